"""Some rows of every unit in half precision are encoded in fp32 too, and compared."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Shaped

from featcache.precision import FP32
from featcache.store.layout import EMBEDDING

if TYPE_CHECKING:
    from featcache.encoder import Encoder

CHECKED_IMAGES = 64
"""Of a unit, at least one sample: 1.6 % of a unit of 4,096 rows."""
BATCH = 16


class SpotCheck:
    """Collects what was encoded of a unit's checked rows; compares it when the unit is whole.

    Which rows those are depends on their place in the unit alone, and all are encoded in batches of the same size, so
    that a run that was stopped and resumed finds the very same cosines.

    Args:
        rows: of the unit.
        views: of each row.
    """

    def __init__(self, rows: int, views: int):
        self._every = -(-rows * views // CHECKED_IMAGES)
        self._pixels: dict[int, np.ndarray] = {}
        self._embedding: dict[int, np.ndarray] = {}

    def wants(self, position: int) -> bool:
        return position % self._every == 0

    def add(
        self,
        position: int,
        pixels: Shaped[np.ndarray, "views ..."],
        embedding: Float[np.ndarray, "views d"],
    ) -> None:
        """What a checked row's pixels became."""
        self._pixels[position], self._embedding[position] = pixels, embedding

    def cosines(self, encoder: "Encoder") -> dict[int, float]:
        """Position → the least cosine, over a row's views, of its embedding to that in fp32.

        `encoder` is handed back in the precision that it came in.
        """
        if not self._pixels:
            return {}
        positions = sorted(self._pixels)
        exact = in_fp32(encoder, np.concatenate([self._pixels[position] for position in positions]))[EMBEDDING]
        found = torch.from_numpy(np.concatenate([self._embedding[position] for position in positions]))
        cosines = torch.nn.functional.cosine_similarity(found.double(), exact.double())
        cosines[(found == exact).all(1)] = 1.0  # of zeros too, which have none
        worst = cosines.view(len(positions), -1).amin(1).nan_to_num(nan=0.0)
        return dict(zip(positions, worst.tolist(), strict=True))

    def arrays(self) -> dict[str, np.ndarray]:
        """What `load` needs, for a unit in progress that is saved."""
        if not self._pixels:
            return {}
        positions = sorted(self._pixels)
        return {
            "spot.positions": np.array(positions),
            "spot.pixels": np.stack([self._pixels[position] for position in positions]),
            "spot.embedding": np.stack([self._embedding[position] for position in positions]),
        }

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        for position, *row in zip(
            *(arrays.get(name, ()) for name in ("spot.positions", "spot.pixels", "spot.embedding")), strict=True
        ):
            self.add(int(position), *row)


def in_fp32(
    encoder: "Encoder", pixels: Shaped[np.ndarray, "n ..."], fields: tuple[str, ...] = (EMBEDDING,)
) -> dict[str, torch.Tensor]:
    """What `encoder` makes of these pixels in fp32, on the CPU; it is handed back in the precision that it came in."""
    before = encoder.precision
    encoder.to(encoder.device, FP32)
    try:
        exact = encoder.encode_padded(torch.from_numpy(pixels), BATCH, fields)
        return {name: features.cpu() for name, features in exact.items()}
    finally:
        encoder.to(encoder.device, before)

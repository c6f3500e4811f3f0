"""Any number of tiny images that cost next to nothing to hold, read and encode: so that only featcache's own cost is left."""

import io
from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from PIL import Image

from featcache import Encoder, Preprocess

PIXELS = 8


class Ids(Sequence[str]):
    """The ids "image/000000000" …, made when asked for: a list of them would take some 70 bytes a row."""

    def __init__(self, rows: range, prefix: str):
        self._rows, self._prefix = rows, prefix

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> "Ids": ...
    def __getitem__(self, i: int | slice) -> "str | Ids":
        return Ids(self._rows[i], self._prefix) if isinstance(i, slice) else f"{self._prefix}/{self._rows[i]:09d}"


class Synthetic:
    """Images number `first` … `first + rows - 1`: one of 16 PNG files of 8 × 8 px, and the number behind its end, so
    that all differ in content."""

    class_names = tuple(str(name) for name in range(10))

    def __init__(self, rows: int, first: int = 0, prefix: str = "image"):
        self._rows = range(first, first + rows)
        self.spec, self.ids = f"synthetic:{prefix}:{first}:{rows}", Ids(self._rows, prefix)
        pixels = np.random.default_rng(0).integers(0, 256, (16, PIXELS, PIXELS, 3), dtype=np.uint8)
        self._files = [_png(image) for image in pixels]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, i: int) -> bytes:
        number = self._rows[i]
        return self._files[number % len(self._files)] + number.to_bytes(8, "little")

    def label(self, i: int) -> int:
        return self._rows[i] % 10


class _Mean(torch.nn.Module):
    """Mean colour, mapped to the embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = torch.nn.Linear(3, width)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.linear(images.mean((2, 3)))}


def synthetic_encoder(width: int) -> Encoder:
    torch.manual_seed(0)
    third = (1 / 3, 1 / 3, 1 / 3)
    preprocess = Preprocess(resize=PIXELS, crop=PIXELS, size=PIXELS, mean=third, std=third)
    return Encoder(
        name="synthetic",
        module=_Mean(width),
        preprocess=preprocess,
        fields={"embedding": (width,)},
        output="mean colour",
    )


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()

"""Maps of images, brought to another grid: bilinearly between the centres of cells, as PyTorch's `interpolate` with
`mode="bilinear", align_corners=False` does."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32


def bilinear(at: Float[np.ndarray, " points"], cells: int) -> Float32[np.ndarray, "points cells"]:
    """How each point is made of the cells of one side; the centre of the first cell is at 0, beyond the outer centres nothing changes."""
    at = at.clip(0, cells - 1)
    below = np.minimum(at.astype(np.int64), max(0, cells - 2))
    weights = np.zeros((len(at), cells), np.float32)
    weights[np.arange(len(at)), below] = 1 - (at - below)
    if cells > 1:
        weights[np.arange(len(at)), below + 1] = at - below
    return weights


def resampled(maps: Float[np.ndarray, "n c h w"], size: Sequence[int]) -> Float32[np.ndarray, "n c u v"]:
    """On a grid of `size` cells; unchanged where it is of these."""
    maps = maps.astype(np.float32)
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    down, across = (
        bilinear((np.arange(new) + 0.5) * old / new - 0.5, old) for new, old in zip(size, maps.shape[2:], strict=True)
    )
    return np.ascontiguousarray(down @ (maps @ across.T))

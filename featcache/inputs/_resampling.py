"""Part of an enlarged image, bit for bit as Pillow computes it, without the rest."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

_BITS = 22
"""Pillow's weights of 8-bit pixels are integers of so many bits after the point (libImaging/Resample.c)."""


def _bicubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


_FILTERS: dict[Image.Resampling, tuple[float, Callable[[float], float]]] = {
    Image.Resampling.BILINEAR: (1.0, lambda x: max(0.0, 1 - abs(x))),
    Image.Resampling.BICUBIC: (2.0, _bicubic),
    Image.Resampling.LANCZOS: (3.0, lambda x: _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0),
}
"""Support in px, and weight at a distance."""


def enlarged(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], resample: Image.Resampling
) -> Image.Image:
    """`image.resize(size, resample).crop(box)` of an RGB image that is larger neither way than `size`, `box` inside it.

    Only what the box depends on is read, so memory does not grow with `size`. First across, then down, with 8 bits
    between, as every release of Pillow enlarges.
    """
    assert max(image.width - size[0], image.height - size[1]) <= 0
    left, top, right, bottom = box
    columns, across = _weights(image.width, size[0], left, right, resample)
    rows, down = _weights(image.height, size[1], top, bottom, resample)
    part = np.asarray(image.crop((columns.start, rows.start, columns.stop, rows.stop)))
    return Image.fromarray(_applied(down, _applied(across, part.swapaxes(0, 1)).swapaxes(0, 1)))


def _weights(
    length: int, resized: int, start: int, stop: int, resample: Image.Resampling
) -> tuple[range, Float64[np.ndarray, "new old"]]:
    """The old pixels that the new ones from `start` to `stop` are made of, and their weights, which are integers."""
    scale = float(np.float32(length)) / resized  # Pillow takes the box as 32-bit numbers
    if resample == Image.Resampling.NEAREST:
        nearest = _positions(scale, start, stop).astype(int)
        used = range(int(nearest[0]), int(nearest[-1]) + 1)
        return used, np.equal.outer(nearest, np.array(used)) * float(1 << _BITS)
    support, weight = _FILTERS[resample]
    centres = [(new + 0.5) * scale for new in range(start, stop)]
    spans = [(max(0, int(c - support + 0.5)), min(length, int(c + support + 0.5))) for c in centres]
    used = range(spans[0][0], spans[-1][1])
    weights = np.zeros((stop - start, len(used)))
    for row, (centre, (first, last)) in enumerate(zip(centres, spans, strict=True)):
        values = [weight(old - centre + 0.5) for old in range(first, last)]
        total = 0.0
        for value in values:  # one by one, as Pillow: `sum` is more exact since Python 3.12
            total += value
        for at, value in enumerate(values, first - used.start):
            share = value / total if total else value
            weights[row, at] = int((-0.5 if share < 0 else 0.5) + share * (1 << _BITS))
    return used, weights


def _positions(scale: float, start: int, stop: int) -> Float64[np.ndarray, " new"]:
    """Centres of the new pixels, in old ones. Pillow adds up the steps one by one, and so lands where no product does."""
    found, position = [], 0.5 * scale
    for first in range(0, stop, 1 << 20):
        steps = np.full(min(1 << 20, stop - first), scale)
        steps[0] = position
        positions = np.add.accumulate(steps)
        position = positions[-1] + scale
        found.append(positions[max(0, start - first) :])
    return np.concatenate(found)


def _applied(
    weights: Float64[np.ndarray, "new old"], pixels: UInt8[np.ndarray, "old other 3"]
) -> UInt8[np.ndarray, "new other 3"]:
    sums = np.tensordot(weights, pixels.astype(np.float64), 1)  # exact: far below 2**53
    sums += 1 << (_BITS - 1)
    return np.floor(np.ldexp(sums, -_BITS)).clip(0, 255).astype(np.uint8)

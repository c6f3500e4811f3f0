"""Masks: the class of every pixel of an image, and how they follow the image's views."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from featcache.inputs.images import Preprocess, View, known_formats

MASK = "mask"
"""The target of `featcache.corpora.target` that these are."""
NONE = 0
"""A pixel without a class, in coded masks; class i is i + 1. What `Image.crop` puts beyond the image, too."""
MOST_CLASSES = 255
_LARGEST = 65_535  # of 16 bits


@dataclass(frozen=True, kw_only=True)
class MaskClasses:
    """What the values of mask files mean.

    Attributes:
        names: of the classes, in their order.
        values: of their pixels, one a class.
        ignored: values of pixels that have no class: they are neither trained on nor measured.
    """

    names: Sequence[str]
    values: Sequence[int]
    ignored: Sequence[int] = ()

    def __post_init__(self) -> None:
        every = (*self.values, *self.ignored)
        if not 2 <= len(self.names) == len(self.values) <= MOST_CLASSES:
            raise ValueError(f"masks of {len(self.names)} classes; give 2 to {MOST_CLASSES}, each with its value")
        if len(set(every)) < len(every) or len(set(self.names)) < len(self.names) or not all(self.names):
            raise ValueError("classes of masks have names and values of their own; give each once")
        if not 0 <= min(every) <= max(every) <= _LARGEST:
            raise ValueError(f"values of masks are whole numbers from 0 to {_LARGEST}")

    def decode(self, encoded: bytes) -> UInt8[np.ndarray, "height width"]:
        """A mask's file → its classes, coded (`NONE`): of grey images the levels, of palette images the indices.

        Raises:
            ValueError: a value is of no class, or pixels are colours.
            Exception: whatever Pillow raises on bytes that are no image.
        """
        with Image.open(io.BytesIO(encoded), formats=known_formats()) as image:
            pixels = np.asarray(image)
        if pixels.ndim == 3:
            levels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1]
            if (levels != levels[..., :1]).any():
                raise ValueError("its pixels are colours; write one value a pixel, a grey or palette PNG")
            pixels = levels[..., 0]
        if pixels.dtype == bool:
            pixels = pixels * np.uint8(255)
        if pixels.dtype.kind not in "iu":
            raise ValueError("its pixels are no whole numbers; write one value a pixel, a grey or palette PNG")
        table = np.full(_LARGEST + 2, -1)
        table[list(self.values)], table[list(self.ignored)] = np.arange(len(self.values)) + 1, NONE
        found = table[pixels.clip(-1, _LARGEST + 1)]
        if (found < 0).any():
            odd = np.unique(pixels[found < 0]).tolist()
            raise ValueError(
                f"holds the value {', '.join(map(str, odd[:5]))}{', …' if len(odd) > 5 else ''}, which is of no class (known: {self}); "
                "name its class with @classes=NAME:VALUE,…, leave it out with @ignore=VALUE, or, where it comes of lossy "
                "compression, write the mask as PNG"
            )
        return found.astype(np.uint8)

    def __str__(self) -> str:
        known = [f"{value} {name}" for name, value in zip(self.names, self.values, strict=True)]
        return ", ".join(
            [*known[:8], *(["…"] if len(known) > 8 else []), *(f"{value} ignored" for value in self.ignored)]
        )


def render(
    mask: UInt8[np.ndarray, "height width"], preprocess: Preprocess, view: View
) -> UInt8[np.ndarray, "size size"]:
    """A coded mask as the image's own view has it: box, mirroring and turns, at `preprocess.size` px, of each pixel the class of
    that pixel of the mask in which its centre lies; `NONE` beyond the image.

    Args:
        preprocess: that renders the image.
        view: drawn for an image of the mask's size.
    """
    image = Image.fromarray(np.repeat(mask[..., None], 3, axis=2))
    rendered: np.ndarray = replace(preprocess, interpolation="nearest").render(image, view)[..., 0]
    return np.ascontiguousarray(rendered)


def refuse_other_size(where: str, mask: UInt8[np.ndarray, "height width"], size: tuple[int, int]) -> None:
    """Raises ValueError unless the mask has as many pixels as its image, of `size` (width, height)."""
    if mask.shape[::-1] != size:
        (height, width), (w, h) = mask.shape, size
        raise ValueError(
            f"{where}: its mask is {width} × {height} px, the image {w} × {h}; write the mask in the image's size"
        )

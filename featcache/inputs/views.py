"""Replayable views: what an encoder sees of an image, as a pure function of its bytes and a recipe.

A view is a box in the decoded image plus a mirror flag. Both are drawn from (seed, sample id, view number)
and nothing else, so any process, in any order, on any machine, in either stage, renders the same pixels.
"""

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from featcache.inputs.decoding import MAX_PIXELS, decode
from featcache.inputs.preprocess import Preprocess
from featcache.inputs.resampling import enlarged

__all__ = ["AUGMENTS", "CROP_AREA", "MAX_PIXELS", "PARAMETERS", "View", "Views", "decode", "render"]

PARAMETERS = ("x0", "y0", "x1", "y1", "flip", "turns")
"""Columns of the store's `view` array: the box in px of the decoded image, 1 when mirrored, quarter turns after that."""

AUGMENTS = ("none", "flip", "rotate4", "rrc")

CROP_AREA = 0.35

_LONG = 16
"""Images so many times longer than wide, or wider than long, are enlarged only where the crop is."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class View:
    """One drawn view: a box in px of the decoded image, what is done to it, and whether it is the plain view's box.

    Attributes:
        flip: mirrored left to right.
        turns: quarter turns, counter-clockwise, after the mirroring.
    """

    box: tuple[float, float, float, float]
    flip: bool = False
    turns: int = 0
    plain: bool = True

    def scaled(self, x: float, y: float) -> "View":
        """The same view of the same image, resized by these factors."""
        left, top, right, bottom = self.box
        return replace(self, box=(left * x, top * y, right * x, bottom * y))

    @property
    def parameters(self) -> tuple[float, ...]:
        return (*self.box, float(self.flip), float(self.turns))


@dataclass(frozen=True, kw_only=True)
class Views:
    """The recipe for a sample's views.

    Attributes:
        count: views a sample. View 0 is always the encoder's plain evaluation view.
        augment: what views 1, 2, … are. "none": nothing, `count` must be 1. "flip": odd views mirror the plain view.
            "rotate4": view v turns the plain view by (v mod 4) × 90° counter-clockwise. "rrc": random resized crop
            (area `crop_area`…1 of the image, aspect 3/4…4/3), mirrored with probability 1/2.
        seed: changes every drawn view.
        crop_area: least area of a random crop, as a share of the image's, above 0 and up to 1.
    """

    count: int = 1
    augment: Literal["none", "flip", "rotate4", "rrc"] = "none"
    seed: int = 0
    crop_area: float = CROP_AREA

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTS:
            raise ValueError(f"unknown augment {self.augment!r}; known: {', '.join(AUGMENTS)}")
        if self.count < 1 or (self.augment == "none") != (self.count == 1):
            raise ValueError(
                f"{self.count} views with augment {self.augment!r}: give --views 2 or more together with "
                "--augment flip, rotate4 or rrc, or --views 1 alone"
            )
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop area {self.crop_area} is no share of an image; give one above 0 and up to 1")
        if self.crop_area != CROP_AREA and self.augment != "rrc":
            raise ValueError(f"crop area {self.crop_area} with augment {self.augment!r}: only --augment rrc crops")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Views":
        """What `record` was made of; of a store's manifest, too."""
        return cls(**{each.name: record[each.name] for each in fields(cls) if each.name in record})

    @property
    def record(self) -> dict[str, Any]:
        """As the manifest holds it. Without `crop_area` where it is the usual one, so that stores from before there
        was a choice are still of the same recipe."""
        record = asdict(self)
        if self.crop_area == CROP_AREA:
            del record["crop_area"]
        return record

    def draw(self, size: tuple[int, int], preprocess: Preprocess, sample_id: str, view: int) -> View:
        """The view numbered `view` of an image of `size` (width, height) px."""
        if view == 0 or self.augment in ("flip", "rotate4"):
            box, flip, turns = _plain_box(size, preprocess), self.augment == "flip" and view % 2 == 1, view % 4
            return View(box, flip=flip, turns=turns if self.augment == "rotate4" else 0)
        digest = hashlib.blake2b(f"{self.seed}\0{sample_id}\0{view}".encode(), digest_size=16).digest()
        return _random_resized_crop(size, self.crop_area, random.Random(int.from_bytes(digest, "little")))


def render(image: Image.Image, view: View, preprocess: Preprocess) -> UInt8[np.ndarray, "size size 3"]:
    """The view's pixels at `preprocess.size` px, RGB.

    At the teacher's own size the plain view is byte-identical to torchvision's Resize + CenterCrop, which
    timm and open_clip use. At any other size, and for random crops, the box is resampled once, straight
    from the decoded image. Memory is bounded by the image and the crop, however long the image.
    """
    size, resample = preprocess.size, _RESAMPLING[preprocess.interpolation]
    if view.plain and size == preprocess.crop:
        (width, height), (left, top) = _resized(image.size, preprocess)
        if max(width, height) > _LONG * min(width, height) and min(image.size) < min(width, height):
            image = enlarged(image, (width, height), (left, top, left + size, top + size), resample)
        else:
            image = image.resize((width, height), resample).crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), resample, box=view.box)
    pixels = np.asarray(ImageOps.mirror(image) if view.flip else image)
    return np.ascontiguousarray(np.rot90(pixels, view.turns)) if view.turns else pixels


def _resized(size: tuple[int, int], preprocess: Preprocess) -> tuple[tuple[int, int], tuple[int, int]]:
    """Resized (width, height) and the crop's (left, top), rounded as torchvision rounds them."""
    (width, height), resize, crop = size, preprocess.resize, preprocess.crop
    if preprocess.mode == "squash":
        width = height = resize
    elif width <= height:
        width, height = resize, int(resize * height / width)
    else:
        width, height = int(resize * width / height), resize
    return (width, height), (round((width - crop) / 2), round((height - crop) / 2))


def _plain_box(size: tuple[int, int], preprocess: Preprocess) -> tuple[float, float, float, float]:
    """The centre crop, mapped back to px of the decoded image."""
    (width, height), (left, top) = _resized(size, preprocess)
    x, y = size[0] / width, size[1] / height
    return left * x, top * y, (left + preprocess.crop) * x, (top + preprocess.crop) * y


def _random_resized_crop(size: tuple[int, int], least: float, rng: random.Random) -> View:
    """Inception-style crop (Szegedy et al. 2015), the draw order of torchvision's RandomResizedCrop.

    Only `rng.random()` is used: the one stream that Python promises never to change.
    """
    width, height = size
    for _ in range(10):
        area = width * height * (least + (1 - least) * rng.random())
        aspect = math.exp((2 * rng.random() - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int((width - w + 1) * rng.random()), int((height - h + 1) * rng.random())
            break
    else:  # very long images: the largest centred square
        w = h = min(size)
        left, top = (width - w) // 2, (height - h) // 2
    return View((float(left), float(top), float(left + w), float(top + h)), flip=rng.random() < 0.5, plain=False)

"""Images: replayable views of them, what an encoder sees as a pure function of their bytes and a recipe, and kept copies.

A view is a box in the decoded image plus a mirror flag. Both are drawn from (seed, sample id, view number)
and nothing else, so any process, in any order, on any machine, in either stage, renders the same pixels.
"""

import hashlib
import io
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from featcache.inputs import AUGMENTS, Input, Views, input_of
from featcache.inputs._decoding import MAX_PIXELS, decode, is_heif, known_formats
from featcache.inputs._resampling import enlarged

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

__all__ = ["MAX_PIXELS", "PARAMETERS", "KeptPixels", "Preprocess", "View", "decode", "is_heif", "known_formats"]

PARAMETERS = ("x0", "y0", "x1", "y1", "flip", "turns")
"""Columns of the store's `view` array: the box in px of the decoded image, 1 when mirrored, quarter turns after that."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")

_LONG = 16
"""Images so many times longer than wide, or wider than long, are enlarged only where the crop is."""
_ANY = 1 << 62

JPEG_QUALITY = 95
JPEG_SIDE = 65_500
"""In px: no JPEG may be longer or wider."""


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
class Preprocess(Input[Image.Image, View]):
    """Resize, centre crop and normalisation of one encoder; stored in the manifest and part of its fingerprint.

    Attributes:
        resize: length in px that the shorter side is resized to ("shortest"), or that both sides are
            resized to without keeping the aspect ratio ("squash").
        crop: side in px of the centre square then cut out; `crop <= resize`.
        size: side in px at which that square is rendered. Equal to `crop` for a teacher; a student that
            works at another resolution keeps the teacher's square and changes only this.
        interpolation: Pillow filter, always with antialiasing.
        mode: "shortest" or "squash".
        mean, std: per channel (RGB), applied to pixels scaled to 0…1.
    """

    kind = "image"
    augments = AUGMENTS
    parameters = PARAMETERS

    resize: int
    crop: int
    size: int
    interpolation: str = "bicubic"
    mode: Literal["shortest", "squash"] = "shortest"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not 0 < self.crop <= self.resize or self.size <= 0:
            raise ValueError(f"need 0 < crop <= resize and size > 0 px, got {self}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
        if self.mode not in ("shortest", "squash"):
            raise ValueError(f"resize mode {self.mode!r} is not 'shortest' or 'squash'")
        try:
            right = len(self.mean) == len(self.std) == 3 and math.isfinite(sum((*self.mean, *self.std)))
            right = right and min(self.std) > 0
        except TypeError:
            right = False
        if not right:
            raise ValueError(f"need mean and std > 0 of three channels, got mean {self.mean}, std {self.std}")

    def __str__(self) -> str:
        """In words, on one line."""
        how = "both sides" if self.mode == "squash" else "the shorter side"
        rendered = f", rendered at {self.size}" if self.size != self.crop else ""
        mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{how} to {self.resize} px ({self.interpolation}), centre {self.crop} px{rendered}, mean {mean}, std {std}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Preprocess":
        """What `to_dict` recorded.

        Raises:
            ValueError: it is of another input.
        """
        if record.get("input", "images") != "images":
            raise ValueError(f"input {record['input']!r}: only plain images can be used here")
        return cls(**{**record, "mean": tuple(record["mean"]), "std": tuple(record["std"])})

    @staticmethod
    def decode(encoded: bytes, *, seen: bool = False) -> Image.Image:
        """Upright and RGB; see `featcache.inputs._decoding.decode`."""
        return decode(encoded, max_pixels=_ANY if seen else None)

    def size_of(self, item: Image.Image) -> tuple[int, int]:
        """(width, height) in px."""
        return item.size

    def draw(self, size: tuple[int, int], views: Views, sample_id: str, view: int) -> View:
        """The view numbered `view` of an image of `size` (width, height) px."""
        if view == 0 or views.augment in ("flip", "rotate4"):
            box, flip, turns = self._plain_box(size), views.augment == "flip" and view % 2 == 1, view % 4
            return View(box, flip=flip, turns=turns if views.augment == "rotate4" else 0)
        rng = _stream(views.seed, sample_id, view)
        if views.augment == "rotate4_crop":
            group = view // 4
            flip = group > 0 and _stream(views.seed, sample_id, f"group {group}").random() < 0.5
            return View(_moved(self._plain_box(size), rng), flip=flip, turns=view % 4, plain=False)
        return _random_resized_crop(size, views.crop_area, rng)

    def render(
        self, item: Image.Image, view: View, size: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "size size 3"]:
        """The view's pixels at `self.size` px, RGB.

        At the teacher's own size the plain view is byte-identical to torchvision's Resize + CenterCrop, which
        timm and open_clip use. At any other size, and for random crops, the box is resampled once, straight
        from the decoded image, which lies on a black ground. Memory is bounded by the image and the crop, however long the image.

        Args:
            size: (width, height) that the view was drawn for, where `item` is a smaller copy of that image.
        """
        image, side, resample = item, self.size, Image.Resampling[self.interpolation.upper()]
        if view.plain and side == self.crop:
            (width, height), (left, top) = self._resized(image.size)
            if max(width, height) > _LONG * min(width, height) and min(image.size) < min(width, height):
                image = enlarged(image, (width, height), (left, top, left + side, top + side), resample)
            else:
                image = image.resize((width, height), resample).crop((left, top, left + side, top + side))
        else:
            view = view.scaled(image.width / size[0], image.height / size[1]) if size else view
            image, box = _within(image, view.box)
            image = image.resize((side, side), resample, box=box)
        pixels = np.asarray(ImageOps.mirror(image) if view.flip else image)
        return np.ascontiguousarray(np.rot90(pixels, view.turns)) if view.turns else pixels

    def to_model(self, rendered: UInt8[Tensor, "batch size size 3"]) -> Float[Tensor, "batch 3 size size"]:
        """uint8 RGB pixels → float32, scaled to 0…1, minus mean, over std."""
        # Whole lines of an image at a time: four times as fast as over a last dimension of 3.
        mean, std = (_line(each, rendered.shape[2], rendered.device) for each in (self.mean, self.std))
        return rendered.flatten(2).float().sub_(mean).div_(std).view(rendered.shape).permute(0, 3, 1, 2)

    def blank(self, count: int) -> UInt8[Tensor, "count size size 3"]:
        """Black images."""
        import torch

        return torch.zeros(count, self.size, self.size, 3, dtype=torch.uint8)

    def limits(self, device: Any) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
        """What `to_model` makes of black and of white pixels: the range of its values. A 255th of what lies between is one
        step of a pixel."""
        return _limits(self, device)

    def _resized(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Resized (width, height) and the crop's (left, top), rounded as torchvision rounds them."""
        (width, height), resize, crop = size, self.resize, self.crop
        if self.mode == "squash":
            width = height = resize
        elif width <= height:
            width, height = resize, int(resize * height / width)
        else:
            width, height = int(resize * width / height), resize
        return (width, height), (round((width - crop) / 2), round((height - crop) / 2))

    def _plain_box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The centre crop, mapped back to px of the decoded image."""
        (width, height), (left, top) = self._resized(size)
        x, y = size[0] / width, size[1] / height
        return left * x, top * y, (left + self.crop) * x, (top + self.crop) * y


def image_input(record: Mapping[str, Any]) -> Preprocess:
    """The input of images that a manifest or `student.json` records, another package's too.

    Raises:
        ValueError: no such input, or it takes no images.
    """
    found = input_of(record)
    if not isinstance(found, Preprocess):
        raise ValueError(f"input {record['input']!r}: takes no images")
    return found


open_input = Preprocess.from_dict


@cache
def _limits(preprocess: Preprocess, device: Any) -> tuple[Tensor, Tensor]:
    """Kept, as `_line`."""
    import torch

    with torch.inference_mode(False):  # training uses it too
        pixels = torch.tensor([0, 255], dtype=torch.uint8, device=device)[:, None, None, None]
        black, white = preprocess.to_model(pixels.repeat(1, 1, 1, 3))
    return black, white


@cache
def _line(moments: tuple[float, float, float], width: int, device: Any) -> Float[Tensor, " line"]:
    """Of the pixels of one line, in 0…255. Kept: copying it to a GPU waits for all that the GPU still has to do."""
    import torch  # takes a second, and corpora are read without it

    with torch.inference_mode(False):  # training uses it too
        return torch.tensor(moments, device=device).mul(255).repeat(width)


def _stream(seed: int, sample_id: str, what: int | str) -> random.Random:
    """Of one view, or of what several share. Only its `random()` is used: the one stream that Python promises never to
    change."""
    digest = hashlib.blake2b(f"{seed}\0{sample_id}\0{what}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))


def _moved(box: tuple[float, float, float, float], rng: random.Random) -> tuple[float, float, float, float]:
    """The box moved by −4…4 thirty-seconds of its sides, each as likely: torchvision's RandomCrop(32, padding=4)."""
    left, top, right, bottom = box
    x, y = ((int(9 * rng.random()) - 4) / 32 * side for side in (right - left, bottom - top))
    return left + x, top + y, right + x, bottom + y


def _within(
    image: Image.Image, box: tuple[float, float, float, float]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """The image with as much black around it as the box needs, and the box in px of that."""
    left, top, right, bottom = box
    slack = 1e-3  # px; a plain box that is the whole image is rounded
    x, y = (max(0, math.ceil(-start - slack)) for start in (left, top))
    width, height = (max(side, math.ceil(end - slack)) for side, end in zip(image.size, (right, bottom), strict=True))
    if x or y or (width, height) != image.size:
        image = image.crop((-x, -y, width, height))
    return image, (max(0.0, left + x), max(0.0, top + y), min(right + x, image.width), min(bottom + y, image.height))


def _random_resized_crop(size: tuple[int, int], least: float, rng: random.Random) -> View:
    """Inception-style crop (Szegedy et al. 2015), the draw order of torchvision's RandomResizedCrop."""
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


@dataclass(frozen=True, kw_only=True)
class KeptPixels:
    """How images are kept: upright RGB, whole (not cropped), never enlarged.

    Attributes:
        size: shorter side, in px; an image that is smaller stays as it is.
        format: "jpeg" (quality 95, no chroma subsampling) or "raw" (an uncompressed BMP, exact). An image with a side
            over 65,500 px, which no JPEG may have, is kept raw.
    """

    size: int
    format: Literal["jpeg", "raw"] = "jpeg"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"--pixels {self.size}: give the shorter side in px, 1 or more")
        if self.format not in ("jpeg", "raw"):
            raise ValueError(f"unknown format of pixels {self.format!r}; known: jpeg, raw")

    def encode(self, image: Image.Image) -> bytes:
        """An upright RGB image → the file that is kept."""
        shorter = min(image.size)
        if shorter > self.size:
            # Rounded as torchvision's Resize: at the size that a teacher resizes to, these are the teacher's own pixels.
            width, height = (max(1, int(self.size * side / shorter)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        if self.format == "jpeg" and max(image.size) <= JPEG_SIDE:
            # Pillow would copy the original's comment, and refuse a long one.
            image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, comment=b"")
        else:
            image.save(file, "BMP")
        return file.getvalue()

    @property
    def typical_bytes(self) -> int:
        """Of one kept image of 4:3, for the layout of chunks: a guess on the large side."""
        pixels = self.size * self.size * 4 // 3
        return 3 * pixels if self.format == "raw" else pixels

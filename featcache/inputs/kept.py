"""Images kept in a store, decoded and resized once, so that later stages need not touch the corpus."""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

JPEG_QUALITY = 95
JPEG_SIDE = 65_500
"""In px: no JPEG may be longer or wider."""


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

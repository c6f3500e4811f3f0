"""Photographs of two or three kinds of ground with masks, and an encoder with dense maps."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from featcache.encoder import Encoder
from featcache.inputs.images import Preprocess


def write_photos(folder: Path, count: int = 8, size: tuple[int, int] = (24, 24), seed: int = 0) -> Path:
    """`folder/images`, `folder/masks`: bright stripes (255) on dark ground (0), of other widths and places, in noise."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    width, height = size
    for number in range(count):
        at = (np.arange(width) * (1 + number % 3) // 5 + rng.integers(9)) % 3 == 0
        mask = (
            np.broadcast_to(at, (height, width)) if number % 2 else np.broadcast_to(at[:height, None], (height, width))
        )
        pixels = 60 + 120 * mask[..., None] + rng.integers(0, 60, (height, width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"images/{number}.png")
        Image.fromarray((255 * mask).astype(np.uint8)).save(folder / f"masks/{number}.png")
    return folder


class DenseModule(nn.Module):
    """Maps of one convolution, and what is pooled of them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 4, 4)
        self.head = nn.Conv2d(6, classes, 1, bias=False)

    def forward(self, images):
        found = self.convolution(images).relu()
        return {
            "embedding": found.mean((2, 3)) + 0.1,
            "tokens": found.flatten(2).transpose(1, 2),
            "dense": self.head(found - found.mean((2, 3), keepdim=True)),
        }


def dense_encoder(
    weights: int = 0, size: int = 16, resize: int = 16, names: tuple[str, ...] | None = None, classes: int = 2
) -> Encoder:
    """`size` px; maps of a quarter of that a side."""
    with torch.random.fork_rng():
        torch.manual_seed(weights)
        module = DenseModule(classes)
    side = size // 4
    return Encoder(
        name=f"dense{weights}",
        module=module,
        preprocess=Preprocess(resize=resize, crop=size, size=size),
        fields={"embedding": (6,), "tokens": (side * side, 6), "dense": (classes, side, side)},
        output="maps",
        classes=names,
    )

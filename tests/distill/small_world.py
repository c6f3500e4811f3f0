"""Small images and a teacher of one convolution."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from featcache.encoder import Encoder
from featcache.inputs.images import Preprocess


class OneConvolution(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.convolution = nn.Conv2d(3, dim, 5, stride=3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.convolution(images).abs().mean(dim=(2, 3))}


class RecordingEncoder(Encoder):
    """An encoder that keeps every image it is given, in order, in `seen`."""

    def encode(self, pixels: Tensor, fields: Sequence[str] | None = None) -> dict[str, Tensor]:
        self.__dict__.setdefault("seen", []).extend(pixels.numpy().copy())
        return super().encode(pixels, fields)


def make_teacher(dim: int = 12) -> RecordingEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = OneConvolution(dim)
    return RecordingEncoder(
        name="test/one_convolution",
        module=module,
        preprocess=Preprocess(resize=18, crop=16, size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
        fields={"embedding": dim},
        output="mean of magnitudes",
    )


def make_images(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` PNG files of smooth noise with a colour of their own, 24 × 20 px and 20 × 28 px in turn."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = rng.normal(rng.uniform(0, 255, 3), 60, (4, 4, 3)).clip(0, 255).astype(np.uint8)
        size = (24, 20) if i % 2 else (20, 28)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder

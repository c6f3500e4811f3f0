"""`unet/WIDTH`, a small U-Net to be trained that gives maps at half the image's side: `unet/11` has 59 k parameters, `unet` is `unet/16`."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from featcache.models import Features, Model, Variant
from featcache.models._dense import DenseNetwork, DenseStudent, block, enlarged_like, pooled, trained_here

SIZE, WIDTH, WIDEST = 64, 16, 1024


class UNet(DenseNetwork):
    """Four 3 × 3 convolutions of stride 2, WIDTH to 4 · WIDTH channels; back up, each level beside the one below, enlarged
    bilinearly (Ronneberger et al. 2015, arXiv 1505.04597, with one convolution a level)."""

    def __init__(self, width: int):
        super().__init__()
        widths = [3, *(width * level for level in (1, 2, 3, 4))]
        self.down = nn.ModuleList(block(a, b, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(block(a + b, a) for a, b in reversed(list(pairwise(widths[1:]))))
        self.map_width = width

    def maps(self, images: Tensor) -> Features:
        levels = [images]
        for layer in self.down:
            levels.append(layer(levels[-1]))
        *finer, last = levels[1:]
        found = last
        for layer, level in zip(self.up, reversed(finer), strict=True):
            found = layer(torch.cat([enlarged_like(found, level), level], dim=1))
        return pooled(last, found)


def _width(rest: str) -> int:
    if rest and not (rest.isdecimal() and 0 < int(rest) <= WIDEST):
        raise ValueError(f"unet/{rest}: give its width, a whole number up to {WIDEST}; known: unet/{WIDTH}")
    return int(rest or WIDTH)


def open_model(rest: str) -> Model:
    raise trained_here(f"unet/{rest}")


def make_model(rest: str, variant: Variant) -> DenseStudent:
    variant.refuse_all_but_size(f"unet/{rest}")
    width = _width(rest)
    return DenseStudent(UNet(width), variant.image_size or SIZE, {"architecture": f"unet/{width}"})


def rebuild_model(rest: str, record: Mapping[str, Any]) -> DenseStudent:
    width = _width(rest)
    return DenseStudent(UNet(width), record["preprocess"]["size"], {"architecture": f"unet/{width}"})

"""How an encoder computes, and which way is the fastest that stays faithful to fp32, measured on the device at hand.

No table of models can know: bf16 autocast is the fastest choice for a convnet on a CPU with AVX-512 bf16, the
slowest by far on one without, and for a ViT on the former it is bf16 *weights*. But the clock decides only once for
each encoder and kind of machine (`featcache/pins.py`): features of two precisions are not comparable, however close.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from featcache.encoder import Encoder

CHOSEN = 0.9995
"""Smallest cosine on the images that a precision is chosen on: others will be worse than these few."""

log = logging.getLogger("featcache")


@dataclass(frozen=True)
class Precision:
    """How an encoder computes: the weights' dtype, bf16 autocast or not, and the images' memory layout."""

    weights: torch.dtype
    autocast: bool = False
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def half(self) -> bool:
        """Whether anything is computed in less than fp32."""
        return self.autocast or self.weights != torch.float32

    @property
    def name(self) -> str:
        """For example "fp32", "bf16-autocast+channels_last": what `--precision` takes and the manifest stores."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.weights]
        return ("bf16-autocast" if self.autocast else dtype) + ("+channels_last" if self.channels_last else "")


FP32 = Precision(torch.float32)
CANDIDATES = {
    p.name: p
    for p in (
        FP32,
        Precision(torch.float32, channels_last=True),
        Precision(torch.bfloat16, channels_last=True),
        Precision(torch.float32, autocast=True, channels_last=True),
        Precision(torch.float16, channels_last=True),
    )
}


def fastest_faithful(encoder: "Encoder", pixels: Tensor, batch: int, device: str) -> str:
    """The candidate in which `encoder` is fastest on `device`, among those faithful by a margin to every image.

    Args:
        encoder: left on `device`, in any precision.
        pixels: images to be faithful to, uint8 (N, S, S, 3).
        batch: images a forward pass.
    """
    encoder.to(device)
    reference = encoder.encode_padded(pixels, batch)
    best, best_seconds = FP32, [math.inf, math.inf]
    for candidate in CANDIDATES.values():
        if candidate.weights == torch.float16 and device != "cuda":
            continue
        encoder.to(device, candidate)
        # One image first: half precision without hardware for it is so slow that the whole batch would take seconds.
        seconds = [pass_seconds(encoder, pixels[:1], 1)]
        if seconds[0] > 3 * best_seconds[0]:
            continue
        seconds.append(pass_seconds(encoder, pixels, batch))
        if seconds[1] >= best_seconds[1]:
            continue
        worst = float(_cosines(encoder.encode_padded(pixels, batch), reference).min()) if candidate.half else 1.0
        if worst >= CHOSEN:
            best, best_seconds = candidate, seconds
        else:  # NaN included
            log.info("%s: %s is fast, but its cosine to fp32 is %.5f: not used", encoder.name, candidate.name, worst)
    return best.name


def pass_seconds(encoder: "Encoder", pixels: Tensor, batch: int) -> float:
    """Of a forward pass over `batch` images, the shorter of two: the first one also warms up."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        encoder.encode_padded(pixels[:batch], batch)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _cosines(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    return torch.nn.functional.cosine_similarity(one["embedding"].double(), other["embedding"].double())

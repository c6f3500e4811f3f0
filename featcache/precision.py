"""The fastest precision that stays faithful to fp32, measured on the device at hand.

No table of models can know: bf16 autocast is the fastest choice for a convnet on a CPU with AVX-512 bf16, the
slowest by far on one without, and for a ViT on the former it is bf16 *weights*.
"""

import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from featcache.encoder import Encoder

FAITHFUL = 0.999
"""Smallest cosine to the fp32 embedding allowed, over the images of the probe batch."""

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
    def name(self) -> str:
        """For example "fp32", "bf16-autocast+channels_last": what the manifest stores and `from_name` reads."""
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


def choose_precision(
    encoder: "Encoder", pixels: Tensor, requested: str, device: str, *, recorded: bool = False
) -> tuple[dict[str, Any], float]:
    """Move `encoder` to `device` in the fastest faithful precision that `requested` admits.

    Args:
        encoder: in fp32 on the CPU.
        pixels: probe batch, uint8 (B, S, S, 3).
        requested: "auto", "fp32", "bf16", "fp16", or the exact name of a candidate (as a manifest records it).
        device: "cpu" or "cuda".
        recorded: `requested` is what a manifest records, so "fp32" is that one candidate and not its kind.

    Returns:
        The record for the manifest: {"precision": name, "cosine": smallest cosine to fp32 on the probe}; and how many
        images/s the encoder does alone.

    Raises:
        ValueError: an unknown precision.
    """
    kinds = ("fp32", "bf16", "fp16")
    if requested not in ("auto", *kinds, *CANDIDATES):
        raise ValueError(f"unknown precision {requested!r}; known: auto, {', '.join(kinds)}")
    admitted = [
        candidate
        for candidate in CANDIDATES.values()
        if requested == candidate.name
        or (requested in kinds and candidate.name.startswith(requested) and not recorded)
        or (requested == "auto" and (device == "cuda" or candidate.weights != torch.float16))
    ]
    reference = encoder.to(device).encode(pixels, ["embedding"])["embedding"]
    best, best_seconds, best_cosine = FP32, [math.inf, math.inf], 1.0
    for candidate in admitted:
        encoder.to(device, candidate)
        # One image first: half precision without hardware for it is so slow that the whole batch would take seconds.
        seconds = [_seconds(encoder, pixels[:1])]
        if seconds[0] > 3 * best_seconds[0]:
            continue
        seconds.append(_seconds(encoder, pixels))
        if seconds[1] >= best_seconds[1]:
            continue
        cosine = float(
            torch.nn.functional.cosine_similarity(encoder.encode(pixels, ["embedding"])["embedding"], reference).min()
        )
        if cosine >= FAITHFUL:
            best, best_seconds, best_cosine = candidate, seconds, cosine
        else:  # NaN included
            log.warning(
                "%s: %s is fast but unfaithful (cosine to fp32 %.5f, less than %s): not used",
                encoder.name,
                candidate.name,
                cosine,
                FAITHFUL,
            )
    encoder.to(device, best)
    if math.isinf(best_seconds[1]):  # nothing that was asked for is faithful
        best_seconds[1] = _seconds(encoder, pixels)
    return {"precision": best.name, "cosine": round(best_cosine, 6)}, len(pixels) / best_seconds[1]


def _seconds(encoder: "Encoder", pixels: Tensor) -> float:
    """The shorter of two passes: the first one also warms up."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        encoder.encode(pixels, ["embedding"])
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken)

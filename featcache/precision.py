"""The fastest precision that stays faithful to fp32, measured on the device at hand.

No table of models can know: bf16 autocast is the fastest choice for a convnet on a CPU with AVX-512 bf16, the
slowest by far on one without, and for a ViT on the former it is bf16 *weights*.
"""

import logging
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
) -> dict[str, Any]:
    """Move `encoder` to `device` in the fastest faithful precision that `requested` admits.

    Args:
        encoder: in fp32 on the CPU.
        pixels: probe batch, uint8 (B, S, S, 3).
        requested: "auto", "fp32", "bf16", "fp16", or the exact name of a candidate (as a manifest records it).
        device: "cpu" or "cuda".
        recorded: `requested` is what a manifest records, so "fp32" is that one candidate and not its kind.

    Returns:
        The record for the manifest: {"precision": name, "cosine": smallest cosine to fp32 on the probe}.

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
    reference = encoder.to(device).encode(pixels)["embedding"]
    weights = {key: value.clone() for key, value in encoder.module.state_dict().items()}
    best, best_seconds, best_cosine = FP32, float("inf"), 1.0
    for candidate in admitted:
        _restore(encoder, weights, candidate)
        seconds, embedding = _time(encoder, pixels, give_up=3 * best_seconds)
        cosine = float(torch.nn.functional.cosine_similarity(embedding, reference).min())
        if seconds >= best_seconds:
            continue
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
    _restore(encoder, weights, best)
    return {"precision": best.name, "cosine": round(best_cosine, 6)}


def _restore(encoder: "Encoder", weights: dict[str, Tensor], precision: Precision) -> None:
    """Back to the exact fp32 weights, then into `precision`."""
    encoder.module.float().load_state_dict(weights)
    encoder.precision = FP32
    encoder.to(encoder.device, precision)


def _time(encoder: "Encoder", pixels: Tensor, give_up: float) -> tuple[float, Tensor]:
    """Seconds for the probe batch after one warm-up pass; the warm-up's own time when that is hopeless."""
    for _ in range(2):
        started = time.perf_counter()
        embedding = encoder.encode(pixels)["embedding"]
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if seconds > give_up:
            break
    return seconds, embedding

"""Which way of computing is the fastest that stays faithful to fp32, measured on the device at hand.

No table of models can know: bf16 autocast is the fastest choice for a convnet on a CPU with AVX-512 bf16, the
slowest by far on one without, and for a ViT on the former it is bf16 *weights*. But the clock decides only once for
each encoder and kind of machine (`pins.py`): features of two precisions are not comparable, however close.
"""

import logging
import math
import time

import torch
from torch import Tensor

from featcache.encoder import Encoder
from featcache.precision import CANDIDATES, FP32, Precision
from featcache.store.comparable import is_half

CHOSEN = 0.9995
"""Smallest cosine on the images that a precision is chosen on: others will be worse than these few."""

LAID_OUT = Precision(torch.float32, channels_last=True)
"""Of token ids, fp32 all over again."""

log = logging.getLogger("featcache")


def fastest_faithful(encoder: Encoder, pixels: Tensor, batch: int, device: str) -> str:
    """The candidate in which `encoder` is fastest on `device`, among those faithful by a margin to every image.

    Args:
        encoder: left on `device`, in any precision.
        pixels: images to be faithful to, as rendered.
        batch: images a forward pass.
    """
    encoder.to(device)
    pixels = pixels.to(encoder.device)  # what is timed is the encoder, not the way to a GPU
    reference = encoder.encode_padded(pixels, batch)["embedding"].double()
    best, best_seconds = FP32, [math.inf, math.inf]
    for candidate in CANDIDATES.values():
        if candidate.weights == torch.float16 and device != "cuda":
            continue
        if candidate == LAID_OUT and encoder.preprocess.kind != "image":
            continue
        encoder.to(device, candidate)
        # One image first: half precision without hardware for it is so slow that the whole batch would take seconds.
        seconds = [pass_seconds(encoder, pixels[:1], 1)]
        if seconds[0] > 3 * best_seconds[0]:
            continue
        seconds.append(pass_seconds(encoder, pixels, batch))
        if seconds[1] >= best_seconds[1]:
            continue
        worst = 1.0
        if is_half(candidate.name):
            found = encoder.encode_padded(pixels, batch)["embedding"].double()
            worst = float(torch.nn.functional.cosine_similarity(found, reference).min())
        if worst >= CHOSEN:
            best, best_seconds = candidate, seconds
        else:  # NaN included
            log.info("%s: %s is fast, but its cosine to fp32 is %.5f: not used", encoder.name, candidate.name, worst)
    return best.name


def pass_seconds(encoder: Encoder, pixels: Tensor, batch: int) -> float:
    """Of a forward pass over `batch` images, the shorter of two: the first one also warms up."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        encoder.encode_padded(pixels[:batch], batch)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken)

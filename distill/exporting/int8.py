"""An ONNX file in whole numbers: static quantisation by ONNX Runtime, calibrated on some images of a corpus and judged by others."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from featcache.corpora import open_corpus
from featcache.extraction.samples import Wanted, prefetch, read_sample
from featcache.inputs import Views
from featcache.inputs.images import Preprocess
from featcache.machine import cores

METHODS = ("percentile", "minmax", "entropy")
LEAST_COSINE = 0.95
"""Of what a quantised student gives to what the student gives, on average: less is refused."""
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Images that say how large the numbers inside a student get, and from these how they are rounded.

    Attributes:
        corpus: its spec.
        images: at most so many calibrate, and as many others judge what came of it.
        method: what becomes of the numbers seen: "percentile" keeps the range of 99.999 % of them, "minmax" of all, "entropy" the
            one whose histogram loses least in rounding (Kullback-Leibler, as TensorRT does).
        seed: chooses the images.

    Raises:
        ValueError: no image, no such method, or a seed below 0.
    """

    corpus: str
    images: int = 256
    method: str = "percentile"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"calibration on {self.images} images: give 1 or more")
        if self.method not in METHODS:
            raise ValueError(f"unknown calibration method {self.method!r}; known: {', '.join(METHODS)}")
        if self.seed < 0:
            raise ValueError(f"calibration seed {self.seed}: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What quantisation cost, on images that nothing was calibrated on.

    Attributes:
        calibrated, images: how many calibrated, and how many judge.
        corpus: where they come from.
        cosine, least: to what the student gives, on average and the smallest.
        difference: largest distance, as a share of the length of what the student gives.
    """

    calibrated: int
    images: int
    corpus: str
    cosine: float
    least: float
    difference: float

    def __str__(self) -> str:
        return (
            f"calibrated on {self.calibrated:,} images of {self.corpus}; on {self.images:,} others of them, the cosine to what "
            f"the student gives is {self.cosine:.4f} on average and at least {self.least:.4f}"
        )


def some_images(
    calibration: Calibration, preprocess: Preprocess
) -> tuple[UInt8[np.ndarray, "n size size 3"], UInt8[np.ndarray, "m size size 3"]]:
    """The plain view of those that calibrate and of those that judge: readable ones, no two files alike, in an order drawn
    from the seed. Where there are fewer than twice `images`, half of them each.

    Raises:
        ValueError: fewer than two can be read.
    """
    corpus = open_corpus(calibration.corpus)
    rows = np.random.default_rng(calibration.seed).permutation(len(corpus)).tolist()
    read = partial(read_sample, corpus, recipe=Views(), wanted=[Wanted(preprocess)])
    found: dict[bytes, np.ndarray] = {}
    threads = cores()
    with ThreadPoolExecutor(threads) as pool:
        for sample in prefetch(read, rows, pool, 2 * threads):
            if (seen := sample.seen[0]) and seen.pixels is not None:
                found.setdefault(sample.content, seen.pixels[0])
            if len(found) == 2 * calibration.images:
                break
    if len(found) < 2:
        raise ValueError(
            f"{calibration.corpus}: {len(found)} of {len(corpus)} images can be used; calibration needs two that differ: one to "
            "calibrate with, one to judge by"
        )
    pixels, half = np.stack(list(found.values())), len(found) // 2
    return pixels[:half], pixels[half:]


class _Reader:
    """The images, as ONNX Runtime wants to be given them: in batches, some of which it asks for at a time."""

    def __init__(self, name: str, pixels: UInt8[np.ndarray, "n size size 3"], preprocess: Preprocess):
        self._name, self._batches = name, _batches(pixels, preprocess)
        self.set_range(0, len(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self._left, None)
        return None if found is None else {self._name: found().numpy()}


def _batches(
    pixels: UInt8[np.ndarray, "n size size 3"], preprocess: Preprocess
) -> list[Callable[[], Float[Tensor, "batch 3 size size"]]]:
    def normalised(start: int) -> Tensor:
        return preprocess.to_model(torch.from_numpy(pixels[start : start + BATCH])).contiguous()

    return [partial(normalised, start) for start in range(0, len(pixels), BATCH)]


def quantise(file: Path, pixels: UInt8[np.ndarray, "n size size 3"], preprocess: Preprocess, method: str) -> None:
    """Put the model of an ONNX file of normalised images into int8, in place: weights by output channel and symmetric,
    what the layers give as a whole, between pairs of QuantizeLinear and DequantizeLinear (QDQ)."""
    import onnxruntime.quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    chosen = {
        "minmax": ort.CalibrationMethod.MinMax,
        "percentile": ort.CalibrationMethod.Percentile,
        "entropy": ort.CalibrationMethod.Entropy,
    }
    with tempfile.TemporaryDirectory() as folder, _silence():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(file, prepared, skip_symbolic_shape=True)
        ort.quantize_static(
            prepared,
            file,
            _Reader("images", pixels, preprocess),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=chosen[method],
            extra_options={"CalibStridedMinMax": 1},  # a batch at a time, of any method: what they saw is not all kept
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Of ONNX Runtime, which tells stdout how it gets on, and warns of every norm, whose weights have one axis only."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@torch.no_grad()
def loss(
    student: nn.Module,
    quantised: Callable[[Tensor], Tensor],
    pixels: UInt8[np.ndarray, "n size size 3"],
    preprocess: Preprocess,
    **calibrated: Any,
) -> Loss:
    """Of what the student gives; `calibrated` is what is said of the calibration."""
    wanted, found = (
        torch.cat([run(images()) for images in _batches(pixels, preprocess)]).double() for run in (student, quantised)
    )
    cosines = nn.functional.cosine_similarity(found, wanted).nan_to_num(-1)
    apart = ((found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-12)).nan_to_num(torch.inf)
    return Loss(
        images=len(pixels),
        **calibrated,
        cosine=float(cosines.mean()),
        least=float(cosines.min()),
        difference=float(apart.max()),
    )

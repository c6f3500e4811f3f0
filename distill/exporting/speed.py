"""How long a student takes on this machine's CPU, by format, threads and images at a time: passes of all that is compared
alternate, so that what else the machine does falls on all of them."""

import copy
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.exporting.export import pictures
from distill.exporting.int8 import quantise
from distill.exporting.onnx import write_onnx
from featcache.graph import pixels
from featcache.inputs.images import Preprocess
from featcache.models.onnx import open_session
from featcache.student import Student, load_student

FORMATS = {"torch": "", "onnx": "fp32", "onnx-fp16": "fp16", "onnx-int8": "int8"}
"""Precision of the ONNX file, by format; "torch" is the student itself, in fp32."""
ROUNDS = 50
WARM_UP = 3
_CALIBRATING = 8


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one student in one format.

    Attributes:
        run, architecture, format: what it is.
        threads, batch: that compute, and images of one pass.
        parameters, multiply_adds: weights, and multiplications (each with an addition) of one image in convolutions,
            matrix products and attention.
        file_bytes: of the ONNX file; of "torch" its weights.
        p50, p95: quantiles over passes, in seconds.
        images_per_second: at the median.
        ratio: time of its passes to that of the first format of the first run in the same round, the median; below 1 is faster.
        ratio_quartiles: of the same.
    """

    run: str
    architecture: str
    format: str
    threads: int
    batch: int
    parameters: int
    multiply_adds: int
    file_bytes: int
    p50: float
    p95: float
    images_per_second: float
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True)
class _Timed:
    """A student in a format; `run` makes of a number of threads what computes."""

    said: dict[str, Any]
    like: Preprocess
    run: Callable[[int], Callable[[Tensor], Any]]


def speed(
    runs: Sequence[str | os.PathLike[str]],
    *,
    formats: Sequence[str] = ("torch", "onnx", "onnx-int8"),
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    rounds: int = ROUNDS,
    trust_code: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[Speed]:
    """Time students of runs, from normalised images to what they give, on the CPU.

    In each round every format of every run makes one pass, one after the other, beginning with another one each time; of all
    others the time is compared with that of the first format of the first run in that very round. How long int8 takes does not depend on
    what it was calibrated on: here on drawn pictures.

    Args:
        formats: of `FORMATS`. float16 is for GPUs and for small files: most CPUs convert it and compute in float32.
        rounds: passes that are timed of each.
        progress: is told rounds done, of how many, and at what.

    Raises:
        ValueError: no such format, a number that is none, no finished run, or the packages of the extra `onnx` are missing.
    """
    for name, numbers in (("threads", threads), ("batch", batches), ("rounds", (rounds,))):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name} {', '.join(map(str, numbers))}: give whole numbers, 1 or more")
    if max(threads) > (cores := os.cpu_count() or 1):
        raise ValueError(f"threads {max(threads)}: of {cores} cores of this machine; give no more")
    if unknown := [each for each in formats if each not in FORMATS]:
        raise ValueError(f"unknown format {unknown[0]!r}; known: {', '.join(FORMATS)}")
    usual, cells = torch.get_num_threads(), [(count, batch) for count in threads for batch in batches]
    found: list[Speed] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            timed, students = [], [load_student(run, trust_code=trust_code) for run in runs]
            for run, (student, _) in zip(runs, students, strict=True):
                if student.model.kind != "image":
                    raise ValueError(f"{run}: is a student of {student.model.kind}s, and those of images are timed")
            for number, (run, (student, record)) in enumerate(zip(runs, students, strict=True)):
                progress(0, rounds * len(cells), f"exporting {Path(run).name}")
                timed += _formats(str(run), student, record, formats, Path(folder) / str(number))
            for at, (count, batch) in enumerate(cells):
                torch.set_num_threads(count)
                told = f"threads {count}, batch {batch}"
                so_far = partial(_sum_to, progress, at * rounds, rounds * len(cells), told)
                seconds = _seconds(timed, count, batch, rounds, so_far)
                found += _summary(timed, seconds, count, batch)
    finally:
        torch.set_num_threads(usual)
    return found


def _sum_to(progress: Callable[[int, int, str], None], before: int, total: int, what: str, done: int) -> None:
    progress(before + done, total, what)


def _formats(run: str, student: Student, record: dict[str, Any], formats: Sequence[str], folder: Path) -> list[_Timed]:
    """A run's student in each format; the files go into `folder`."""
    like = Preprocess.from_dict(record["preprocess"])
    said = {
        "run": run,
        "architecture": record["architecture"],
        "parameters": sum(weight.numel() for weight in student.parameters()),
        "multiply_adds": multiply_adds(student.deployed, pictures(1, like)),
    }
    made = []
    for name in formats:
        if not FORMATS[name]:
            size = sum(value.nbytes for value in student.state_dict().values())
            made.append(_Timed({**said, "format": name, "file_bytes": size}, like, partial(_itself, student.deployed)))
            continue
        place = folder / name
        place.mkdir(parents=True)
        calibrating = pixels(_CALIBRATING, like.size, like.size).numpy()
        rounding = partial(quantise, pixels=calibrating, preprocess=like, method="minmax")
        precision = FORMATS[name]
        write_onnx(place, copy.deepcopy(student), record, precision, quantise=rounding if precision == "int8" else None)
        file = place / "model.onnx"
        made.append(_Timed({**said, "format": name, "file_bytes": file.stat().st_size}, like, partial(_session, file)))
    return made


def _itself(model: nn.Module, threads: int) -> nn.Module:
    return model


def _session(file: Path, threads: int) -> Callable[[Tensor], Any]:
    session = open_session(file, threads=threads)
    return lambda images: session.run(None, {"images": images.numpy()})


@torch.no_grad()
def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Of one image: those of convolutions, matrix products and attention, as PyTorch counts them."""
    # Counted as matrix products: fused attention is not known of every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops() // 2 // len(images)


@torch.inference_mode()
def _seconds(timed: Sequence[_Timed], threads: int, batch: int, rounds: int, told: Callable[[int], None]) -> np.ndarray:
    """(rounds, formats) of passes that alternate."""
    passes = [(each.run(threads), pictures(batch, each.like)) for each in timed]
    taken = np.empty((WARM_UP + rounds, len(passes)))
    for number in range(WARM_UP + rounds):
        for step in range(len(passes)):
            i = (number + step) % len(passes)
            run, images = passes[i]
            images = images.clone()  # some students work on theirs in place
            began = time.perf_counter()
            run(images)
            taken[number, i] = time.perf_counter() - began
        told(max(number + 1 - WARM_UP, 0))
    return taken[WARM_UP:]


def _summary(timed: Sequence[_Timed], seconds: np.ndarray, threads: int, batch: int) -> list[Speed]:
    found = []
    for each, own in zip(timed, seconds.T, strict=True):
        p50, p95 = np.quantile(own, (0.5, 0.95)).tolist()
        low, ratio, high = np.quantile(own / seconds[:, 0], (0.25, 0.5, 0.75)).tolist()
        found.append(
            Speed(
                **each.said,
                threads=threads,
                batch=batch,
                p50=p50,
                p95=p95,
                images_per_second=batch / p50,
                ratio=ratio,
                ratio_quartiles=(low, high),
            )
        )
    return found

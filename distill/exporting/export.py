"""A run's student as files that load without featcache: safetensors for plain timm or torch, or ONNX; with a model card."""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.exporting.card import write_card
from distill.exporting.int8 import LEAST_COSINE, Calibration, Loss, loss, quantise, some_images
from distill.exporting.onnx import write_onnx
from distill.exporting.safetensors import write_safetensors
from distill.exporting.texts import (
    largest_text_difference,
    refuse_other_formats,
    tokenising_code,
    write_text_onnx,
)
from distill.training.run import Run
from featcache.disk.durable import appearing
from featcache.disk.refusals import refuse_unmakeable, writing
from featcache.graph import Preprocessed, pixels
from featcache.inputs.images import Preprocess
from featcache.models.onnx import open_session
from featcache.public import public
from featcache.run_folder import on_disk, split_spec
from featcache.student import Student, load_student

FORMATS = ("safetensors", "onnx")
PRECISIONS = ("fp32", "fp16", "int8")
LARGEST_DIFFERENCE = {
    ("safetensors", "fp32"): 1e-5,
    ("onnx", "fp32"): 1e-4,
    ("safetensors", "fp16"): 1e-2,
    ("onnx", "fp16"): 1e-2,
}
"""Between an export's embedding and the student's, as a share of its length: 1e-2 is a cosine of 0.99995 or more."""
CHECKED_BATCHES = (1, 5)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the folder.
        files: their names.
        max_difference: largest distance between one of its embeddings and the student's, as a share of the latter's
            length, on the images it was checked with.
        loss: of precision "int8", what that cost.
        hub_code: Python by which its library loads it from the hub; "" where that takes the code in README.md.
    """

    path: Path
    files: tuple[str, ...]
    max_difference: float
    loss: Loss | None = None
    hub_code: str = ""


def export(
    run: Run | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    precision: str = "fp32",
    with_preprocessing: bool = False,
    unfinished: bool = False,
    trust_code: bool = False,
    results: Sequence[str | os.PathLike[str]] = (),
    calibration: Calibration | None = None,
    any_loss: bool = False,
    repository: str = "",
) -> Exported:
    """Write the student of a run, of `FOLDER@epoch=N` one that it kept on the way, or of `hf-hub:USER/NAME[@REVISION]` one on the
    hub, to a new folder, which appears whole or not at all.

    "safetensors": `model.safetensors`, `config.json` (timm's own layout for timm models), `hubconf.py` for `torch.hub` and
    `README.md`, whose code loads it without featcache. "onnx": `model.onnx` for normalised float32 images (batch, 3, S, S), any batch size,
    the preprocessing in its metadata, and `README.md`. Either is loaded again and compared with the student.

    Args:
        precision: "fp16" halves the files: of safetensors the weights alone are float16, ONNX also computes so, between
            float32 images and a float32 embedding.
        with_preprocessing: of ONNX: take images as they are, uint8 RGB (batch, height, width, 3), and resize, crop and
            normalise them inside the graph, to within a level or two (of 255) of Pillow. Students of texts are exported as
            ONNX in fp32, for token ids, their tokeniser beside the file.
        unfinished: of a run that is not finished, write the student of its newest checkpoint.
        trust_code: a student MODULE:CALLABLE that the folder names may be imported.
        results: result files of evalsuite, for the model card.
        calibration: of "int8", the images that its rounding is chosen by.
        any_loss: keep an "int8" file also where its mean cosine to the student is below `int8.LEAST_COSINE`.
        repository: USER/NAME[@REVISION] on the hub that the folder is for: the code of the model card loads it from there.

    Raises:
        ValueError: the run is not finished and `unfinished` not set, or there is no checkpoint; `out` exists, or a
        result file is none, or the calibration has no images; nothing has been written.
        RuntimeError: what was written does not give what the student gives; it has been removed.
    """
    out = Path(out)
    _refuse(format, precision, with_preprocessing, calibration)
    _refuse_existing(out)
    run, student, record = chosen(run, unfinished=unfinished, trust_code=trust_code)
    evaluated = [_read_result(path) for path in results]
    if student.model.kind == "text":
        refuse_other_formats(format, precision, with_preprocessing)
        return _export_texts(run, student, record, out, evaluated, repository)
    preprocess = Preprocess.from_dict(record["preprocess"])
    images = some_images(calibration, preprocess) if calibration else None

    with appearing(out, folder=True) as part:
        part.mkdir()
        losses: list[Loss] = []
        if format == "safetensors":
            written = write_safetensors(part, student, record, precision, pictures(2, preprocess))
        elif calibration and images:
            rounding = partial(_round, losses, student, preprocess, calibration, images)
            written = write_onnx(part, copy.deepcopy(student), record, precision, with_preprocessing, rounding)
        else:
            written = write_onnx(part, copy.deepcopy(student), record, precision, with_preprocessing)
        lost = losses[0] if losses else None
        if lost:
            difference, checked = lost.difference, str(replace(lost, corpus=public(lost.corpus)))
            _refuse_loss(out, lost, any_loss)
        else:
            difference = _largest_difference(student, written.load, preprocess, with_preprocessing)
            checked = f"at most {difference:.1e} of an embedding's length from the student's"
            _refuse_difference(out, format, precision, difference)
        write_card(
            part / "README.md",
            run,
            record,
            student,
            written=written,
            checked=checked,
            results=evaluated,
            repository=repository,
        )
        for file in part.iterdir():  # safetensors lets nobody else read its files
            file.chmod((part / "README.md").stat().st_mode)
    files = tuple(sorted(file.name for file in out.iterdir()))
    return Exported(path=out, files=files, max_difference=difference, loss=lost, hub_code=written.of_hub)


def _export_texts(
    run: Run, student: Student, record: dict[str, Any], out: Path, results: Sequence[dict[str, Any]], repository: str
) -> Exported:
    """The same of a student of texts."""
    with appearing(out, folder=True) as part:
        part.mkdir()
        written = write_text_onnx(part, student, record)
        difference = largest_text_difference(student, written.load)
        _refuse_difference(out, "onnx", "fp32", difference)
        checked = f"at most {difference:.1e} of an embedding's length from the student's"
        write_card(
            part / "README.md", run, record, student, written=written, checked=checked, results=results, repository=repository,
            preparing=f"```python\n{tokenising_code(record)}\n```\n\n`{student.gives} = model(ids(texts))`.",
        )  # fmt: skip
    return Exported(path=out, files=tuple(sorted(file.name for file in out.iterdir())), max_difference=difference)


def chosen(
    run: Run | str | os.PathLike[str], *, unfinished: bool, trust_code: bool
) -> tuple[Run, Student, dict[str, Any]]:
    """The run that a spec names, its student, and the student's record; for arguments and errors see `export`."""
    spec = on_disk(run.path if isinstance(run, Run) else run)
    folder, snapshot, _ = split_spec(spec)
    of = Run(folder)
    newest = unfinished and not of.finished and not snapshot
    return of, *(_newest(of, trust_code) if newest else load_student(spec, trust_code=trust_code))


def _refuse(format: str, precision: str, with_preprocessing: bool, calibration: Calibration | None) -> None:
    """Raises ValueError for what does not go together."""
    for name, given, known in (("format", format, FORMATS), ("precision", precision, PRECISIONS)):
        if given not in known:
            raise ValueError(f"unknown {name} {given!r}; known: {', '.join(known)}")
    if with_preprocessing and format != "onnx":
        raise ValueError("preprocessing can be put into ONNX files only; give format onnx, or leave it out")
    if precision == "int8" and format != "onnx":
        raise ValueError("int8 is for ONNX files; give format onnx, or precision fp16")
    if (precision == "int8") != (calibration is not None):
        raise ValueError(
            "precision int8 and a calibration (images like those that it will see: a corpus) need each other"
        )


def _round(
    losses: list[Loss],
    student: Student,
    preprocess: Preprocess,
    calibration: Calibration,
    images: tuple[np.ndarray, np.ndarray],
    file: Path,
) -> None:
    """Quantise the file, and note what that cost."""
    quantise(file, images[0], preprocess, calibration.method)
    session = open_session(file)
    losses.append(
        loss(
            student.deployed,
            lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]),
            images[1],
            preprocess,
            corpus=calibration.corpus,
            calibrated=len(images[0]),
        )
    )


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out}: exists; choose another name or remove it")


def _refuse_difference(out: Path, format: str, precision: str, difference: float) -> None:
    limit = LARGEST_DIFFERENCE[format, precision]
    if not difference <= limit:
        raise RuntimeError(
            f"{out}: the {format} model differs from the student by {difference:.1e} of an embedding's length, more "
            f"than {limit:.0e}; nothing was kept"
        )


def _refuse_loss(out: Path, lost: Loss, any_loss: bool) -> None:
    if not any_loss and not lost.cosine >= LEAST_COSINE:
        raise RuntimeError(
            f"{out}: {lost}, and less than {LEAST_COSINE} on average is too little; nothing was kept: calibrate on more images "
            "or by another method, or keep it all the same (--any-loss)"
        )


def preview(
    run: Run | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    precision: str = "fp32",
    with_preprocessing: bool = False,
    unfinished: bool = False,
    trust_code: bool = False,
    results: Sequence[str | os.PathLike[str]] = (),
    calibration: Calibration | None = None,
    any_loss: bool = False,
) -> int:
    """Bytes of weights, about, that `export` would write; refused as it would be before it writes. Nothing is written."""
    _refuse(format, precision, with_preprocessing, calibration)
    _refuse_existing(Path(out))
    _, student, record = chosen(run, unfinished=unfinished, trust_code=trust_code)
    if student.model.kind == "text":
        refuse_other_formats(format, precision, with_preprocessing)
    for path in results:
        _read_result(path)
    if calibration:
        some_images(calibration, Preprocess.from_dict(record["preprocess"]))
    with writing(out):
        refuse_unmakeable(Path(out).parent)
    return sum(value.nbytes for value in student.state_dict().values()) // {"fp16": 2, "int8": 4}.get(precision, 1)


def _newest(run: Run, trust_code: bool) -> tuple[Student, dict[str, Any]]:
    """The student of the newest checkpoint, as `load_student` gives that of a finished run.

    Raises:
        ValueError: there is none.
    """
    checkpoint = run.load_checkpoint()
    if checkpoint is None or "record" not in checkpoint:
        raise ValueError(
            f"{run.path}: has no checkpoint that a student can be made from; go on with `distill fit --out {run.path} --resume`"
        )
    record = {**checkpoint["record"], "unfinished": f"the checkpoint of step {checkpoint['step']:,}"}
    with tempfile.TemporaryDirectory() as folder:
        weights = (checkpoint["best"] or {}).get("student") or checkpoint.get("ema", checkpoint["student"])
        Run(folder).finish(weights, record)
        return load_student(folder, trust_code=trust_code)


def _largest_difference(
    student: Student, load: Callable[[], Callable[[Tensor], Tensor]], like: Preprocess, plain: bool
) -> float:
    """See `Exported.max_difference`. A model of `plain` images is given such, of which the student sees the plain view."""
    exported, whole, worst = load(), student.deployed, 0.0
    view = Preprocessed(whole, like)
    with torch.no_grad():
        for count in CHECKED_BATCHES:
            images = pixels(count, 2 * like.size + count, 3 * like.size) if plain else pictures(count, like)
            wanted = view(images) if plain else whole(images.clone())  # some work on their images in place
            apart = (exported(images.clone()) - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-12)
            worst = max(worst, float(apart.nan_to_num(torch.inf).max()))
    return worst


def pictures(count: int, preprocess: Preprocess) -> Float[Tensor, "count 3 size size"]:
    """Such images at the student's size, normalised."""
    return preprocess.to_model(pixels(count, preprocess.size, preprocess.size)).contiguous()


def _read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A result file of evalsuite.

    Raises:
        ValueError: it is none.
    """
    try:
        record = json.loads(Path(path).read_text())
        assert isinstance(record["command"], str)
        assert all(isinstance(metric["value"], int | float) for metric in record["metrics"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"{path}: not a result file ({type(error).__name__}); write one with `evalsuite … --json {path}`"
        ) from None
    return record

"""A run's student as files that load without featcache: safetensors for plain timm or torch, or ONNX; with a model card."""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.exporting.card import write_card
from distill.exporting.onnx import Preprocessed, write_onnx
from distill.training.run import Run
from featcache.disk.durable import appearing
from featcache.inputs.images import Preprocess
from featcache.run_folder import split_spec
from featcache.student import Student, load_student

FORMATS = ("safetensors", "onnx")
PRECISIONS = ("fp32", "fp16")
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
    """

    path: Path
    files: tuple[str, ...]
    max_difference: float


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
) -> Exported:
    """Write the student of a run, or of `FOLDER@epoch=N` one that it kept on the way, to a new folder, which appears whole or
    not at all.

    "safetensors": `model.safetensors`, `config.json` (timm's own layout for timm models) and `README.md`, whose code
    loads it without featcache. "onnx": `model.onnx` for normalised float32 images (batch, 3, S, S), any batch size,
    the preprocessing in its metadata, and `README.md`. Either is loaded again and compared with the student.

    Args:
        precision: "fp16" halves the files: of safetensors the weights alone are float16, ONNX also computes so, between
            float32 images and a float32 embedding.
        with_preprocessing: of ONNX: take images as they are, uint8 RGB (batch, height, width, 3), and resize, crop and
            normalise them inside the graph, to within a level or two (of 255) of Pillow.
        unfinished: of a run that is not finished, write the student of its newest checkpoint.
        trust_code: a student MODULE:CALLABLE that the folder names may be imported.
        results: result files of evalsuite, for the model card.

    Raises:
        ValueError: the run is not finished and `unfinished` not set, or there is no checkpoint; `out` exists, or a
        result file is none; nothing has been written.
        RuntimeError: what was written does not give what the student gives; it has been removed.
    """
    for name, given, known in (("format", format, FORMATS), ("precision", precision, PRECISIONS)):
        if given not in known:
            raise ValueError(f"unknown {name} {given!r}; known: {', '.join(known)}")
    if with_preprocessing and format != "onnx":
        raise ValueError("preprocessing can be put into ONNX files only; give format onnx, or leave it out")
    spec, out = run.path if isinstance(run, Run) else run, Path(out)
    folder, snapshot, _ = split_spec(spec)
    run = Run(folder)
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out}: exists; choose another name or remove it")
    newest = unfinished and not run.finished and not snapshot
    student, record = _newest(run, trust_code) if newest else load_student(spec, trust_code=trust_code)
    preprocess = Preprocess.from_dict(record["preprocess"])
    evaluated = [_read_result(path) for path in results]

    with appearing(out, folder=True) as part:
        part.mkdir()
        if format == "onnx":
            loading, load = write_onnx(part, copy.deepcopy(student), record, precision, with_preprocessing)
        else:
            loading, load = _write_safetensors(part, student, record, precision)
        difference, limit = (
            _largest_difference(student, load, preprocess, with_preprocessing),
            LARGEST_DIFFERENCE[format, precision],
        )
        if not difference <= limit:
            raise RuntimeError(
                f"{out}: the {format} model differs from the student by {difference:.1e} of an embedding's length, more "
                f"than {limit:.0e}; nothing was kept"
            )
        write_card(part / "README.md", run, record, student, loading=loading, difference=difference, results=evaluated)
        for file in part.iterdir():  # safetensors lets nobody else read its files
            file.chmod((part / "README.md").stat().st_mode)
    return Exported(path=out, files=tuple(sorted(file.name for file in out.iterdir())), max_difference=difference)


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


def pixels(count: int, height: int, width: int) -> UInt8[Tensor, "count height width 3"]:
    """Images with large shapes, edges and some grain, as photographs have; always the same."""
    generator = torch.Generator().manual_seed(count)
    sides = (height, width)
    shapes = nn.functional.interpolate(torch.rand(count, 3, 5, 5, generator=generator), sides, mode="bicubic")
    edges = nn.functional.interpolate(torch.rand(count, 3, 3, 3, generator=generator), sides, mode="nearest")
    grain = torch.rand(count, 3, *sides, generator=generator)
    levels = (0.6 * shapes + 0.3 * edges + 0.1 * grain).clamp(0, 1) * 255
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def pictures(count: int, preprocess: Preprocess) -> Float[Tensor, "count 3 size size"]:
    """Such images at the student's size, normalised."""
    return preprocess.to_model(pixels(count, preprocess.size, preprocess.size)).contiguous()


# -- safetensors ------------------------------------------------------------------------------------------


def _write_safetensors(
    folder: Path, student: Student, record: dict[str, Any], precision: str
) -> tuple[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Returns the code that loads it, and a way of running that very code."""
    images = pictures(2, Preprocess.from_dict(record["preprocess"]))
    alone = student.model.standalone(student.behind, record, images)
    save_file(_tensors(alone.network, precision), folder / "model.safetensors", {"format": "pt", **alone.metadata})
    _write_json(folder / "config.json", alone.config)

    def load() -> Callable[[Tensor], Tensor]:
        names: dict[str, Any] = {"folder": str(folder)}
        exec(alone.code, names)
        return names["model"]

    return alone.code, load


def _tensors(module: nn.Module, precision: str) -> dict[str, Tensor]:
    """Copies that share no memory, floating-point ones in the precision."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    return {
        key: value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
        for key, value in module.state_dict().items()
    }


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


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")

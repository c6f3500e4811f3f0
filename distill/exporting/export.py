"""A run's student as files that load without featcache: safetensors for plain timm or torch, or ONNX; with a model card."""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.exporting.card import write_card
from distill.exporting.onnx import Preprocessed, write_onnx
from distill.training.run import Run
from featcache.backbones import Backbone, ClipTower, Tiny, arguments_of, load_backbone
from featcache.disk.durable import appearing
from featcache.inputs.images import Preprocess

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
    """Write the student of a run to a new folder, which appears whole or not at all.

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
        ValueError: the run is not finished and `unfinished` not set, or there is no checkpoint; `out` exists, or a result file is none; nothing has been written.
        RuntimeError: what was written does not give what the student gives; it has been removed.
    """
    for name, given, known in (("format", format, FORMATS), ("precision", precision, PRECISIONS)):
        if given not in known:
            raise ValueError(f"unknown {name} {given!r}; known: {', '.join(known)}")
    if with_preprocessing and format != "onnx":
        raise ValueError("preprocessing can be put into ONNX files only; give format onnx, or leave it out")
    run, out = run if isinstance(run, Run) else Run(run), Path(out)
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out}: exists; choose another name or remove it")
    newest = unfinished and not run.finished
    backbone, record = _newest(run, trust_code) if newest else load_backbone(run.path, trust_code=trust_code)
    preprocess = Preprocess.from_dict(record["preprocess"])
    evaluated = [_read_result(path) for path in results]

    with appearing(out, folder=True) as part:
        part.mkdir()
        if format == "onnx":
            loading, load = write_onnx(part, copy.deepcopy(backbone), record, precision, with_preprocessing)
        else:
            loading, load = _write_safetensors(part, backbone, record, precision)
        difference, limit = (
            _largest_difference(backbone, load, preprocess, with_preprocessing),
            LARGEST_DIFFERENCE[format, precision],
        )
        if not difference <= limit:
            raise RuntimeError(
                f"{out}: the {format} model differs from the student by {difference:.1e} of an embedding's length, more "
                f"than {limit:.0e}; nothing was kept"
            )
        write_card(part / "README.md", run, record, backbone, loading=loading, difference=difference, results=evaluated)
        for file in part.iterdir():  # safetensors lets nobody else read its files
            file.chmod((part / "README.md").stat().st_mode)
    return Exported(path=out, files=tuple(sorted(file.name for file in out.iterdir())), max_difference=difference)


def _newest(run: Run, trust_code: bool) -> tuple[Backbone, dict[str, Any]]:
    """The student of the newest checkpoint, as `load_backbone` gives that of a finished run.

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
        student = (checkpoint["best"] or {}).get("student") or checkpoint.get("ema", checkpoint["student"])
        Run(folder).finish(student, record)
        return load_backbone(folder, trust_code=trust_code)


def _largest_difference(
    backbone: Backbone, load: Callable[[], Callable[[Tensor], Tensor]], like: Preprocess, plain: bool
) -> float:
    """See `Exported.max_difference`. A model of `plain` images is given such, of which the student sees the plain view."""
    exported, view, worst = load(), Preprocessed(backbone, like), 0.0
    with torch.no_grad():
        for count in CHECKED_BATCHES:
            images = pixels(count, 2 * like.size + count, 3 * like.size) if plain else pictures(count, like)
            wanted = view(images) if plain else backbone(images.clone())  # some work on their images in place
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
    folder: Path, backbone: Backbone, record: dict[str, Any], precision: str
) -> tuple[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Returns the code that loads it, and a way of running that very code."""
    source, _, name = record["architecture"].partition("/")
    classified = _with_own_classifier(backbone, record) if source == "timm" else None
    if classified is not None:
        # By this, featcache knows that the classifier gives the embedding when it loads the file again.
        marked = {"embedding": "classifier"} if isinstance(backbone.projection, nn.Linear) else {}
        save_file(_tensors(classified, precision), folder / "model.safetensors", {"format": "pt", **marked})
        _write_json(folder / "config.json", _timm_config(classified, record))
        code = 'import timm\n\nmodel = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()'
    else:
        body: nn.Module = backbone.body.visual if isinstance(backbone.body, ClipTower) else backbone.body
        projected = isinstance(backbone.projection, nn.Linear)
        if isinstance(body, Tiny):
            plain: nn.Module = nn.Sequential(*body, *([backbone.projection] if projected else []))
            code = _tiny_code(plain)
        else:
            plain = nn.Sequential(body, backbone.projection) if projected else body
            code = _body_code(source, name, record)
            if projected:
                code += f"\nmodel = nn.Sequential(body, nn.Linear({backbone.width}, {backbone.embedding_dim}))"
            else:
                code += "\nmodel = body"
        code += '\nmodel.load_state_dict(load_file(f"{folder}/model.safetensors"))\nmodel.eval()'
        save_file(_tensors(plain, precision), folder / "model.safetensors", {"format": "pt"})
        _write_json(folder / "config.json", record)

    def load() -> Callable[[Tensor], Tensor]:
        names: dict[str, Any] = {"folder": str(folder)}
        exec(code, names)
        return names["model"]

    return code, load


def _with_own_classifier(backbone: Backbone, record: dict[str, Any]) -> Any | None:
    """The student as a model of timm alone, the projection as its classifier; None where timm's cannot compute that."""
    architecture = record["architecture"].partition("/")[2].split(".")[0]
    projection, state = backbone.projection, backbone.body.state_dict()
    arguments = arguments_of(record)
    projected = isinstance(projection, nn.Linear)
    model: Any = timm.create_model(architecture, num_classes=backbone.embedding_dim if projected else 0, **arguments)
    if isinstance(projection, nn.Linear):
        known = model.state_dict().keys() - state.keys()
        _set_to(projection, [module for name, module in model.named_modules() if f"{name}.weight" in known])
    model.eval().load_state_dict({**model.state_dict(), **state})
    like = pictures(2, Preprocess.from_dict(record["preprocess"]))
    with torch.no_grad():
        found, wanted = model(like), backbone(like)
    return (
        model
        if found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5 * float(wanted.norm(dim=1).max()))
        else None
    )


@torch.no_grad()
def _set_to(projection: nn.Linear, layers: Sequence[nn.Module]) -> None:
    """Make a classifier's layers compute the projection, where they can: the linear ones, alone or averaged, each of all
    features or of its own part of them; batch norms before them are made to do nothing."""
    linear: list[Any] = [layer for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    widths = [layer.weight.shape[1] for layer in linear]
    parts = [projection.weight] * len(linear)
    if sum(widths) == projection.in_features:
        parts = [len(linear) * part for part in projection.weight.split(widths, dim=1)]
    for layer, weight in zip(linear, parts, strict=True):
        if layer.weight.numel() == weight.numel() and layer.bias is not None:
            layer.weight.copy_(weight.view_as(layer.weight))
            layer.bias.copy_(projection.bias)
    for layer in layers:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_var is not None:
            layer.reset_parameters()
            layer.running_var.fill_(1 - layer.eps)


def _timm_config(model: Any, record: dict[str, Any]) -> dict[str, Any]:
    """`config.json` as timm's hub layout has it."""
    preprocess, own = Preprocess.from_dict(record["preprocess"]), model.pretrained_cfg
    architecture = record["architecture"].partition("/")[2].split(".")[0]
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": arguments_of(record),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, preprocess.size, preprocess.size],
            "fixed_input_size": own.get("fixed_input_size", False),
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop / preprocess.resize,
            "crop_mode": "squash" if preprocess.mode == "squash" else "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": own.get("first_conv"),
            "classifier": own.get("classifier"),
        },
    }


def _body_code(source: str, name: str, record: dict[str, Any]) -> str:
    size = record["preprocess"]["size"]
    if source == "timm":
        arguments = arguments_of(record)
        given = "".join(f", {key}={value!r}" for key, value in arguments.items())
        make = f'import timm\n\nbody = timm.create_model("{name.split(".")[0]}", num_classes=0{given})'
    elif source == "open_clip":
        make = f'import open_clip\n\nbody = open_clip.create_model("{name}", force_image_size={size}).visual'
    else:
        module, _, function = record["architecture"].partition(":")
        make = f"from {module} import {function}  # your own code\n\nbody = {function}()"
    return f"from safetensors.torch import load_file\nfrom torch import nn\n{make}"


def _tiny_code(plain: nn.Module) -> str:
    """A few lines that build the same layers in the same order."""
    convolutions = [layer for layer in plain.children() if isinstance(layer, nn.Conv2d)]
    linears = [layer for layer in plain.children() if isinstance(layer, nn.Linear)]
    shapes = [(layer.in_channels, layer.out_channels, layer.stride[0]) for layer in convolutions]
    last = ", ".join(f"nn.Linear({layer.in_features}, {layer.out_features})" for layer in linears)
    return (
        "from safetensors.torch import load_file\nfrom torch import nn\n\n"
        "layers = []\n"
        f"for inputs, outputs, stride in {shapes}:\n"
        "    layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]\n"
        f"model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), {last})"
    )


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


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")

"""A finished run as files that load without featcache: safetensors for plain timm or torch, or ONNX; with a model card."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill._card import write_card
from distill.run import Run
from featcache.backbones import Backbone, ClipTower, Tiny, load_backbone, timm_arguments
from featcache.encoder import normalise
from featcache.preprocess import Preprocess

FORMATS = ("safetensors", "onnx")
LARGEST_DIFFERENCE = {"safetensors": 1e-5, "onnx": 1e-4}
"""Between an export's output and the student's, in any number of an embedding."""
CHECKED_BATCHES = (1, 5)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the folder.
        files: their names.
        max_difference: largest between its output and the student's, on the images it was checked with.
    """

    path: Path
    files: tuple[str, ...]
    max_difference: float


def export(
    run: Run | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    results: Sequence[str | os.PathLike[str]] = (),
) -> Exported:
    """Write the student of a finished run to a new folder, which appears whole or not at all.

    "safetensors": `model.safetensors`, `config.json` (timm's own layout for timm models) and `README.md`, whose code
    loads it without featcache. "onnx": `model.onnx` for normalised float32 images (batch, 3, S, S), any batch size,
    the preprocessing in its metadata, and `README.md`. Either is loaded again and compared with the student.

    Args:
        results: result files of evalsuite, for the model card.

    Raises:
        ValueError: the run is not finished, `out` exists, or a result file is none; nothing has been written.
        RuntimeError: what was written does not give what the student gives; it has been removed.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    run, out = run if isinstance(run, Run) else Run(run), Path(out)
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out}: exists; choose another name or remove it")
    backbone, record = load_backbone(run.path)
    preprocess = Preprocess.from_dict(record["preprocess"])
    evaluated = [_read_result(path) for path in results]
    write = {"safetensors": _write_safetensors, "onnx": _write_onnx}[format]

    part = out.with_name(f"{out.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        loading, load = write(part, backbone, record)
        difference = _largest_difference(backbone, load, preprocess)
        if not difference <= LARGEST_DIFFERENCE[format]:
            raise RuntimeError(
                f"{out}: the {format} model differs from the student by {difference:.1e}, more than "
                f"{LARGEST_DIFFERENCE[format]:.0e}; nothing was kept"
            )
        write_card(part / "README.md", run, record, backbone, loading=loading, difference=difference, results=evaluated)
        for file in part.iterdir():  # safetensors lets nobody else read its files
            file.chmod((part / "README.md").stat().st_mode)
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(path=out, files=tuple(sorted(file.name for file in out.iterdir())), max_difference=difference)


def _largest_difference(backbone: Backbone, load: Callable[[], Callable[[Tensor], Tensor]], like: Preprocess) -> float:
    exported, worst = load(), 0.0
    with torch.no_grad():
        for count in CHECKED_BATCHES:
            images = pictures(count, like)
            worst = max(worst, float((exported(images) - backbone(images)).abs().max()))
    return worst


def pictures(count: int, preprocess: Preprocess) -> Tensor:
    """Normalised images (count, 3, S, S) with large shapes, edges and some grain, as photographs have; always the same."""
    generator = torch.Generator().manual_seed(count)
    size = (preprocess.size, preprocess.size)
    shapes = nn.functional.interpolate(torch.rand(count, 3, 5, 5, generator=generator), size, mode="bicubic")
    edges = nn.functional.interpolate(torch.rand(count, 3, 3, 3, generator=generator), size, mode="nearest")
    grain = torch.rand(count, 3, *size, generator=generator)
    pixels = (0.6 * shapes + 0.3 * edges + 0.1 * grain).clamp(0, 1) * 255
    return normalise(pixels.to(torch.uint8).permute(0, 2, 3, 1), preprocess).contiguous()


# -- safetensors ------------------------------------------------------------------------------------------


def _write_safetensors(
    folder: Path, backbone: Backbone, record: dict[str, Any]
) -> tuple[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Returns the code that loads it, and a way of running that very code."""
    source, _, name = record["architecture"].partition("/")
    classified = _with_own_classifier(backbone, record) if source == "timm" else None
    if classified is not None:
        save_file(_tensors(classified), folder / "model.safetensors", {"format": "pt"})
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
        save_file(_tensors(plain), folder / "model.safetensors", {"format": "pt"})
        _write_json(folder / "config.json", record)

    def load() -> Callable[[Tensor], Tensor]:
        names: dict[str, Any] = {"folder": str(folder)}
        exec(code, names)
        return names["model"]

    return code, load


def _with_own_classifier(backbone: Backbone, record: dict[str, Any]) -> Any | None:
    """The student as a model of timm alone, the projection as its classifier; None where timm's is no linear layer."""
    architecture = record["architecture"].partition("/")[2].split(".")[0]
    arguments = timm_arguments(architecture, record["preprocess"]["size"], record.get("patch_size"))
    projection, state = backbone.projection, dict(backbone.body.state_dict())
    model: Any = timm.create_model(architecture, num_classes=0, **arguments)
    if isinstance(projection, nn.Linear):
        model = timm.create_model(architecture, num_classes=backbone.embedding_dim, **arguments)
        classifier = model.pretrained_cfg.get("classifier")
        if not isinstance(classifier, str) or type(model.get_classifier()) is not nn.Linear:
            return None
        state |= {f"{classifier}.weight": projection.weight, f"{classifier}.bias": projection.bias}
    model.load_state_dict(state)
    return model


def _timm_config(model: Any, record: dict[str, Any]) -> dict[str, Any]:
    """`config.json` as timm's hub layout has it."""
    preprocess, own = Preprocess.from_dict(record["preprocess"]), model.pretrained_cfg
    architecture = record["architecture"].partition("/")[2].split(".")[0]
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": timm_arguments(architecture, preprocess.size, record.get("patch_size")),
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
        arguments = timm_arguments(name.split(".")[0], size, record.get("patch_size"))
        given = "".join(f", {key}={value}" for key, value in arguments.items())
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


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().contiguous().clone() for key, value in module.state_dict().items()}


# -- ONNX -------------------------------------------------------------------------------------------------


def _write_onnx(
    folder: Path, backbone: Backbone, record: dict[str, Any]
) -> tuple[str, Callable[[], Callable[[Tensor], Tensor]]]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise ValueError(f"exporting to ONNX needs {error.name}; pip install 'featcache[onnx]'") from None
    file, size = folder / "model.onnx", record["preprocess"]["size"]
    program = torch.onnx.export(
        backbone,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        input_names=["images"],
        output_names=["embedding"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None
    program.save(str(file), external_data=False)
    model = onnx.load(file)
    described = {
        "input": f"images: float32 (batch, 3, {size}, {size}), RGB scaled to 0…1, minus mean, over std",
        "output": f"embedding: float32 (batch, {backbone.embedding_dim})",
        "preprocess": json.dumps(record["preprocess"]),
        "teacher": str(record.get("teacher", "")),
        "method": str(record.get("method", "")),
    }
    onnx.helper.set_model_props(model, described)
    onnx.save(model, file)

    def load() -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession(f"{folder}/model.onnx")\n'
        'model = lambda images: session.run(None, {"images": images.numpy()})[0]'
    ), load


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

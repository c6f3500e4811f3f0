"""A student as an ONNX file, from normalised images or, with the preprocessing inside the graph, from images as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.exporting.card import Written
from featcache.graph import describe, write_graph
from featcache.inputs.images import Preprocess
from featcache.student import Student


class Half(nn.Module):
    """A model computed in float16, float32 on both sides."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.half()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.half()).float()


def write_onnx(
    folder: Path,
    student: Student,
    record: dict[str, Any],
    precision: str,
    with_preprocessing: bool = False,
    quantise: Callable[[Path], None] | None = None,
) -> Written:
    """Write `model.onnx`.

    Args:
        quantise: what to do with the file of precision "int8", written in fp32 and for normalised images.

    Raises:
        ValueError: the packages of the extra `onnx` are missing.
    """
    file, name = folder / "model.onnx", "pixels" if with_preprocessing else "images"
    shape = student.gives_shape  # it is tried in fp32
    model = Half(student.deployed) if precision == "fp16" else student.deployed
    preprocess = Preprocess.from_dict(record["preprocess"])
    inside = with_preprocessing and not quantise
    takes = write_graph(file, model, preprocess, [student.gives], with_preprocessing=inside)
    if quantise:
        quantise(file)
        takes = _put_before(file, preprocess) if with_preprocessing else takes
    described = {
        "input": takes,
        "output": f"{student.gives}: float32 (batch, {', '.join(map(str, shape))})",
        "precision": precision,
        "preprocess": json.dumps(record["preprocess"]),
        "teacher": str(record.get("teacher", "")),
        "method": str(record.get("method", "")),
        **({"classes": json.dumps(student.classes)} if student.classes else {}),
    }
    describe(file, described)

    def load() -> Callable[[Tensor], Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(np.asarray(session.run(None, {name: images.numpy()})[0]))

    loading = (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession(f"{folder}/model.onnx")\n'
        f'model = lambda {name}: session.run(None, {{"{name}": {name}.numpy()}})[0]'
    )
    return Written(loading=loading, load=load)


def _put_before(file: Path, preprocess: Preprocess) -> str:
    """Let the model of normalised images in a file take images as they are; returns what it takes, in words."""
    import onnx
    import onnx.compose

    after, first = onnx.load(file), file.with_name("before.onnx")
    takes = write_graph(first, nn.Identity(), preprocess, ["images"], with_preprocessing=True)
    before = onnx.compose.add_prefix(onnx.load(first), "preprocessing/", rename_inputs=False)
    first.unlink()
    before.ir_version = after.ir_version
    onnx.save(onnx.compose.merge_models(before, after, [("preprocessing/images", "images")]), file)
    return takes

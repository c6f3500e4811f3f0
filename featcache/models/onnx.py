"""`onnx/PATH`: a file that `distill export --format onnx` wrote, or the folder that it lies in, as a teacher. ONNX Runtime runs it on
the CPU in the precision that it was written in, int8 say; how an image becomes what it takes stands in its metadata."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featcache.inputs.images import Preprocess, image_input
from featcache.models import Features, Model, first_line

FILE = "model.onnx"
"""In a folder that is given."""


class OnnxModel(Model):
    """An ONNX file; images normalised as its metadata says → what it gives, logits also as the embedding.

    Attributes:
        digest: 128-bit BLAKE2b of the file, in place of weights: it is what tells one from another.
    """

    own_precision = True
    digest: Tensor

    def __init__(self, spec: str, file: Path):
        super().__init__()
        content = file.read_bytes()
        self.spec, self.files, self.session = spec, (os.path.abspath(file),), open_session(file, content)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        self.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        said = self.session.get_modelmeta().custom_metadata_map
        self.input = _input(file, self.session, said)
        self.given, self.gives = self.session.get_inputs()[0].name, self.session.get_outputs()[0].name
        size = self.input.size
        found = self(torch.zeros(1, 3, size, size))
        self.fields = {name: tuple(value.shape[1:]) for name, value in found.items()}
        self.classes = _classes(file, said, found["embedding"].shape[1])
        self.output = f"{self.gives} of an ONNX file"

    def forward(self, images: Tensor) -> Features:
        if images.requires_grad:
            raise ValueError(f"{self.spec}: ONNX Runtime gives no gradients; attack the run that was exported")
        batch = images.cpu().float().contiguous().numpy()
        found = torch.from_numpy(np.asarray(self.session.run(None, {self.given: batch})[0])).to(images.device)
        return {"embedding": found, "logits": found} if self.gives == "logits" else {"embedding": found}


def open_session(file: Path, content: bytes | None = None, threads: int | None = None) -> Any:
    """ONNX Runtime on the CPU, with as many threads as PyTorch takes unless said.

    Raises:
        ValueError: the package is missing, or the file is none of ONNX.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"{file}: running it needs onnxruntime; pip install 'featcache[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or torch.get_num_threads(), 3
    # A pool that waits for work by spinning takes the cores from whoever reads images, or is timed beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(content or str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no base class
        raise ValueError(f"{file}: is no ONNX file that runs here ({first_line(error)})") from None


def _input(file: Path, session: Any, said: dict[str, str]) -> Preprocess:
    """What the metadata of the file says of its images.

    Raises:
        ValueError: nothing, or that it is not for normalised images.
    """
    try:
        preprocess = image_input(json.loads(said["preprocess"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: its metadata does not say how images are preprocessed ({type(error).__name__}: {error}); give a file that "
            "`distill export --format onnx` wrote"
        ) from None
    inputs, (first, *others) = session.get_inputs(), session.get_outputs()
    if inputs[0].type != "tensor(float)":
        raise ValueError(
            f"{file}: takes images as they are; export once more without --with-preprocessing for a file to be measured"
        )
    shape = [side if isinstance(side, int) else 0 for side in inputs[0].shape]
    if len(inputs) > 1 or others or shape != [0, 3, preprocess.size, preprocess.size] or len(first.shape) != 2:
        raise ValueError(
            f"{file}: takes {inputs[0].shape} and gives {first.shape}, not images (batch, 3, {preprocess.size}, "
            f"{preprocess.size}) and one vector of each"
        )
    return preprocess


def _classes(file: Path, said: dict[str, str], width: int) -> list[str] | None:
    """What the numbers that it gives stand for, where its metadata says so.

    Raises:
        ValueError: it names others than so many.
    """
    if "classes" not in said:
        return None
    try:
        names = json.loads(said["classes"])
    except ValueError:
        names = None
    if not isinstance(names, list) or len(names) != width or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{file}: its metadata does not name the {width} classes that it gives numbers of; give a file that `distill export "
            "--format onnx` wrote"
        )
    return names


def open_model(rest: str) -> OnnxModel:
    file = Path(named_files(rest)[0])
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; make one with `distill export RUN {file.parent} --format onnx`, and give onnx/PATH of it"
        )
    return OnnxModel(f"onnx/{rest}", file)


def named_files(rest: str) -> list[str]:
    return [os.path.join(rest, FILE) if os.path.isdir(rest) else rest]

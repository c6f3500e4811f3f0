"""The encoder of a deployed detector: the one that made the stores, as a graph from images as they are to its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featcache.corpora import open_corpus
from featcache.encoder import Encoder, load_encoder
from featcache.extraction.samples import content_hash
from featcache.graph import Preprocessed, describe, pixels, write_graph
from featcache.inputs import Views
from featcache.inputs.images import Preprocess
from featcache.models import first_line
from featcache.models.onnx import OnnxModel, open_session
from featcache.rows import Rows
from featcache.store.comparable import FAITHFUL

Encode = Callable[[np.ndarray], dict[str, np.ndarray]]
"""One RGB image, uint8 (height, width, 3) → features by name, float32 (1, …)."""

LARGEST_DIFFERENCE = 2e-3
"""Between a feature of the graph and the encoder's, as a share of its length: float16 alone, where it is kept so, rounds by 5e-4."""
CHECKED_IMAGES = 16
"""Of the held-out rows, read again and encoded by the graph, to be compared with their rows."""


class AsKept(nn.Module):
    """Some of an encoder's features, each rounded as its stores keep it: what is rounded otherwise, detectors may tell apart."""

    def __init__(self, module: nn.Module, dtypes: Mapping[str, str]):
        super().__init__()
        self.module, self._dtypes = module, {name: getattr(torch, dtype) for name, dtype in dtypes.items()}

    def forward(self, images: Float[Tensor, "batch 3 size size"]) -> tuple[Tensor, ...]:
        found = self.module(images)
        return tuple(found[name].float().to(dtype).float() for name, dtype in self._dtypes.items())


def open_encoder(spec: str, bank: Rows, fields: Mapping[str, str], trust_code: bool) -> Encoder:
    """The encoder of that spec, once it is known to be the one of `bank`. `fields` are those that are needed.

    Raises:
        ValueError: it cannot be opened, is another, takes no plain images or does not give a field.
    """
    store = bank.stores[0]
    try:
        encoder = load_encoder(spec, trust_code=trust_code)
    except ValueError as error:
        raise ValueError(
            f"{bank.name}: its encoder {spec} cannot be opened ({error}); say where it is with --encoder SPEC, or make a "
            "detector for stores alone with --encoder none"
        ) from None
    if encoder.fingerprint != store.fingerprint:
        raise ValueError(
            f"{spec} is encoder {encoder.fingerprint}, {bank.name} was made by {store.encoder_name} ({store.fingerprint}); "
            "give that one as --encoder SPEC, or extract the store again"
        )
    if type(encoder.preprocess) is not Preprocess:
        raise ValueError(f"{spec}: takes no plain images, which a graph could prepare; give --encoder none")
    for name in fields:
        if encoder.fields.get(name) != tuple(bank.shape_of(name)):
            raise ValueError(f"{spec}: gives no {name} of {tuple(bank.shape_of(name))}, as {bank.name} has it")
    return encoder.to("cpu")


def _write_joined(file: Path, encoder: Encoder, dtypes: Mapping[str, str]) -> str:
    """The graph of an encoder that is an ONNX file itself: preprocessing, that file, and how features are kept."""
    import onnx
    from onnx import TensorProto, compose, helper

    model = encoder.module
    assert isinstance(model, OnnxModel)
    takes = write_graph(file, nn.Identity(), encoder.image_input, ["prepared"], with_preprocessing=True)
    first = compose.add_prefix(onnx.load(file), "prepare/", rename_inputs=False)
    second = compose.add_prefix(onnx.load(model.files[0]), "model/")
    first.ir_version = second.ir_version = max(first.ir_version, second.ir_version)
    whole = compose.merge_models(first, second, io_map=[("prepare/prepared", f"model/{model.given}")])
    del whole.graph.output[:]
    for name, dtype in dtypes.items():
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        whole.graph.node.append(helper.make_node("Cast", [f"model/{model.gives}"], [f"{name}/kept"], to=kind))
        whole.graph.node.append(helper.make_node("Cast", [f"{name}/kept"], [name], to=TensorProto.FLOAT))
        shape = ["batch", *encoder.fields[name]]
        whole.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    onnx.save(whole, file)
    return takes


def write_encoder(file: Path, encoder: Encoder, dtypes: Mapping[str, str]) -> float:
    """Write the graph from `pixels`, uint8 (batch, height, width, 3), to these features, kept in these dtypes; returns by
    how much of a feature's length it differs from the encoder, at worst, on images made up.

    Raises:
        ValueError: the encoder cannot be a graph, or the packages of the extra `onnx` are missing.
        RuntimeError: what was written does not give what the encoder gives.
    """
    kept, size = AsKept(encoder.module, dtypes), encoder.image_input.size
    try:
        if isinstance(encoder.module, OnnxModel):
            takes = _write_joined(file, encoder, dtypes)
        else:
            takes = write_graph(file, kept, encoder.image_input, list(dtypes), with_preprocessing=True)
    except ValueError:
        raise
    except Exception as error:  # torch's exporter raises its own kinds, over many lines
        said = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(
            f"{encoder.name}: cannot be written as ONNX ({said}); keep its weights with --format safetensors, which needs featcache"
        ) from None
    describe(file, {"input": takes, "encoder": encoder.name, "fingerprint": encoder.fingerprint})
    graph, plain, worst = open_session(file), Preprocessed(kept, encoder.image_input), 0.0
    for count in (1, 3):
        images = pixels(count, 2 * size + count, 3 * size)
        with torch.inference_mode():
            wanted = plain(images)
        for found, of in zip(graph.run(None, {"pixels": images.numpy()}), wanted, strict=True):
            apart = (torch.from_numpy(found) - of).norm(dim=1) / of.norm(dim=1).clamp(min=1e-12)
            worst = max(worst, float(apart.nan_to_num(torch.inf).max()))
    if not worst <= LARGEST_DIFFERENCE:
        raise RuntimeError(
            f"{encoder.name}: as ONNX it differs by {worst:.1e} of a feature's length, more than {LARGEST_DIFFERENCE:.0e}; "
            "nothing was kept"
        )
    return worst


def open_graph(file: Path) -> Encode:
    """What `write_encoder` wrote."""
    graph = open_session(file)
    names = [each.name for each in graph.get_outputs()]
    return lambda image: dict(zip(names, graph.run(None, {"pixels": image[None]}), strict=True))


def write_weights(file: Path, encoder: Encoder) -> None:
    """Write the encoder's weights alone, for those that no graph can be made of: they need featcache, and the encoder's code.

    Raises:
        ValueError: its weights are an ONNX file.
    """
    if isinstance(encoder.module, OnnxModel):
        raise ValueError(f"{encoder.name}: is a graph already; leave out --format safetensors")
    state = encoder.module.state_dict()
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in state.items()}, file)


def open_weights(file: Path, spec: str, fingerprint: str, dtypes: Mapping[str, str], trust_code: bool) -> Encode:
    """The encoder of that spec with the weights that `write_weights` wrote.

    Raises:
        ValueError: it cannot be opened here, or is another.
    """
    encoder = load_encoder(spec, trust_code=trust_code)
    try:
        encoder.module.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ValueError(f"{file}: does not fit {spec} as it is here ({first_line(error)})") from None
    if encoder.fingerprint != fingerprint:
        raise ValueError(f"{spec}: is encoder {encoder.fingerprint} with {file}, which was written of {fingerprint}")
    kept, like = AsKept(encoder.to("cpu").module, dtypes), encoder.image_input

    def encode(image: UInt8[np.ndarray, "height width 3"]) -> dict[str, np.ndarray]:
        item = Image.fromarray(image)
        pixels = like.render(item, like.draw(item.size, Views(), "", 0))
        with torch.inference_mode():
            found = kept(like.to_model(torch.from_numpy(pixels.copy())[None]))
        return {name: value.numpy() for name, value in zip(dtypes, found, strict=True)}

    return encode


def images_again(rows: Rows, most: int = CHECKED_IMAGES) -> dict[int, np.ndarray]:
    """RGB pixels of some of the rows' images by their position, as far as the corpus is still there and they are the same."""
    found: dict[int, np.ndarray] = {}
    opened: dict[int, Any] = {}
    for position in np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int).tolist():
        number, row = rows.locate(position)
        store = rows.stores[number]
        try:
            if number not in opened:
                opened[number] = open_corpus(str(store.manifest.corpus.spec))
            encoded = opened[number].read(row)
            if content_hash(encoded) == store.content[row].tobytes():
                found[position] = np.asarray(Preprocess.decode(encoded))
        except Exception:  # gone, moved or changed: there is nothing to compare with
            continue
    return found


def require_faithful(encode: Encode, rows: Rows, images: Mapping[int, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """Features of these images, by position.

    Raises:
        RuntimeError: the cosine of an embedding to its row is less than `FAITHFUL`.
    """
    found = {position: encode(image) for position, image in images.items()}
    for position, features in found.items():
        row, made = rows.take(np.array([position]))[0].astype(np.float64), features["embedding"][0].astype(np.float64)
        cosine = float(row @ made / max(np.linalg.norm(row) * np.linalg.norm(made), 1e-300))
        if not cosine >= FAITHFUL and row.any():
            raise RuntimeError(
                f"{rows.sample_ids[position]}: the cosine of its embedding to its row in {rows.name} is "
                f"{cosine:.5f}, less than {FAITHFUL}: the store was not made like this; extract it again with --precision fp32"
            )
    return found

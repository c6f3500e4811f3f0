"""Encoder: a frozen model, its input, and a fingerprint of both."""

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Num, Shaped
from torch import Tensor, nn

from featcache.inputs import Input
from featcache.inputs.images import Preprocess
from featcache.models import Field, Model
from featcache.plugins import load_plugin, plugin_names
from featcache.precision import FP32, Precision, full_fp32
from featcache.specs import code_in, names_code
from featcache.store.layout import DTYPES, INTEGERS


@dataclass(kw_only=True)
class Encoder:
    """A frozen model that maps images, or texts, to features.

    Attributes:
        name: the spec it was loaded from.
        module: eval-mode module; takes what `preprocess.to_model` gives, normalised images (B, 3, S, S) or token ids
            (B, L), and returns a dict of tensors (B, …), more of them than `fields` if it likes.
        preprocess: how an image becomes its pixels, or a text its token ids.
        fields: shape of one sample's features, by name: "embedding" (D,) always, and where the model gives them
            "logits" (C,), "tokens" (T, D), the patch tokens in row-major order of the patch grid, and
            "prefix_tokens" (P, D), the class token and the registers; further names and shapes as you like.
            A plain int is the length of a vector; a `Field` says what it is kept in too.
        dtypes: of the fields that say it, see `Field`.
        output: which layer and pooling each field is, in words; part of the fingerprint.
        files: local files that the weights were loaded from, where known.
        classes: names of the columns of its "logits", where known.
        own_precision: it computes in one way alone, as an ONNX file does, and is given images in float32.
        reload: loads it again, in another process say; None for one that a program made by hand.
    """

    name: str
    module: nn.Module
    preprocess: Input[Any, Any]
    fields: dict[str, Any]  # int, tuple or Field is given, tuple is read
    output: str
    files: tuple[str, ...] = ()
    classes: Sequence[str] | None = None
    own_precision: bool = False
    reload: "Callable[[], Encoder] | None" = field(default=None, init=False, repr=False)
    dtypes: dict[str, str] = field(default_factory=dict, init=False)
    device: torch.device = field(default=torch.device("cpu"), init=False)
    _exact: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # while they are rounded
    precision: Precision = field(default=FP32, init=False)

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)
        given = {
            name: of if isinstance(of, Field) else Field((of,) if isinstance(of, int) else tuple(of))
            for name, of in self.fields.items()
        }
        self.fields = {name: tuple(of.shape) for name, of in given.items()}
        self.dtypes = {name: of.dtype for name, of in given.items() if of.dtype is not None}
        if unknown := {*self.dtypes.values()} - {*DTYPES, *INTEGERS}:
            known = ", ".join((*DTYPES, *INTEGERS))
            raise ValueError(f"{self.name}: its fields name dtype {unknown.pop()!r}; known: {known}")
        if len(self.fields.get("embedding", ())) != 1:
            raise ValueError(f'{self.name}: its fields {self.fields} need an "embedding" that is a vector')

    @classmethod
    def of(cls, model: Model) -> "Encoder":
        """A teacher, frozen."""
        return cls(
            name=model.spec,
            module=model,
            preprocess=model.input,
            fields=dict(model.fields),
            output=model.output,
            files=model.files,
            classes=model.classes,
            own_precision=model.own_precision,
        )

    @property
    def image_input(self) -> Preprocess:
        """Its input, where that is of images.

        Raises:
            ValueError: it is of another kind.
        """
        if not isinstance(self.preprocess, Preprocess):
            raise ValueError(
                f"{self.name}: takes {self.preprocess.kind}s, and this is for images; give an encoder of images"
            )
        return self.preprocess

    @property
    def embedding_dim(self) -> int:
        return int(self.fields["embedding"][0])

    @property
    def token_head(self) -> nn.Linear | None:
        """Of a language model, what reads its hidden states; see `Model.token_head`."""
        found = getattr(self.module, "token_head", None)
        return found if isinstance(found, nn.Linear) else None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.module.parameters())

    @cached_property
    def fingerprint(self) -> str:
        """128-bit BLAKE2b, in hex, of every weight, the preprocessing, and the layer and pooling.

        Precision and machine are not in it: a store's manifest records them, and stores that differ in them are not
        compared.
        """
        digest = hashlib.blake2b(f"{self.preprocess.to_dict()}\0{self.output}".encode(), digest_size=16)
        for key, weight in sorted(self.module.state_dict().items()):
            digest.update(f"\0{key}\0{weight.dtype}\0{tuple(weight.shape)}\0".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def to(self, device: torch.device | str, precision: Precision = FP32) -> "Encoder":
        """Move, cast and lay out the model in place; returns self.

        The result depends on `device` and `precision` alone, not on what the model was in before: from half precision it
        goes back to the exact weights first, buffers that no state dict holds included, and every tensor is laid out anew.
        """
        assert self.fingerprint  # of the fp32 weights, whatever comes after
        self.device = torch.device(device)
        self.module.to(self.device)
        if not self._exact and precision.weights != torch.float32:
            self._exact = {name: tensor.detach() for name, tensor in self._floats()}
        self.precision, self._exact = precision, {name: exact.to(self.device) for name, exact in self._exact.items()}
        for name, tensor in self._floats():
            exact = self._exact.get(name, tensor).to(precision.weights)
            # `contiguous` keeps the strides of a 1 × 1 convolution in channels_last, and kernels are chosen by them.
            tensor.data = exact.clone(memory_format=precision.memory_format) if exact.dim() == 4 else exact
        self._exact = self._exact if precision.weights != torch.float32 else {}
        return self

    def _floats(self) -> Iterator[tuple[str, Tensor]]:
        named = chain(self.module.named_parameters(), self.module.named_buffers())
        return ((name, tensor) for name, tensor in list(named) if tensor.is_floating_point())

    @torch.inference_mode()
    def encode(
        self, pixels: Shaped[Tensor, "batch ..."], fields: Sequence[str] | None = None
    ) -> dict[str, Num[Tensor, "batch ..."]]:
        """What `preprocess.render` gives (of images, RGB pixels) → features, float32, or whole numbers in their own dtype, on
        the encoder's device.

        Args:
            pixels: uint8, or int32 token ids; in pinned memory they are copied to a GPU while it works.
            fields: which features to return, of `self.fields`; all of them by default.

        Raises:
            ValueError: the module returns a field in another shape than `self.fields` says, or no whole numbers where those are said.
        """
        given = self.preprocess.to_model(pixels.to(self.device, non_blocking=True))
        if given.is_floating_point():
            given = given.to(self.precision.weights, memory_format=self.precision.memory_format)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.autocast), full_fp32(self.device):
            features = self.module(given)
        wanted = self.fields if fields is None else fields
        if not self.preprocess.alike:
            features = {name: _lengthened(features[name], self.fields[name]) for name in wanted if name in features}
        for name in wanted:
            if name not in features or tuple(features[name].shape[1:]) != self.fields[name]:
                found = f"{tuple(features[name].shape[1:])}" if name in features else "nothing"
                raise ValueError(
                    f"{self.name}: its module gives {found} as {name!r}, not {self.fields[name]}; correct `fields`"
                )
        return {name: self._kept(name, features[name]) for name in wanted}

    def _kept(self, name: str, values: Tensor) -> Tensor:
        """A feature in float32, or in the dtype of whole numbers that it is kept in."""
        dtype = self.dtypes.get(name)
        if dtype not in INTEGERS:
            return values.float()
        held = getattr(torch, dtype)
        if values.dtype == held:
            return values
        if values.is_floating_point() or not torch.equal(values.to(held).to(values.dtype), values):
            raise ValueError(f"{self.name}: its module gives {values.dtype} as {name!r}, no {dtype}; correct `fields`")
        return values.to(held)

    def encode_padded(
        self, pixels: Shaped[Tensor, "n ..."], batch: int, fields: Sequence[str] = ("embedding",)
    ) -> dict[str, Num[Tensor, "n ..."]]:
        """`encode`, in forward passes of exactly `batch` samples of one width, the last one filled up.

        A model takes other kernels for another number of samples, and gives other bits: so it always gets as many.
        """
        places, parts = [], []
        for at, of_width in self.preprocess.by_width(pixels):
            places.append(torch.arange(len(pixels))[at])
            for part in torch.split(of_width, batch):
                filling = part[:1].expand(batch - len(part), *part.shape[1:])
                found = self.encode(torch.cat([part, filling]) if len(filling) else part, fields)
                parts.append({name: features[: len(part)] for name, features in found.items()})
        whole = {name: torch.cat([part[name] for part in parts]) for name in fields}
        if len(places) == 1:
            return whole
        order = torch.cat(places).argsort()
        return {name: features[order.to(features.device)] for name, features in whole.items()}


def _lengthened(values: Shaped[Tensor, "batch ..."], shape: tuple[int, ...]) -> Shaped[Tensor, "batch ..."]:
    """Features of each token of a batch that is narrower than the field, with zeros behind them."""
    missing = shape[0] - values.shape[1] if values.ndim == len(shape) + 1 and len(shape) else 0
    if missing <= 0 or values.shape[2:] != shape[1:]:
        return values
    return torch.cat([values, values.new_zeros(len(values), missing, *shape[1:])], 1)


def load_encoder(spec: str, *, trust_code: bool = False) -> Encoder:
    """Load a frozen encoder by its spec: `LIBRARY/NAME…`, `run:PATH[@epoch=N]` for a trained student, or `MODULE:CALLABLE`.

    Args:
        trust_code: a student `MODULE:CALLABLE` in the folder of `run:PATH` may be imported. One in the spec is.

    Raises:
        ValueError: no such library, model or weights; the message suggests near names or the remedy.
    """
    match = re.match(r"([\w-]+)[/:](.+)", f"python:{code_in(spec)}" if names_code(spec) else spec)
    if not match:
        sources = ", ".join(plugin_names("featcache.models"))
        raise ValueError(
            f"teacher {spec!r} is not SOURCE/NAME; sources: {sources} (for example timm/vit_small_patch14_dinov2.lvd142m)"
        )
    open_model = load_plugin("featcache.models", match[1].replace("-", "_")).open_model
    trusting = trust_code and "trust_code" in inspect.signature(open_model).parameters
    found = open_model(match[2], trust_code=True) if trusting else open_model(match[2])
    if not isinstance(found, Encoder | Model):
        raise ValueError(f"teacher {match[2]}: returned a {type(found).__name__}, not a featcache.Encoder")
    encoder = found if isinstance(found, Encoder) else Encoder.of(found)
    encoder.reload = partial(load_encoder, spec, trust_code=trust_code)
    return encoder

"""Encoder: a frozen model, its preprocessing, and a fingerprint of both."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from featcache.plugins import load_plugin, plugin_names
from featcache.precision import FP32, Precision
from featcache.preprocess import Preprocess


@dataclass(kw_only=True)
class Encoder:
    """A frozen model that maps pixels to features.

    Attributes:
        name: the spec it was loaded from.
        module: eval-mode module; takes normalised images (B, 3, S, S) and returns a dict of tensors (B, …), more of
            them than `fields` if it likes.
        preprocess: how an image becomes its pixels.
        fields: shape of one image's features, by name: "embedding" (D,) always, and where the model gives them
            "logits" (C,), "tokens" (T, D), the patch tokens in row-major order of the patch grid, and
            "prefix_tokens" (P, D), the class token and the registers; further names and shapes as you like.
            A plain int is the length of a vector.
        output: which layer and pooling each field is, in words; part of the fingerprint.
        files: local files that the weights were loaded from, where known.
    """

    name: str
    module: nn.Module
    preprocess: Preprocess
    fields: dict[str, Any]
    output: str
    files: tuple[str, ...] = ()
    device: torch.device = field(default=torch.device("cpu"), init=False)
    _fp32: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    precision: Precision = field(default=FP32, init=False)

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)
        self.fields = {
            name: (shape,) if isinstance(shape, int) else tuple(shape) for name, shape in self.fields.items()
        }
        if len(self.fields.get("embedding", ())) != 1:
            raise ValueError(f'{self.name}: its fields {self.fields} need an "embedding" that is a vector')

    @property
    def embedding_dim(self) -> int:
        return self.fields["embedding"][0]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.module.parameters())

    @cached_property
    def fingerprint(self) -> str:
        """128-bit BLAKE2b, in hex, of every weight, the preprocessing, and the layer and pooling.

        Precision and device are not in it: they are held to a cosine of 0.999 to fp32 instead.
        """
        digest = hashlib.blake2b(f"{self.preprocess.to_dict()}\0{self.output}".encode(), digest_size=16)
        for key, weight in sorted(self.module.state_dict().items()):
            digest.update(f"\0{key}\0{weight.dtype}\0{tuple(weight.shape)}\0".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def to(self, device: torch.device | str, precision: Precision = FP32) -> "Encoder":
        """Move and cast the model in place; returns self. From half precision it goes back to the exact weights first."""
        assert self.fingerprint  # of the fp32 weights, whatever comes after
        if self.precision.weights != torch.float32:
            self.module.float().load_state_dict(self._fp32)
        elif precision.weights != torch.float32:
            self._fp32 = {key: weight.clone() for key, weight in self.module.state_dict().items()}
        self.device, self.precision = torch.device(device), precision
        self.module.to(self.device, precision.weights)
        if precision.channels_last:
            self.module.to(memory_format=torch.channels_last)
        return self

    @torch.inference_mode()
    def encode(
        self, pixels: UInt8[Tensor, "batch size size 3"], fields: Sequence[str] | None = None
    ) -> dict[str, Float[Tensor, "batch ..."]]:
        """RGB pixels at `preprocess.size` px → features, float32, on the encoder's device.

        Args:
            pixels: uint8; in pinned memory they are copied to a GPU while it works.
            fields: which features to return, of `self.fields`; all of them by default.

        Raises:
            ValueError: the module returns a field in another shape than `self.fields` says.
        """
        images = normalise(pixels.to(self.device, non_blocking=True), self.preprocess)
        images = images.to(self.precision.weights, memory_format=self.precision.memory_format)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.autocast):
            features = self.module(images)
        wanted = self.fields if fields is None else fields
        for name in wanted:
            if name not in features or tuple(features[name].shape[1:]) != self.fields[name]:
                found = f"{tuple(features[name].shape[1:])}" if name in features else "nothing"
                raise ValueError(
                    f"{self.name}: its module gives {found} as {name!r}, not {self.fields[name]}; correct `fields`"
                )
        return {name: features[name].float() for name in wanted}


def normalise(pixels: UInt8[Tensor, "batch size size 3"], preprocess: Preprocess) -> Float[Tensor, "batch 3 size size"]:
    """uint8 RGB pixels → float32, scaled to 0…1, minus mean, over std."""
    # Whole lines of an image at a time: four times as fast as over a last dimension of 3.
    width = pixels.shape[2]
    mean = torch.tensor(preprocess.mean, device=pixels.device).mul(255).repeat(width)
    std = torch.tensor(preprocess.std, device=pixels.device).mul(255).repeat(width)
    return pixels.flatten(2).float().sub_(mean).div_(std).view(pixels.shape).permute(0, 3, 1, 2)


def load_encoder(spec: str) -> Encoder:
    """Load a frozen encoder by its spec: `SOURCE/NAME…`, `run:PATH` for a trained student, or `MODULE:CALLABLE`.

    Raises:
        ValueError: no such source, model or weights; the message suggests near names or the remedy.
    """
    match = re.match(r"(\w+)[/:](.+)", spec)
    if re.fullmatch(r"[\w.]+:\w+", spec) and spec.partition(":")[0] not in plugin_names("featcache.encoders"):
        return load_plugin("featcache.encoders", "python").load_encoder(spec)
    if not match:
        sources = ", ".join(plugin_names("featcache.encoders"))
        raise ValueError(
            f"teacher {spec!r} is not SOURCE/NAME; sources: {sources} (for example timm/vit_small_patch14_dinov2.lvd142m)"
        )
    return load_plugin("featcache.encoders", match[1]).load_encoder(match[2])


def read_weights(path: str) -> dict[str, Any]:
    """A state dict from a `.safetensors` or PyTorch file, never by unpickling code.

    Raises:
        ValueError: no such file, or it holds anything but tensors.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such weights file") from None
    except Exception as error:
        raise ValueError(
            f"{path}: not a weights file that loads without unpickling code ({type(error).__name__}); convert it to .safetensors"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a state dict; save `model.state_dict()`")
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return state

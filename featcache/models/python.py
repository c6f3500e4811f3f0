"""`MODULE:CALLABLE` (or `python:MODULE:CALLABLE`): an encoder, or a network to be trained, that the user's own code makes."""

import copy
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcache.inputs import input_of
from featcache.inputs.texts import Texts
from featcache.models import Features, Model, Variant, first_line
from featcache.models.timm import timm_features

SIZE = 32
IMAGENET_CLASSES = 1000


class OwnModel(Model):
    """A module of the user's, or of torchvision without its classifier; of models of timm's kind the tokens too."""

    def __init__(self, spec: str, network: nn.Module, image_size: int, texts: Texts | None = None):
        super().__init__()
        self.spec, self.network, self.image_size, self.record = spec, network, image_size, {"architecture": spec}
        if texts is not None:
            self.kind, self.input = "text", texts
        self.removed = _remove_classifier(network) if spec.startswith("torchvision.models") else 0

    def forward(self, images: Tensor) -> Features:
        if hasattr(self.body, "forward_head"):
            return timm_features(self.body, images)
        return {"embedding": self.body(images)}

    def refuse_untrainable(self, width: int) -> None:
        """Raises ValueError where it gives something else in training than it does in use, as Inception does, or what
        does not follow from its weights; or where it cannot be copied or saved."""
        spec = self.spec
        if self.removed:
            self.remark = f"{spec}: its classifier of {self.removed:,} classes is left out: students give features"
        elif width == IMAGENET_CLASSES:
            self.remark = (
                f"{spec}: gives {width:,} numbers, as many as ImageNet has classes: if they are logits, return the "
                "features before them"
            )
        odd = [name for name, value in self.body.state_dict().items() if not isinstance(value, Tensor)]
        if odd:
            raise ValueError(
                f"{spec}: body.{odd[0]} of its state is no tensor, and only tensors are saved; leave it out"
            )
        try:
            body = copy.deepcopy(self.body).train()
        except Exception as error:  # the user's own code
            raise ValueError(
                f"{spec}: the student cannot be copied ({type(error).__name__}: {first_line(error)})"
            ) from error
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # what dropout draws changes nothing else
                found = body(self.example(2))
        except Exception as error:  # the user's own code
            raise ValueError(
                f"{spec}: the student cannot train on {self.takes} ({type(error).__name__}: {first_line(error)})"
                + ("; give another image_size" if self.kind == "image" else "")
            ) from error
        if not isinstance(found, Tensor) or found.shape != (2, width):
            what = f"{tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(
                f"{spec}: in training the student gives {what} of two images, in use (2, {width}); let it give the same"
            )
        if not found.requires_grad and any(weight.requires_grad for weight in body.parameters()):
            raise ValueError(
                f"{spec}: what the student gives does not follow from its weights (under torch.no_grad, or detached?), so "
                "they cannot train"
            )

    def making(self, record: Mapping[str, Any]) -> str:
        module, _, function = record["architecture"].partition(":")
        return f"from {module} import {function}  # your own code\n\nbody = {function}()"


def open_model(rest: str) -> Any:
    """What CALLABLE of MODULE, imported from the working directory too, returns: a `featcache.Encoder`, or a `Model`.

    Raises:
        ValueError: as `import_callable`.
    """
    return import_callable(rest, "teacher", "a featcache.Encoder")()


def make_model(rest: str, variant: Variant) -> OwnModel:
    variant.refuse_all_but_size(rest)
    network = import_callable(rest, "student", "an nn.Module")()
    if not isinstance(network, nn.Module):
        raise ValueError(f"student {rest}: returned a {type(network).__name__}, not an nn.Module")
    if variant.texts is not None:
        variant.of_texts(rest)
    return OwnModel(rest, network, variant.image_size or SIZE, variant.texts)


def rebuild_model(rest: str, record: Mapping[str, Any]) -> OwnModel:
    like = input_of(record["preprocess"])
    if isinstance(like, Texts):
        return make_model(rest, Variant(texts=like))
    return make_model(rest, Variant(image_size=record["preprocess"]["size"]))


def import_callable(spec: str, role: str, returns: str) -> Callable[[], Any]:
    """CALLABLE of `MODULE:CALLABLE`; MODULE may lie in the working directory.

    Args:
        role, returns: what it is and what it should return, for the message.

    Raises:
        ValueError: there is no such module or callable, or either raises anything; so does what is returned.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        raise ValueError(
            f"{role} {spec}: {type(error).__name__}: {error}; "
            f"give MODULE:CALLABLE, importable from here, that returns {returns}"
        ) from error
    finally:
        sys.path.remove(here)

    def call() -> Any:
        try:
            return function()
        except Exception as error:
            raise ValueError(
                f"{role} {spec}: it raised {type(error).__name__}: {error}; correct it (FEATCACHE_DEBUG=1 shows where)"
            ) from error

    return call


def _remove_classifier(body: nn.Module) -> int:
    """Take the last layer out of a torchvision model, the one that gives logits; returns how many, 0 where there is none."""
    for name in ("fc", "classifier", "head", "heads"):
        found = getattr(body, name, None)
        if isinstance(found, nn.Linear):
            setattr(body, name, nn.Identity())
            return found.out_features
        for inner, layer in reversed(list(found.named_children())) if isinstance(found, nn.Sequential) else ():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                setattr(found, inner, nn.Identity())
                return layer.weight.shape[0]
    return 0

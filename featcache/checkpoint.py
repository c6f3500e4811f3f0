"""Checkpoints: files of weights as others save them, and how they fit a model. Nothing in them is ever run."""

import argparse
import logging
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger("featcache")

WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "teacher", "student", "module", "net", "network"),
)
"""Under which names trainers keep the weights in their checkpoints; averaged ones come first, as timm has it."""
OF_SEVERAL = ("ema", "teacher", "momentum_encoder", "base_encoder", "encoder_q", "student", "backbone", "online")
"""Of several networks in one file, whose names fit the model equally well: the first that is called so."""
_scalar = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")),
]
"""Besides tensors, what trainers leave in checkpoints: their arguments, and numbers of NumPy."""


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` or PyTorch file, never by unpickling code; out of the wrappers that trainers
    put around it, and without the prefixes of DDP and torch.compile.

    Raises:
        ValueError: no such file, or it holds no tensors by name.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError(f"{path}: a pipe, a socket or a device, no file; give a .safetensors or PyTorch file")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # the length of a header, then the header
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_HARMLESS):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such weights file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; give a weights file, or timm/local-dir:{path}") from None
    except Exception as error:
        raise ValueError(
            f"{path}: not a weights file that loads without unpickling code ({type(error).__name__}); convert it to .safetensors"
        ) from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a state dict; save `model.state_dict()`")
    taken: list[str] = []
    while wrapped := [name for name in WRAPPERS if _holds_tensors(found.get(name))]:
        if len(wrapped) > 1:
            log.warning("%s: holds %s; %s is taken", path, " and ".join(wrapped), wrapped[0])
        found = found[wrapped[0]]
        taken.append(wrapped[0])
    state = _tensors(found)
    if not state:
        inside = f" under {'.'.join(taken)}" if taken else ""
        raise ValueError(f"{path}: holds no tensors by name{inside}; save `model.state_dict()`")
    return {_bare(key): value for key, value in state.items()}


def _holds_tensors(found: Any) -> bool:
    return isinstance(found, Mapping) and bool(
        _tensors(found) or any(_holds_tensors(found.get(name)) for name in WRAPPERS)
    )


def _tensors(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}


def _bare(key: str) -> str:
    """Without what DDP and torch.compile put in front, in whatever order."""
    while (short := key.removeprefix("module.").removeprefix("_orig_mod.")) != key:
        key = short
    return key


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights by the names of the model that they are for.

    Attributes:
        path: of the file.
        state: the weights.
        shapes: that they have in the file, where a weight of that name is in it.
        outside: names in the file that are of something else.
    """

    path: str
    state: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    outside: list[str]


def open_checkpoint(
    path: str,
    name: str,
    model: nn.Module,
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> Checkpoint:
    """The part of a file that is for `model`: under no prefix, or under one such as Lightning's `model.`,
    `teacher.backbone.` or any other, whichever has most of the model's names.

    Args:
        name: of the model, for messages.
        convert: what its library does to checkpoints of other layouts and sizes.

    Raises:
        ValueError: the file is none, `convert` fails, or several parts fit equally well and none is known to be the one.
    """
    found = read_weights(path)
    prefix = _prefix(path, found, model.state_dict())
    given = {key[len(prefix) :]: value for key, value in found.items() if key.startswith(prefix)}
    try:
        state = dict(convert(dict(given)))
    except Exception as error:  # a filter meets what it was not made for
        raise ValueError(f"{path}: does not fit {name} ({type(error).__name__}: {error})") from None
    shapes = {key: tuple(value.shape) for key, value in given.items()}
    return Checkpoint(
        path=path, state=state, shapes=shapes, outside=[key for key in found if key[: len(prefix)] != prefix]
    )


def _prefix(path: str, found: Mapping[str, Tensor], names: Mapping[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for key in found:
        at = 0
        while at >= 0:
            if key[at:] in names:
                counts[key[:at]] += 1
            at = key.find(".", at) + 1 or -1
    most = max(counts.values(), default=0)
    if 2 * most < len(names) or counts[""] == most:  # in the first case the library may know the layout
        return ""
    best = [prefix for prefix, count in counts.items() if count == most]
    known = [prefix for word in OF_SEVERAL for prefix in best if word in prefix.split(".")]
    if len(best) > 1 and not known:
        raise ValueError(f"{path}: holds several such networks, {' and '.join(best)}; save one of them alone")
    return (known or best)[0]


def fill(model: nn.Module, checkpoint: Checkpoint, name: str, heads: tuple[str, ...] = ()) -> list[str]:
    """Set every weight of `model` that is no head's, or none; and those heads that the checkpoint has whole.

    Args:
        name: of the model, for messages.
        heads: names of its classifiers.

    Returns:
        The heads that are as they were, because the checkpoint lacks them or has others.

    Raises:
        ValueError: a weight is missing or has another shape, or the checkpoint is of a model with more layers.
    """

    def head_of(key: str) -> str | None:
        return next((head for head in heads if key.startswith(f"{head}.")), None)

    own, state = model.state_dict(), checkpoint.state
    counted = {key for key in own if key.endswith(".num_batches_tracked")}  # old files lack them; nothing reads them
    other = [key for key in own if (state[key].shape != own[key].shape if key in state else key not in counted)]
    kept = list(dict.fromkeys(head for key in other if (head := head_of(key))))
    wrong = [
        f"{key} {tuple(state[key].shape)} there, {tuple(own[key].shape)} here" if key in state else f"no {key}"
        for key in other
        if not head_of(key)
    ]
    # What is left of a part that the model has too is of another model: of one with more layers, say.
    parts = {key.partition(".")[0] for key in own if not head_of(key)}
    made_anew = {key for key, _ in model.named_buffers()}
    left = [key for key in state if key not in own and key not in made_anew]
    wrong += [f"{key} too" for key in left if key.partition(".")[0] in parts and not head_of(key)]
    if wrong:
        raise ValueError(f"{checkpoint.path}: does not fit {name} ({_some(wrong, '; ')})")
    model.load_state_dict({key: state[key] for key in own if key in state and head_of(key) not in kept}, strict=False)
    resampled = [
        key
        for key in own
        if key in checkpoint.shapes and key in state and tuple(own[key].shape) != checkpoint.shapes[key]
    ]
    left += [key for key in state if key in own and head_of(key) in kept] + checkpoint.outside
    for what, names in (("resampled to the model's size", resampled), ("left out", left)):
        if names:
            log.warning("%s: %s: %s", checkpoint.path, what, _some(names))
    return kept


def _some(names: list[str], between: str = ", ") -> str:
    return between.join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def projection_in(
    path: str, width: int, further: Mapping[str, tuple[str, ...]] = MappingProxyType({})
) -> nn.Linear | None:
    """The linear layer behind a network of this width that a run's or an export's weights hold; None where there is none.

    A run's stands beside `body.`, an export's behind the network in an `nn.Sequential`.

    Args:
        further: names that it may have, with the prefixes of all other weights.
    """
    found = read_weights(path)
    for name, before in ({"projection": ("body.",), "1": ("0.",)} | dict(further)).items():
        weight, bias = found.get(f"{name}.weight"), found.get(f"{name}.bias")
        others = [key for key in found if key not in (f"{name}.weight", f"{name}.bias")]
        if weight is None or bias is None or not others or not all(key.startswith(before) for key in others):
            continue
        if weight.ndim == 2 and weight.shape[1] == width and bias.shape == weight.shape[:1]:
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.load_state_dict({"weight": weight, "bias": bias})
            return linear
    return None

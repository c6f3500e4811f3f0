"""timm's networks with weights: from the hub, from a local file, or from a folder of timm's own layout."""

import inspect
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from safetensors import safe_open
from timm.models import _builder, _hub
from torch import Tensor

from featcache import hub
from featcache.checkpoint import fill, open_checkpoint, read_weights
from featcache.models import first_line
from featcache.plugins import suggest

INPUT = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
"""What timm records of the images that weights were trained on."""
PREFERRED = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""How timm calls the weights in a folder."""


def open_pretrained(
    name: str,
    *,
    size: int | None = None,
    inputs: Sequence[str] = INPUT,
    **arguments: Any,
) -> tuple[Any, tuple[str, ...]]:
    """A timm model with pretrained weights, its `pretrained_cfg` that of those very weights; and their local files.

    Args:
        name: "NAME" or "NAME.TAG" with weights from the hub, either with ":FILE"; "hf-hub:ORGANISATION/NAME" or
            "local-dir:FOLDER", a folder of timm's own layout.
        size: side in px of the images; of a file's position embeddings too, where they are of that size.
        inputs: what must be known of the input: a file without a TAG is refused where the tags differ in it.
        arguments: of timm's `create_model`.

    Raises:
        ValueError: unknown name or tag, weights that cannot be fetched, or a file that does not fit.
    """
    if name.startswith("hf-hub:"):
        return _fetched(name, **arguments), _files_of_hub(name.removeprefix("hf-hub:"))
    if name.startswith("local-dir:"):
        files = _files_in(name.removeprefix("local-dir:"))
        return _from_file(name, files[1], size, arguments), files
    name, _, file = name.partition(":")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"timm/{name}: no such model; {suggest(architecture, timm.list_models())}")
    if file:
        if not os.path.exists(file):
            raise ValueError(f"{file}: no such weights file")
        _refuse_unknown_input(name, file, [key for key in inputs if key != "input_size" or not size])
        return _from_file(name, file, size, arguments), (os.path.abspath(file),)
    tagged = timm.list_pretrained(f"{architecture}*")
    if (name not in tagged and name != architecture) or not any(t.split(".")[0] == architecture for t in tagged):
        raise ValueError(
            f"timm/{name}: no such pretrained weights; {suggest(name, tagged)} Or give a file: timm/{architecture}:WEIGHTS"
        )
    return _fetched(name, **arguments), ()


def _fetched(name: str, **arguments: Any) -> Any:
    recorded = None if ":" in name else timm.get_pretrained_cfg(name)
    url = recorded.url if recorded and not recorded.hf_hub_id and isinstance(recorded.url, str) else None
    local = "timm/local-dir:FOLDER" if ":" in name else f"timm/{name}:WEIGHTS.safetensors"
    with hub.fetching(f"timm/{name}", "its weights could not be fetched", f"with them on disk give {local}", url):
        return timm.create_model(name, pretrained=True, **arguments)


def _files_of_hub(repository: str) -> tuple[str, ...]:
    """The weights that timm has just fetched from there, where they are in the hub's cache under timm's own name."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    found = try_to_load_from_cache(name, PREFERRED[0], revision=revision or None)
    return (found,) if isinstance(found, str) else ()


def _refuse_unknown_input(name: str, file: str, keys: Sequence[str]) -> None:
    """Raises ValueError for a tag that there is not, and for none where the weights of different tags see different inputs."""
    architecture, _, tag = name.partition(".")
    recorded = {
        each: config for each, config in timm.models.get_arch_pretrained_cfgs(architecture).items() if "." in each
    }
    if tag:
        if name not in recorded:
            what = suggest(name, recorded) if recorded else f"it has none; give timm/{architecture}:{file}"
            raise ValueError(f"timm/{name}: no such tag; {what}")
        return
    trained = {each: config for each, config in recorded.items() if config.has_weights} or recorded
    seen: dict[str, list[str]] = {}
    for each, config in trained.items():
        found = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
        seen.setdefault(str([found[key] for key in keys]), []).append(each.partition(".")[2])
    if len(seen) > 1:
        read_weights(file)  # a file that is none is refused as that
        raise ValueError(
            f"timm/{name}:{file}: weights of {name} were trained on different inputs, and which these are is not said; "
            f"give timm/{name}.TAG:{file}, TAG one of {'; or '.join(', '.join(tags) for tags in seen.values())}"
        )


_ONE_AT_A_TIME = threading.Lock()


def _untrained(name: str, **arguments: Any) -> tuple[Any, Callable[[dict[str, Tensor]], Any]]:
    """The model of that name and tag, and timm's own conversion of checkpoints for it, which reads the model's size anew
    at each call.

    timm hands that to one function only, the one that would load the tag's weights.
    """
    handed: dict[str, Any] = {}

    def keep(model: Any, **given: Any) -> None:
        handed.update(given)

    with _ONE_AT_A_TIME:
        usual = _builder.load_pretrained
        setattr(_builder, "load_pretrained", keep)  # noqa: B010
        try:
            model = timm.create_model(name, pretrained=True, **arguments)
        finally:
            _builder.load_pretrained = usual
    return model, lambda state: _converted(model, state, handed.get("filter_fn"))


def _converted(model: Any, state: dict[str, Tensor], own: Callable[..., Any] | None) -> dict[str, Tensor]:
    if own is not None:
        state = own(state, model) if len(inspect.signature(own).parameters) > 1 else own(state)
    offset = model.pretrained_cfg.get("label_offset") or 0
    for key in (f"{head}.{kind}" for head in _heads(model) for kind in ("weight", "bias")):
        if offset and key in state and len(state[key]) == model.num_classes + offset:
            state[key] = state[key][offset:]
    return state


def _heads(model: Any) -> tuple[str, ...]:
    named = model.pretrained_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def recorded_architecture(name: str) -> dict[str, Any]:
    """Of "local-dir:FOLDER" or "hf-hub:…", once it has been opened: "architecture" and "model_args", as its config.json says."""
    source, _, place = name.partition(":")
    read = _hub.load_model_config_from_path if source == "local-dir" else _hub.load_model_config_from_hf
    _, architecture, arguments = read(place)
    given = {key: value for key, value in arguments.items() if key not in ("img_size", "num_classes")}
    return {"architecture": f"timm/{architecture}", **({"model_args": given} if given else {})}


def embeds_by_classifier(files: Sequence[str]) -> bool:
    """Whether these are weights that `distill export` wrote of a student whose projection is timm's classifier."""
    if not files or not files[-1].endswith(".safetensors"):
        return False
    with safe_open(files[-1], "pt") as file:
        return (file.metadata() or {}).get("embedding") == "classifier"


def _files_in(folder: str) -> tuple[str, str]:
    """config.json and the weights of a folder of timm's layout."""
    config = os.path.join(folder, "config.json")
    if not os.path.isfile(config):
        raise ValueError(f"timm/local-dir:{folder}: holds no config.json; give timm/NAME:WEIGHTS for weights alone")
    found = [os.path.join(folder, each) for each in PREFERRED] + sorted(
        str(path) for kind in ("safetensors", "pth", "bin") for path in Path(folder).glob(f"*.{kind}")
    )
    weights = next(filter(os.path.isfile, found), None)
    if weights is None:
        raise ValueError(f"timm/local-dir:{folder}: holds no weights ({PREFERRED[0]})")
    return os.path.abspath(config), os.path.abspath(weights)


def _from_file(name: str, file: str, size: int | None, arguments: dict[str, Any]) -> Any:
    """The model of `name`, filled from a local file; without its classifier where the file has none that fits.

    With a `size`, the file's position embeddings may be of that size or of the model's own.
    """
    try:
        model, convert = _untrained(name, **arguments)
    except (RuntimeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        if arguments:
            raise
        raise ValueError(f"timm/{name}: cannot be made ({first_line(error)})") from None
    if size and hasattr(model, "set_input_size"):
        try:
            model.set_input_size(img_size=(size, size))
            return _filled(name, file, model, convert)
        except (AssertionError, RuntimeError, ValueError):
            model, convert = _untrained(name, **arguments)
    return _filled(name, file, model, convert)


def _filled(name: str, file: str, model: Any, convert: Callable[[dict[str, Tensor]], Any]) -> Any:
    if file.endswith(".npz"):
        return _filled_from_arrays(name, file, model)
    checkpoint, heads = open_checkpoint(file, f"timm/{name}", model, convert), _heads(model)
    classes = {len(checkpoint.state[key]) for key in (f"{head}.weight" for head in heads) if key in checkpoint.state}
    if model.num_classes and len(classes) == 1 and classes != {model.num_classes}:
        model.reset_classifier(classes.pop())
    if fill(model, checkpoint, f"timm/{name}", heads):
        model.reset_classifier(0)
    return model


def _filled_from_arrays(name: str, file: str, model: Any) -> Any:
    """From JAX's `.npz`, by the model's own reader; which weights it left alone is told by what they were before."""
    for weight in model.parameters():
        weight.data.fill_(torch.nan)
    try:
        model.load_pretrained(file)
    except Exception as error:  # each model's own code
        raise ValueError(f"{file}: does not fit timm/{name} ({first_line(error)})") from None
    lacking = [key for key, weight in model.named_parameters() if weight.isnan().any()]
    heads = tuple(f"{head}." for head in _heads(model))
    if wrong := [key for key in lacking if not key.startswith(heads)]:
        raise ValueError(f"{file}: does not fit timm/{name} (no {wrong[0]})")
    if lacking:
        model.reset_classifier(0)
    return model

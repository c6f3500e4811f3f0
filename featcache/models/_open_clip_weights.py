"""open_clip's models with weights: a tag's, or those of a local file or a folder of open_clip's own layout."""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import VisionTransformer
from torch import Tensor

from featcache import hub
from featcache.checkpoint import fill, open_checkpoint
from featcache.plugins import suggest


def open_pretrained(name: str, image_size: int | None = None, whole: bool = False) -> tuple[Any, tuple[str, ...]]:
    """An open_clip model with pretrained weights (of the image tower, at least) and the preprocessing of those very
    weights; and their local files. Its attribute `activation` says in words what the tag changes in the architecture.

    Args:
        name: "NAME:TAG"; "NAME:FILE" or "NAME:TAG:FILE"; "hf-hub:ORGANISATION/NAME", or "local-dir:FOLDER", of
            open_clip's own layout.
        image_size: px; the model's own when None.
        whole: a file must have both towers.

    Raises:
        ValueError: unknown name or tag, weights that cannot be fetched, or a file that does not fit.
    """
    spec, given = f"open_clip/{name}", {"force_image_size": image_size, "require_pretrained": True}
    if name.startswith("local-dir:"):
        return _of_folder(spec, name.removeprefix("local-dir:"), given)
    if name.startswith("hf-hub:"):
        with hub.fetching(
            spec, "its weights could not be fetched", "with them on disk give open_clip/local-dir:FOLDER"
        ):
            model = open_clip.create_model(name, **given)
        model.activation = ""
        return model, ()
    architecture, _, rest = name.partition(":")
    if architecture not in open_clip.list_models():
        raise ValueError(f"open_clip/{architecture}: no such model; {suggest(architecture, open_clip.list_models())}")
    tag, file = _tag_and_file(architecture, rest)
    recorded = open_clip.get_pretrained_cfg(architecture, tag) if tag else common_input(architecture, file)
    own_gelu = bool(open_clip.get_model_config(architecture).get("quick_gelu"))
    quick_gelu = bool(recorded.get("quick_gelu")) if tag else own_gelu
    if quick_gelu != own_gelu:  # open_clip only warns of it
        given["quick_gelu"] = quick_gelu
    if not file:
        remedy, url = f"with a checkpoint on disk give open_clip/{architecture}:{tag}:CHECKPOINT", recorded.get("url")
        with (
            _without_warnings(),
            hub.fetching(spec, "its weights could not be fetched", remedy, None if recorded.get("hf_hub") else url),
        ):
            model = open_clip.create_model(architecture, pretrained=tag, **given)
    else:
        fill_from = _of_both_towers if whole else _filled
        model = fill_from(spec, architecture, file, recorded, {**given, "require_pretrained": False})
    changed = quick_gelu != own_gelu and isinstance(model.visual, VisionTransformer | ModifiedResNet)
    model.activation = f"; {'QuickGELU' if quick_gelu else 'GELU'}" if changed else ""
    return model, (os.path.abspath(file),) if file else ()


def _tag_and_file(name: str, rest: str) -> tuple[str, str]:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if rest in tags:
        return rest, ""
    if os.path.isfile(rest):
        return "", rest
    tag, _, file = rest.partition(":")
    if file and tag in tags and os.path.isfile(file):
        return tag, file
    if file and tag in tags:
        raise ValueError(f"open_clip/{name}:{rest}: no such file {file}")
    hint = suggest(tag, tags) if tags else "it has no tags."
    raise ValueError(
        f"open_clip/{name}:{rest}: no such pretrained tag or file; {hint} Give open_clip/{name}:TAG or :CHECKPOINT"
    )


def common_input(name: str, file: str) -> dict[str, Any]:
    """The preprocessing that all tags of a model record.

    Raises:
        ValueError: they record different ones.
    """
    seen: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for tag in open_clip.list_pretrained_tags_by_model(name):
        config = open_clip.get_pretrained_cfg(name, tag)
        found = merge_preprocess_dict(PreprocessCfg(), config)
        found.pop("size")
        seen.setdefault(str(found), ([], found))[0].append(tag)
    if len(seen) > 1:
        choices = "; or ".join(", ".join(tags) for tags, _ in seen.values())
        raise ValueError(
            f"open_clip/{name}:{file}: weights of {name} were trained on different inputs, and which these are is not said; "
            f"give open_clip/{name}:TAG:{file}, TAG one of {choices}"
        )
    return next(iter(seen.values()))[1] if seen else {}


def _filled(spec: str, name: str, file: str, recorded: dict[str, Any], given: dict[str, Any]) -> Any:
    """The model, its image tower filled from a local file; of a tower alone, or of the whole model."""
    if is_timm := "timm_model_name" in open_clip.get_model_config(name)["vision_cfg"]:
        size, given = given["force_image_size"], {**given, "force_image_size": None}
    inputs = {key: value for key, value in recorded.items() if key != "size"}
    try:
        with _without_warnings():
            model = open_clip.create_model(name, pretrained_text=False, force_preprocess_cfg=inputs, **given)
    except Exception as error:  # a text tower may need its own library, or the hub
        raise ValueError(f"{spec}: cannot be made ({type(error).__name__}: {error})") from None
    if file.endswith(".npz"):
        _fill_from_arrays(spec, file, model)
    else:
        checkpoint = open_checkpoint(file, spec, model.visual, lambda state: _converted(model, state))
        projection = [key for key in checkpoint.outside if re.fullmatch(r"(1|projection)\.(weight|bias)", key)]
        fill(model.visual, replace(checkpoint, outside=projection), spec)  # a text tower is not missed
    if is_timm and size:
        model.visual.set_input_size(size)
    return model


def _of_both_towers(spec: str, name: str, file: str, recorded: dict[str, Any], given: dict[str, Any]) -> Any:
    """The model, all of it from a local file."""
    try:
        with _without_warnings():
            return open_clip.create_model(name, pretrained=file, **given)
    except Exception as error:  # state-dict, pickle and file errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: does not fit {spec} ({reason}); give a checkpoint of the whole model") from None


def _converted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's weights by its own names, its position embeddings in its own size."""
    whole = convert_state_dict(model, state)
    if whole is not state:  # MobileCLIP's own layout
        state = {key.removeprefix("visual."): value for key, value in whole.items() if key.startswith("visual.")}
    named = {f"visual.{key}": value for key, value in state.items()}
    resize_pos_embed(named, model)
    return {key.removeprefix("visual."): value for key, value in named.items()}


def _fill_from_arrays(spec: str, file: str, model: Any) -> None:
    """From big_vision's `.npz`; which weights its reader left alone is told by what they were before."""
    for weight in model.visual.parameters():
        weight.data.fill_(torch.nan)
    try:
        load_big_vision_weights(model, file)
    except Exception as error:  # it meets what it was not made for
        raise ValueError(f"{file}: does not fit {spec} ({type(error).__name__}: {error})") from None
    if lacking := [key for key, weight in model.visual.named_parameters() if weight.isnan().any()]:
        raise ValueError(f"{file}: does not fit {spec} (no visual.{lacking[0]})")


def _of_folder(spec: str, folder: str, given: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    try:
        with _without_warnings():
            model = open_clip.create_model(f"local-dir:{folder}", **given)
    except Exception as error:  # state-dict, JSON and file errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{spec}: cannot be loaded ({reason}); it needs open_clip_config.json and open_clip_model.safetensors"
        ) from None
    model.activation = ""
    return model, tuple(sorted(str(path.resolve()) for path in Path(folder).iterdir() if path.is_file()))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """open_clip warns of weights that it was not asked to load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""`timm/NAME[.TAG]` with weights from the Hugging Face hub, or `timm/NAME[.TAG]:WEIGHTS` from a local file; also
`timm/hf-hub:ORGANISATION/NAME`, and `timm/local-dir:FOLDER` of timm's layout. The input is what timm records for that tag.
To be trained, `timm/NAME` begins with new weights.

Options of a teacher follow: `timm/vit_small_patch14_dinov2.lvd142m@size=224@layer=-2@pool=token+avg`; see `_options.py`.
"""

import inspect
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import timm.data
import torch
from torch import Tensor, nn

from featcache.checkpoint import projection_in
from featcache.inputs.images import Preprocess
from featcache.models import Features, Model, Standalone, Variant, first_line
from featcache.models._options import PLAIN, Options, split_options
from featcache.models._timm_weights import embeds_by_classifier, open_pretrained, recorded_architecture
from featcache.models._tower import Tokens, Tower, flat
from featcache.plugins import suggest

OPTIONS = ("layer", "pool", "norm", "size")
log = logging.getLogger("featcache")


class TimmModel(Tower):
    """A timm model: its pooled features before the classifier, its logits where it has one, and its tokens."""

    library = "timm"
    own = "pooled by the model's own head (timm forward_head before the classifier)"

    projected = False
    """What would be the classifier gives the embedding."""

    def __init__(self, model: Any, projected: bool = False):
        super().__init__()
        self.model, self.projected = model, projected  # "model" is in every fingerprint
        self.describe(model)

    @property
    def trunk(self) -> Any:
        return self.model

    def describe(self, trunk: Any) -> None:
        """What timm says of its model. Only a plain transformer has one norm for the tokens of all its blocks."""
        self.layers = len(trunk.feature_info) if hasattr(trunk, "forward_intermediates") else 0
        if hasattr(trunk, "num_prefix_tokens") and self.layers and len(getattr(trunk, "blocks", ())) == self.layers:
            self.kind = "block"
            self.has_norm = not isinstance(getattr(trunk, "norm", nn.Identity()), nn.Identity)
        self.has_class_token = getattr(trunk, "cls_token", None) is not None

    def last(self, images: Tensor) -> tuple[Tensor, Tokens]:
        features = self.trunk.forward_features(images)
        return features, split_tokens(self.trunk, features)

    def head(self, features: Tensor) -> Features:
        if self.projected:
            return {"embedding": self.trunk.forward_head(features)}
        embedding = self.trunk.forward_head(features, pre_logits=True)
        if not self.trunk.num_classes:
            return {"embedding": embedding}
        return {"embedding": embedding, "logits": self.trunk.forward_head(features)}

    def tap(self, images: Tensor, layer: int, norm: bool) -> Tokens:
        run = self.trunk.forward_intermediates
        asked: dict[str, Any] = {"norm": norm} if self.has_norm else {}
        if self.has_class_token and "return_prefix_tokens" in inspect.signature(run).parameters:
            asked["return_prefix_tokens"] = True
        (found,) = run(images, indices=[layer], stop_early=True, intermediates_only=True, output_fmt="NCHW", **asked)
        feature_map, prefix = found if isinstance(found, tuple) else (found, None)
        return flat(feature_map), prefix


class TimmStudent(Model):
    """A timm model to be trained, without its classifier."""

    def __init__(self, model: Any, image_size: int, record: Mapping[str, Any], projection: nn.Linear | None = None):
        super().__init__()
        self.network, self.image_size, self.record, self.projection = model, image_size, record, projection
        config = timm.data.resolve_model_data_config(model)
        self.normalisation = config["mean"], config["std"]

    def forward(self, images: Tensor) -> Features:
        return timm_features(self.body, images)

    def making(self, record: Mapping[str, Any]) -> str:
        given = "".join(f", {key}={value!r}" for key, value in arguments_of(record).items())
        return f'import timm\n\nbody = timm.create_model("{_architecture(record)}", num_classes=0{given})'

    def standalone(self, behind: Sequence[nn.Linear], record: Mapping[str, Any], images: Tensor) -> Standalone:
        """A model of timm alone, in timm's own layout, what is behind it as its classifier; where timm's cannot compute
        that, as any library's."""
        classifier = _merged(behind)
        classes = classifier.out_features if classifier else 0
        model: Any = timm.create_model(_architecture(record), num_classes=classes, **arguments_of(record))
        state = self.body.state_dict()
        if classifier:
            known = model.state_dict().keys() - state.keys()
            _set_to(classifier, [module for name, module in model.named_modules() if f"{name}.weight" in known])
        model.eval().load_state_dict({**model.state_dict(), **state})
        with torch.no_grad():
            found, wanted = model(images), nn.Sequential(self.body, *behind)(images)
        close = 1e-5 * float(wanted.norm(dim=1).max())
        if found.shape != wanted.shape or not torch.allclose(found, wanted, atol=close):
            return super().standalone(behind, record, images)
        return Standalone(
            network=model,
            config=_config(model, record),
            code='import timm\n\nmodel = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()',
            of_hub='import timm\n\nmodel = timm.create_model("hf-hub:{name}", pretrained=True).eval()',
            # By this, `open_pretrained`'s callers know that the classifier gives the embedding.
            metadata={"embedding": "classifier"} if classifier and "classes" not in record else {},
            maps='import timm\n\nbackbone = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()',
            last_map=_last_map(self.body, images),
        )


def split_tokens(trunk: Any, features: Any) -> Tokens:
    """Patch and prefix tokens in what a timm model's `forward_features` gives; None for what it does not tell."""
    if not isinstance(features, Tensor):  # several resolutions side by side (CoaT, CrossViT)
        return None, None
    if features.ndim == 4:
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if channels_last else flat(features), None
    prefix = getattr(trunk, "num_prefix_tokens", None)
    if features.ndim != 3 or prefix is None:  # tokens in an order that timm does not tell
        return None, None
    return features[:, prefix:], features[:, :prefix]


def timm_features(body: Any, images: Tensor) -> Features:
    """All that a model of timm's kind has, without a classifier."""
    features = body.forward_features(images)
    tokens, prefix = split_tokens(body, features)
    found = {"embedding": body.forward_head(features)}
    if tokens is not None:
        found["tokens"] = tokens
    if prefix is not None and prefix.shape[1]:
        found["prefix_tokens"] = prefix
    return found


def open_model(rest: str) -> TimmModel:
    name, options = split_options("timm", rest, known=OPTIONS)
    model, files = open_pretrained(name, size=options.size)
    return as_teacher(f"timm/{rest}", model, options, files)


def as_teacher(spec: str, model: Any, options: Options = PLAIN, files: tuple[str, ...] = ()) -> TimmModel:
    """A timm model as it is, with timm's own evaluation preprocessing.

    Raises:
        ValueError: the model cannot do what `options` ask for.
    """
    config = timm.data.resolve_model_data_config(model)
    crop_mode = config["crop_mode"]
    if crop_mode not in ("center", "squash"):
        raise ValueError(f"{spec}: timm crop mode {crop_mode!r} is not supported, only center and squash")
    if config["crop_pct"] > 1:
        raise ValueError(f"{spec}: timm pads its images (crop_pct {config['crop_pct']}), which is not supported")
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ValueError(
            f"{spec}: takes images of {height} × {width} px and {channels} channels; only squares of RGB are made here"
        )
    size = options.size or config["input_size"][-1]
    if options.size:
        _resize(spec, model, size)
    teacher = TimmModel(model, projected=embeds_by_classifier(files))
    teacher.files = files
    teacher.input = Preprocess(
        resize=int(size / config["crop_pct"]),
        crop=size,
        size=size,
        interpolation=config["interpolation"],
        mode="squash" if crop_mode == "squash" else "shortest",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    teacher.choose(spec, options)
    try:
        teacher.fields = teacher.shapes(size)
    except (AssertionError, RuntimeError) as error:
        if not options.size:
            raise
        raise ValueError(f"{spec}: the model does not take images of {size} px ({first_line(error)})") from None
    return teacher


def make_model(rest: str, variant: Variant) -> TimmStudent:
    spec, size, patch_size = f"timm/{rest}", variant.image_size, variant.patch_size
    regularised: dict[str, Any] = {"drop_path_rate": variant.drop_path} if variant.drop_path else {}
    name, _, weights = rest.partition(":")
    record: dict[str, Any] = {"architecture": f"timm/{name}"}
    projection = None
    try:
        if weights or variant.pretrained:
            # Its own normalisation goes with it, and its square of the image is the teacher's: the rest may differ.
            model, files = open_pretrained(rest, size=size, inputs=("mean", "std"), **regularised)
            if name in ("local-dir", "hf-hub"):
                record = recorded_architecture(rest)
            projection = _projection(spec, model, files)
            model.reset_classifier(0)
            arguments = _arguments(record["architecture"].partition("/")[2], size, patch_size)
            if arguments:  # timm resamples position embeddings and patch filters
                model.set_input_size(**{key: (side, side) for key, side in arguments.items()})
        else:
            architecture = _known(name)
            model = timm.create_model(
                architecture, num_classes=0, **_arguments(architecture, size, patch_size), **regularised
            )
    except (TypeError, AttributeError, AssertionError, RuntimeError) as error:
        given = {"image_size": size, "patch_size": patch_size, "drop_path": variant.drop_path}
        settings = ", ".join(f"{key} {value}" for key, value in given.items() if value)
        if not settings:
            raise
        raise ValueError(f"{spec}: the model does not take {settings} ({first_line(error)}); leave it out") from None
    side = size or timm.data.resolve_model_data_config(model)["input_size"][-1]
    if side % (patch := patch_side(model)):
        raise ValueError(f"{spec}: {side} px is not a multiple of its patches of {patch} px; give another image_size")
    return TimmStudent(model, side, record | ({"patch_size": patch_size} if patch_size else {}), projection)


def rebuild_model(rest: str, record: Mapping[str, Any]) -> TimmStudent:
    own = {key: record[key] for key in ("architecture", "patch_size", "model_args") if key in record}
    patch_size, extra = own.get("patch_size", 1), own.get("model_args", {})
    if type(patch_size) is not int or patch_size < 1 or not isinstance(extra, dict):
        raise ValueError("is damaged (sizes must be whole numbers); train again with another --out")
    taken = {*inspect.signature(timm.create_model).parameters, "num_classes"}
    if wrong := [key for key in extra if not key.isidentifier() or key in taken]:
        raise ValueError(f"model_args {', '.join(wrong)}: no architecture's; train again with another --out")
    architecture = _known(_architecture(record))
    try:
        model = timm.create_model(architecture, num_classes=0, **arguments_of(record))
    except Exception as error:  # each model's own code
        raise ValueError(
            f"{architecture} cannot be made ({first_line(error)}); train again with another --out"
        ) from None
    return TimmStudent(model, record["preprocess"]["size"], own)


def named_files(rest: str) -> list[str] | None:
    weights = split_options("timm", rest, known=OPTIONS)[0].partition(":")[2]
    return [weights] if weights and os.path.isfile(weights) else None


def hub_repository(rest: str) -> str:
    if os.environ.get("TIMM_USE_OLD_CACHE"):
        return ""
    config = timm.get_pretrained_cfg(split_options("timm", rest, known=OPTIONS)[0])
    return (config.hf_hub_id if config else None) or ""


def licence(rest: str) -> str | None:
    try:
        config = timm.get_pretrained_cfg(re.split("[:@]", rest)[0])
    except RuntimeError:
        return None
    return config.license if config else None


def arguments_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `timm.create_model` needs besides the name, to build the student of this `student.json`."""
    sizes = _arguments(_architecture(record), record["preprocess"]["size"], record.get("patch_size"))
    return record.get("model_args", {}) | sizes


def _architecture(record: Mapping[str, Any]) -> str:
    return record["architecture"].partition("/")[2].partition(".")[0]


def _known(name: str) -> str:
    """The architecture of that name, without its tag."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"timm/{name}: no such model; {suggest(architecture, timm.list_models())}")
    return architecture


def _arguments(name: str, image_size: int | None, patch_size: int | None) -> dict[str, Any]:
    """What `timm.create_model` needs to build `name`, with or without a tag, for these sizes; nothing where they are
    its own, or where any size does."""
    config = timm.get_pretrained_cfg(name)
    own = config.input_size[-1] if config else None
    arguments: dict[str, Any] = {}
    if image_size and image_size != own and config and config.fixed_input_size:
        arguments["img_size"] = image_size
    if patch_size:
        arguments["patch_size"] = patch_size
    return arguments


def _projection(spec: str, model: Any, files: Sequence[str]) -> nn.Linear | None:
    """What weights of ours bring behind the model."""
    if embeds_by_classifier(files):
        if isinstance(model.get_classifier(), nn.Linear):
            return model.get_classifier()
        log.warning("%s: its projection is left out: it is no single linear layer there", spec)
        return None
    return projection_in(files[-1], getattr(model, "head_hidden_size", model.num_features)) if files else None


def patch_side(model: Any) -> int:
    """Of a transformer's patches, in px; 1 where a model has none."""
    side = getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1
    return side if isinstance(side, int) else side[0]


def _resize(spec: str, model: Any, size: int) -> None:
    """Let `model` take images of `size` px: position embeddings are resampled; a convnet needs nothing."""
    if size % (patch := patch_side(model)):
        raise ValueError(f"{spec}: {size} px is not a multiple of its patches of {patch} px")
    if not hasattr(model, "set_input_size"):
        return
    try:
        model.set_input_size(img_size=(size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{spec}: the model does not take images of {size} px ({first_line(error)})") from None


# -- export -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _merged(layers: Sequence[nn.Linear]) -> nn.Linear | None:
    """One linear layer that computes all of them, one after the other."""
    if len(layers) < 2:
        return layers[0] if layers else None
    first, second = layers
    merged = nn.Linear(first.in_features, second.out_features)
    merged.weight.copy_(second.weight @ first.weight)
    merged.bias.copy_(second.weight @ first.bias + second.bias)
    return merged


@torch.no_grad()
def _set_to(projection: nn.Linear, layers: Sequence[nn.Module]) -> None:
    """Make a classifier's layers compute the projection, where they can: the linear ones, alone or averaged, each of all
    features or of its own part of them; batch norms before them are made to do nothing."""
    linear: list[Any] = [layer for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    widths = [layer.weight.shape[1] for layer in linear]
    parts = [projection.weight] * len(linear)
    if sum(widths) == projection.in_features:
        parts = [len(linear) * part for part in projection.weight.split(widths, dim=1)]
    for layer, weight in zip(linear, parts, strict=True):
        if layer.weight.numel() == weight.numel() and layer.bias is not None:
            layer.weight.copy_(weight.view_as(layer.weight))
            layer.bias.copy_(projection.bias)
    for layer in layers:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_var is not None:
            layer.reset_parameters()
            layer.running_var.fill_(1 - layer.eps)


@torch.no_grad()
def _last_map(model: Any, images: Tensor) -> Tensor | None:
    """The feature map (B, C, H, W) of a timm model's last stage or block; None where timm does not tell."""
    if not hasattr(model, "forward_intermediates"):
        return None
    (found,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
    return found if isinstance(found, Tensor) and found.ndim == 4 else None


def _config(model: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` as timm's hub layout has it."""
    preprocess, own = Preprocess.from_dict(record["preprocess"]), model.pretrained_cfg
    return {
        "architecture": _architecture(record),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": arguments_of(record),
        **({"label_names": record["classes"]} if "classes" in record else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, preprocess.size, preprocess.size],
            "fixed_input_size": own.get("fixed_input_size", False),
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop / preprocess.resize,
            "crop_mode": "squash" if preprocess.mode == "squash" else "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": own.get("first_conv"),
            "classifier": own.get("classifier"),
        },
    }

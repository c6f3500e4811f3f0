"""Students as modules: spec or record → module, shared by training, by `run:PATH` and by the export."""

import contextlib
import copy
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from featcache.checkpoint import fill, open_checkpoint, read_weights
from featcache.inputs.images import Preprocess
from featcache.models.python import import_callable
from featcache.models.timm import embeds_by_classifier, open_model, patch_side, recorded_architecture, split_tokens
from featcache.plugins import suggest
from featcache.specs import names_code, refuse_code

log = logging.getLogger("featcache")

TINY_SIZE = 32
IMAGENET_CLASSES = 1000
EMBEDDING = ("embedding",)


class Tiny(nn.Sequential):
    """A plain CNN of 0.57 M parameters for 32 px images: six 3 × 3 convolutions, mean pool, linear to 128."""

    num_features = 128

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs, stride in (
            (3, 32, 1),
            (32, 64, 2),
            (64, 96, 2),
            (96, 128, 1),
            (128, 160, 2),
            (160, 128, 1),
        ):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, self.num_features))

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """The embedding, and as tokens each position of the last map (an eighth of the image a side)."""
        *convolutions, pool, flatten, linear = self
        feature_map = images
        for layer in convolutions:
            feature_map = layer(feature_map)
        return {
            "embedding": linear(flatten(pool(feature_map))),
            "tokens": linear(feature_map.flatten(2).transpose(1, 2)),
        }


class ClipTower(nn.Module):
    """The image tower of an open_clip model; its tokens go through the model's own projection."""

    def __init__(self, visual: Any):
        from open_clip.timm_model import TimmModel

        from featcache.models._options import PLAIN
        from featcache.models.open_clip import ImageTower, TimmImageTower

        super().__init__()
        self.tower = TimmImageTower(visual) if isinstance(visual, TimmModel) else ImageTower(visual)
        self.tower.choose("open_clip", PLAIN)

    @property
    def visual(self) -> Any:
        """open_clip's own module."""
        return self.tower.visual

    def forward(self, images: Tensor) -> Tensor:
        return self.tower(images)["embedding"]

    def features(self, images: Tensor) -> dict[str, Tensor]:
        found = self.tower(images)
        projection = getattr(self.visual, "proj", None)
        if projection is None or not self.tower.has_norm:
            return {"embedding": found["embedding"]}
        return {name: value if name == "embedding" else value @ projection for name, value in found.items()}


class Backbone(nn.Module):
    """A student: a body and, where its width is not the wanted one, a linear projection.

    Attributes:
        width: of the body's output.
        embedding_dim: of the student's.
        image_size: px of the images that it was made for.
        record: "architecture" and what else rebuilds it, without any file, from `student.json`.
        normalisation: mean and std that its weights were trained with, where it is a run's.
        remark: a line to tell before it is trained, "" for none.
    """

    record: Mapping[str, Any]
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None
    remark = ""

    def __init__(self, body: nn.Module, image_size: int, embedding_dim: int | None = None):
        super().__init__()
        self.body, self.image_size = body, image_size
        self.width = _width(_black_image(body, image_size))
        self.embedding_dim = embedding_dim or self.width
        self.projection = (
            nn.Identity() if self.embedding_dim == self.width else nn.Linear(self.width, self.embedding_dim)
        )

    def forward(self, images: Tensor, fields: Sequence[str] | None = None) -> Any:
        """The embedding (B, D); or, given `fields`, what `features` gives, so that wrappers (DDP, compile) see it."""
        return self.features(images)["embedding"] if fields is None else self.features(images, fields)

    def features(self, images: Tensor, fields: Sequence[str] = EMBEDDING) -> dict[str, Tensor]:
        """Features by name: "embedding" (B, D), "tokens" (B, T, D) of patches or of positions of the last feature
        map, row-major, and "prefix_tokens" (B, P, D). All go through the same projection.

        Raises:
            ValueError: the student does not have one of `fields`.
        """
        if set(fields) == set(EMBEDDING):
            return {"embedding": self.projection(self.body(images))}
        found = _features(self.body, images)
        # A head that widens the pooled features (MobileNetV3) leaves tokens which no shared projection fits.
        fitting = {name: value for name, value in found.items() if value.shape[-1] == self.width}
        missing = [name for name in fields if name not in fitting]
        if missing:
            hint = "its tokens have another width than its embedding" if missing[0] in found else "it has none"
            raise ValueError(f"this student gives no {', '.join(missing)}: {hint}; choose another student or method")
        return {name: self.projection(fitting[name]) for name in fields}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one image's features, of all fields there are, seen on a black image."""
        found = _black_image(self, self.image_size, lambda images: _features(self.body, images))
        return {
            name: (*value.shape[1:-1], self.embedding_dim)
            for name, value in found.items()
            if value.shape[-1] == self.width
        }


def build_backbone(
    spec: str,
    *,
    embedding_dim: int | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    drop_path: float = 0.0,
    pretrained: bool = False,
    trust_code: bool = False,
) -> Backbone:
    """A student with new weights or, with `pretrained` or weights in the spec, with those.

    Weights that bring a projection (a run's, an export's) keep it, unless another `embedding_dim` is asked for.

    Args:
        spec: "tiny" or "tiny:FILE"; "timm/NAME", or as a teacher with weights of its own "timm/NAME[.TAG]:FILE",
            "timm/local-dir:FOLDER", "timm/hf-hub:…"; the image tower "open_clip/NAME", "open_clip/NAME:CHECKPOINT",
            "open_clip/NAME:TAG[:CHECKPOINT]"; "run:FOLDER", the student of a finished run; or "MODULE:CALLABLE",
            importable from here too, that returns an `nn.Module` from (B, 3, S, S) to (B, D).
        embedding_dim: width of its output; its own when None.
        image_size: px; its own when None (32 for tiny and for MODULE:CALLABLE).
        patch_size: px, for timm's transformers; its own when None.
        drop_path: rate of stochastic depth while training, for timm models.
        pretrained: start from timm's weights of that name.
        trust_code: a run's MODULE:CALLABLE may be imported.

    Raises:
        ValueError: unknown spec (the message suggests near names), or a setting that the model does not take.
    """
    source, _, rest = spec.partition("/")
    if source == "timm" and rest:
        body, size, record, projection = _timm(spec, rest, image_size, patch_size, drop_path, pretrained)
        return _checked(spec, body, size, embedding_dim, record, projection)
    for setting, given in (("patch_size", patch_size), ("drop_path", drop_path)):
        if given:
            raise ValueError(f"{spec} takes no {setting}, only timm students do; leave it out")
    if pretrained and ":" not in spec:
        raise ValueError(f"{spec}: pretrained is for timm students; leave it out (open_clip: give open_clip/NAME:TAG)")
    if spec.startswith("run:"):
        return _of_run(spec, embedding_dim, image_size, trust_code)
    if spec == "tiny" or spec.startswith("tiny:"):
        tiny, file = Tiny(), spec.partition(":")[2]
        if file:
            fill(tiny, open_checkpoint(file, "tiny", tiny, _without_projection), "tiny")
        projection = _projection_in(file, Tiny.num_features) if file else None
        return _checked(spec, tiny, image_size or TINY_SIZE, embedding_dim, {"architecture": "tiny"}, projection)
    if source == "open_clip" and rest:
        tower, size, files = _open_clip(spec, rest, image_size)
        projection = _projection_in(files[0], _black_image(tower, size).shape[-1]) if len(files) == 1 else None
        return _checked(spec, tower, size, embedding_dim, {"architecture": spec.partition(":")[0]}, projection)
    if not names_code(spec):
        raise ValueError(
            f"unknown student {spec!r}; give tiny, timm/NAME, timm/NAME:WEIGHTS, open_clip/NAME, "
            "open_clip/NAME:CHECKPOINT, run:FOLDER or MODULE:CALLABLE"
        )
    body = import_callable(spec, "student", "an nn.Module")()
    if not isinstance(body, nn.Module):
        raise ValueError(f"student {spec}: returned a {type(body).__name__}, not an nn.Module")
    of_torchvision = spec.removeprefix("python:").startswith("torchvision.models")
    classes = _remove_classifier(body) if of_torchvision else 0
    backbone = _checked(spec, body, image_size or TINY_SIZE, embedding_dim, {"architecture": spec})
    if classes:
        backbone.remark = f"{spec}: its classifier of {classes:,} classes is left out: students give features"
    elif backbone.width == IMAGENET_CLASSES:
        backbone.remark = (
            f"{spec}: gives {backbone.width:,} numbers, as many as ImageNet has classes: if they are logits, return the "
            "features before them"
        )
    _refuse_other_output_in_training(spec, backbone)
    return backbone


def load_backbone(folder: str | os.PathLike[str], *, trust_code: bool = False) -> tuple[Backbone, dict[str, Any]]:
    """The trained student of a run folder, in eval mode, and its record (`student.json`).

    Nothing is fetched. A student `MODULE:CALLABLE` imports that module again, where code is trusted.

    Raises:
        ValueError: the folder holds no finished student, its weights are not of the architecture it names, or that is
            code and not trusted.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "student.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        unfinished = (folder / "config.toml").exists()
        remedy = (
            "finish it with `distill fit … --resume`" if unfinished else f"make one with `distill fit … --out {folder}`"
        )
        raise ValueError(f"{folder}: holds no finished student (student.json); {remedy}") from None
    except ValueError:
        raise ValueError(f"{folder / 'student.json'}: is damaged; train again with another --out") from None
    with _naming(folder / "student.json"):
        size = _refuse_odd_record(record, trust_code)
        backbone = _rebuilt(record, size)
    weights = folder / "student.safetensors"
    if not weights.exists():
        raise ValueError(f"{weights}: is gone; `distill fit --out {folder} --resume` makes it from the last checkpoint")
    try:
        backbone.load_state_dict(read_weights(str(weights)))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise ValueError(f"{weights}: does not fit {record['architecture']} as built here ({reason})") from None
    return backbone.eval(), record


def _refuse_odd_record(record: Any, trust_code: bool) -> int:
    """The size of the images, once a record is seen to name an architecture alone: no code, no file, nothing to fetch."""
    architecture = record.get("architecture") if isinstance(record, dict) else None
    if not isinstance(architecture, str):
        raise ValueError("names no architecture; train again with another --out")
    refuse_code("its student", architecture, trust_code)
    if not names_code(architecture) and not re.fullmatch(r"tiny|(timm|open_clip)/[^:/\\]+", architecture):
        raise ValueError(f"{architecture!r} is no architecture; train again with another --out")
    try:
        size, dim, patch = record["preprocess"]["size"], record["embedding_dim"], record.get("patch_size", 1)
        Preprocess.from_dict(record["preprocess"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is damaged ({type(error).__name__}: {error}); train again with another --out") from None
    extra = record.get("model_args", {})
    if not all(type(number) is int and number > 0 for number in (size, dim, patch)) or not isinstance(extra, dict):
        raise ValueError("is damaged (sizes must be whole numbers); train again with another --out")
    taken = {*inspect.signature(timm.create_model).parameters, "num_classes"}
    if wrong := [key for key in extra if not key.isidentifier() or key in taken]:
        raise ValueError(f"model_args {', '.join(wrong)}: no architecture's; train again with another --out")
    return size


def _rebuilt(record: Mapping[str, Any], size: int) -> Backbone:
    """The student of a record, with new weights."""
    if not record["architecture"].startswith("timm/"):
        return build_backbone(record["architecture"], embedding_dim=record["embedding_dim"], image_size=size)
    architecture = record["architecture"].partition("/")[2].partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"timm/{architecture}: no such model; {suggest(architecture, timm.list_models())}")
    try:
        body = timm.create_model(architecture, num_classes=0, **arguments_of(record))
    except Exception as error:  # each model's own code
        raise ValueError(f"{architecture} cannot be made ({_reason(error)}); train again with another --out") from None
    return _checked(record["architecture"], body, size, record["embedding_dim"])


def arguments_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `timm.create_model` needs besides the name, to build the student of this `student.json`."""
    name = record["architecture"].partition("/")[2].partition(".")[0]
    return record.get("model_args", {}) | timm_arguments(name, record["preprocess"]["size"], record.get("patch_size"))


def _of_run(spec: str, embedding_dim: int | None, image_size: int | None, trust_code: bool) -> Backbone:
    """The student of a finished run; with a new projection where another width is asked for."""
    backbone, record = load_backbone(spec.partition(":")[2], trust_code=trust_code)
    if image_size and image_size != backbone.image_size:
        raise ValueError(f"{spec}: works at {backbone.image_size} px, not {image_size}; leave image_size out")
    own: dict[str, Any] = {key: record[key] for key in ("architecture", "patch_size", "model_args") if key in record}
    if embedding_dim and embedding_dim != backbone.embedding_dim:
        return _checked(spec, backbone.body, backbone.image_size, embedding_dim, own)
    backbone.record = own
    backbone.normalisation = record["preprocess"]["mean"], record["preprocess"]["std"]
    return backbone.train()


def _projection_in(file: str, width: int) -> nn.Linear | None:
    """The projection behind a body of this width that a run's or an export's weights hold; None where there is none.

    A run's stands beside `body.`, an export's behind the body in an `nn.Sequential`.
    """
    found = read_weights(file)
    behind = {"projection": ("body.",), "1": ("0.",), str(len(Tiny())): tuple(f"{i}." for i in range(len(Tiny())))}
    for name, before in behind.items():
        weight, bias = found.get(f"{name}.weight"), found.get(f"{name}.bias")
        others = [key for key in found if key not in (f"{name}.weight", f"{name}.bias")]
        if weight is None or bias is None or not others or not all(key.startswith(before) for key in others):
            continue
        if weight.ndim == 2 and weight.shape[1] == width and bias.shape == weight.shape[:1]:
            return _linear(weight, bias)
    return None


def _without_projection(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.partition(".")[0] != str(len(Tiny()))}


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


@contextlib.contextmanager
def _naming(place: object) -> Iterator[None]:
    """A ValueError raised within says first where."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def timm_arguments(name: str, image_size: int | None, patch_size: int | None) -> dict[str, Any]:
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


def _timm(
    spec: str,
    rest: str,
    image_size: int | None,
    patch_size: int | None,
    drop_path: float,
    pretrained: bool,
) -> tuple[nn.Module, int, dict[str, Any], nn.Linear | None]:
    """The body, the size of its images, what rebuilds it, and the projection that its weights bring."""
    regularised: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    name, _, weights = rest.partition(":")
    record: dict[str, Any] = {"architecture": f"timm/{name}"}
    projection = None
    try:
        if weights or pretrained:
            # Its own normalisation goes with it, and its square of the image is the teacher's: the rest may differ.
            model, files = open_model(rest, size=image_size, inputs=("mean", "std"), **regularised)
            if name in ("local-dir", "hf-hub"):
                record = recorded_architecture(rest)
            if embeds_by_classifier(files):
                projection = model.get_classifier() if isinstance(model.get_classifier(), nn.Linear) else None
                if projection is None:
                    log.warning("%s: its projection is left out: it is no single linear layer there", spec)
            elif files:
                projection = _projection_in(files[-1], getattr(model, "head_hidden_size", model.num_features))
            model.reset_classifier(0)
            own = record["architecture"].partition("/")[2]
            arguments = timm_arguments(own, image_size, patch_size)
            if arguments:  # timm resamples position embeddings and patch filters
                model.set_input_size(**{key: (side, side) for key, side in arguments.items()})
        elif timm.is_model(architecture := name.partition(".")[0]):
            arguments = timm_arguments(architecture, image_size, patch_size)
            model = timm.create_model(architecture, num_classes=0, **arguments, **regularised)
        else:
            raise ValueError(f"timm/{name}: no such model; {suggest(architecture, timm.list_models())}")
    except (TypeError, AttributeError, AssertionError, RuntimeError) as error:
        given = {"image_size": image_size, "patch_size": patch_size, "drop_path": drop_path}
        settings = ", ".join(f"{key} {value}" for key, value in given.items() if value)
        if not settings:
            raise
        raise ValueError(f"{spec}: the model does not take {settings} ({_reason(error)}); leave it out") from None
    size = image_size or timm.data.resolve_model_data_config(model)["input_size"][-1]
    if size % (patch := patch_side(model)):
        raise ValueError(f"{spec}: {size} px is not a multiple of its patches of {patch} px; give another image_size")
    return model, size, record | ({"patch_size": patch_size} if patch_size else {}), projection


def _open_clip(spec: str, rest: str, image_size: int | None) -> tuple[nn.Module, int, tuple[str, ...]]:
    import open_clip

    from featcache.models.open_clip import open_model as open_clip_model

    files: tuple[str, ...] = ()
    if rest.startswith(("hf-hub:", "local-dir:")):
        raise ValueError(f"{spec}: no student can be rebuilt from that; give open_clip/NAME:CHECKPOINT")
    if ":" in rest:
        model, files = open_clip_model(rest, image_size)
    else:
        if rest not in open_clip.list_models():
            raise ValueError(f"open_clip/{rest}: no such model; {suggest(rest, open_clip.list_models())}")
        try:
            model = open_clip.create_model(rest, force_image_size=image_size)
        except Exception as error:  # hub and network errors share no base class
            raise ValueError(f"{spec}: could not be made ({type(error).__name__}: {_reason(error)})") from None
    size = image_size or open_clip.get_model_preprocess_cfg(model)["size"]
    return ClipTower(model.visual), size if isinstance(size, int) else size[0], files


def _checked(
    spec: str,
    body: nn.Module,
    size: int,
    embedding_dim: int | None,
    record: dict[str, Any] | None = None,
    projection: nn.Linear | None = None,
) -> Backbone:
    """The Backbone around `body`, after it has seen one black image of `size` px; with that `projection` where its width
    is the wanted one."""
    if projection is not None:
        embedding_dim = embedding_dim or projection.out_features
    try:
        backbone = Backbone(body, size, embedding_dim)
    except _OddOutput as error:
        raise ValueError(f"{spec}: {error}") from None
    except Exception as error:  # a model's own code raises what it likes
        channels = next((layer.in_channels for layer in body.modules() if isinstance(layer, nn.Conv2d)), 3)
        if channels != 3:
            raise ValueError(
                f"{spec}: the student takes images of {channels} channels; it is given RGB images: begin with a layer that "
                "takes 3"
            ) from error
        raise ValueError(
            f"{spec}: the student does not take images of {size} px ({type(error).__name__}: {_reason(error)}); "
            "give another image_size"
        ) from error
    if projection is not None:
        if projection.out_features == embedding_dim:
            backbone.projection = projection
        else:
            log.warning(
                "%s: its projection to %d is left out: %d is asked for", spec, projection.out_features, embedding_dim
            )
    backbone.record = record or {"architecture": spec}
    return backbone


class _OddOutput(ValueError):
    """A student's output is no embedding; the message says what it is."""


def _width(output: Any) -> int:
    """Of the embedding that a student makes of one image.

    Raises:
        _OddOutput: it is none.
    """
    if isinstance(output, Mapping):
        named = ", ".join(map(str, output)) or "nothing"
        raise _OddOutput(f"the student returns a dictionary ({named}); let it return the embedding (B, D) alone")
    if not isinstance(output, Tensor):
        raise _OddOutput(f"the student returns a {type(output).__name__}; let it return the embedding (B, D) alone")
    shape = tuple(output.shape)
    if output.ndim == 4 and shape[0] == 1:
        raise _OddOutput(
            f"the student gives maps, (B, {', '.join(map(str, shape[1:]))}); pool them, say by `.mean((2, 3))`, to (B, D)"
        )
    if output.ndim != 2 or shape[0] != 1 or not shape[1] or not output.is_floating_point():
        raise _OddOutput(
            f"the student gives {shape} {output.dtype} of one image; let it give (B, D) floating-point numbers"
        )
    return shape[1]


def _refuse_other_output_in_training(spec: str, backbone: Backbone) -> None:
    """Raises ValueError where a student gives something else in training than it does in use, as Inception does, or what
    does not follow from its weights; or where it cannot be copied or saved."""
    odd = [name for name, value in backbone.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{spec}: {odd[0]} of its state is no tensor, and only tensors are saved; leave it out")
    try:
        student = copy.deepcopy(backbone).train()
    except Exception as error:  # the user's own code
        raise ValueError(f"{spec}: the student cannot be copied ({type(error).__name__}: {_reason(error)})") from error
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # what dropout draws changes nothing else
            found = student.body(torch.zeros(2, 3, backbone.image_size, backbone.image_size))
    except Exception as error:  # the user's own code
        raise ValueError(
            f"{spec}: the student cannot train on images of {backbone.image_size} px ({type(error).__name__}: "
            f"{_reason(error)}); give another image_size"
        ) from error
    if not isinstance(found, Tensor) or found.shape != (2, backbone.width):
        what = f"{tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"{spec}: in training the student gives {what} of two images, in use (2, {backbone.width}); let it give the same"
        )
    if not found.requires_grad and any(weight.requires_grad for weight in student.body.parameters()):
        raise ValueError(
            f"{spec}: what the student gives does not follow from its weights (under torch.no_grad, or detached?), so "
            "they cannot train"
        )


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


def _features(body: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """All that a body has, before the projection."""
    if isinstance(body, Tiny | ClipTower):
        return body.features(images)
    if not hasattr(body, "forward_head"):
        return {"embedding": body(images)}
    features: Any = body.forward_features(images)  # type: ignore[operator]
    tokens, prefix = split_tokens(body, features)
    found = {"embedding": body.forward_head(features), "tokens": tokens, "prefix_tokens": prefix}  # type: ignore[operator]
    return {
        name: value
        for name, value in found.items()
        if value is not None and (name != "prefix_tokens" or value.shape[1])
    }


@torch.no_grad()
def _black_image(module: nn.Module, size: int, run: Callable[[Tensor], Any] | None = None) -> Any:
    """What `module` (or `run`, a way of running it) makes of one black image in eval mode."""
    training = module.training
    module.eval()
    try:
        return (run or module)(torch.zeros(1, 3, size, size))
    finally:
        module.train(training)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]

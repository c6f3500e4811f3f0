"""Students as modules: spec or record → module, shared by training, by `run:PATH` and by the export."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from featcache.encoder import read_weights
from featcache.encoders.python import import_callable
from featcache.encoders.timm import create_model, patch_side, split_tokens
from featcache.plugins import suggest

TINY_SIZE = 32
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

        from featcache.encoders._options import PLAIN
        from featcache.encoders.open_clip import ImageTower, TimmImageTower

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
    """

    def __init__(self, body: nn.Module, image_size: int, embedding_dim: int | None = None):
        super().__init__()
        self.body, self.image_size = body, image_size
        self.width = _black_image(body, image_size).shape[-1]
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
) -> Backbone:
    """A student with new weights or, with `pretrained` or weights in the spec, with those.

    Args:
        spec: "tiny"; "timm/NAME" or "timm/NAME:WEIGHTS" with a local file; the image tower "open_clip/NAME",
            "open_clip/NAME:CHECKPOINT" or "open_clip/NAME:TAG"; or "MODULE:CALLABLE", importable from here too, that
            returns an `nn.Module` from (B, 3, S, S) to (B, D).
        embedding_dim: width of its output; its own when None.
        image_size: px; its own when None (32 for tiny and for MODULE:CALLABLE).
        patch_size: px, for timm's transformers; its own when None.
        drop_path: rate of stochastic depth while training, for timm models.
        pretrained: start from timm's weights of that name.

    Raises:
        ValueError: unknown spec (the message suggests near names), or a setting that the model does not take.
    """
    source, _, rest = spec.partition("/")
    name, _, weights = rest.partition(":")
    if source == "timm" and name:
        body, size = _timm(spec, name, weights, image_size, patch_size, drop_path, pretrained)
        return _checked(spec, body, size, embedding_dim)
    for setting, given in (("patch_size", patch_size), ("drop_path", drop_path)):
        if given:
            raise ValueError(f"{spec} takes no {setting}, only timm students do; leave it out")
    if pretrained and not weights:
        raise ValueError(f"{spec}: pretrained is for timm students; leave it out (open_clip: give open_clip/NAME:TAG)")
    if spec == "tiny":
        return _checked(spec, Tiny(), image_size or TINY_SIZE, embedding_dim)
    if source == "open_clip" and name:
        body, size = _open_clip(spec, name, weights, image_size)
        return _checked(spec, body, size, embedding_dim)
    if not re.fullmatch(r"[\w.]+:\w+", spec):
        raise ValueError(
            f"unknown student {spec!r}; give tiny, timm/NAME, timm/NAME:WEIGHTS, open_clip/NAME, "
            "open_clip/NAME:CHECKPOINT or MODULE:CALLABLE"
        )
    body = import_callable(spec, "student", "an nn.Module")()
    if not isinstance(body, nn.Module):
        raise ValueError(f"student {spec}: returned a {type(body).__name__}, not an nn.Module")
    return _checked(spec, body, image_size or TINY_SIZE, embedding_dim)


def load_backbone(folder: str | os.PathLike[str]) -> tuple[Backbone, dict[str, Any]]:
    """The trained student of a run folder, in eval mode, and its record (`student.json`).

    A student `MODULE:CALLABLE` imports that module again.

    Raises:
        ValueError: the folder holds no finished student, or its weights are not of the architecture it names.
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
    backbone = build_backbone(
        record["architecture"],
        embedding_dim=record["embedding_dim"],
        image_size=record["preprocess"]["size"],
        patch_size=record.get("patch_size"),
    )
    weights = folder / "student.safetensors"
    if not weights.exists():
        raise ValueError(f"{weights}: is gone; `distill fit --out {folder} --resume` makes it from the last checkpoint")
    try:
        backbone.load_state_dict(read_weights(str(weights)))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise ValueError(f"{weights}: does not fit {record['architecture']} as built here ({reason})") from None
    return backbone.eval(), record


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
    name: str,
    weights: str,
    image_size: int | None,
    patch_size: int | None,
    drop_path: float,
    pretrained: bool,
) -> tuple[nn.Module, int]:
    regularised: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    architecture = name.split(".")[0]
    try:
        if weights or pretrained:
            model = create_model(name, weights, **regularised)
            model.reset_classifier(0)
            arguments = timm_arguments(architecture if weights else name, image_size, patch_size)
            if arguments:  # timm resamples position embeddings and patch filters
                model.set_input_size(**{key: (side, side) for key, side in arguments.items()})
        elif timm.is_model(architecture):
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
    return model, size


def _open_clip(spec: str, name: str, pretrained: str, image_size: int | None) -> tuple[nn.Module, int]:
    import open_clip

    if name not in open_clip.list_models():
        raise ValueError(f"open_clip/{name}: no such model; {suggest(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and pretrained not in tags and not os.path.exists(pretrained):
        raise ValueError(f"{spec}: no such pretrained tag or file; {suggest(pretrained, tags) if tags else 'no tags'}")
    try:
        model = open_clip.create_model(name, pretrained=pretrained or None, force_image_size=image_size)
    except Exception as error:  # hub, network and state-dict errors share no base class
        raise ValueError(f"{spec}: could not be made ({type(error).__name__}: {_reason(error)})") from None
    size = image_size or open_clip.get_model_preprocess_cfg(model)["size"]
    return ClipTower(model.visual), size if isinstance(size, int) else size[0]


def _checked(spec: str, body: nn.Module, size: int, embedding_dim: int | None) -> Backbone:
    """The Backbone around `body`, after it has seen one black image of `size` px."""
    try:
        backbone = Backbone(body, size, embedding_dim)
    except Exception as error:  # a model's own code raises what it likes
        raise ValueError(
            f"{spec}: the student does not take images of {size} px ({type(error).__name__}: {_reason(error)}); "
            "give another image_size"
        ) from error
    return backbone


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

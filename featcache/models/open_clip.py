"""`open_clip/NAME:TAG`, `open_clip/NAME:CHECKPOINT` or `open_clip/NAME:TAG:CHECKPOINT`: the image tower, with a
pretrained tag's weights or those of a local file; also `open_clip/hf-hub:…` and `open_clip/local-dir:FOLDER`. The input
is what open_clip records for that tag. To be trained, `open_clip/NAME` begins with new weights.

Options of a teacher follow: `open_clip/ViT-B-32:laion2b_s34b_b79k@layer=-2@pool=avg`; see `_options.py`. Tokens are not
projected.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import open_clip
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel as ClipTimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from featcache.checkpoint import projection_in
from featcache.inputs.images import Preprocess
from featcache.models import Features, Model, Variant, first_line
from featcache.models._open_clip_weights import open_pretrained
from featcache.models._options import PLAIN, Options, split_options
from featcache.models._tower import Tokens, Tower, flat
from featcache.models.timm import TimmModel
from featcache.plugins import suggest

OWN = "encode_image, not normalised"


class ImageTower(Tower):
    """open_clip's own ViT or ResNet; of any other kind only the projected embedding."""

    library = "open_clip"
    own = OWN

    def __init__(self, visual: Any):
        super().__init__()
        self.visual = visual
        if isinstance(visual, VisionTransformer):
            self.layers, self.kind, self.has_class_token = len(visual.transformer.resblocks), "block", True
            self.has_norm = visual.attn_pool is None and not visual.final_ln_after_pool
        elif isinstance(visual, ModifiedResNet):
            self.layers = 5

    def last(self, images: Tensor) -> tuple[Tensor, Tokens]:
        if not self.layers:
            found = self.visual(images)
            return found[0] if isinstance(found, tuple) else found, (None, None)
        found = self._run(images, self.layers - 1, self.has_norm)
        return found["image_features"], _tokens(found)

    def head(self, features: Tensor) -> Features:
        return {"embedding": features}

    def tap(self, images: Tensor, layer: int, norm: bool) -> Tokens:
        return _tokens(self._run(images, layer, norm, intermediates_only=True, stop_early=True))

    def _run(self, images: Tensor, layer: int, norm: bool, **arguments: bool) -> dict[str, Any]:
        return self.visual.forward_intermediates(
            images,
            indices=[layer],
            normalize_intermediates=norm,
            output_fmt="NLC" if self.kind == "block" else "NCHW",
            output_extra_tokens=True,
            **arguments,
        )


def _tokens(found: dict[str, Any]) -> Tokens:
    (tokens,), (prefix,) = found["image_intermediates"], found.get("image_intermediates_prefix", [None])
    return flat(tokens) if tokens.ndim == 4 else tokens, prefix


class TimmImageTower(TimmModel):
    """A timm model with open_clip's projection (SigLIP, ConvNeXt CLIPs)."""

    library = "open_clip"
    own = OWN

    def __init__(self, visual: Any):
        super(TimmModel, self).__init__()
        self.visual = visual
        self.describe(visual.trunk)

    @property
    def trunk(self) -> Any:
        return self.visual.trunk

    def head(self, features: Tensor) -> Features:
        return {"embedding": self.visual.head(self.trunk.forward_head(features))}


class ClipNetwork(nn.Module):
    """The image tower's embedding alone."""

    def __init__(self, tower: ImageTower | TimmImageTower):
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        return self.tower(images)["embedding"]


class ClipStudent(Model):
    """An image tower to be trained; its tokens go through the model's own projection."""

    network: ClipNetwork

    def __init__(self, name: str, clip: Any, image_size: int | None):
        super().__init__()
        self.network, self.record = ClipNetwork(_tower("open_clip", clip)), {"architecture": f"open_clip/{name}"}
        self.normalisation = clip.visual.image_mean, clip.visual.image_std
        size = image_size or open_clip.get_model_preprocess_cfg(clip)["size"]
        self.image_size = size if isinstance(size, int) else size[0]

    @property
    def plain(self) -> nn.Module:
        return self.network.tower.visual

    def forward(self, images: Tensor) -> Features:
        found = self.network.tower(images)
        projection = getattr(self.plain, "proj", None)
        if projection is None or not self.network.tower.has_norm:
            return {"embedding": found["embedding"]}
        return {name: value if name == "embedding" else value @ projection for name, value in found.items()}

    def making(self, record: Mapping[str, Any]) -> str:
        name, size = record["architecture"].partition("/")[2], record["preprocess"]["size"]
        return f'import open_clip\n\nbody = open_clip.create_model("{name}", force_image_size={size}).visual'


def open_model(rest: str) -> ImageTower | TimmImageTower:
    name, options = split_options("open_clip", rest)
    clip, files = open_pretrained(name)
    preprocess = _preprocess(f"open_clip/{name}", open_clip.get_model_preprocess_cfg(clip))
    tower = _tower(f"open_clip/{rest}", clip, options)
    tower.input, tower.fields, tower.files = preprocess, tower.shapes(preprocess.size), files
    tower.activation = clip.activation
    return tower


def make_model(rest: str, variant: Variant) -> ClipStudent:
    spec = f"open_clip/{rest}"
    variant.refuse_all_but_size(spec)
    name, _, weights = rest.partition(":")
    if rest.startswith(("hf-hub:", "local-dir:")):
        raise ValueError(f"{spec}: no student can be rebuilt from that; give open_clip/NAME:CHECKPOINT")
    if not weights:
        return _new(rest, variant.image_size)
    clip, files = open_pretrained(rest, variant.image_size)
    student = ClipStudent(name, clip, variant.image_size)
    if len(files) == 1:
        (width,) = student.network.tower.shapes(student.image_size)["embedding"]
        student.projection = projection_in(files[0], width)
    return student.train()


def rebuild_model(rest: str, record: Mapping[str, Any]) -> ClipStudent:
    return _new(rest, record["preprocess"]["size"])


def named_files(rest: str) -> list[str] | None:
    weights = split_options("open_clip", rest)[0].partition(":")[2]
    # A tag, which would win over a file of that name, has neither a dot nor a slash.
    if not os.path.isfile(weights):  # NAME:TAG:FILE
        weights = weights.partition(":")[2]
    return [weights] if re.search(r"[./\\]", weights) and os.path.isfile(weights) else None


def hub_repository(rest: str) -> str:
    name, _, tag = split_options("open_clip", rest)[0].partition(":")
    return os.path.split(open_clip.get_pretrained_cfg(name, tag).get("hf_hub") or "")[0]


def _tower(spec: str, clip: Any, options: Options = PLAIN) -> ImageTower | TimmImageTower:
    is_timm = isinstance(clip.visual, ClipTimmModel)
    tower = TimmImageTower(clip.visual) if is_timm else ImageTower(clip.visual)
    tower.choose(spec, options)
    return tower


def _new(name: str, image_size: int | None) -> ClipStudent:
    """With new weights."""
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip/{name}: no such model; {suggest(name, open_clip.list_models())}")
    try:
        clip = open_clip.create_model(name, force_image_size=image_size)
    except Exception as error:  # hub and network errors share no base class
        raise ValueError(f"open_clip/{name}: could not be made ({type(error).__name__}: {first_line(error)})") from None
    return ClipStudent(name, clip, image_size)


def _preprocess(name: str, config: dict[str, Any]) -> Preprocess:
    """What open_clip's own transform does, as its preprocessing record says.

    Raises:
        ValueError: it cannot be done here.
    """
    height, width = config["size"] if isinstance(config["size"], tuple | list) else (config["size"], config["size"])
    mode = config.get("resize_mode") or "shortest"
    if height != width or mode not in ("shortest", "squash"):
        what = f"resize mode {mode!r}" if height == width else f"images of {height} × {width} px"
        raise ValueError(f"{name}: {what}: not supported, only shortest and squash to a square")
    mean, std = (
        tuple(given) if isinstance(given, tuple | list) else (given,) * 3 for given in (config["mean"], config["std"])
    )
    return Preprocess(
        resize=width,
        crop=width,
        size=width,
        interpolation="bilinear" if config.get("interpolation") == "bilinear" else "bicubic",
        mode="squash" if mode == "squash" else "shortest",
        mean=mean,
        std=std,
    )

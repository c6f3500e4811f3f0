"""`open_clip/NAME:PRETRAINED`: the image tower, with a pretrained tag or the path of a local checkpoint.

Options follow: `open_clip/ViT-B-32:laion2b_s34b_b79k@layer=-2@pool=avg`; see `_options.py`. Tokens are not projected.
"""

import os
from typing import Any

import open_clip
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor

from featcache.encoder import Encoder
from featcache.encoders._options import split_options
from featcache.encoders._tower import Tokens, Tower, flat
from featcache.encoders.timm import TimmModule
from featcache.plugins import suggest
from featcache.preprocess import Preprocess

OWN = "encode_image, not normalised"


class ImageTower(Tower):
    """open_clip's own ViT or ResNet; of any other kind only the projected embedding."""

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

    def head(self, features: Tensor) -> dict[str, Tensor]:
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


class TimmImageTower(TimmModule):
    """A timm model with open_clip's projection (SigLIP, ConvNeXt CLIPs)."""

    own = OWN

    def __init__(self, visual: Any):
        super(TimmModule, self).__init__()
        self.visual = visual
        self._describe()

    @property
    def trunk(self) -> Any:
        return self.visual.trunk

    def head(self, features: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.visual.head(self.trunk.forward_head(features))}


def load_encoder(rest: str) -> Encoder:
    model_name, options = split_options("open_clip", rest)
    name, _, pretrained = model_name.partition(":")
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip/{name}: no such model; {suggest(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not os.path.exists(pretrained):
        hint = suggest(pretrained, tags) if tags else "it has no tags."
        raise ValueError(
            f"open_clip/{name}:{pretrained}: no such pretrained tag or file; {hint} Give open_clip/{name}:TAG or :CHECKPOINT"
        )
    try:
        model = open_clip.create_model(name, pretrained=pretrained)
    except Exception as error:  # hub, network and state-dict errors share no base class
        raise ValueError(
            f"open_clip/{name}:{pretrained}: its weights could not be loaded ({type(error).__name__}); "
            f"with a checkpoint on disk give open_clip/{name}:CHECKPOINT"
        ) from None
    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"][0] if isinstance(config["size"], (tuple, list)) else config["size"]
    if config["resize_mode"] not in ("shortest", "squash"):
        raise ValueError(
            f"open_clip/{name}: resize mode {config['resize_mode']!r} is not supported, only shortest and squash"
        )
    tower = TimmImageTower(model.visual) if isinstance(model.visual, TimmModel) else ImageTower(model.visual)
    tower.choose(f"open_clip/{rest}", options)
    return Encoder(
        name=f"open_clip/{rest}",
        module=tower,
        preprocess=Preprocess(
            resize=size,
            crop=size,
            size=size,
            interpolation=config["interpolation"],
            mode=config["resize_mode"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        ),
        fields=tower.shapes(size),
        output=f"open_clip: {tower.output}",
        files=(os.path.abspath(pretrained),) if os.path.exists(pretrained) and pretrained not in tags else (),
    )

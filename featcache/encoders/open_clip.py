"""`open_clip/NAME:PRETRAINED`: the image tower, with a pretrained tag or the path of a local checkpoint."""

import os
from typing import Any

import open_clip
from torch import Tensor, nn

from featcache.encoder import Encoder
from featcache.plugins import suggest
from featcache.preprocess import Preprocess


class ImageTower(nn.Module):
    """The visual tower alone; its output is the projected image embedding, not normalised."""

    def __init__(self, visual: Any):
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        embedding = self.visual(images)
        return {"embedding": embedding[0] if isinstance(embedding, tuple) else embedding}


def load_encoder(rest: str) -> Encoder:
    name, _, pretrained = rest.partition(":")
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
    return Encoder(
        name=f"open_clip/{rest}",
        module=ImageTower(model.visual),
        preprocess=Preprocess(
            resize=size,
            crop=size,
            size=size,
            interpolation=config["interpolation"],
            mode=config["resize_mode"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
        ),
        fields={"embedding": model.visual.output_dim},
        output="open_clip encode_image, not normalised",
    )

"""Student spec → module, and the preprocessing it will carry."""

from dataclasses import replace
from typing import Any

import timm.data

from featcache.backbones import Backbone, Tiny, build_backbone
from featcache.preprocess import Preprocess

TINY_SIZE = 32


def make_student(
    spec: str, teacher: Preprocess, *, embedding_dim: int | None, image_size: int | None, pretrained: bool
) -> tuple[Backbone, Preprocess, dict[str, Any]]:
    """A student, its preprocessing, and the record for `student.json`.

    It sees the same square of the image as the teacher, rendered at its own size and normalised its own way.

    Args:
        spec: "tiny", "timm/NAME" or "timm/NAME:WEIGHTS".
        teacher: preprocessing of the store's encoder.
        embedding_dim: width of its output; its own when None.
        image_size: px; the model's own when None (32 for tiny).
        pretrained: start from timm's pretrained weights.

    Raises:
        ValueError: unknown spec, or an image size the model cannot take.
    """
    backbone = build_backbone(spec, embedding_dim=embedding_dim, pretrained=pretrained)
    if isinstance(backbone.body, Tiny):
        preprocess = replace(teacher, size=image_size or TINY_SIZE)
    else:
        config = timm.data.resolve_model_data_config(backbone.body)
        native = config["input_size"][-1]
        if image_size not in (None, native) and getattr(backbone.body, "pretrained_cfg", {}).get("fixed_input_size"):
            raise ValueError(
                f"{spec} only takes images of {native} px, not {image_size}; leave image_size out or choose a convnet"
            )
        preprocess = replace(teacher, size=image_size or native, mean=config["mean"], std=config["std"])
    record = {
        "architecture": spec.partition(":")[0],
        "embedding_dim": backbone.embedding_dim,
        "preprocess": preprocess.to_dict(),
    }
    return backbone, preprocess, record

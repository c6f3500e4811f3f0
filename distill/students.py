"""Student spec → module, and the preprocessing it will carry."""

from dataclasses import replace
from typing import Any

import timm.data

from featcache.backbones import Backbone, ClipTower, build_backbone
from featcache.inputs.images import Preprocess
from featcache.specs import names_code


def make_student(
    spec: str,
    teacher: Preprocess,
    *,
    embedding_dim: int | None,
    image_size: int | None,
    patch_size: int | None = None,
    drop_path: float = 0.0,
    pretrained: bool,
    trust_code: bool = False,
) -> tuple[Backbone, Preprocess, dict[str, Any]]:
    """A student, its preprocessing, and the record for `student.json`, which `featcache.backbones` rebuilds it from.

    It sees the same square of the image as the teacher, rendered at its own size and normalised its own way.

    Args:
        spec: see `featcache.backbones.build_backbone`.
        teacher: preprocessing of the store's encoder.
        embedding_dim: width of its output; its own when None.
        image_size: px; the model's own when None (32 for tiny; the teacher's for MODULE:CALLABLE).
        patch_size: px; the model's own when None.
        drop_path: rate of stochastic depth while training.
        pretrained: start from timm's pretrained weights.
        trust_code: where the student is a run's, its MODULE:CALLABLE may be imported.

    Raises:
        ValueError: unknown spec, or a setting that the model does not take.
    """
    user_code = names_code(spec)
    backbone = build_backbone(
        spec,
        embedding_dim=embedding_dim,
        image_size=image_size or (teacher.size if user_code else None),
        patch_size=patch_size,
        drop_path=drop_path,
        pretrained=pretrained,
        trust_code=trust_code,
    )
    preprocess = replace(teacher, size=backbone.image_size)
    if backbone.normalisation:
        preprocess = Preprocess.from_dict(
            preprocess.to_dict() | dict(zip(("mean", "std"), backbone.normalisation, strict=True))
        )
    elif isinstance(backbone.body, ClipTower):
        mean, std = backbone.body.visual.image_mean, backbone.body.visual.image_std
        preprocess = replace(preprocess, mean=tuple(mean), std=tuple(std))
    elif spec.startswith("timm/"):
        config = timm.data.resolve_model_data_config(backbone.body)
        preprocess = replace(preprocess, mean=tuple(config["mean"]), std=tuple(config["std"]))
    record = {
        **backbone.record,
        "embedding_dim": backbone.embedding_dim,
        "preprocess": preprocess.to_dict(),
    }
    return backbone, preprocess, record

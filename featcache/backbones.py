"""Architectures that a run folder's `student.json` names: record → module, shared by training and by `run:PATH`."""

from typing import Any

import timm
from torch import Tensor, nn

from featcache.encoders.timm import create_model
from featcache.plugins import suggest


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


class Backbone(nn.Module):
    """A student: a body and, where its width is not the wanted one, a linear projection."""

    def __init__(self, body: nn.Module, width: int, embedding_dim: int | None = None):
        super().__init__()
        self.body = body
        self.embedding_dim = embedding_dim or width
        self.projection = nn.Identity() if self.embedding_dim == width else nn.Linear(width, self.embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.body(images))


def build_backbone(spec: str, *, embedding_dim: int | None = None, pretrained: bool = False) -> Backbone:
    """An untrained (or, with `pretrained`, ImageNet-trained) student.

    Args:
        spec: "tiny", "timm/NAME", or "timm/NAME:WEIGHTS" with a local file.
        embedding_dim: width of its output; its own when None.

    Raises:
        ValueError: unknown spec; the message suggests near names.
    """
    if spec == "tiny":
        return Backbone(Tiny(), Tiny.num_features, embedding_dim)
    source, _, rest = spec.partition("/")
    name, _, weights = rest.partition(":")
    if source != "timm" or not name:
        raise ValueError(f"unknown student {spec!r}; give tiny, timm/NAME, or timm/NAME:WEIGHTS")
    if weights or pretrained:
        model: Any = create_model(name, weights)
        model.reset_classifier(0)
    elif timm.is_model(name.split(".")[0]):
        model = timm.create_model(name.split(".")[0], num_classes=0)
    else:
        raise ValueError(f"timm/{name}: no such model; {suggest(name, timm.list_models())}")
    return Backbone(model, getattr(model, "head_hidden_size", None) or model.num_features, embedding_dim)

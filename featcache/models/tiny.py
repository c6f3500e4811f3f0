"""`tiny`, a small CNN to be trained; `tiny:WEIGHTS` begins from a file of its weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featcache.checkpoint import fill, open_checkpoint, projection_in
from featcache.models import LOADER, LOADING, Features, Model, Standalone, Variant

SIZE = 32


class Tiny(nn.Sequential):
    """A plain CNN of 0.57 M parameters for 32 px images: six 3 × 3 convolutions, mean pool, linear to 128."""

    num_features = 128

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        sizes = ((3, 32, 1), (32, 64, 2), (64, 96, 2), (96, 128, 1), (128, 160, 2), (160, 128, 1))
        for inputs, outputs, stride in sizes:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, self.num_features))


class TinyModel(Model):
    """Tiny; as tokens each position of its last map (an eighth of the image a side), through its linear layer."""

    network: Tiny

    def __init__(self, image_size: int):
        super().__init__()
        self.network, self.image_size, self.record = Tiny(), image_size, {"architecture": "tiny"}

    def forward(self, images: Tensor) -> Features:
        *convolutions, pool, flatten, linear = self.network
        feature_map = images
        for layer in convolutions:
            feature_map = layer(feature_map)
        return {
            "embedding": linear(flatten(pool(feature_map))),
            "tokens": linear(feature_map.flatten(2).transpose(1, 2)),
        }

    def standalone(self, behind: Sequence[nn.Linear], record: Mapping[str, Any], images: Tensor) -> Standalone:
        """One `nn.Sequential`, and a few lines that build the same layers in the same order."""
        plain = nn.Sequential(*self.network, *behind)
        shapes = [(at.in_channels, at.out_channels, at.stride[0]) for at in plain if isinstance(at, nn.Conv2d)]
        linears = [at for at in plain if isinstance(at, nn.Linear)]
        last = ", ".join(f"nn.Linear({layer.in_features}, {layer.out_features})" for layer in linears)
        code = (
            f"{LOADER}\nlayers = []\nfor inputs, outputs, stride in {shapes}:\n"
            "    layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]\n"
            f"model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), {last})"
        )
        return Standalone(network=plain, config=record, code=code + LOADING)


def open_model(rest: str) -> Model:
    raise ValueError(
        f"tiny:{rest}: is trained here, and has no input of its own; give run:FOLDER of its run, or make one with `distill fit`"
    )


def make_model(rest: str, variant: Variant) -> TinyModel:
    variant.refuse_all_but_size(f"tiny:{rest}" if rest else "tiny")
    model = TinyModel(variant.image_size or SIZE)
    if rest:
        last = str(len(model.network))
        own = open_checkpoint(rest, "tiny", model.network, lambda state: _without(state, last))
        fill(model.network, own, "tiny")
        model.projection = projection_in(rest, Tiny.num_features, {last: tuple(f"{i}." for i in range(int(last)))})
    return model


def rebuild_model(rest: str, record: Mapping[str, Any]) -> TinyModel:
    if rest:
        raise ValueError(f"'tiny/{rest}' is no architecture; train again with another --out")
    return TinyModel(record["preprocess"]["size"])


def _without(state: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.partition(".")[0] != layer}

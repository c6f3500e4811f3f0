"""`conv_autoencoder`: the encoder of a small convolutional autoencoder, to be trained (method `autoencoder`)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from featcache.models import Model, Variant

SIZE = 32
CHANNELS = (12, 24, 48)
"""Of its three convolutions."""


class ConvEncoder(nn.Sequential):
    """ReffAKD's (arXiv 2404.09886): three 4 × 4 convolutions of stride 2, each with a ReLU, and all that is left of the image:
    48 × (size / 8)² numbers, 768 of 32 px; 24 thousand weights."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.ReLU()]
        super().__init__(*layers, nn.Flatten())


class ConvAutoencoder(Model):
    """The encoder; its decoder is the method's, and left behind after training."""

    network: ConvEncoder

    def __init__(self, image_size: int):
        super().__init__()
        self.network, self.image_size, self.record = ConvEncoder(), image_size, {"architecture": "conv_autoencoder"}

    def making(self, record: Mapping[str, Any]) -> str:
        pairs = zip((3, *CHANNELS), CHANNELS, strict=False)
        layers = (f"nn.Conv2d({inputs}, {outputs}, 4, 2, 1), nn.ReLU()" for inputs, outputs in pairs)
        return f"\nbody = nn.Sequential({', '.join(layers)}, nn.Flatten())"


def open_model(rest: str) -> Model:
    raise ValueError(
        f"conv_autoencoder:{rest}: is trained here, and has no weights of its own; give run:FOLDER of its run, or make one with "
        "`distill fit --student conv_autoencoder --method autoencoder`"
    )


def make_model(rest: str, variant: Variant) -> ConvAutoencoder:
    variant.refuse_all_but_size("conv_autoencoder")
    if rest:
        raise ValueError(f"conv_autoencoder:{rest}: takes no weights; give run:FOLDER to train a run's student further")
    return ConvAutoencoder(variant.image_size or SIZE)


def rebuild_model(rest: str, record: Mapping[str, Any]) -> ConvAutoencoder:
    if rest:
        raise ValueError(f"'conv_autoencoder/{rest}' is no architecture; train again with another --out")
    return ConvAutoencoder(record["preprocess"]["size"])

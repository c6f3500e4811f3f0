"""Networks that give a map of every image beside its embedding: a backbone, and a decoder of its feature maps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from featcache.models import Features, Model
from featcache.store.layout import DENSE


class DenseNetwork(nn.Module, ABC):
    """Images → embedding (B, D), the mean of the backbone's last feature map unless said otherwise.

    Attributes:
        map_width: channels of the decoder's map.
    """

    map_width: int

    @abstractmethod
    def maps(self, images: Float[Tensor, "b 3 s s"]) -> Features:
        """ "embedding" (B, D), "tokens" (B, T, D), the positions of the backbone's last map, and "dense" (B, K, h, w), that of the
        decoder."""

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        return self.maps(images)["embedding"]


class DenseStudent(Model):
    """A `DenseNetwork` to be trained; a student of it classifies pixels, by a 1 × 1 convolution of the decoder's map."""

    def __init__(
        self,
        network: DenseNetwork,
        image_size: int,
        record: Mapping[str, Any],
        normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
    ):
        super().__init__()
        self.network, self.image_size, self.record, self.normalisation = network, image_size, record, normalisation
        self.map_width = network.map_width

    def forward(self, images: Tensor) -> Features:
        network = self.body
        assert isinstance(network, DenseNetwork)
        return network.maps(images)


def pooled(last: Float[Tensor, "b d h w"], decoded: Float[Tensor, "b k u v"]) -> Features:
    """What `maps` gives of a backbone's last map and the decoder's."""
    return {"embedding": last.mean((2, 3)), "tokens": last.flatten(2).transpose(1, 2), DENSE: decoded}


def enlarged_like(deep: Float[Tensor, "b d h w"], fine: Float[Tensor, "b e u v"]) -> Float[Tensor, "b d u v"]:
    return F.interpolate(deep, size=fine.shape[2:], mode="bilinear", align_corners=False)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3 × 3 convolution, batch norm, rectifier."""
    layers = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    return nn.Sequential(*layers)


def trained_here(spec: str) -> ValueError:
    """Of a spec that is asked for as a teacher."""
    return ValueError(
        f"{spec}: is trained here, and has no input of its own; give run:FOLDER of its run, or make one with `distill fit`"
    )

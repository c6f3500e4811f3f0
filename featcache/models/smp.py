"""`smp/ARCHITECTURE@encoder=NAME`, to be trained: a network of segmentation-models-pytorch, such as `smp/unet@encoder=resnet18`.

New weights; with `pretrained=true` the encoder begins with the library's ImageNet weights, from the hub. Its last layer, the
segmentation head, is left out: a student classifies pixels of the decoder's map, by a 1 × 1 convolution.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from featcache.models import Features, Model, Variant, first_line
from featcache.models._dense import DenseNetwork, DenseStudent, pooled, trained_here
from featcache.plugins import suggest
from featcache.specs import options_in

SIZE, ENCODER = 224, "resnet34"


class SmpNetwork(DenseNetwork):
    """Encoder and decoder of the library's network; the embedding is the mean of the encoder's last map."""

    def __init__(self, network: Any):
        super().__init__()
        self.encoder, self.decoder = network.encoder, network.decoder
        self.map_width = network.segmentation_head[0].in_channels

    def maps(self, images: Tensor) -> Features:
        levels = self.encoder(images)
        return pooled(levels[-1], self.decoder(levels))


def _parts(rest: str) -> tuple[str, str]:
    """Architecture and encoder."""
    at = rest.find("@")
    name, options = (rest, "") if at < 0 else (rest[:at], rest[at:])
    return name, options_in(options, f"smp/{rest}", ("encoder",)).get("encoder", ENCODER)


def _made(rest: str, size: int, weights: str | None) -> DenseStudent:
    spec, (name, encoder) = f"smp/{rest}", _parts(rest)
    smp = _library(spec)
    known = sorted(smp.MODEL_ARCHITECTURES_MAPPING)
    if name not in known:
        raise ValueError(f"{spec}: no such architecture; {suggest(name, known)}")
    try:
        network = smp.create_model(name, encoder_name=encoder, encoder_weights=weights, classes=1)
    except Exception as error:  # of the library: a KeyError of all encoders, for one
        raise ValueError(
            f"{spec}: the library makes no such network ({first_line(error)}); give another @encoder=NAME"
        ) from None
    stride = getattr(network.encoder, "output_stride", 32)
    if size % stride:
        raise ValueError(f"{spec}: {size} px is no multiple of {stride}, as the library needs; give another image_size")
    moments = smp.encoders.get_preprocessing_params(encoder, weights) if weights else {}
    normalisation = (moments["mean"], moments["std"]) if moments.get("mean") else None
    return DenseStudent(SmpNetwork(network), size, {"architecture": f"smp/{name}@encoder={encoder}"}, normalisation)


def _library(spec: str) -> Any:
    try:
        import segmentation_models_pytorch
    except ImportError:
        raise ValueError(f"{spec} needs segmentation-models-pytorch: pip install 'featcache[segmentation]'") from None
    return segmentation_models_pytorch


def open_model(rest: str) -> Model:
    known = sorted(_library(f"smp/{rest}").MODEL_ARCHITECTURES_MAPPING)
    if (name := _parts(rest)[0]) not in known:
        raise ValueError(f"smp/{rest}: no such architecture; {suggest(name, known)}")
    raise trained_here(f"smp/{rest}")


def make_model(rest: str, variant: Variant) -> DenseStudent:
    for setting, given in (("patch_size", variant.patch_size), ("drop_path", variant.drop_path)):
        if given:
            raise ValueError(f"smp/{rest} takes no {setting}; leave it out")
    return _made(rest, variant.image_size or SIZE, "imagenet" if variant.pretrained else None)


def rebuild_model(rest: str, record: Mapping[str, Any]) -> DenseStudent:
    return _made(rest, record["preprocess"]["size"], None)

"""`run:PATH`: a student that `distill fit` trained, read from its run folder. That is data: code that it names is run
only where the user trusts it."""

import os
from pathlib import Path

from torch import Tensor, nn

from featcache.backbones import Backbone, load_backbone
from featcache.encoder import Encoder
from featcache.inputs.images import Preprocess


class StudentModule(nn.Module):
    """Every field that the student has; tokens as training with them sees them, after the projection."""

    def __init__(self, backbone: Backbone, fields: tuple[str, ...]):
        super().__init__()
        self.backbone, self.fields = backbone, fields

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.backbone.features(images, self.fields)


def load_encoder(rest: str, *, trust_code: bool = False) -> Encoder:
    folder = Path(rest)
    backbone, record = load_backbone(folder, trust_code=trust_code)
    shapes = backbone.shapes()
    return Encoder(
        name=f"run:{rest}",
        module=StudentModule(backbone, tuple(shapes)),
        preprocess=Preprocess.from_dict(record["preprocess"]),
        fields=shapes,
        output="student embedding",
        files=(os.path.abspath(folder / "student.json"), os.path.abspath(folder / "student.safetensors")),
    )

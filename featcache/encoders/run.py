"""`run:PATH`: a student that `distill fit` trained, read from its run folder."""

import json
import os
from pathlib import Path

from torch import Tensor, nn

from featcache.backbones import build_backbone
from featcache.encoder import Encoder, read_weights
from featcache.preprocess import Preprocess


class StudentModule(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.backbone(images)}


def load_encoder(rest: str) -> Encoder:
    folder = Path(rest)
    try:
        record = json.loads((folder / "student.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: holds no finished student (student.json); make one with `distill fit … --out {folder}`"
        ) from None
    backbone = build_backbone(record["architecture"], embedding_dim=record["embedding_dim"])
    weights = folder / "student.safetensors"
    backbone.load_state_dict(read_weights(str(weights)))
    return Encoder(
        name=f"run:{rest}",
        module=StudentModule(backbone),
        preprocess=Preprocess.from_dict(record["preprocess"]),
        fields={"embedding": (backbone.embedding_dim,)},
        output="student embedding",
        files=(os.path.abspath(folder / "student.json"), os.path.abspath(weights)),
    )

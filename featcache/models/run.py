"""`run:PATH`: a student that `distill fit` trained, read from its run folder. That is data: code that it names is run
only where the user trusts it."""

import os

from torch import Tensor

from featcache.inputs.images import image_input
from featcache.models import Features, Model
from featcache.student import load_student


class Trained(Model):
    """Every field that the student has; tokens as training with them sees them, after the projection."""

    output = "student embedding"

    def __init__(self, folder: str, trust_code: bool):
        super().__init__()
        student, record = load_student(folder, trust_code=trust_code)
        self.spec, self.input = f"run:{folder}", image_input(record["preprocess"])
        self.backbone, self.fields = student, student.shapes()  # "backbone" is in every fingerprint
        self.files = tuple(map(os.path.abspath, named_files(folder)))

    def forward(self, images: Tensor) -> Features:
        return self.backbone.features(images, tuple(self.fields))


def open_model(rest: str, *, trust_code: bool = False) -> Trained:
    return Trained(rest, trust_code)


def named_files(rest: str) -> list[str]:
    return [os.path.join(rest, "student.json"), os.path.join(rest, "student.safetensors")]

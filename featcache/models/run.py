"""`run:PATH`: a student that `distill fit` trained, read from its run folder, or one that it kept on the way,
`run:PATH@epoch=N` or `run:PATH@step=N`. That is data: code that it names is run only where the user trusts it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from featcache.inputs.images import image_input
from featcache.models import Features, Model
from featcache.run_folder import student_files
from featcache.student import Student, load_student


class Trained(Model):
    """Every field that the student has; tokens as training with them sees them, after the projection."""

    output = "student embedding"

    def __init__(self, spec: str, student: Student, record: Mapping[str, Any], files: Sequence[str] = ()):
        super().__init__()
        self.spec, self.input = spec, image_input(record["preprocess"])
        self.backbone, self.fields = student, student.shapes()  # "backbone" is in every fingerprint
        self.classes = student.classes
        self.files = tuple(map(os.path.abspath, files))

    def forward(self, images: Tensor) -> Features:
        return self.backbone.features(images, tuple(self.fields))


def open_model(rest: str, *, trust_code: bool = False) -> Trained:
    student, record = load_student(rest, trust_code=trust_code)
    return Trained(f"run:{rest}", student, record, named_files(rest))


def named_files(rest: str) -> list[str]:
    return student_files(rest)

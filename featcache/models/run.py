"""`run:PATH`: a student that `distill fit` trained, read from its run folder, one that it kept on the way, `run:PATH@epoch=N`
or `run:PATH@step=N`, or one that `distill push` took to the Hugging Face hub, `run:hf-hub:USER/NAME[@REVISION]`. That is data:
code that it names is run only where the user trusts it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featcache.inputs import input_of
from featcache.inputs.texts import Texts
from featcache.models import Features, Model
from featcache.models._language import GIVES
from featcache.run_folder import HUB, TOKENIZER, on_disk, pinned, student_files
from featcache.student import Student, load_student


class Trained(Model):
    """Every field that the student has; tokens as training with them sees them, after the projection."""

    output = "student embedding"
    backbone: Student

    def __init__(self, spec: str, student: Student, record: Mapping[str, Any], files: Sequence[str] = ()):
        super().__init__()
        self.spec = spec
        self.input = student.model.input if student.model.kind == "text" else input_of(record["preprocess"])
        self.kind = self.input.kind
        self.backbone, own = student, student.model.own_fields  # "backbone" is in every fingerprint
        self.fields = {**student.shapes(), **own}
        self.output = f"{self.output}; {GIVES}" if own else self.output
        self.classes = student.classes
        self.files = tuple(map(os.path.abspath, files))

    @property
    def token_head(self) -> nn.Linear | None:
        return self.backbone.model.token_head

    def forward(self, images: Tensor) -> Features:
        return self.backbone.features(images, tuple(self.fields))


def open_model(rest: str, *, trust_code: bool = False) -> Trained:
    spec = pinned(f"run:{rest}")
    folder = on_disk(spec.removeprefix("run:"))
    student, record = load_student(folder, trust_code=trust_code)
    if isinstance(like := getattr(student.model, "input", None), Texts) and not like.vocabulary:
        raise ValueError(f"{spec}: its {TOKENIZER} is gone, and it takes no texts without; put it back")
    return Trained(spec, student, record, student_files(folder))


def named_files(rest: str) -> list[str] | None:
    return None if rest.startswith(HUB) else student_files(rest)


def hub_repository(rest: str) -> str:
    return rest.removeprefix(HUB) if rest.startswith(HUB) else ""

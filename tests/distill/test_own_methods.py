"""Methods of one file that use all that a method may: labels and a classifier, inputs of its own, weights of rows, what it
learns of evaluations."""

import importlib
import json
import sys

import pytest
import torch
from fit_cases import Interrupted, interrupt_at
from safetensors.torch import load_file
from small_world import make_images, make_teacher

import distill.methods
import featcache
from featcache.encoder import load_encoder

LABELLED = """
import torch
import torch.nn.functional as F
from distill.methods import Method

class Labelled(Method):
    \"\"\"Cross entropy of the labels, of images that are turned upside down, harder classes more often: for tests alone.\"\"\"

    student_fields = ("embedding", "logits")
    classifier = True
    labelled = True
    heard: torch.Tensor

    def __init__(self, teacher_dim, student_dim, *, upside_down: bool = True):
        super().__init__()
        self.upside_down = upside_down
        self.register_buffer("heard", torch.zeros(()))

    def prepare(self, source, **given):
        self.labels = source.labels
        return {}

    def inputs(self, batch, student):
        return batch.inputs.flip(2) if self.upside_down else batch.inputs

    def weights(self, epoch):
        return (self.labels == int(self.heard) % 2).astype(float)

    def learn(self, epoch, held_out):
        self.heard += "holdout/gram_pearson" in held_out

    def loss(self, student, batch):
        SEEN.append((batch.label.tolist(), batch.row.tolist()))
        return {"ce": F.cross_entropy(student["logits"], batch.label)}

SEEN = []
"""


@pytest.fixture
def labelled(tmp_path):
    """The module of a method that is a file of another folder."""
    (tmp_path / "labelled.py").write_text(LABELLED)
    distill.methods.__path__.append(str(tmp_path))
    yield importlib.import_module("distill.methods.labelled")
    distill.methods.__path__.remove(str(tmp_path))
    sys.modules.pop("distill.methods.labelled")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """`train(out, ...)`: a small fit on two classes of 16 images."""
    folder = tmp_path_factory.mktemp("classes")
    for seed, name in enumerate("ab"):
        make_images(folder / "images" / name, 16, seed=seed)
    store = featcache.extract(str(folder / "images"), make_teacher(), folder / "s.zarr", device="cpu", precision="fp32")

    def train(out, **given):
        few = {"student": "tiny", "embedding_dim": 8, "image_size": 16, "device": "cpu"}
        return distill.fit(store, str(folder / "images"), out=out, **few, **given)

    return train


GIVEN = {"method": "labelled", "epochs": 2, "eval_every": 1, "holdout": 0.25, "batch_size": 4}


def test_a_method_may_use_labels_a_classifier_weights_and_evaluations(labelled, train, tmp_path):
    """Rows of class 0 alone in the first epoch, of class 1 in the second, once the evaluation was heard of."""
    run = train(tmp_path / "run", **GIVEN)
    record = json.loads((run.path / "student.json").read_text())
    assert record["classes"] == ["a", "b"]
    steps = len(labelled.SEEN) // 2
    classes = [{*labels} for labels, _ in labelled.SEEN]
    assert classes == [{0}] * steps + [{1}] * steps
    weights = load_file(run.path / "student.safetensors")
    assert weights["classifier.weight"].shape[0] == 2
    encoder = load_encoder(f"run:{run.path}")
    assert encoder.fields["logits"] == (2,)
    seen = encoder.encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    expected = seen["embedding"] @ weights["classifier.weight"].T + weights["classifier.bias"]
    torch.testing.assert_close(seen["logits"], expected)


def test_it_is_resumed_to_the_bit(labelled, train, tmp_path):
    whole = train(tmp_path / "whole", **GIVEN)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **GIVEN, progress=interrupt_at("training", 9), checkpoint_minutes=0.0)
    run = train(tmp_path / "run", **GIVEN, resume=True)
    assert (run.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()


def test_the_student_is_shown_what_the_method_makes_of_the_images(labelled, train, tmp_path):
    """Upside down or not: other weights; the same where the images are turned back."""
    weights = []
    for upside_down in (True, False):
        run = train(tmp_path / str(upside_down), **GIVEN, method_options={"upside_down": upside_down})
        weights.append(load_file(run.path / "student.safetensors")["classifier.weight"])
    assert not torch.equal(*weights)


def test_labels_that_are_not_there_are_refused(labelled, store, images, tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.zarr has no classes: neither labels .* nor logits"):
        distill.fit(store, str(images), out=tmp_path / "run", student="tiny", **GIVEN)
    assert not (tmp_path / "run").exists()

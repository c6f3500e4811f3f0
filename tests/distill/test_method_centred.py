"""The term of `centred` against float64 arithmetic; what it shares with `landmarks`; students that cannot be negative."""

import json

import numpy as np
import pytest
import timm
import torch

from distill import load_method
from distill.testing.methods import STUDENT, student_batch, teacher_batch, write_token_store
from distill.training.setup import _needs_projection
from featcache.geometry import one_sided
from featcache.inputs.images import image_input
from featcache.rows import Rows
from featcache.store.from_arrays import write_store
from featcache.student import load_student, make_student, open_student


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return Rows.of([write_token_store(tmp_path_factory.mktemp("store") / "s.zarr")])


def prepared(rows, name="centred", **options):
    method = load_method(name)(rows.embedding_dim, STUDENT, **{"mapping": "spectral", "landmarks": 9, **options})
    method.prepare(rows, seed=0)
    return method


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_term_is_the_cosine_between_deviations_from_the_mean_landmark(rows):
    method, batch, student = prepared(rows), teacher_batch(rows, ("embedding",)), student_batch(("embedding",))
    weight = method.mapping.weight.detach().numpy().astype(np.float64)

    def mapped(x):
        return unit(unit(x.astype(np.float64)) @ weight.T)

    drawn = np.random.default_rng(0).choice(len(rows), 9, replace=False)
    mean = mapped(rows.gather(drawn)).mean(0)
    cosines = [
        unit(given - mean) @ unit(target - mean)
        for given, target in zip(
            unit(student["embedding"].detach().numpy().astype(np.float64)),
            mapped(batch["embedding"].numpy()),
            strict=True,
        )
    ]
    terms = method.loss(student, batch)
    assert terms.keys() == {"centred", "landmarks"}
    assert terms["centred"].item() == pytest.approx(1 - np.mean(cosines), rel=1e-4)


def test_it_is_least_where_the_student_is_the_mapped_teacher_of_whatever_length(rows):
    method, batch = prepared(rows), teacher_batch(rows, ("embedding",))
    there = {"embedding": 3 * method.target(batch)}
    assert method.loss(there, batch)["centred"].item() == pytest.approx(0, abs=1e-6)
    assert method.loss({"embedding": there["embedding"].roll(1, 0)}, batch)["centred"].item() > 0.1


def test_its_landmarks_are_those_of_landmarks(rows):
    same = {"weight": 0.4, "temperatures": [0.07, 0.2]}
    batch, student = teacher_batch(rows, ("embedding",)), student_batch(("embedding",))
    ours, theirs = (prepared(rows, name, **same).loss(student, batch) for name in ("centred", "landmarks"))
    assert torch.equal(ours["landmarks"], theirs["landmarks"])


@pytest.mark.parametrize(("method", "added"), [("centred", True), ("tintem", True), ("cosine", False)])
def test_a_student_that_cannot_be_negative_gets_a_linear_layer_where_its_target_can(method, added, train, tmp_path):
    """test_resnet pools after a ReLU; what a mapping gives has negative coordinates."""
    width = timm.create_model("test_resnet", num_classes=0).num_features
    run = train(tmp_path / "run", method=method, student="timm/test_resnet", image_size=32, embedding_dim=0, epochs=1)
    record = json.loads((run.path / "student.json").read_text())
    assert record["embedding_dim"] == width
    assert record.get("projected", False) == added
    student, _ = load_student(run.path)
    assert isinstance(student.projection, torch.nn.Linear) == added
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert (student(images).min() < 0) == added
    again, _, told = make_student(f"run:{run.path}", image_input(record["preprocess"]))
    assert told.get("projected", False) == added
    with torch.no_grad():
        assert torch.equal(again.eval()(images), student(images))


def test_a_run_that_was_begun_without_that_layer_is_refused_in_words(train, tmp_path, monkeypatch):
    given = {"method": "tintem", "student": "timm/test_resnet", "image_size": 32, "embedding_dim": 0}
    with monkeypatch.context() as older:
        older.setattr("distill.training.setup._needs_projection", lambda *given: False)
        run = train(tmp_path / "run", epochs=1, **given)
    (run.path / "student.json").unlink()
    with pytest.raises(
        ValueError, match=r"built otherwise \(.*projection.*\); finish it with the version that began it"
    ):
        train(tmp_path / "run", epochs=1, resume=True, **given)


def test_rows_are_one_sided_where_negative_coordinates_add_up_to_next_to_nothing():
    drawn = np.random.default_rng(0).normal(size=(20, 9)).astype(np.float32)
    assert not one_sided(drawn)
    assert one_sided(np.maximum(drawn, 0))
    assert one_sided(np.maximum(drawn, -0.01))
    assert not one_sided(np.maximum(drawn, -0.2))


@pytest.mark.parametrize(
    ("options", "width", "negative", "needed"),
    [
        ({"mapping": "sne"}, 96, False, False),  # the target is the teacher's embedding, and neither can be negative
        ({"mapping": "sne"}, 96, True, True),
        ({"mapping": "spectral"}, 96, False, True),  # turned
        ({"joint": True}, 96, False, True),
        ({"mapping": "sne"}, 80, False, True),
    ],
)
def test_as_wide_as_its_teacher_it_needs_none_where_the_target_is_as_one_sided(
    options, width, negative, needed, tmp_path
):
    drawn = np.abs(np.random.default_rng(0).normal(size=(20, width)))
    teacher = Rows.of([write_store(tmp_path / "s.zarr", -drawn if negative else drawn)])
    student = open_student("timm/test_resnet", image_size=32)
    method = load_method("tintem")(width, student.embedding_dim, **options)
    assert _needs_projection(student, method, teacher) == needed
    assert not _needs_projection(student, load_method("cosine")(width, student.embedding_dim), teacher)
    student.project()
    assert not _needs_projection(student, method, teacher)

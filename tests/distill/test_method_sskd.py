"""SSKD against its formula in float64, its filter against a slow loop, its head against the task that it is fitted to."""

import math

import numpy as np
import pytest
import torch
from fit_cases import Interrupted, interrupt_at, without_speed
from small_world import make_teacher
from test_tasks import painted

import distill
import featcache
from distill.methods.sskd import SSKD, fit_projection, kept, own, rank_of, similarities
from distill.testing.methods import (
    ROWS,
    STUDENT,
    TEACHER,
    batch_of,
    build,
    student_batch,
    teacher_batch,
    write_token_store,
)
from evalsuite import probe
from featcache.rows import Rows

FEW = {"head_epochs": 1}


@pytest.fixture
def rows(tmp_path):
    return Rows.of([write_token_store(tmp_path / "s.zarr", views=4)])


def of_rows(rows, seed=1):
    return teacher_batch(rows, SSKD.fields, group=4), student_batch(SSKD.student_fields, seed, rows=4 * ROWS)


# -- the filter -----------------------------------------------------------------------------------------------


def by_hand(table, right, share):
    """Slowly: rows whose right column is the highest, and the best-ranked share of the others, in their order."""
    ranks = [sum(value > row[column] for value in row) for row, column in zip(table, right, strict=True)]
    wrong = sorted((rank, place) for place, rank in enumerate(ranks) if rank > 0)
    chosen = {place for _, place in wrong[: int(share * len(wrong))]}
    return [float(rank == 0 or place in chosen) for place, rank in enumerate(ranks)]


def test_the_filter_on_a_case_made_by_hand():
    table = torch.tensor([[9.0, 1, 2], [1, 9, 2], [3, 2, 1], [1, 2, 3], [2, 3, 1], [5, 5, 1]], dtype=torch.float32)
    right = torch.tensor([0, 0, 2, 2, 0, 1])
    assert rank_of(table, right).tolist() == [0, 2, 2, 0, 1, 0], "a tie is not above"
    assert kept(rank_of(table, right), 0.0).tolist() == [1, 0, 0, 1, 0, 1]
    assert kept(rank_of(table, right), 0.34).tolist() == [1, 0, 0, 1, 1, 1]
    assert kept(rank_of(table, right), 0.75).tolist() == [1, 1, 0, 1, 1, 1], "two of three, rounded down"
    assert kept(rank_of(table, right), 1.0).tolist() == [1] * 6


@pytest.mark.parametrize("share", [0.0, 0.29, 0.5, 0.75, 1.0])
def test_the_filter_is_the_slow_loop(share):
    drawn = np.random.default_rng(3)
    for _ in range(20):
        table, right = drawn.integers(0, 6, (40, 5)).astype(np.float32), drawn.integers(0, 5, 40)
        found = kept(rank_of(torch.from_numpy(table), torch.from_numpy(right)), share)
        assert found.tolist() == by_hand(table.tolist(), right.tolist(), share)


def test_a_turned_image_belongs_to_its_own_upright_one():
    upright = torch.eye(3)
    images = torch.stack([upright[i] + 0.1 * turn for i in range(3) for turn in range(4)])
    table = similarities(images)
    assert table.shape == (9, 3)
    assert own(table).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert rank_of(table, own(table)).tolist() == [0] * 9


# -- the loss ---------------------------------------------------------------------------------------------------


def log_softmax(x):
    shifted = x - x.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def kl(target, output, t):
    p, q = log_softmax(target / t), log_softmax(output / t)
    return (np.exp(p) * (p - q)).sum(1)


def through(head, x):
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in (head[0], head[2]))
    w1, b1, w2, b2 = (each.detach().double().numpy() for each in (w1, b1, w2, b2))
    return np.maximum(x @ w1.T + b1, 0) @ w2.T + b2


def test_it_is_the_formula_in_float64(rows):
    method, _ = build("sskd", {**FEW, "turned_keep": 0.4, "kd_temperature": 3.0, "turned_temperature": 2.0}, rows)
    batch, student = of_rows(rows)
    batch.label[4:8] = -1  # an image without a label
    found = {name: term.item() for name, term in method.loss(student, batch).items()}
    t, s = batch["logits"].double().numpy(), student["logits"].detach().double().numpy()
    label = batch.label.numpy()
    at = np.arange(4 * ROWS)
    upright, turned = at[at % 4 == 0], at[at % 4 > 0]
    known = upright[label[upright] >= 0]
    ce = -np.mean(log_softmax(s[known])[np.arange(len(known)), label[known]])
    # What has no class is ranked as if it were right.
    right = np.where(label[turned] < 0, t[turned].argmax(1), label[turned])
    counted = np.array(by_hand(t[turned].tolist(), right.tolist(), 0.4)) == 1
    assert 0 < counted.sum() < len(turned)
    projected = [
        through(head, of["embedding"].detach().double().numpy())
        for head, of in ((method.teacher_head, batch), (method.student_head, student))
    ]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in projected]
    a_t, a_s = (x[turned] @ x[upright].T for x in unit)
    matched = np.array(by_hand(a_t.tolist(), (turned // 4).tolist(), 0.75)) == 1
    assert 0 < matched.sum() < len(turned)
    expected = {
        "ce": 0.1 * ce,
        "kl": 0.9 * 3.0**2 * kl(t[upright], s[upright], 3.0).mean(),
        "kl_turned": 2.7 * 2.0**2 * kl(t[turned], s[turned], 2.0)[counted].mean(),
        "relation_kl": 10 * 0.5**2 * kl(a_t, a_s, 0.5)[matched].mean(),
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_golden_values():
    """Two images of two classes, no head in the way: the cosines are those of the embeddings."""
    method = SSKD(4, 4)
    for head in (method.teacher_head, method.student_head):
        for layer in (head[0], head[2]):
            layer.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
    first, second = [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]
    logits = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    batch = batch_of(
        {"embedding": torch.tensor([first] * 4 + [second] * 4), "logits": logits},
        label=torch.tensor([0] * 4 + [1] * 4),
    )
    student = {"embedding": torch.tensor([first, second] * 4), "logits": torch.zeros(8, 2)}
    terms = {name: term.item() for name, term in method.loss(student, batch).items()}
    # Of the teacher's logits (1, 0) at T = 4, and of its cosines (1, 0) at τ = 0.5; the student says nothing of either: its
    # upright images are both `first`, so every turned one is as near to one as to the other.
    soft, sharp = 0.00775189, 0.32781333
    expected = {
        "ce": 0.1 * math.log(2),
        "kl": 0.9 * 16 * soft,
        "kl_turned": 2.7 * 16 * soft,
        "relation_kl": 2.5 * sharp,
    }
    assert terms == pytest.approx(expected, rel=1e-5)


def test_the_least_is_at_the_teacher(rows):
    """A student that is the teacher: all that it learns of it is 0, and more anywhere near."""
    method, _ = build("sskd", {**FEW}, rows)
    batch, _ = of_rows(rows)
    method.student_head = method.teacher_head
    student = {"embedding": batch["embedding"], "logits": batch["logits"]}
    least = {name: term.item() for name, term in method.loss(student, batch).items()}
    learned = ("kl", "kl_turned", "relation_kl")
    assert all(abs(least[name]) < 1e-5 for name in learned)
    drawn = torch.Generator().manual_seed(0)
    near = {name: value + 0.1 * torch.randn(value.shape, generator=drawn) for name, value in student.items()}
    assert all(method.loss(near, batch)[name].item() > 1e-3 * (name != "relation_kl") for name in learned)


def test_gradients_reach_the_students_head_and_not_the_teachers(rows):
    method, _ = build("sskd", {**FEW}, rows)
    batch, student = of_rows(rows)
    leaves = {name: value.detach().requires_grad_() for name, value in student.items()}
    method.loss(leaves, batch)["relation_kl"].backward()
    assert leaves["logits"].grad is None
    assert (leaves["embedding"].grad.unflatten(0, (-1, 4))[:, 0].abs().sum(1) > 0).all(), "upright ones are columns"
    assert {name for name, weight in method.named_parameters() if weight.grad is not None} == {
        f"student_head.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    assert not any(name.startswith("teacher") for name, _ in method.named_parameters())


def test_without_the_relation_it_is_kd_on_the_same_views(rows):
    method, report = build("sskd", {"relation": 0.0}, rows)
    batch, student = of_rows(rows)
    assert report == {}
    assert {*method.loss(student, batch)} == {"ce", "kl", "kl_turned"}
    assert not [*method.parameters(), *method.buffers()]


@pytest.mark.parametrize(
    ("options", "needed"), [({}, True), ({"ce": 0.0}, False), ({"ce": 0.0, "turned_keep": 0.5}, True)]
)
def test_labels_are_needed_for_cross_entropy_and_for_right_and_wrong(options, needed):
    assert SSKD(4, 4, **options).labelled == needed


# -- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images of three classes, two groups of four rotations of each as a teacher sees them, and a head on its embeddings."""
    folder = tmp_path_factory.mktemp("world")
    given = {"device": "cpu", "precision": "fp32", "views": 8, "augment": "rotate4_crop"}
    corpora = [painted(folder / name, count, seed) for seed, (name, count) in enumerate({"a": 8, "b": 4}.items())]
    stores = [featcache.extract(each, make_teacher(), f"{each}.zarr", **given) for each in corpora]
    probe(*stores, c=1.0, save=folder / "head.safetensors")
    few = {"student": "tiny", "embedding_dim": 8, "image_size": 16, "device": "cpu", "epochs": 2, "batch_size": 6}
    return stores[0], corpora[0], {**few, "head": str(folder / "head.safetensors")}


@pytest.mark.parametrize(("method", "options"), [("sskd", {"head_epochs": 2, "head_batch_size": 8}), ("ega", {})])
def test_a_stopped_run_goes_on_to_the_same_bits(world, tmp_path, method, options):
    """And the teacher's head, once fitted, is not fitted again."""
    store, corpus, given = world
    given = {**given, "method": method, "method_options": options}
    whole, told = distill.fit(store, corpus, out=tmp_path / "whole", **given), []
    for stop in (2, 5):
        with pytest.raises(Interrupted):
            distill.fit(
                store, corpus, out=tmp_path / "run", **given, resume=True, progress=interrupt_at("training", stop)
            )
    run = distill.fit(store, corpus, out=tmp_path / "run", **given, resume=True, progress=told.append)
    assert {at.stage for at in told} == {"training"}
    for name in ("student.safetensors", "mapping.safetensors"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert without_speed(run.metrics) == without_speed(whole.metrics)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "sskd", "views": "plain"}, r"pairs views \(group\), and views=plain has one; leave views out"),
        ({"method": "ega", "views": "student"}, r"pairs views \(independent\), and views=student has one"),
    ],
)
def test_views_that_cannot_be_paired_are_refused_before_there_is_a_run(world, tmp_path, given, message):
    store, corpus, few = world
    with pytest.raises(ValueError, match=message):
        distill.fit(store, corpus, out=tmp_path / "run", **few, **given)
    assert not (tmp_path / "run").exists()


def test_a_run_tells_of_the_heads_fit_and_learns(world, tmp_path):
    store, corpus, given = world
    told = []
    given |= {"method": "sskd", "epochs": 12, "method_options": {"head_epochs": 4, "head_batch_size": 8}}
    run = distill.fit(store, corpus, out=tmp_path / "run", progress=told.append, **given)
    fitted = [(at.done, at.total) for at in told if at.stage == "mapping"]
    assert fitted == [(step, 12) for step in range(1, 13)]
    first, *_, last = run.metrics
    assert 0 < first["mapping/matched"] <= 1
    assert last["loss"] < 0.8 * first["loss"]
    assert {"loss/ce", "loss/kl", "loss/kl_turned", "loss/relation_kl"} <= {*last}


# -- the teacher's head -------------------------------------------------------------------------------------------


def turned_rows(path, noise):
    """Of 20 images, whose four views share a direction; the rest is noise."""
    rows = Rows.of([write_token_store(path, views=4)])
    directions = np.random.default_rng(5).normal(size=(ROWS, 1, TEACHER))
    embedding = directions + noise * np.random.default_rng(6).normal(size=(ROWS, 4, TEACHER))
    rows.gather = lambda positions, field, view: embedding[positions, view].astype(np.float32)
    return rows


def test_the_head_learns_whose_rotation_it_is(tmp_path):
    told = []
    _, report = fit_projection(turned_rows(tmp_path / "s.zarr", 1.5), 150, 0.05, 10, 0, lambda *at: told.append(at))
    _, untrained = fit_projection(turned_rows(tmp_path / "t.zarr", 1.5), 1, 1e-9, 10, 0)
    assert report["matched"] > untrained["matched"] + 0.2
    assert report["contrast"] < untrained["contrast"] - 0.3
    assert told[-1] == (300, 300)
    assert [done for done, _ in told] == list(range(1, 301))


def test_features_that_the_head_cannot_be_fitted_to_are_named(tmp_path):
    made = turned_rows(tmp_path / "s.zarr", 1.0)
    with pytest.raises(
        ValueError, match="the head of sskd cannot be fitted to its features at head_lr=1e\\+30; lower it"
    ):
        fit_projection(made, 1, 1e30, 10, 0)


@pytest.mark.parametrize("views", [1, 2, 6])
def test_other_views_are_refused_before_anything_is_fitted(tmp_path, views):
    rows = Rows.of([write_token_store(tmp_path / "s.zarr", views=views)])
    with pytest.raises(ValueError, match=rf"has {views} views .*extract with --views 4 --augment rotate4_crop"):
        SSKD(TEACHER, STUDENT).prepare(rows, seed=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kd": -1.0}, "kd must not be negative, got -1"),
        ({"relation_keep": 1.5}, r"relation_keep must be a share from 0 to 1, got 1\.5"),
        ({"turned_temperature": 0.0}, r"turned_temperature must be greater than 0, got 0\.0"),
        ({"head_epochs": 0}, "head_epochs must be greater than 0, got 0"),
        ({"kd": 0.0, "turned": 0.0, "relation": 0.0}, "nothing is left of the teacher; that is method ce"),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SSKD(TEACHER, STUDENT, **given)

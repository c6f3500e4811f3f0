"""cosine, mse, proteus, rkd and lightly_v1 against numbers by hand and the papers' formulas in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from distill import load_method
from distill.testing.methods import (
    ROWS,
    STUDENT,
    TEACHER,
    batch_of,
    student_batch,
    teacher_batch,
    total,
    write_token_store,
)
from featcache.rows import Rows
from featcache.store.from_arrays import write_store

L3 = math.log(3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Rows.of([write_token_store(tmp_path_factory.mktemp("store") / "s.zarr")])


def double(value):
    return value.detach().numpy().astype(np.float64)


def linear(layer, x):
    return x @ double(layer.weight).T + double(layer.bias)


def layer_norm(layer, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * double(layer.weight) + double(
        layer.bias
    )


def mean_cosine_distance(a, b):
    return np.mean(1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))


def embeddings(student, teacher, dtype=torch.float32):
    return {"embedding": torch.tensor(student, dtype=dtype)}, batch_of(
        {"embedding": torch.tensor(teacher, dtype=dtype)}
    )


def with_random_affine(method):
    """LayerNorms start as ones and zeros, where a mistake could hide."""
    torch.manual_seed(5)
    for module in method.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return method


# --- cosine and mse


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", (0.04 + 2) / 2),  # (3, 4) with (4, 3), (1, 0) with (−2, 0)
        ("mse", (1 + 1 + 9 + 0) / 4),
    ],
)
def test_plain_baselines_golden_values(name, expected):
    method = load_method(name)(2, 2)
    with torch.no_grad():
        method.head.weight.copy_(torch.eye(2))
        method.head.bias.zero_()
    terms = method.loss(*embeddings([[3.0, 4.0], [1.0, 0.0]], [[4.0, 3.0], [-2.0, 0.0]]))
    assert {key: term.item() for key, term in terms.items()} == {name: pytest.approx(expected, rel=1e-6)}


@pytest.mark.parametrize("kind", ["linear", "layernorm_linear", "mlp"])
def test_plain_baselines_equal_the_formula(source, kind):
    student, teacher = student_batch(("embedding",)), teacher_batch(source, ("embedding",))
    x, y = double(student["embedding"]), double(teacher["embedding"])
    for name in ("cosine", "mse"):
        method = with_random_affine(load_method(name)(TEACHER, STUDENT, head=kind))
        if kind == "linear":
            output = linear(method.head, x)
        elif kind == "layernorm_linear":
            output = linear(method.head[1], layer_norm(method.head[0], x))
        else:
            hidden = layer_norm(method.head[1], linear(method.head[0], x))
            hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
            output = linear(method.head[3], hidden)
        expected = mean_cosine_distance(output, y) if name == "cosine" else np.mean((output - y) ** 2)
        assert total(method.loss(student, teacher)).item() == pytest.approx(expected, rel=1e-5)


def test_another_head_is_refused():
    with pytest.raises(ValueError, match="unknown head 'conv'; known: layernorm_linear, linear, mlp"):
        load_method("cosine")(4, 2, head="conv")


@pytest.mark.parametrize("name", ["cosine", "mse", "proteus", "rkd", "lightly_v1"])
def test_students_of_these_need_a_head_or_none_so_there_is_no_target(source, name):
    method = load_method(name)(TEACHER, STUDENT)
    assert method.target(teacher_batch(source, method.fields)) is None


# --- proteus


def test_proteus_golden_value():
    """LayerNorm of (1, 3) is (−1, 1); against (0, 3), (1 + 4) / 2."""
    method = load_method("proteus")(2, 2)
    with torch.no_grad():
        method.head[1].weight.copy_(torch.eye(2))
        method.head[1].bias.zero_()
    assert method.loss(*embeddings([[1.0, 3.0]], [[0.0, 3.0]]))["mse"].item() == pytest.approx(2.5, abs=1e-4)


def test_proteus_equals_the_formula_with_tokens_of_the_same_grid(source):
    method = with_random_affine(load_method("proteus")(TEACHER, STUDENT, tokens=True))
    assert method.prepare(source, seed=0) == {}
    drawn = torch.Generator().manual_seed(2)
    student = {**student_batch(("embedding",)), "tokens": torch.randn(ROWS, 16, STUDENT, generator=drawn)}
    teacher = teacher_batch(source, method.fields)
    block = np.concatenate([double(student["embedding"])[:, None], double(student["tokens"])], 1)
    seen = np.concatenate([double(teacher["embedding"])[:, None], double(teacher["tokens"])], 1)
    terms = method.loss(student, teacher)
    pooled = linear(method.head[1], layer_norm(method.head[0], block[:, 0]))
    every = linear(method.tokens_head[1], layer_norm(method.tokens_head[0], block))
    assert terms["mse"].item() == pytest.approx(np.mean((pooled - seen[:, 0]) ** 2), rel=1e-5)
    assert terms["tokens"].item() == pytest.approx(np.mean((every - seen) ** 2), rel=1e-5)


@pytest.mark.parametrize("name", ["cosine", "mse", "proteus"])
def test_the_minimum_is_where_the_head_gives_the_teacher(source, name):
    method, student = load_method(name)(TEACHER, STUDENT), student_batch(("embedding",))
    teacher = batch_of({"embedding": method.head(student["embedding"]).detach()})
    loss = total(method.loss(student, teacher))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student["embedding"].grad.abs().max() < 1e-6
    other = batch_of({"embedding": teacher["embedding"] + 0.1 * torch.randn(ROWS, TEACHER)})
    assert total(method.loss(student, other)) > 1e-4


# --- rkd


def test_rkd_golden_values():
    """A 3-4-5 triangle against three points on a line.

    Distances over their means are ¾, 1, 5/4 and ¾, 3/2, ¾: 2 (0 + ⅛ + ⅛) / 9, times 25. Cosines of the angles are
    0, 3/5, 4/5 and 1, −1, 1: 2 (½ + 1.1 + 0.02) / 27, times 50.
    """
    method = load_method("rkd")(2, 1, normalise=False)
    teacher, student = [[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], [[0.0], [1.0], [2.0]]
    terms = method.loss(*embeddings(student, teacher, torch.float64))
    assert terms["distance"].item() == pytest.approx(25 * 0.5 / 9, rel=1e-9)
    assert terms["angle"].item() == pytest.approx(6.0, rel=1e-9)


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def slow_rkd(student, teacher):
    """Equations 4-6 and 7-8 of the paper, one pair and one triplet at a time."""

    def distances(x):
        d = [[math.dist(a, b) for b in x] for a in x]
        mean = np.mean([value for row in d for value in row if value > 0])
        return np.array(d) / mean

    def angle(x, i, j, k):
        if j in (i, k):
            return 0.0
        a, b = x[i] - x[j], x[k] - x[j]
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    n = range(len(student))
    s, t = distances(student), distances(teacher)
    distance = np.mean([huber(s[i, j] - t[i, j]) for i in n for j in n])
    return distance, np.mean(
        [huber(angle(student, i, j, k) - angle(teacher, i, j, k)) for i in n for j in n for k in n]
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_rkd_equals_the_formula_in_loops(rng, normalise):
    student, teacher = rng.normal(size=(9, 3)), 3 * rng.normal(size=(9, 5))
    method = load_method("rkd")(5, 3, normalise=normalise, distance=2.0, angle=3.0)
    terms = method.loss(*embeddings(student, teacher, torch.float64))
    if normalise:
        student, teacher = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher))
    distance, angle = slow_rkd(student, teacher)
    assert terms["distance"].item() == pytest.approx(2 * distance, rel=1e-9)
    assert terms["angle"].item() == pytest.approx(3 * angle, rel=1e-9)


def test_rkd_compares_angles_within_parts_of_the_batch(rng):
    """Eleven samples, at most four at once: 4 + 4 + 3."""
    student, teacher = rng.normal(size=(11, 3)), rng.normal(size=(11, 5))
    method = load_method("rkd")(5, 3, angle_batch=4, normalise=False)
    angle = method.loss(*embeddings(student, teacher, torch.float64))["angle"]
    parts = [slow_rkd(student[part], teacher[part])[1] for part in (slice(4), slice(4, 8), slice(8, 11))]
    assert angle.item() == pytest.approx(50 * np.mean(parts), rel=1e-9)


@pytest.mark.parametrize("normalise", [True, False])
def test_rkd_is_least_at_the_teacher_turned_and_scaled(rng, normalise):
    teacher = rng.normal(size=(9, 4))
    turned = 7 * teacher @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
    student, target = embeddings(turned, teacher, torch.float64)
    student["embedding"].requires_grad_()
    method = load_method("rkd")(4, 4, normalise=normalise)
    loss = total(method.loss(student, target))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student["embedding"].grad.abs().max() < 1e-9
    assert total(method.loss({"embedding": student["embedding"] + torch.rand(9, 4)}, target)) > 1e-3


def test_rkd_of_duplicates_and_of_all_alike_is_finite():
    for rows in ([[1.0, 2.0]] * 4, [[1.0, 2.0], [1.0, 2.0], [0.0, 1.0], [3.0, 1.0]]):
        student, teacher = embeddings(rows, [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        student["embedding"].requires_grad_()
        loss = total(load_method("rkd")(2, 2).loss(student, teacher))
        loss.backward()
        assert loss.isfinite()
        assert student["embedding"].grad.isfinite().all()


def test_rkd_with_a_match_has_a_head_for_it(source):
    method = load_method("rkd")(TEACHER, STUDENT, match=0.5)
    student, teacher = student_batch(("embedding",)), teacher_batch(source, ("embedding",))
    expected = mean_cosine_distance(linear(method.head, double(student["embedding"])), double(teacher["embedding"]))
    terms = method.loss(student, teacher)
    assert list(terms) == ["distance", "angle", "cosine"]
    assert terms["cosine"].item() == pytest.approx(0.5 * expected, rel=1e-5)
    assert list(load_method("rkd")(TEACHER, STUDENT).parameters()) == []


def test_rkd_needs_three_samples_for_an_angle():
    with pytest.raises(ValueError, match="angle_batch must be 3 or more, got 2"):
        load_method("rkd")(4, 2, angle_batch=2)


# --- lightly_v1


def lightly(queue, temperature, teacher_dim=2):
    """Its head gives (0, 0): to the student all of the queue is equally far."""
    method = load_method("lightly_v1")(teacher_dim, 2, queue=queue, temperature=temperature)
    nn.init.zeros_(method.head.weight)
    nn.init.zeros_(method.head.bias)
    return method


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        # the queue is the batch: odds 3 : 1 against 1 : 1
        (2, 0.130812035941),
        # and two zeros: 3 : 1 : 1 : 1 against 1/4 each, ½ ln 2 + ½ ln 2/3
        (4, 0.143841036226),
    ],
)
def test_lightly_golden_values(queue, expected):
    method = lightly(queue, 1 / L3)
    loss = method.loss(*embeddings([[1.0, 1.0], [5.0, 0.0]], [[2.0, 0.0], [0.0, 0.5]]))["kl"]
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_lightly_queue_holds_the_newest_first_and_unit_length():
    method = lightly(3, 0.07)
    batches = ([[2.0, 0.0], [0.0, 3.0]], [[3.0, 4.0], [-1.0, 0.0]], [[0.0, -7.0]])
    held = []
    for batch in batches:
        method.loss(*embeddings([[1.0, 1.0]] * len(batch), batch))
        held.append(method.queue.tolist())
    east, north, between, west, south = [1.0, 0.0], [0.0, 1.0], pytest.approx([0.6, 0.8]), [-1.0, 0.0], [0.0, -1.0]
    assert held == [[east, north, [0.0, 0.0]], [between, west, east], [south, between, west]]
    method.loss(*embeddings([[1.0, 1.0]] * 4, [[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]]))
    assert method.queue.tolist() == [north, east, south]
    method.eval()
    method.loss(*embeddings([[1.0, 1.0]], [[3.0, 4.0]]))
    assert method.queue.tolist() == [north, east, south]


def test_lightly_equals_the_formula_over_three_batches(source):
    method = load_method("lightly_v1")(TEACHER, STUDENT, queue=50)
    queue = np.zeros((50, TEACHER))
    for step in range(3):
        student = student_batch(("embedding",), seed=step)
        teacher = teacher_batch(source, ("embedding",), view=step % 2)
        y, x = double(teacher["embedding"]), linear(method.head, double(student["embedding"]))
        y, x = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (y, x))
        queue = np.concatenate([y, queue])[:50]
        p, q = (np.exp(rows @ queue.T / 0.07) for rows in (y, x))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        expected = (p * np.log(p / q)).sum(1).mean()
        assert method.loss(student, teacher)["kl"].item() == pytest.approx(expected, rel=1e-4)


def test_lightly_is_zero_where_the_head_points_along_the_teacher(source):
    method, student = load_method("lightly_v1")(TEACHER, STUDENT, queue=30), student_batch(("embedding",))
    teacher = batch_of({"embedding": 3 * method.head(student["embedding"]).detach()})
    loss = method.loss(student, teacher)["kl"]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student["embedding"].grad.abs().max() < 1e-5


class SomeSamples(Rows):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.mark.parametrize(
    ("samples", "size"),
    [(49, 16), (50, 32), (249, 64), (250, 128), (3999, 1024), (19_999, 4096), (20_000, 8192), (10**6, 8192)],
)
def test_lightly_chooses_the_queue_by_the_number_of_samples(samples, size):
    method = load_method("lightly_v1")(1, 1)
    assert method.prepare(SomeSamples(samples), seed=0) == {"queue": float(size)}
    assert method.queue.shape == (size, 1)


def test_lightly_keeps_a_queue_that_was_asked_for(tmp_path):
    source = Rows.of([write_store(tmp_path / "s.zarr", np.ones((5, TEACHER)))])
    method = load_method("lightly_v1")(TEACHER, STUDENT, queue=7)
    assert method.prepare(source, seed=0) == {"queue": 7.0}
    assert method.queue.shape == (7, TEACHER)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lightly_v1", {"queue": -1}, "queue must not be negative, got -1"),
        ("lightly_v1", {"temperature": 0.0}, r"temperature must be greater than 0, got 0\.0"),
        ("rkd", {"distance": -1.0}, r"distance must not be negative, got -1\.0"),
        ("rkd", {"match": -0.5}, r"match must not be negative, got -0\.5"),
    ],
)
def test_options_without_a_meaning_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_method(name)(TEACHER, STUDENT, **options)


def test_lightly_head_starts_as_in_the_original():
    torch.manual_seed(0)
    weight = load_method("lightly_v1")(200, 300).head.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)

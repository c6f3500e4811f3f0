"""EGA against its formula in float64, and whom each term reaches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from distill.methods.ega import EGA
from distill.testing.methods import CLASSES, STUDENT, batch_of, build, student_batch, teacher_batch, write_token_store
from featcache.rows import Rows


@pytest.fixture
def rows(tmp_path):
    return Rows.of([write_token_store(tmp_path / "s.zarr")])


def labelled(embedding):
    return batch_of({"embedding": embedding}, label=torch.zeros(len(embedding), dtype=torch.long))


def fed(method, x_teacher, x_student):
    """Terms of these embeddings as they are: heads that change nothing, of two classes."""
    width = len(x_teacher[0])
    for head in (method.teacher_head, method.student_head):
        head.load_state_dict({"weight": torch.eye(width), "bias": torch.zeros(width)})
    method.teacher_classifier = nn.Linear(width, 2)
    n = len(x_teacher)
    given = {"embedding": torch.tensor(x_student), "logits": torch.zeros(n, 2)}
    batch = labelled(torch.tensor(x_teacher))
    return {name: term.item() for name, term in method.loss(given, batch).items()}


def test_it_is_the_formula_in_float64(rows):
    method, _ = build("ega", {"beta": 0.5, "node": 0.7, "edge": 0.3}, rows)
    teacher, student = teacher_batch(rows, method.fields), student_batch(method.student_fields)
    found = {name: term.item() for name, term in method.loss(student, teacher).items()}

    def through(head, x):
        weight, bias = (each.detach().double().numpy() for each in (head.weight, head.bias))
        return x @ weight.T + bias

    x_t = through(method.teacher_head, teacher["embedding"].double().numpy())
    x_s = through(method.student_head, student["embedding"].detach().double().numpy())
    both = np.corrcoef(np.concatenate([x_t, x_s]))  # of 2n rows, as in the authors' code
    n = len(x_t)
    edge = math.sqrt(((both[:n, :n] - both[n:, n:]) ** 2).sum())
    node = math.sqrt(((both[:n, n:] - np.eye(n)) ** 2).sum())

    def ce(logits):
        shifted = logits - logits.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(n), teacher.label.numpy()]))

    expected = {
        "ce": ce(student["logits"].detach().double().numpy()),
        "teacher_ce": ce(through(method.teacher_classifier, x_t)),
        "node": 0.5 * 0.7 * node,
        "edge": 0.5 * 0.3 * edge,
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_golden_values(rows):
    """By hand: the teacher's two samples are uncorrelated, the student's are the teacher's first one twice."""
    first, second = [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]
    terms = fed(EGA(4, 4, beta=1.0, node=1.0, edge=1.0), [first, second], [first, first])
    # edge: E_t = I, E_s all ones. node: rows (1, 1) and (0, 0), minus I.
    assert terms == pytest.approx(
        {"ce": math.log(2), "teacher_ce": terms["teacher_ce"], "node": 2**0.5, "edge": 2**0.5}
    )


def test_every_term_counts_a_row_as_often_as_its_weight_says(rows):
    method, _ = build("ega", {"beta": 1.0, "node": 1.0, "edge": 1.0}, rows)
    student = student_batch(method.student_fields)
    teacher = replace(teacher_batch(rows, method.fields), label=torch.arange(len(rows)) % CLASSES)
    n = len(teacher.label)
    weight = torch.tensor(np.random.default_rng(0).uniform(0, 3, n), dtype=torch.float32)
    found = {name: term.item() for name, term in method.loss(student, replace(teacher, weight=weight)).items()}
    w = weight.double().numpy()
    with torch.no_grad():
        of_teacher = method.teacher_head(teacher["embedding"])
        x_t, x_s = (x.double().numpy() for x in (of_teacher, method.student_head(student["embedding"])))
        logits = {"ce": student["logits"], "teacher_ce": method.teacher_classifier(of_teacher)}
    for name, given in logits.items():
        log_p = given.double().log_softmax(1)[torch.arange(n), teacher.label].detach().numpy()
        assert found[name] == pytest.approx(-(w * log_p).sum() / w.sum(), rel=1e-5)
    both = np.corrcoef(np.concatenate([x_t, x_s]))
    for name, apart in (("node", both[:n, n:] - np.eye(n)), ("edge", both[:n, :n] - both[n:, n:])):
        pairs = sum(w[i] * w[j] * apart[i, j] ** 2 for i in range(n) for j in range(n))
        assert found[name] == pytest.approx(n * math.sqrt(pairs) / w.sum(), rel=1e-5)


def test_norms_are_neither_squared_nor_divided(rows):
    """Of the samples twice, the norm of E_t − E_s is twice as large; squared it were four times, divided by n as large."""
    drawn = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    once, twice = (
        fed(EGA(4, 4, beta=1.0, node=0.0, edge=1.0), *np.tile(drawn, (1, times, 1)).tolist()) for times in (1, 2)
    )
    assert once["edge"] > 0.5
    assert twice["edge"] == pytest.approx(2 * once["edge"], rel=1e-5)


def test_the_least_is_at_the_teachers_graph(rows):
    """Uncorrelated samples that the student embeds alike, up to each one's scale and offset: 0, and more anywhere near."""
    graph = [[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]
    method = EGA(4, 4, beta=1.0, node=1.0, edge=1.0)
    alike = (3 * np.array(graph, np.float32) + 2).tolist()
    least = fed(method, graph, alike)
    assert least["node"] + least["edge"] < 1e-5
    for seed in range(10):
        moved = alike + np.random.default_rng(seed).normal(scale=0.1, size=(3, 4))
        near = fed(method, graph, moved.astype(np.float32).tolist())
        assert min(near["node"], near["edge"]) > 0.01


def test_it_is_reached_by_descent(rows):
    method, _ = build("ega", {"beta": 1.0, "node": 1.0, "edge": 1.0, "dim": STUDENT}, rows)
    few = [0, 1, 2, 3]  # as many as can be uncorrelated over six features
    teacher = labelled(torch.eye(12)[few])
    method.teacher_head.load_state_dict({"weight": torch.eye(STUDENT, 12), "bias": torch.zeros(STUDENT)})
    method.student_head.load_state_dict({"weight": torch.eye(STUDENT), "bias": torch.zeros(STUDENT)})
    embedding = torch.randn(4, STUDENT, generator=torch.Generator().manual_seed(0)).requires_grad_()
    descent = torch.optim.Adam([embedding], lr=0.05)
    for _ in range(300):
        descent.zero_grad()
        terms = method.loss({"embedding": embedding, "logits": torch.zeros(4, CLASSES)}, teacher)
        terms["edge"].backward()
        descent.step()
    assert terms["edge"].item() < 0.1


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        ("ce", {"logits"}),
        ("teacher_ce", {"teacher_head.weight", "teacher_head.bias", "teacher_classifier.weight", "teacher_classifier.bias"}),
        ("node", {"embedding", "student_head.weight", "student_head.bias"}),
        ("edge", {"embedding", "student_head.weight", "student_head.bias"}),
    ],
)  # fmt: skip
def test_whom_each_term_reaches(rows, term, reached):
    """No node or edge in the teacher's head, and nothing of its cross-entropy in the student."""
    method, _ = build("ega", {}, rows)
    student = {name: value.detach().requires_grad_() for name, value in student_batch(method.student_fields).items()}
    method.loss(student, teacher_batch(rows, method.fields))[term].backward()
    leaves = {**student, **dict(method.named_parameters())}
    assert {name for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.abs().max() > 0} == reached


def test_an_arm_is_left_out_with_its_weight(rows):
    student = student_batch(EGA.student_fields)
    for left_out in ("node", "edge"):
        method, _ = build("ega", {left_out: 0.0}, rows)
        assert {"ce", "teacher_ce", "node", "edge"} - {*method.loss(student, teacher_batch(rows, method.fields))} == {
            left_out
        }


@pytest.mark.parametrize("given", [{"beta": 0.0}, {"node": 0.0, "edge": 0.0}])
def test_without_the_teacher_it_is_refused(given):
    with pytest.raises(ValueError, match="nothing is left of the teacher; that is method ce"):
        EGA(4, 4, **given)


@pytest.mark.parametrize(("name", "value"), [("node", -1.0), ("edge", -1.0), ("dim", -1)])
def test_negative_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
        EGA(4, 4, **{name: value})

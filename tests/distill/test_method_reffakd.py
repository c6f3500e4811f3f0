"""ReffAKD on a case made by hand, against its formula, and its control."""

import math

import numpy as np
import pytest
import torch

from distill.methods.reffakd import ReffAKD, even
from distill.testing.methods import batch_of
from featcache.rows import Rows


def prepared(embedding, label, **options):
    method = ReffAKD(len(embedding[0]), 4, **options)
    report = method.prepare(Rows.from_arrays(np.array(embedding, np.float32), np.array(label)), seed=0)
    return method, report


def terms(method, logits, label):
    batch = batch_of({"embedding": torch.zeros(len(label), 4)}, label=torch.tensor(label))
    return {name: term.item() for name, term in method.loss({"logits": torch.tensor(logits)}, batch).items()}


def test_a_case_by_hand():
    """Two classes of two samples, whose angles are 0° and 60°, and 90° and 180°."""
    at = [0, 60, 90, 180]
    embedding = [[3 * math.cos(math.radians(a)), 3 * math.sin(math.radians(a))] for a in at]
    method, report = prepared(embedding, [0, 0, 1, 1], boost=0.0, table_temperature=0.5)
    # cos 60° = ½; cos 90° = 0; between the classes the mean of cos 90°, 180°, 30°, 120°.
    between = (0 - 1 + math.sqrt(3) / 2 - 0.5) / 4
    table = np.array([[0.5, between], [between, 0.0]])
    q = np.exp(table / 0.5) / np.exp(table / 0.5).sum(1, keepdims=True)
    np.testing.assert_allclose(method.soft.numpy(), q, rtol=1e-6)
    np.testing.assert_allclose(q[0], [0.788680, 0.211320], atol=1e-6)
    assert report == {"entropy": pytest.approx(-(q * np.log(q)).sum(1).mean() / math.log(2))}
    # logits (2, 0) of class 0, at T = 2: softmax (e, 1) / (e + 1).
    log_p = np.log(np.array([math.e, 1]) / (math.e + 1))
    expected = {"soft_ce": 0.5 * 2**2 * -(q[0] @ log_p), "ce": 0.5 * math.log(1 + math.exp(-2))}
    method, _ = prepared(embedding, [0, 0, 1, 1], boost=0.0, table_temperature=0.5, temperature=2.0)
    assert terms(method, [[2.0, 0.0]], [0]) == pytest.approx(expected, rel=1e-6)
    assert terms(method, [[2.0, 0.0]], [0]) == pytest.approx({"soft_ce": 1.0491633, "ce": 0.0634640}, rel=1e-6)


def test_rows_without_a_label_count_for_nothing():
    method, _ = prepared(np.random.default_rng(0).normal(size=(8, 4)), [0, 1] * 3 + [-1, -1])
    logits = [[2.0, 0.0], [0.5, 0.0], [9.0, -9.0]]
    assert terms(method, logits, [0, 1, -1]) == pytest.approx(terms(method, logits[:2], [0, 1]), rel=1e-6)


def test_the_least_is_where_the_softened_student_is_the_soft_label():
    method, _ = prepared(np.random.default_rng(0).normal(size=(12, 4)), [0, 1, 2] * 4, alpha=1.0, table_temperature=0.2)
    logits = torch.zeros(3, 3, requires_grad=True)
    descent, batch = (
        torch.optim.Adam([logits], lr=0.1),
        batch_of({"embedding": torch.zeros(3, 4)}, label=torch.arange(3)),
    )
    for _ in range(400):
        descent.zero_grad()
        found = method.loss({"logits": logits}, batch)
        found["soft_ce"].backward()
        descent.step()
    assert [*found] == ["soft_ce"], "with α = 1 no label counts for itself"
    torch.testing.assert_close((logits / 5.0).softmax(1), method.soft, atol=1e-3, rtol=0)
    entropy = -(method.soft * method.soft.log()).sum(1).mean()
    assert found["soft_ce"].item() == pytest.approx(5.0**2 * entropy.item(), rel=1e-4)


def test_the_control_has_the_same_entropies_and_other_classes():
    given = np.random.default_rng(0).normal(size=(30, 4)), [*range(6)] * 5
    (method, report), (control, shuffled), (smooth, _) = (
        prepared(*given, table_temperature=0.1, control=control) for control in ("none", "shuffled", "even")
    )
    own, other = (np.sort(each.soft.numpy(), axis=1) for each in (method, control))
    np.testing.assert_array_equal(own, other)
    assert report["entropy"] == pytest.approx(shuffled["entropy"])
    np.testing.assert_array_equal(method.soft.diagonal(), control.soft.diagonal())
    assert (method.soft != control.soft).any(dim=1).sum() >= 5
    entropies = [-(each.soft.double() * each.soft.double().log()).sum(1).numpy() for each in (method, smooth)]
    np.testing.assert_allclose(*entropies, rtol=1e-5)
    others = smooth.soft[~torch.eye(6, dtype=torch.bool)].reshape(6, 5)
    assert (others == others[:, :1]).all()
    assert (smooth.soft.diagonal() > others[:, 0]).all()


def test_soft_labels_that_say_nothing_are_smoothed_to_nothing():
    np.testing.assert_allclose(even(np.log(np.full((4, 4), 0.25))), 0.25)


def test_a_class_without_two_rows_is_refused():
    with pytest.raises(ValueError, match="class 1 of array has 1 rows; its similarity to itself takes two"):
        prepared(np.eye(3), [0, 0, 1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be above 0 \(that is method ce\)"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"table_temperature": -1.0}, "table_temperature must be greater than 0"),
        ({"control": "odd"}, "unknown control 'odd'; known: none, shuffled, even"),
        ({"per_class": 1}, "per_class is 1; give at least 2"),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ReffAKD(4, 4, **given)

"""The term of `landmarks` against a float64 loop over samples and landmarks; what is drawn, and what is kept of it."""

import math

import numpy as np
import pytest
import torch
from method_cases import ROWS, STUDENT, TEACHER, student_batch, teacher_batch, write_token_store

from distill import load_method
from distill.methods import fitted_tensors
from distill.source import Source
from featcache.arrays import write_store


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Source([write_token_store(tmp_path_factory.mktemp("store") / "s.zarr")])


def prepared(source, student_dim=STUDENT, *, seed=0, fitted=None, **options):
    method = load_method("landmarks")(source.embedding_dim, student_dim, **{"mapping": "spectral", **options})
    return method, method.prepare(source, seed=seed, fitted=fitted)


def cosine(a, b):
    a, b = (x.detach().numpy().astype(np.float64) for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def softmax(values):
    exponents = np.exp(values - values.max())
    return exponents / exponents.sum()


def test_golden_value(tmp_path):
    """Landmarks (1, 0) and (0, 1); the teacher says the first, the student the second: KL is tanh(½) at τ = 1."""
    source = Source([write_store(tmp_path / "s.zarr", np.eye(2, dtype=np.float16))])
    method, _ = prepared(source, 2, mapping="identity", landmarks=2, weight=3.0, temperatures=[1.0])
    terms = method.loss({"embedding": torch.tensor([[0.0, 5.0]])}, {"embedding": torch.tensor([[2.0, 0.0]])})
    assert terms.keys() == {"cosine", "landmarks"}
    assert terms["landmarks"].item() == pytest.approx(3 * math.tanh(0.5))
    assert terms["cosine"].item() == pytest.approx(1)


@pytest.mark.parametrize("count", [5, ROWS, 1000])
def test_the_term_is_the_mean_divergence_of_a_slow_loop(source, count):
    temperatures = (0.05, 0.2)
    method, _ = prepared(source, landmarks=count, weight=0.7, temperatures=temperatures)
    teacher, student = teacher_batch(source, ("embedding",), view=1), student_batch(("embedding",))
    everyone = torch.from_numpy(source.gather(range(ROWS))).float()
    rows = np.random.default_rng(0).choice(ROWS, min(count, ROWS), replace=False)
    divergences = []
    for seen, output in zip(teacher["embedding"], student["embedding"], strict=True):
        of_teacher = np.array([cosine(seen, everyone[row]) for row in rows])
        of_student = np.array([cosine(output, method.mapping(everyone[row])) for row in rows])
        for temperature in temperatures:
            p, q = softmax(of_teacher / temperature), softmax(of_student / temperature)
            divergences.append((p * np.log(p / q)).sum())
    assert method.loss(student, teacher)["landmarks"].item() == pytest.approx(0.7 * np.mean(divergences), rel=1e-4)


def test_other_terms_are_tintems(source):
    method, report = prepared(source, tokens=True)
    tintem = load_method("tintem")(TEACHER, STUDENT, mapping="spectral", tokens=True)
    assert tintem.prepare(source, seed=0) == report
    teacher, student = teacher_batch(source, method.fields), student_batch(method.student_fields)
    found = method.loss(student, teacher)
    del found["landmarks"]
    assert found == tintem.loss(student, teacher)


def test_zero_where_the_mapping_loses_nothing_and_the_student_is_there(tmp_path):
    """Rows of a plane: two dimensions keep all angles. Any other place is worse."""
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(40, 2)) @ np.linalg.qr(rng.normal(size=(7, 2)))[0].T).astype(np.float16)
    method, _ = prepared(Source([write_store(tmp_path / "s.zarr", rows)]), 2)
    teacher = {"embedding": torch.from_numpy(rows).float()}
    there = method.target(teacher)
    least = method.loss({"embedding": there}, teacher)["landmarks"].item()
    assert 0 <= least < 1e-4
    for seed in range(5):
        moved = there + 0.3 * torch.randn(there.shape, generator=torch.Generator().manual_seed(seed))
        assert method.loss({"embedding": moved}, teacher)["landmarks"].item() > 100 * least


def test_landmarks_follow_the_seed_and_are_not_kept(source):
    """They are drawn again on resume: neither checkpoints nor `mapping.safetensors` grow by them."""
    (first, report), (other, _) = prepared(source, landmarks=6), prepared(source, landmarks=6, seed=1)
    assert not torch.equal(first.landmarks, other.landmarks)
    kept = fitted_tensors(first)
    assert first.state_dict().keys() == kept.keys() == {"mapping.weight"}
    again, told = prepared(source, landmarks=6, fitted=(kept, report))
    assert told == report
    for name in ("landmarks", "mapped_landmarks"):
        assert torch.equal(getattr(again, name), getattr(first, name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landmarks": 1}, "landmarks must be 2 or more, got 1"),
        ({"weight": -0.1}, "weight must not be negative"),
        ({"temperatures": []}, "temperatures must be one or more numbers greater than 0"),
        ({"temperatures": [0.1, 0.0]}, "temperatures must be one or more numbers greater than 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_method("landmarks")(TEACHER, STUDENT, **options)

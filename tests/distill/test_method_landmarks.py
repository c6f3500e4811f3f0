"""The term of `landmarks` against a float64 loop over samples and landmarks; what is drawn, and what is kept of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill import load_method
from distill.methods import fitted_tensors
from distill.methods.landmarks import Landmarks
from distill.testing.methods import ROWS, STUDENT, TEACHER, batch_of, student_batch, teacher_batch, write_token_store
from featcache.rows import Rows
from featcache.store.from_arrays import write_store


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Rows.of([write_token_store(tmp_path_factory.mktemp("store") / "s.zarr")])


def prepared(source, student_dim=STUDENT, *, seed=0, fitted=None, **options):
    method = load_method("landmarks")(source.embedding_dim, student_dim, **{"mapping": "spectral", **options})
    return method, method.prepare(source, seed=seed, fitted=fitted)


def cosine(a, b):
    a, b = (x.detach().numpy().astype(np.float64) for x in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_golden_value(tmp_path):
    """Landmarks (1, 0) and (0, 1); the teacher says the first, the student the second: KL is tanh(½) at τ = 1. So it is
    with an own column for the first, which is then no landmark; with none, one column is left, and nothing to learn."""
    source = Rows.of([write_store(tmp_path / "s.zarr", np.eye(2, dtype=np.float16))])
    student, teacher = {"embedding": torch.tensor([[0.0, 5.0]])}, {"embedding": torch.tensor([[2.0, 0.0]])}
    for own, rows, expected in (
        ("none", None, 0.5),
        ("column", torch.tensor([0]), 0.5),
        ("none", torch.tensor([0]), 0),
    ):
        options = {"mapping": "identity", "weight": 3.0, "temperatures": [1.0], "own": own}
        method, _ = prepared(source, 2, landmarks=2, **options)
        method._count = 1 if rows is not None and own == "column" else 2  # as many as there are: none stands for two
        terms = method.loss(student, batch_of(teacher, rows))
        assert terms.keys() == {"cosine", "landmarks"}
        assert terms["landmarks"].item() == pytest.approx(3 * math.tanh(expected))
        assert terms["cosine"].item() == pytest.approx(1)


@pytest.mark.parametrize("own", ["column", "none"])
@pytest.mark.parametrize("known", [True, False], ids=["rows known", "strangers"])
@pytest.mark.parametrize("count", [5, ROWS, 100])
def test_the_term_is_the_mean_divergence_of_a_slow_loop(source, count, known, own):
    """Where there are fewer rows than landmarks are asked for, each is there several times, in parts."""
    temperatures = (0.05, 0.2)
    method, _ = prepared(source, landmarks=count, weight=0.7, temperatures=temperatures, own=own)
    teacher, student = teacher_batch(source, ("embedding",), view=1), student_batch(("embedding",))
    everyone = torch.from_numpy(source.gather(range(ROWS))).float()
    rows = np.random.default_rng(0).choice(ROWS, min(count, ROWS), replace=False)
    divergences = []
    for i, (seen, output) in enumerate(zip(teacher["embedding"], student["embedding"], strict=True)):
        others = [row for row in rows if not (known and row == i)]
        of_teacher = [cosine(seen, everyone[row]) for row in others]
        of_student = [cosine(output, method.mapping(everyone[row])) for row in others]
        times = np.full(len(others), count / len(others) if own == "column" else 1.0)
        if own == "column":
            of_teacher, of_student = [*of_teacher, 1.0], [*of_student, cosine(output, method.mapping(seen))]
            times = np.append(times, 1.0)
        for temperature in temperatures:
            p, q = (times * np.exp(np.array(of) / temperature) for of in (of_teacher, of_student))
            divergences.append((p / p.sum() * np.log(p / p.sum() * q.sum() / q)).sum())
    if known:
        teacher = replace(teacher, row=torch.arange(ROWS))
    assert method.loss(student, teacher)["landmarks"].item() == pytest.approx(0.7 * np.mean(divergences), rel=1e-4)


def own_share(path, rows, dim=64):
    """Mean probability that a sample's distribution over the landmarks gives to itself, at τ = 0.1."""
    drawn = np.random.default_rng(0).normal(size=(rows, dim)) + 0.7  # cosines around 0.33, as teachers have
    source = Rows.of([write_store(path, drawn)])
    method, _ = prepared(source, 8, mapping="random_orthonormal")
    some = np.arange(200)  # the same samples in all stores
    teacher = batch_of({"embedding": torch.from_numpy(source.gather(some)).float()}, torch.from_numpy(some))
    ((target, _),) = method.similarities({"embedding": method.target(teacher)}, teacher, [0.1])
    return (target / 0.1).softmax(1)[:, -1].mean().item()


def test_the_own_share_does_not_depend_on_the_size_of_the_store(tmp_path):
    """With 200 rows, with as many as there are landmarks, and with 100,000."""
    few, some, many = (own_share(tmp_path / f"{rows}.zarr", rows) for rows in (200, 4096, 100_000))
    assert some == pytest.approx(many, rel=0.02)
    assert few == pytest.approx(many, rel=0.05)
    assert 0.05 < many < 0.5


def test_the_row_of_each_sample_reaches_the_method(train, tmp_path, monkeypatch):
    """Whatever is held out and however batches are cut: the features are those of that row of what `prepare` got."""
    seen, sources = [], []
    original = Landmarks.loss, Landmarks.prepare

    def loss(self, student, batch):
        seen.append((batch.row, batch["embedding"]))
        return original[0](self, student, batch)

    def prepare(self, source, **given):
        sources.append(source)
        return original[1](self, source, **given)

    monkeypatch.setattr(Landmarks, "loss", loss)
    monkeypatch.setattr(Landmarks, "prepare", prepare)
    options = {"mapping": "spectral"}
    train(
        tmp_path / "run", epochs=1, holdout=0.2, accumulate=2, views="plain", method="landmarks", method_options=options
    )
    rows = torch.cat([row for row, _ in seen])
    assert rows.dtype == torch.int64
    assert len(rows.unique()) == len(rows) == 48
    expected = torch.from_numpy(sources[0].gather(rows.numpy())).float()
    assert torch.equal(torch.cat([embedding for _, embedding in seen]), expected)


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
    method, _ = prepared(Rows.of([write_store(tmp_path / "s.zarr", rows)]), 2)
    teacher = batch_of({"embedding": torch.from_numpy(rows).float()})
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
    for name in ("landmarks", "mapped_landmarks", "landmark_rows"):
        assert torch.equal(getattr(again, name), getattr(first, name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landmarks": 1}, "landmarks must be 2 or more, got 1"),
        ({"own": "both"}, "unknown own 'both'; known: column, none"),
        ({"weight": -0.1}, "weight must not be negative"),
        ({"temperatures": []}, "temperatures must be one or more numbers greater than 0"),
        ({"temperatures": [0.1, 0.0]}, "temperatures must be one or more numbers greater than 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_method("landmarks")(TEACHER, STUDENT, **options)

"""Each number of the report, against another program's or plain loops."""

import numpy as np
import pytest

import evalsuite
from distill.mapping_report import _auroc, report
from distill.mappings import orthogonality
from distill.mappings.random_orthonormal import RandomOrthonormal
from distill.mappings.spectral import Spectral
from distill.objectives import TEMPERATURES
from featcache.rows import Rows
from featcache.store.from_arrays import write_store

CLASSES = ["ant", "bee", "cat"]


def clusters(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Three overlapping classes in 16 dimensions, and their labels."""
    labels = rng.integers(3, size=rows)
    return np.eye(16)[labels] + 0.6 * rng.normal(size=(rows, 16)), labels


@pytest.fixture
def stores(make_store, rng):
    """Bank, held-out rows, rows of another distribution; the bank is longer than one block."""
    bank, bank_labels = clusters(rng, 2500)
    test, test_labels = clusters(rng, 150)
    return (
        make_store("bank", bank, labels=bank_labels, class_names=CLASSES, failed={3: "truncated"}),
        make_store("test", test, labels=test_labels, class_names=CLASSES, failed={5: "truncated"}),
        make_store("ood", np.roll(np.eye(16), 5, 1)[rng.integers(3, size=120)] + 0.6 * rng.normal(size=(120, 16))),
    )


def mapped_store(mapping, store, path):
    """The store that the mapping would make of `store`: for evaluators that know no mappings."""
    return write_store(
        path,
        mapping.transform(store.gather(range(len(store)))),
        labels=store.labels,
        class_names=store.class_names,
        sample_ids=[str(i) for i in store.sample_ids],
        failed={int(row): "truncated" for row in np.setdiff1d(np.arange(len(store)), store.ok)},
    )


def test_orthogonality_golden_values():
    """Singular values 1 and 3: c = 5, WWᵀ/c = diag(1/5, 9/5), ‖·‖_F / √2 = 4/5."""
    weight = np.array([[1.0, 0, 0], [0, 0, 3.0]], np.float32)
    assert orthogonality(weight) == pytest.approx({"singular_min": 1, "singular_max": 3, "deviation": 0.8})
    scaled = np.array([[0, 2.0, 0], [0, 0, -2.0]], np.float32)
    assert orthogonality(scaled) == pytest.approx({"singular_min": 2, "singular_max": 2, "deviation": 0})


def test_numbers_are_those_of_evalsuite(stores, tmp_path):
    mapping = RandomOrthonormal(6).fit(stores[0])
    found = report(mapping, stores[0], id_test=stores[1], ood=stores[2])
    mapped = [mapped_store(mapping, store, tmp_path / f"mapped-{i}.zarr") for i, store in enumerate(stores)]
    for prefix, (bank, test, ood) in (("teacher/", stores), ("", mapped)):
        knn = evalsuite.knn(bank, test, k=[20], resamples=2)
        assert found[f"{prefix}top1@20"] == pytest.approx(knn.metrics["top1@20"].value, abs=0.01)
        for k in (1, 50):
            result = evalsuite.ood(id_train=bank, id_test=test, near={"other": ood}, detectors=[f"knn:k={k}"])
            assert found[f"{prefix}auroc@{k}"] == pytest.approx(
                result.metrics[f"knn:k={k}/near/other/auroc"].value, abs=1e-3
            )
    fidelity = evalsuite.fidelity(stores[1], mapped[1])
    assert found["gram_pearson"] == pytest.approx(fidelity.metrics["gram_pearson"].value, abs=1e-4)


def test_mutual_neighbours_and_loss_by_plain_loops(make_store, stores, rng, slow_relation_kl):
    mapping = Spectral(3).fit(stores[0])
    few = make_store("few", clusters(rng, 40)[0])
    rows = few.gather(range(40)).astype(np.float64)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, rows @ mapping.weight_.T)]
    before, after = (x @ x.T for x in unit)
    shared = 0
    for i in range(40):
        near = [[j for j in np.argsort(-gram[i]) if j != i][:10] for gram in (before, after)]
        shared += len(set(near[0]) & set(near[1]))
    found = report(mapping, stores[0], id_test=few)
    assert found["mutual_knn@10"] == pytest.approx(shared / 40 / 10, abs=0.003)
    assert found["sne"] == pytest.approx(slow_relation_kl(before, after, TEMPERATURES, True, True), rel=1e-3)


def test_without_held_out_rows_the_store_itself_is_looked_at(stores):
    found = report(Spectral(4).fit(stores[0]), stores[0], sample=100)
    assert set(found) == {"singular_min", "singular_max", "deviation", "sne", "gram_pearson", "mutual_knn@10"}
    assert all(type(value) is float for value in found.values())


def test_a_map_to_full_width_keeps_everything(stores):
    found = report(RandomOrthonormal(16).fit(stores[0]), stores[0], id_test=stores[1], ood=stores[2])
    assert found["sne"] == pytest.approx(0, abs=1e-4)
    assert found["gram_pearson"] == pytest.approx(1, abs=1e-5)
    assert found["mutual_knn@10"] > 0.995
    for name in ("auroc@1", "auroc@50"):
        assert found[name] == pytest.approx(found[f"teacher/{name}"], abs=1e-3)
    assert found["top1@20"] == pytest.approx(found["teacher/top1@20"], abs=0.01)


def test_the_sample_is_drawn_from_the_seed(stores):
    mapping = Spectral(3).fit(stores[0])

    def gram(seed: int) -> float:
        return report(mapping, stores[0], id_test=stores[1], sample=60, seed=seed)["gram_pearson"]

    assert gram(1) == gram(1)
    assert gram(1) != gram(2)


def test_rows_without_labels_have_no_vote(make_store, stores, rng):
    bank, labels = clusters(rng, 200)
    some = np.where(np.arange(200) % 2 == 0, labels, -1)
    store = make_store("some", bank, labels=some, class_names=CLASSES)
    found = report(RandomOrthonormal(16).fit(store), store, id_test=stores[1])
    assert found["teacher/top1@20"] > 0.5
    bare = make_store("bare", bank)
    assert "top1@20" not in report(RandomOrthonormal(16).fit(bare), bare, id_test=stores[1])


def test_several_stores_are_one_source(make_store, rng):
    rows, _ = clusters(rng, 200)
    parts = Rows.of([make_store("a", rows[:90]), make_store("b", rows[90:])])
    whole = make_store("whole", rows)
    mapping = Spectral(3).fit(whole)
    assert report(mapping, parts, id_test=parts, ood=parts) == report(mapping, whole, id_test=whole, ood=whole)


def test_auroc_counts_ties_one_half():
    assert _auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0])) == pytest.approx(3.5 / 4)
    assert _auroc(np.array([3.0]), np.array([1.0])) == 0


def test_what_cannot_be_compared_is_refused(make_store, stores, rng):
    bank, test, ood = stores
    mapping = Spectral(3).fit(bank)
    with pytest.raises(ValueError, match="give `id_test` as well"):
        report(mapping, bank, ood=ood)
    with pytest.raises(ValueError, match=r"few\.zarr: 11 rows with features; a report needs 12 or more"):
        report(mapping, bank, id_test=make_store("few", rng.normal(size=(11, 16))))
    small = make_store("small", rng.normal(size=(49, 16)))
    with pytest.raises(ValueError, match=r"small\.zarr: 49 rows with features; its neighbours need 50 or more"):
        report(mapping, small, id_test=test)
    other = make_store("other", rng.normal(size=(20, 16)), labels=np.zeros(20, int), class_names=["dog"])
    with pytest.raises(ValueError, match="do not name their classes alike"):
        report(mapping, bank, id_test=other)
    rows = rng.normal(size=(60, 16))
    ours, theirs = (make_store(f"from{n}", rows, labels=np.full(60, n)) for n in (0, 100))
    with pytest.raises(ValueError, match=r"from100\.zarr and .*from0\.zarr have no class in common"):
        report(mapping, ours, id_test=theirs)

import json
import re
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save_file
from sklearn.decomposition import PCA

import featcache.rows
import featcache_cli.screen
from evalsuite import Result, ood
from evalsuite.detectors import Detector, load
from evalsuite.intervals import mean_of, ranking
from evalsuite.metrics import ood_metrics
from featcache.head import Head
from featcache.rows import Rows
from featcache_cli import programs

METRICS = ("auroc", "aupr_in", "aupr_out", "ap_in", "ap_out", "fpr95_id", "fpr95_ood")


@pytest.fixture
def arrays(rng, clusters):
    """ID train, ID test, one near and two far sets, overlapping enough that no metric is saturated."""
    centres = 2 * rng.normal(size=(4, 6))
    return {
        "train": clusters(centres, 20, spread=1.0),
        "test": clusters(centres, 8, spread=1.0),
        "near": clusters(centres[:2] + rng.normal(size=6), 10, spread=1.0),
        "far_a": clusters(2 * rng.normal(size=(2, 6)), 9, spread=1.0),
        "far_b": clusters(-centres[:1], 12, spread=1.0),
    }


@pytest.fixture
def stores(arrays, make_store):
    return {name: make_store(name, x, [f"{name}/{i}" for i in range(len(x))]) for name, x in arrays.items()}


def slow_knn_score(train, x, k):
    train, x = (a.astype(np.float16).astype(np.float64) for a in (train, x))
    cosine = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (train / np.linalg.norm(train, axis=1, keepdims=True)).T
    return 1 - np.sort(cosine, axis=1)[:, -k]


def run(stores, **given):
    return ood(
        id_train=stores["train"],
        id_test=stores["test"],
        near={"n": stores["near"]},
        far={"a": stores["far_a"], "b": stores["far_b"]},
        **given,
    )


def approx(interval):
    return interval and pytest.approx(interval, abs=1e-5)  # scores are float32 in one, float64 in the other


@pytest.mark.parametrize(("spec", "k"), [("knn", 50), ("knn:k=1", 1)])
def test_values_and_intervals_equal_the_slow_way(arrays, stores, monkeypatch, spec, k):
    monkeypatch.setattr(featcache.rows, "_BLOCK_FLOATS", 6 * 7)  # scores are computed 7 rows at a time
    result = run(stores, detectors=[spec], seed=3)
    score = {name: slow_knn_score(arrays["train"], x, k) for name, x in arrays.items()}
    estimates = []
    for group, name, ood_set in (("near", "n", "near"), ("far", "a", "far_a"), ("far", "b", "far_b")):
        expected = ood_metrics(score["test"], score[ood_set])
        estimates.append(ranking(score["test"], score[ood_set], ood_source=ood_set))
        for metric, value in expected.items():
            got = result.metrics[f"{spec}/{group}/{name}/{metric}"]
            assert got.value == pytest.approx(value, abs=1e-12)
            assert (got.ci95, got.no_ci95) == (approx(estimates[-1][metric].ci95), estimates[-1][metric].none)
    for metric in METRICS:
        a, b = (result.metrics[f"{spec}/far/{name}/{metric}"].value for name in "ab")
        mean = result.metrics[f"{spec}/far/mean/{metric}"]
        assert mean.value == pytest.approx((a + b) / 2, abs=1e-12)
        assert mean.ci95 == approx(mean_of([of_set[metric] for of_set in estimates[1:]]).ci95)
        assert result.metrics[f"{spec}/near/mean/{metric}"] == result.metrics[f"{spec}/near/n/{metric}"]
    assert len(result.metrics) == len(METRICS) * (3 + 2)
    assert 0.5 < result.metrics[f"{spec}/far/b/auroc"].value < 1
    assert result.parameters["detectors"] == {spec: {"k": k, "mean": False}}


def test_k_reaches_detectors_whose_spec_does_not_set_it(stores):
    result = run(stores, detectors=("knn", "knn: k = 1"), k=7, resamples=5)
    assert {spec: given["k"] for spec, given in result.parameters["detectors"].items()} == {"knn": 7, "knn:k=1": 1}
    assert result.metrics["knn/near/n/auroc"] != result.metrics["knn:k=1/near/n/auroc"]


def test_an_ignored_k_warns(stores, monkeypatch):
    monkeypatch.setattr("evalsuite.detectors.load", lambda name: _Norm)
    with pytest.warns(UserWarning, match="k=7 is ignored"):
        run(stores, detectors=["norm"], k=7, resamples=5)


class _Norm(Detector):
    """A detector without arguments."""

    def score(self, features):
        return np.linalg.norm(features, axis=1)


class _Coarse(_Norm):
    """Its scores tell two kinds of rows apart, no more."""

    def score(self, features):
        return (features[:, 0] > 0).astype(np.float64)


def test_saturated_scores_are_counted_and_said(stores, monkeypatch):
    monkeypatch.setattr("evalsuite.detectors.load", lambda name: _Coarse if name == "coarse" else load(name))
    with pytest.warns(RuntimeWarning) as warned:
        result = run(stores, detectors=["coarse", "knn"], resamples=5)
    assert [str(w.message)[:41] for w in warned] == ["detector coarse: scores saturate: 100% of"]
    assert result.parameters["tied"]["coarse"] == {"near/n": 1.0, "far/a": 1.0, "far/b": 1.0}
    assert result.parameters["tied"]["knn"] == {"near/n": 0.0, "far/a": 0.0, "far/b": 0.0}


def test_duplicated_rows_tie_but_are_no_saturation(stores, arrays, make_store):
    twice = make_store("twice", np.tile(arrays["near"], (2, 1)))
    result = run(stores | {"near": twice}, resamples=5)  # a warning would be an error
    assert result.parameters["tied"]["knn"]["near/n"] == pytest.approx(40 / (40 + 32))


class _Broken(_Norm):
    def fit(self, bank):
        raise RuntimeError("out of luck")


class _NotANumber(_Norm):
    def score(self, features):
        return np.full(len(features), np.nan)


@pytest.mark.parametrize(
    ("broken", "reason"), [(_Broken, "RuntimeError: out of luck"), (_NotANumber, "ValueError: .*NaN")]
)
def test_a_failing_detector_does_not_lose_the_others(stores, monkeypatch, broken, reason):
    expected = run(stores, detectors=["knn"], resamples=5)
    monkeypatch.setattr("evalsuite.detectors.load", lambda name: broken if name == "broken" else load(name))
    with pytest.warns(RuntimeWarning, match=f"broken failed.*{reason}"):
        result = run(stores, detectors=["broken", "knn"], resamples=5)
    assert result.metrics == expected.metrics
    assert list(result.parameters["failed_detectors"]) == ["broken"]
    with pytest.raises(ValueError, match=r"every detector failed .*broken"):
        run(stores, detectors=["broken"])


@pytest.fixture
def with_logits(arrays, rng, make_store):
    """Stores of the same rows with labels and logits."""
    head = rng.normal(size=(6, 3))
    labels = np.repeat(np.arange(4), 20)
    return {
        name: make_store(
            f"{name}-logits",
            x,
            [f"{name}/{i}" for i in range(len(x))],
            logits=x @ head,
            labels=labels if name == "train" else None,
        )
        for name, x in arrays.items()
    }


def test_all_detectors_of_a_command_read_each_set_once(with_logits, monkeypatch):
    specs = ["knn:k=3", "mahalanobis++", "gmm:covariance=tied", "msp", "energy", "nnguide"]
    alone = [run(with_logits, detectors=[spec], resamples=5).metrics for spec in specs]
    reads = Counter()
    take = featcache.rows.Rows.take

    def counted(self, positions, field="embedding", view=0):
        reads[self.name, field] += len(positions)
        return take(self, positions, field, view)

    monkeypatch.setattr(featcache.rows.Rows, "take", counted)
    together = run(with_logits, detectors=specs, resamples=5).metrics
    assert together == {name: metric for metrics in alone for name, metric in metrics.items()}
    for name in ("test", "near", "far_a", "far_b"):
        store = with_logits[name]
        assert reads[str(store.path), "embedding"] == reads[str(store.path), "logits"] == len(store)


def test_a_detector_without_its_field_does_not_lose_the_others(with_logits, stores):
    mixed = with_logits | {"far_b": stores["far_b"]}
    with pytest.warns(RuntimeWarning) as warned:
        result = run(mixed, detectors=["knn", "msp", "nnguide", "mahalanobis"], resamples=5)
    assert list(result.parameters["failed_detectors"]) == ["msp", "nnguide"]
    assert {name.split("/")[0] for name in result.metrics} == {"knn", "mahalanobis"}
    assert [str(w.message) for w in warned] == [
        f"detector {spec} failed and is left out: ValueError: {stores['far_b'].path} has no logits; "
        "extract it again with --fields embedding,logits, using an encoder that has them, "
        "or give a head (`evalsuite probe` saves one)"
        for spec in ("msp", "nnguide")
    ]


@pytest.fixture
def head(rng, tmp_path):
    """Writes a classifier of four classes of 6-dimensional rows."""

    def write(**metadata):
        arrays = {"weight": rng.normal(size=(4, 6)), "bias": rng.normal(size=4)}
        save_file(arrays, tmp_path / "head.safetensors", metadata)
        return tmp_path / "head.safetensors"

    return write


def test_a_head_serves_the_detectors_that_need_one(arrays, make_store, with_logits, head):
    path = head(labels="[0, 1, 2, 3]", fingerprint="arrays")
    classifier = Head.read(path)
    labels = np.repeat(np.arange(4), 20)
    own = {
        name: make_store(
            f"{name}-own",
            x,
            logits=classifier.logits(x.astype(np.float16)),
            labels=labels if name == "train" else None,
        )
        for name, x in arrays.items()
    }
    with pytest.warns(RuntimeWarning, match="right on 0.1625 of the 80 labelled rows of id_train .* next to chance"):
        result = run(with_logits, detectors=["energy", "vim", "she"], head=path, resamples=5)
    assert result.parameters["head"] == str(path)
    assert {name.split("/")[0] for name in result.metrics} == {"energy", "vim", "she"}
    for name, metric in run(own, detectors=["energy"], resamples=5).metrics.items():
        assert result.metrics[name].value == pytest.approx(metric.value, abs=0.01)  # stored as float16
    with pytest.raises(ValueError, match=r"vim: a head is needed to score against .*train-own\.zarr; fit one with"):
        run(own, detectors=["vim"])


def test_a_head_that_does_not_fit_is_refused(stores, head, tmp_path, make_store):
    with pytest.raises(
        ValueError, match=r"head\.safetensors was fitted to 6 dimensions of encoder other, .*fit a head"
    ):
        run(stores, head=head(fingerprint="other"))
    with pytest.raises(ValueError, match=r"head\.safetensors holds no classifier .*2 labels"):
        run(stores, head=head(labels="[0, 1]"))
    with pytest.raises(ValueError, match=r"head\.safetensors holds no classifier .*4 labels, 1 class names"):
        run(stores, head=head(class_names='["ant"]'))
    narrow = {name: make_store(f"narrow-{name}", np.ones((5, 3)) * i) for i, name in enumerate(stores)}
    with pytest.raises(
        ValueError, match=r"was fitted to 6 dimensions, .*narrow-train\.zarr has 3 of arrays; fit a head"
    ):
        run(narrow, head=head())
    (tmp_path / "text.safetensors").write_text("nothing")
    for name, said in (
        ("text.safetensors", " holds no classifier "),
        ("missing.safetensors", ": no such file"),
        ("near.zarr", ": this is a store or another folder"),
    ):
        with pytest.raises(ValueError, match=f"{name}{said}.*; give a head that `evalsuite probe"):
            run(stores, head=tmp_path / name)


CLASSES = ["ant", "bee", "cat", "dog"]


def probed(arrays, make_store, order=(0, 1, 2, 3), named=True):
    """Stores of four labelled classes, and the head that puts a row to the nearest of their means, its classes in `order`."""
    labels = {"train": np.repeat(np.arange(4), 20), "test": np.repeat(np.arange(4), 8)}
    names = {"class_names": CLASSES} if named else {}
    stores = {
        name: make_store(f"{name}-{named}", x, **({"labels": labels[name], **names} if name in labels else {}))
        for name, x in arrays.items()
    }
    means = arrays["train"].reshape(4, 20, -1).mean(axis=1)[list(order)]
    return stores, {"weight": means, "bias": -0.5 * (means**2).sum(axis=1)}


def nearest_mean(arrays):
    means = arrays["train"].reshape(4, 20, -1).mean(axis=1)
    away = ((arrays["test"][:, None] - means) ** 2).sum(axis=-1)
    return float((away.argmin(axis=1) == np.repeat(np.arange(4), 8)).mean())


def saved(tmp_path, arrays, **metadata):
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, tmp_path / "head.safetensors", metadata)
    return tmp_path / "head.safetensors"


def test_a_head_in_another_order_scores_the_same_where_it_has_names(arrays, make_store, tmp_path):
    order = [2, 0, 3, 1]
    detectors = ["she", "energy", "msp", "vim", "fdbd", "nci", "gradnorm"]
    stores, head = probed(arrays, make_store)
    found = {}
    for which in ([0, 1, 2, 3], order):
        permuted = {name: array[which] for name, array in head.items()}
        path = saved(tmp_path, permuted, class_names=json.dumps([CLASSES[i] for i in which]))
        found[tuple(which)] = run(stores, head=path, detectors=detectors, resamples=5)
    one, other = found.values()
    assert {name: m.value for name, m in one.metrics.items()} == {name: m.value for name, m in other.metrics.items()}
    assert one.parameters["head_accuracy"] == other.parameters["head_accuracy"]
    assert one.parameters["head_accuracy"] == {
        "top1": pytest.approx(nearest_mean(arrays)), "chance": 0.25, "rows": 32, "of": "id_test", "classes_by": "name",
    }  # fmt: skip
    assert f"right on {nearest_mean(arrays):.4f} of the 32 labelled rows of id_test" in one.remarks[-1]


@pytest.mark.parametrize("named", [True, False])
def test_a_head_in_another_order_without_names_warns(arrays, make_store, tmp_path, named):
    stores, head = probed(arrays, make_store, [2, 0, 3, 1], named)
    with pytest.warns(
        RuntimeWarning, match=r"head .*head\.safetensors: right on 0\.\d+ of the 32 .*matched by number, next to"
    ):
        result = run(stores, head=saved(tmp_path, head), detectors=["energy"], resamples=5)
    assert result.parameters["head_accuracy"]["top1"] < 0.25
    assert "its classes matched by number (chance 0.2500)" in result.remarks[-1]


def test_where_id_test_has_no_labels_a_head_is_judged_on_id_train(arrays, make_store, tmp_path):
    """`she` takes its patterns from id_train by the head's classes: in another order it said 0.56 for 0.75 without a word."""
    stores, good = probed(arrays, make_store, named=False)
    for order, right in (([0, 1, 2, 3], True), ([2, 0, 3, 1], False)):
        head = {name: array[order] for name, array in good.items()}
        given = stores | {"test": stores["near"], "near": stores["test"]}  # near has no labels
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = run(given, head=saved(tmp_path, head), detectors=["she"], resamples=5)
        found = result.parameters["head_accuracy"]
        assert (found["of"], found["rows"], found["top1"] > 0.5) == ("id_train", 80, right)
        assert any("labelled rows of id_train" in remark for remark in result.remarks)
        assert any("next to chance" in str(each.message) for each in told) is not right


def test_a_good_head_does_not_warn_where_one_class_has_most_rows(arrays, make_store, tmp_path):
    """Not better than the majority alone, but right about the other classes; and all of one class."""
    labels = np.repeat(np.arange(4), 8)
    stores, head = probed(arrays, make_store)
    path = saved(tmp_path, head, class_names=json.dumps(CLASSES))
    away = ((arrays["test"][:, None] - head["weight"]) ** 2).sum(axis=-1)
    right, wrong = np.flatnonzero(away.argmin(axis=1) == labels), np.flatnonzero(away.argmin(axis=1) != labels)
    few = [right[labels[right] == c][0] for c in range(1, 4)]
    rows = np.concatenate([np.repeat(right[labels[right] == 0][:1], 60), few, np.repeat(wrong[:1], 3)])
    for name, chosen in (("most", rows), ("one", rows[:30])):
        stores["test"] = make_store(name, arrays["test"][chosen], labels=labels[chosen], class_names=CLASSES)
        found = run(stores, head=path, detectors=["vim"], resamples=5).parameters["head_accuracy"]
        assert 0.9 < found["chance"] >= found["top1"] - 0.01


def test_two_classes_of_a_head_exchanged_warns(arrays, make_store, tmp_path):
    """It is right about the others, far above chance."""
    big = {name: np.repeat(x, 3, axis=0) if name == "test" else x for name, x in arrays.items()}
    labels = np.repeat(np.arange(4), 24)
    stores, head = probed(arrays, make_store, [0, 2, 1, 3])
    stores["test"] = make_store("more", big["test"], labels=labels, class_names=CLASSES)
    with pytest.warns(
        RuntimeWarning, match=r"\d+ of \d+ rows that it takes for (bee are cat|cat are bee) in id_test .*order"
    ):
        run(stores, head=saved(tmp_path, head), detectors=["energy"], resamples=5)


def test_a_random_head_warns(arrays, make_store, rng, tmp_path):
    stores, _ = probed(arrays, make_store)
    path = saved(
        tmp_path, {"weight": 1e-3 * rng.normal(size=(4, 6)), "bias": np.eye(4)[1]}, class_names=json.dumps(CLASSES)
    )
    with pytest.warns(RuntimeWarning, match=r"right on 0\.2500 of the 32 labelled rows of id_test .*next to chance"):
        run(stores, head=path, detectors=["energy"], resamples=5)


def test_classes_that_cannot_be_matched_are_not_judged(arrays, make_store, rng, tmp_path):
    stores, _ = probed(arrays, make_store)
    many = {"weight": rng.normal(size=(9, 6)), "bias": np.zeros(9)}
    result = run(stores, head=saved(tmp_path, many), detectors=["energy"], resamples=5)
    assert result.parameters["head_accuracy"] is None
    assert "cannot be told: it has 9 classes without names that are matched, and the store 4" in result.remarks[-1]
    foreign = saved(tmp_path, many, class_names=json.dumps([f"other {i}" for i in range(9)]))
    result = run(stores, head=foreign, detectors=["energy"], resamples=5)
    assert result.parameters["head_accuracy"] is None
    assert "cannot be told: they have no class in common" in result.remarks[-1]


def test_stored_logits_are_judged_by_name_or_where_there_are_as_many_as_classes(arrays, make_store, monkeypatch):
    labels = {"train": np.repeat(np.arange(4), 20), "test": np.repeat(np.arange(4), 8)}
    _, head = probed(arrays, make_store)

    def stores(name, order):
        return {
            each: make_store(
                f"{each}-{name}", x, logits=(x @ head["weight"].T + head["bias"])[:, order],
                **({"labels": labels[each], "class_names": CLASSES} if each in labels else {}),
            )
            for each, x in arrays.items()
        }  # fmt: skip

    result = run(stores("right", [0, 1, 2, 3]), detectors=["energy"], resamples=5)
    assert result.parameters["head_accuracy"]["top1"] == pytest.approx(nearest_mean(arrays))
    with pytest.warns(RuntimeWarning, match="the stored logits: right on 0.* matched by number, next to chance"):
        run(stores("permuted", [2, 0, 3, 1]), detectors=["energy"], resamples=5)
    result = run(stores("many", [0, 1, 2, 3, 0, 1]), detectors=["energy"], resamples=5)
    assert (result.parameters["head_accuracy"], result.remarks) == (None, [])

    monkeypatch.setattr(Rows, "logit_classes", [*(CLASSES[i] for i in [2, 0, 3, 1]), "another"])  # their encoder knows
    result = run(stores("named", [2, 0, 3, 1, 1]), detectors=["energy"], resamples=5)
    found = result.parameters["head_accuracy"]
    assert found["classes_by"] == "name"
    assert found["top1"] == pytest.approx(nearest_mean(arrays))


def test_rows_left_out_are_remarked_on(arrays, make_store):
    labels = np.repeat(np.arange(4), 20)
    labels[:7] = -1
    stores = {name: make_store(name, x, failed={1: "damaged"}) for name, x in arrays.items() if name != "train"}
    stores["train"] = make_store("train", arrays["train"], labels=labels, failed={70: "damaged", 71: "damaged"})
    result = run(stores, detectors=["knn:k=3"], resamples=5)
    sizes = {"id_test": 32, "near/n": 20, "far/a": 18, "far/b": 12}
    failed = [f"id_train {stores['train'].path}: left out of 80 rows: 2 failed"]
    paths = {"id_test": "test", "near/n": "near", "far/a": "far_a", "far/b": "far_b"}
    failed += [f"{key} {stores[paths[key]].path}: left out of {n} rows: 1 failed" for key, n in sizes.items()]
    assert result.remarks == failed
    remarks = run(stores, detectors=["knn:k=3", "mahalanobis"], resamples=5).remarks
    lost = f"id_train {stores['train'].path}: 7 of 78 rows have no label: detectors that need labels leave them out"
    assert remarks == [*failed, lost]


@pytest.mark.parametrize(
    ("arrays_given", "metadata", "said"),
    [
        ({"bias": np.array([0, np.nan, 0, 0])}, {}, "1 of 4 values of bias are not finite"),
        ({"weight": np.full((4, 6), np.inf)}, {}, "24 of 24 values of weight are not finite"),
        ({"weight": np.zeros(4)}, {}, r"weight \(4,\), bias \(4,\)"),
        ({"weight": np.zeros((0, 6)), "bias": np.zeros(0)}, {}, r"weight \(0, 6\)"),
        ({"bias": np.zeros((4, 1))}, {}, r"bias \(4, 1\)"),
        ({"bias": np.zeros(())}, {}, "1 labels"),
        ({"bias": np.zeros(4, bool)}, {}, "bias is BOOL, no numbers"),
        ({"bias": None}, {}, "no bias, but weight"),
        ({}, {"labels": "[0, 1, 2, 2]"}, "labels are not distinct numbers from 0"),
        ({}, {"labels": "[0, 1, 2, -1]"}, "labels are not distinct numbers from 0"),
        ({}, {"labels": "[0.5, 1, 2, 3]"}, "labels is no list of whole numbers"),
        ({}, {"labels": "[]"}, "0 labels"),
        ({}, {"labels": "7"}, "labels is no list"),
        ({}, {"labels": "[0, 1, 2, 1" + 30 * "0" + "]"}, "holds no classifier"),
        ({}, {"labels": "{"}, "holds no classifier"),
        ({}, {"class_names": "[1, 2, 3, 4]"}, "class_names is no list of words"),
        ({}, {"class_names": '"ants"'}, "class_names is no list of words"),
    ],
)
def test_a_head_that_is_none_gets_one_line(stores, tmp_path, arrays_given, metadata, said):
    given = {"weight": np.ones((4, 6)), "bias": np.zeros(4)} | arrays_given
    path = saved(tmp_path, {name: array for name, array in given.items() if array is not None}, **metadata)
    with pytest.raises(ValueError, match=r"head\.safetensors holds no classifier \(.*\); give a head") as refused:
        run(stores, head=path)
    assert "\n" not in str(refused.value)
    assert re.search(said, str(refused.value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_heads_of_any_number_type_are_read(tmp_path, dtype):
    weight = torch.arange(12).reshape(3, 4).to(dtype)
    torch_save_file({"weight": weight, "bias": torch.ones(3, dtype=dtype)}, tmp_path / "h.safetensors")
    head = Head.read(tmp_path / "h.safetensors")
    np.testing.assert_array_equal(head.weight, np.arange(12.0).reshape(3, 4))
    assert head.weight.dtype == head.bias.dtype == np.float64


def test_a_row_that_is_not_finite_is_named(stores, arrays, make_store):
    near = arrays["near"].copy()
    near[7, 2] = np.inf
    bad = make_store("bad", near, failed={0: "truncated"})
    with pytest.raises(ValueError, match=r"bad\.zarr row 7: embedding is not finite; extract it again"):
        run(stores | {"near": bad}, detectors=["knn"], resamples=5)


@pytest.mark.parametrize("where", ["test", "far_b"])
def test_logits_that_are_not_finite_lose_only_what_needs_them(with_logits, make_store, where):
    """In the last row of one set: whatever was scored before it."""
    expected = run(with_logits, detectors=["knn:k=5"], resamples=5)
    store = with_logits[where]
    logits = np.array(store.gather(range(len(store)), field="logits"))
    logits[-1, 0] = np.nan
    bad = make_store("bad", store.gather(range(len(store))), logits=logits)
    with pytest.warns(RuntimeWarning, match=r"detector msp failed .*bad\.zarr row \d+: logits is not finite"):
        result = run(with_logits | {where: bad}, detectors=["msp", "knn:k=5"], resamples=5)
    assert {name: metric.value for name, metric in result.metrics.items()} == {
        name: metric.value for name, metric in expected.metrics.items()
    }


def test_all_failing_names_the_bank(stores):
    with pytest.raises(ValueError, match=r"k=81 .*train\.zarr, which has 80 rows; use k from 1 to 80"):
        run(stores, k=81)


def test_full_spectrum_pools_the_shifted_sets_with_id_test(stores, arrays, make_store, monkeypatch):
    shifted = {"c": arrays["test"] + 0.7, "r": arrays["test"][:9] * 1.5 - 1}
    csid = {name: make_store(f"csid-{name}", x, [(name, i) for i in range(len(x))]) for name, x in shifted.items()}
    plain = run(stores, detectors=["knn:k=3"], resamples=30, seed=3)
    reads = Counter()
    take = featcache.rows.Rows.take

    def counted(self, positions, field="embedding", view=0):
        reads[self.name] += len(positions)
        return take(self, positions, field, view)

    monkeypatch.setattr(featcache.rows.Rows, "take", counted)
    result = run(stores, detectors=["knn:k=3"], csid=csid, resamples=30, seed=3)
    for store in (*csid.values(), *(stores[name] for name in ("test", "near", "far_a", "far_b"))):
        assert reads[str(store.path)] == len(store)
    assert plain.metrics.items() <= result.metrics.items()

    score = {name: slow_knn_score(arrays["train"], x, 3) for name, x in (arrays | shifted).items()}
    known = np.concatenate([score["test"], score["c"], score["r"]])
    estimates = []
    for group, name, ood_set in (("near", "n", "near"), ("far", "a", "far_a"), ("far", "b", "far_b")):
        estimates.append(ranking(known, score[ood_set], ood_source=ood_set))
        for metric, value in ood_metrics(known, score[ood_set]).items():
            got = result.metrics[f"knn:k=3/{group}_fs/{name}/{metric}"]
            assert got.value == pytest.approx(value, abs=1e-12)
            assert (got.ci95, got.no_ci95) == (approx(estimates[-1][metric].ci95), estimates[-1][metric].none)
    for metric in METRICS:
        a, b = (result.metrics[f"knn:k=3/far_fs/{name}/{metric}"].value for name in "ab")
        mean = result.metrics[f"knn:k=3/far_fs/mean/{metric}"]
        assert mean.value == pytest.approx((a + b) / 2, abs=1e-12)
        assert mean.ci95 == approx(mean_of([of_set[metric] for of_set in estimates[1:]]).ci95)
    assert len(result.metrics) == 2 * len(METRICS) * (3 + 2)
    assert result.inputs["csid"]["r"]["rows"] == 9
    np.testing.assert_allclose(result.samples["score/knn:k=3/csid/r"], score["r"], atol=1e-6)
    assert result.samples["sample_id/csid/c"].shape == (32,)
    assert result.samples["map/csid/r"].shape == (9, 2)


def test_a_path_in_a_spec_is_its_file_name_in_the_metrics(stores, rng, tmp_path, monkeypatch):
    for name, texts in (("a b", 3), ("c", 5)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "names.npy", rng.normal(size=(texts, 6)))
    result = run(stores, detectors=[f"mcm: text={tmp_path}/a b/names.npy, temperature=0.1", "knn"], k=3, resamples=5)
    assert {name.split("/")[0] for name in result.metrics} == {"mcm:text=names.npy,temperature=0.1", "knn"}
    assert result.parameters["detectors"]["mcm:text=names.npy,temperature=0.1"] == {
        "text": f"{tmp_path}/a b/names.npy",
        "temperature": 0.1,
    }
    monkeypatch.chdir(tmp_path / "c")
    here = run(stores, detectors=["mcm:text=names.npy"], resamples=5)  # a path without a slash
    elsewhere = run(stores, detectors=[f"mcm:text={tmp_path}/c/names.npy"], resamples=5)
    assert here.metrics == elsewhere.metrics
    with pytest.raises(ValueError, match=r"'mcm:text=names\.npy' is given twice"):
        run(stores, detectors=["mcm:text=names.npy", f"mcm:text={tmp_path}/c/names.npy"])
    with pytest.raises(ValueError, match="detector 'knn' takes no argument 'text'"):
        run(stores, detectors=["knn:text=a/b"])
    with pytest.raises(ValueError, match="cannot read the detector spec"):
        run(stores, detectors=["mcm:text=a/b,text=c/d"])


BAD_INPUT = {
    "another encoder": ("--near x=foreign.zarr", "foreign.zarr was made by encoder arrays (another, 6 dimensions)"),
    "other dimensions": ("--near x=narrow.zarr", "narrow.zarr was made by encoder arrays (arrays, 5 dimensions)"),
    "csid of another encoder": ("--near x=near.zarr --csid c=foreign.zarr", "foreign.zarr was made by encoder"),
    "no store": ("--near x=nowhere.zarr", "nowhere.zarr: no such store"),
    "no set": ("", "no OOD set was given"),
    "no name": ("--near near.zarr", "give NAME=STORE"),
    "empty set": ("--near x=failed.zarr", "failed.zarr has no usable row (4 of 4 failed)"),
    "NaN": ("--near x=nan.zarr", "nan.zarr row 2: embedding is not finite"),
    "NaN in the bank": ("--id-train nan.zarr --near x=near.zarr", "nan.zarr row 2: embedding is not finite"),
    "no labels": ("--near x=near.zarr --detector mahalanobis", "train.zarr has no labels"),
    "k exceeds the bank": ("--near x=near.zarr --k 81", "k=81 does not suit the bank train.zarr, which has 80 rows"),
    "k is the bank": ("--near x=near.zarr --detector lof:k=80", "80"),
    "one row in a class": (
        "--id-train lonely.zarr --near x=near.zarr --detector gmm",
        "class 3 of lonely.zarr has one row",
    ),
    "one row in every class": (
        "--id-train alone.zarr --near x=near.zarr --detector mahalanobis",
        "the rows of alone.zarr do not vary about their means",
    ),
    "no head": ("--near x=near.zarr --detector vim", "a head is needed to score against train.zarr"),
    "head missing": ("--near x=near.zarr --detector vim --head gone.safetensors", "gone.safetensors: no such file"),
    "test rows as OOD": ("--near x=test.zarr", "test.zarr is both id_test and near/x; give other images as near/x"),
    "bank as OOD": ("--far x=train.zarr", "train.zarr is both id_train and far/x"),
    "test rows as shifted ones": ("--far x=near.zarr --csid c=test.zarr", "test.zarr is both id_test and csid/c"),
    "shifted rows as OOD": ("--far x=near.zarr --csid c=near.zarr", "near.zarr is both far/x and csid/c"),
    "unknown detector": ("--near x=near.zarr --detector kn", "unknown detector 'kn'; did you mean knn"),
    "neither true nor false": ("--near x=near.zarr --detector knn:mean=maybe", "mean must be true or false, got 'may"),
    "no logits": ("--near x=near.zarr --detector msp", "train.zarr has no logits"),
    "no text": ("--near x=near.zarr --detector mcm", "mcm needs text embeddings: give mcm:text=FILE"),
    "text missing": ("--near x=near.zarr --detector mcm:text=gone.npy", "gone.npy: no such file"),
    "text of another model": (
        "--near x=near.zarr --detector mcm:text=wide.npy",
        "wide.npy holds text embeddings of 9 dimensions, the images of train.zarr have 6",
    ),
    "unknown preset": ("--preset openood-cifar11 --stores .", "did you mean openood-cifar10"),
    "preset and stores": (
        "--preset openood-cifar10 --stores . --near x=near.zarr",
        "--stores FOLDER go together, with",
    ),
    "preset alone": ("--preset openood-cifar10", "--preset NAME and --stores FOLDER go together"),
}


def test_bad_input_gets_one_clear_line(arrays, make_store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(featcache_cli.screen.screen, "width", 400)
    for name in ("train", "test", "near"):
        make_store(name, arrays[name])
    make_store("foreign", arrays["near"], fingerprint="another")
    make_store("narrow", arrays["near"][:, :5])
    make_store("failed", np.ones((4, 6)), failed=dict.fromkeys(range(4), "truncated"))
    make_store("nan", np.where(np.arange(8)[:, None] == 2, np.nan, arrays["near"][:8]))
    make_store("lonely", arrays["train"], labels=np.where(np.arange(80) == 7, 3, np.arange(80) % 3))
    make_store("alone", arrays["train"], labels=np.arange(80))
    np.save("wide.npy", np.ones((3, 9)))
    for case, (arguments, said) in BAD_INPUT.items():
        given = ["--id-train", "train.zarr"] if "--id-train" not in arguments else []
        given += ["--id-test", "test.zarr"]
        given = [] if arguments.startswith("--preset") else given
        monkeypatch.setattr(sys, "argv", ["evalsuite", "ood", *given, *arguments.split()])
        with pytest.raises(SystemExit) as stopped:
            programs.run_evalsuite()
        out, err = capsys.readouterr()
        assert stopped.value.code in (1, 2), case
        assert said in " ".join(err.replace("│", " ").split()), (case, err)
        assert "Traceback" not in out + err, case
        if not err.startswith("Usage: "):  # of the command: more than one line
            assert len(err.strip().splitlines()) == 1, (case, err)


def test_inputs_are_recorded(stores, make_store, rng, tmp_path):
    train = make_store("gaps", rng.normal(size=(60, 6)), failed={3: "truncated"})
    result = ood(id_train=train.path, id_test=stores["test"], far={"a": stores["far_a"]}, resamples=5)
    assert (result.inputs["id_train"]["rows"], result.inputs["id_train"]["failed"]) == (59, 1)
    assert result.inputs["far"]["a"]["path"] == str(stores["far_a"].path)
    assert result.inputs["near"] == {}
    assert not any(name.startswith("knn/near") for name in result.metrics)
    assert Result.read(result.write(tmp_path / "ood.json")) == result


def test_wrong_input_names_the_store_and_the_remedy(stores, make_store):
    train, test = stores["train"], stores["test"]
    empty = make_store("empty", np.ones((1, 6)), failed={0: "truncated"})
    foreign = make_store("foreign", np.ones((4, 6)), fingerprint="another")
    narrow = make_store("narrow", np.ones((4, 5)))
    for bad, message in (
        (empty, r"empty\.zarr has no usable row .*extract it again"),
        (foreign, r"foreign\.zarr was made by encoder .*extract both"),
        (narrow, r"narrow\.zarr was made by .*5 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            ood(id_train=train, id_test=test, near={"x": bad})
    with pytest.raises(ValueError, match="no OOD set"):
        ood(id_train=train, id_test=test)
    with pytest.raises(ValueError, match="both id_train and id_test"):
        ood(id_train=train, id_test=train.path, near={"x": test})
    for name in ("mean", "a/b", ""):
        with pytest.raises(ValueError, match="cannot name a far set"):
            ood(id_train=train, id_test=test, far={name: stores["far_a"]})
    with pytest.raises(ValueError, match="no detector was given"):
        run(stores, detectors=[])
    with pytest.raises(ValueError, match="'knn' is given twice"):
        run(stores, detectors=["knn", " knn"])


def test_an_ood_set_given_twice_warns(stores, tmp_path):
    (tmp_path / "link.zarr").symlink_to(stores["near"].path)
    sets = {"near": {"n": stores["near"]}, "far": {"f": tmp_path / "link.zarr"}}
    with pytest.warns(UserWarning, match=r"link\.zarr is both near/n and far/f: it counts twice"):
        ood(id_train=stores["train"], id_test=stores["test"], resamples=5, **sets)


def test_samples_hold_what_was_measured_of_each(make_store, rng, clusters):
    train, test = clusters(rng.normal(size=(3, 8)), 30), clusters(rng.normal(size=(3, 8)), 10)
    stores = [
        make_store(name, rows) for name, rows in (("train", train), ("test", test), ("far", rng.normal(size=(20, 8))))
    ]
    result = ood(id_train=stores[0], id_test=stores[1], far={"far": stores[2]}, detectors=["knn:k=3"], resamples=10)
    samples = result.samples
    assert set(samples) == {
        f"{what}/{name}" for what in ("sample_id", "content", "map", "score/knn:k=3") for name in ("id_test", "far/far")
    }
    scores = samples["score/knn:k=3/id_test"], samples["score/knn:k=3/far/far"]
    assert ood_metrics(*scores)["auroc"] == result.metrics["knn:k=3/far/far/auroc"].value

    def unit(x):
        x = x.astype(np.float16).astype(np.float64)  # as stored
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    pca = PCA(2, svd_solver="full").fit(unit(train))
    for column in range(2):  # of a direction, only the line is defined
        expected, found = pca.transform(unit(test))[:, column], samples["map/id_test"][:, column]
        assert min(abs(expected - found).max(), abs(expected + found).max()) < 1e-5

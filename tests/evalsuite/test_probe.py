import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, top_k_accuracy_score

from evalsuite import probe
from evalsuite.logistic import held_out
from featcache.head import Head

NUMBERS = np.array([0, 2, 3, 4, 6, 7])


@pytest.fixture
def task(rng, clusters):
    """Six overlapping classes, numbered with gaps and of unequal size, far from the origin; as stores keep them."""
    centres = rng.normal(size=(6, 5))
    train, test = clusters(centres, 20, spread=1.0)[:-5], clusters(centres, 7, spread=1.0)[:-3]
    labels = np.repeat(NUMBERS, 20)[:-5], np.repeat(NUMBERS, 7)[:-3]
    train, test = ((40 * x + 100).astype(np.float16).astype(np.float64) for x in (train, test))
    return train, labels[0], test, labels[1]


def reference(x, labels, c):
    """scikit-learn's on the rows as the docstring says they are scaled."""
    mean = x.mean(axis=0)
    length = np.sqrt(((x - mean) ** 2).sum(axis=1).mean())
    fitted = LogisticRegression(C=c, tol=1e-9, max_iter=100_000).fit((x - mean) / length, labels)
    return fitted, lambda rows: (rows - mean) / length


@pytest.mark.parametrize("c", [0.1, 10.0])
def test_equals_scikit_learn(task, make_store, tmp_path, c):
    x, labels, query, truth = task
    names = [f"class {i}" for i in range(8)]
    train = make_store("train", x, labels=labels, class_names=names, fingerprint="f", encoder_name="e")
    test = make_store("test", query, labels=truth, class_names=names, fingerprint="f", encoder_name="e")
    result = probe(train, test, c=c, save=tmp_path / "new" / "head.safetensors")
    expected, scaled = reference(x, labels, c)
    predicted, p = expected.predict(scaled(query)), expected.predict_proba(scaled(query))
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert values == pytest.approx(
        {
            "probe/top1": (predicted == truth).mean(),
            "probe/top5": top_k_accuracy_score(truth, p, k=5),
            "probe/macro_top1": balanced_accuracy_score(truth, predicted),
        },
        abs=1e-12,
    )
    assert 0.3 < values["probe/top1"] < values["probe/top5"]
    for metric in result.metrics.values():
        assert metric.ci95[0] <= metric.value <= metric.ci95[1]
    assert result.parameters["chance"] == pytest.approx(
        {"probe/top1": 7 / 39, "probe/top5": 35 / 39, "probe/macro_top1": 1 / 6}
    )

    head = load_file(tmp_path / "new" / "head.safetensors")
    assert head["weight"].shape == (6, 5)
    logits = query @ head["weight"].T + head["bias"]
    np.testing.assert_allclose(
        logits - logits.mean(axis=1, keepdims=True), expected.decision_function(scaled(query)), atol=1e-4
    )
    with safe_open(tmp_path / "new" / "head.safetensors", "np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["labels"]) == NUMBERS.tolist()
    assert json.loads(metadata["class_names"]) == [names[n] for n in NUMBERS]
    assert (metadata["fingerprint"], metadata["encoder"], float(metadata["c"])) == ("f", "e", c)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["head.safetensors"]
    assert result.parameters["unfinished"] == []


def test_a_head_has_the_same_bytes_each_time(tmp_path):
    """The library alone has ten entries of metadata in another order nearly always."""
    names = ["é\n", '"', "c"]
    head = Head(np.eye(3, 2), np.arange(3.0), np.array([4, 0, 7]), fingerprint="f", class_names=names)
    said = {f"key{number}": str(number) for number in range(10)}
    data = head.to_bytes(**said)
    assert all(head.to_bytes(**dict(reversed(said.items()))) == data for _ in range(5))
    (tmp_path / "head.safetensors").write_bytes(data)
    back = Head.read(tmp_path / "head.safetensors")
    assert (back.digest, back.fingerprint, back.class_names) == (head.digest, "f", names)
    with safe_open(tmp_path / "head.safetensors", "np") as file:
        assert {name: file.metadata()[name] for name in said} == said


def test_the_head_may_be_read_by_whom_the_umask_lets(make_store, tmp_path):
    train, test = (make_store(name, np.eye(4), labels=[0, 0, 1, 1]) for name in ("train", "test"))
    before = os.umask(0o027)
    try:
        probe(train, test, c=1.0, save=tmp_path / "head.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "head.safetensors").stat().st_mode & 0o777 == 0o640


def test_where_the_head_cannot_be_written_nothing_is_fitted(make_store, tmp_path):
    train, test = (make_store(name, np.eye(4), labels=[0, 0, 1, 1]) for name in ("train", "test"))
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path / "train.zarr", tmp_path / "file" / "head.safetensors", "/dev/null", "/sys/h.safetensors"):
        with pytest.raises(ValueError, match=f"^cannot write {target} .*; give another file for the head$"):
            probe(train, test, c=1.0, save=target, progress=lambda *at: pytest.fail("it was fitted"))
    assert (tmp_path / "file").read_text() == "kept"


def test_a_fit_that_stopped_short_is_said(task, make_store, monkeypatch):
    x, labels, query, truth = task
    stores = make_store("train", x, labels=labels), make_store("test", query, labels=truth)
    needed = probe(*stores, c=1.0).parameters["steps"]
    monkeypatch.setattr("evalsuite.logistic._MOST_STEPS", needed - 1)
    with pytest.warns(RuntimeWarning, match=f"the fit with C = 1 stopped at its limit of {needed - 1} steps, short of"):
        assert probe(*stores, c=1.0).parameters["unfinished"] == [1.0]
    monkeypatch.setattr("evalsuite.logistic._MOST_STEPS", 1)
    with pytest.warns(RuntimeWarning, match=r"the fit with C = 0\.5, 2 stopped at its limit of 1 steps"):
        assert probe(*stores, c=[0.5, 2.0]).parameters["unfinished"] == [0.5, 2.0]


def test_a_c_at_the_end_of_those_tried_is_said(task, make_store):
    x, labels, query, truth = task
    stores = make_store("train", x, labels=labels), make_store("test", query, labels=truth)
    for candidates, best, said in (
        ([1e-6, 1e-5, 1.0], 1.0, "C = 1 is the largest of those tried, a larger one may be better; give larger ones"),
        ([1e5, 1e6, 1e7], 1e5, "C = 100000 is the smallest of those tried, a smaller one may be better"),
    ):
        with pytest.warns(RuntimeWarning, match=said):
            assert probe(*stores, c=candidates).parameters["c"] == best
    assert probe(*stores, c=[1e-6, 1.0]).parameters["c"] == 1.0  # of two, one end or the other is no news


def test_two_classes_are_the_binary_regression_of_twice_c(task, make_store):
    """Its one weight vector is the difference of ours: half the penalty."""
    x, labels, query, truth = task
    two, asked = labels < 3, truth < 3
    result = probe(
        make_store("train", x[two], labels=labels[two]), make_store("test", query[asked], labels=truth[asked]), c=[0.5]
    )
    expected, scaled = reference(x[two], labels[two], 1.0)
    assert result.metrics["probe/top1"].value == pytest.approx(expected.score(scaled(query[asked]), truth[asked]))


def test_c_is_chosen_on_a_part_of_train(task, make_store):
    x, labels, query, truth = task
    train, test = make_store("train", x, labels=labels), make_store("test", query, labels=truth)
    calls = []
    result = probe(train, test, c=(1.0, 0.001, 100.0), seed=3, progress=lambda *at: calls.append(at))
    held = held_out(np.unique(labels, return_inverse=True)[1], 3)
    found = []
    for c in (0.001, 1.0, 100.0):
        # scaled as all of train is
        _, scaled = reference(x, labels, c)
        fitted = LogisticRegression(C=c, tol=1e-9, max_iter=100_000).fit(scaled(x[~held]), labels[~held])
        found.append(
            (fitted.score(scaled(x[held]), labels[held]), log_loss(labels[held], fitted.predict_proba(scaled(x[held]))))
        )
    assert result.parameters["candidates"] == [0.001, 1.0, 100.0]
    assert result.parameters["held_out_top1"] == pytest.approx([accuracy for accuracy, _ in found])
    assert result.parameters["held_out_cross_entropy"] == pytest.approx([loss for _, loss in found], abs=1e-3)
    best = max(range(3), key=lambda i: (found[i][0], -found[i][1]))
    assert result.parameters["c"] == (0.001, 1.0, 100.0)[best]
    expected, scaled = reference(x, labels, result.parameters["c"])
    assert result.metrics["probe/top1"].value == pytest.approx(expected.score(scaled(query), truth))
    assert result.parameters["held_out_rows"] == held.sum() == 12
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_rows_in_blocks_change_nothing(task, make_store, monkeypatch):
    x, labels, query, truth = task
    stores = make_store("train", x, labels=labels), make_store("test", query, labels=truth)
    whole = probe(*stores, c=[0.1, 1.0])
    monkeypatch.setattr("featcache.rows._BLOCK_FLOATS", 5 * 7)
    monkeypatch.setattr("evalsuite.logistic._BLOCK_FLOATS", 11 * 13)
    monkeypatch.setattr("evalsuite.logistic._WIDE_FLOATS", 0)
    parts = probe(*stores, c=[0.1, 1.0])
    assert parts.metrics == whole.metrics
    assert parts.parameters["held_out_cross_entropy"] == pytest.approx(
        whole.parameters["held_out_cross_entropy"], abs=1e-6
    )


def test_a_class_keeps_a_row_to_learn_from():
    target = np.repeat([0, 1, 2, 3], [1, 2, 10, 40])
    held = held_out(target, 0)
    assert np.bincount(target[held], minlength=4).tolist() == [0, 1, 1, 4]


def test_rows_of_unknown_classes_are_wrong_and_counted(make_store):
    train = make_store("train", np.eye(4)[:3], labels=[0, 1, 2])
    test = make_store("test", 1.5 * np.eye(4), labels=[0, 1, 2, 9])
    result = probe(train, test, c=100.0)
    assert result.metrics["probe/top1"].value == 0.75
    assert result.metrics["probe/top5"].value == 0.75
    assert result.inputs["test"]["unreachable"] == 1
    assert result.parameters["chance"]["probe/top1"] == pytest.approx(0.25)
    assert len(result.remarks) == 1
    assert f"1 of 4 rows are of classes without a row in {train.path} (9): they can never be right" in result.remarks[0]


def test_wrong_input_names_the_store_and_the_remedy(make_store, tmp_path):
    train = make_store("train", np.eye(4), labels=[0, 0, 1, 1])
    test = make_store("test", np.eye(4), labels=[0, 0, 1, 1])
    for c in ([], [0.0], [1.0, -1.0], [float("nan")], float("inf")):
        with pytest.raises(ValueError, match="c must hold positive numbers"):
            probe(train, test, c=c)
    nan = np.eye(4)
    nan[2, 1] = np.inf
    for other, said in (
        (train, "both train and test; pass held-out images"),
        (make_store("bare", np.eye(4)), r"bare\.zarr has no labels; extract"),
        (make_store("foreign", np.eye(4), labels=[0, 0, 1, 1], fingerprint="x"), "extract both with the same encoder"),
        (make_store("nan", nan, labels=[0, 0, 1, 1]), r"nan\.zarr row 2: embedding is not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            probe(train, other, c=1.0, save=tmp_path / "head.safetensors")
    assert not (tmp_path / "head.safetensors").exists()
    with pytest.raises(ValueError, match=r"one\.zarr has one class"):
        probe(make_store("one", np.eye(4), labels=[1] * 4), test)
    single = make_store("single", np.eye(4), labels=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"no class of .*single\.zarr has two rows to choose C with; give one C"):
        probe(single, test)
    assert probe(single, test, c=1.0).metrics["probe/top1"].value < 1


def test_rows_that_are_all_alike_give_chance(make_store):
    train = make_store("train", np.ones((6, 3)), labels=[0, 0, 0, 1, 1, 1])
    test = make_store("test", np.ones((4, 3)), labels=[0, 0, 1, 1])
    with pytest.warns(RuntimeWarning, match=r"C = 0\.001 is the smallest of those tried"):
        assert probe(train, test).metrics["probe/top1"].value == 0.5

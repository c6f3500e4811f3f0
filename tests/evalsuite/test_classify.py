import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from evalsuite import classify, compare, probe, report
from featcache.head import Head
from featcache.rows import Rows

NAMES = [f"class {i}" for i in range(7)]


@pytest.fixture
def task(rng, make_store):
    """`store(name, rows)`: seven classes, overconfident logits, as stores keep them."""

    def made(name, rows, **given):
        labels = rng.integers(0, 7, rows)
        logits = 4 * (rng.normal(size=(rows, 7)) + 2 * np.eye(7)[labels])
        given = {"class_names": NAMES, "fingerprint": "f", "encoder_name": "e"} | given
        return make_store(name, rng.normal(size=(rows, 5)), labels=labels, logits=logits, **given)

    return made


def arrays(store):
    rows = Rows.of(store)
    return rows.take(np.arange(len(rows)), "logits").astype(np.float64), rows.labels


def slow_ece(p, truth, bins):
    confidence, right = p.max(axis=1), p.argmax(axis=1) == truth
    total = 0.0
    for b in range(bins):
        rows = [i for i in range(len(p)) if b / bins < confidence[i] <= (b + 1) / bins]
        if rows:
            total += len(rows) / len(p) * abs(np.mean(confidence[rows]) - np.mean(right[rows]))
    return total


def slow_aurc(confidence, right):
    """The mean over thresholds, row by row; no two confidences are alike."""
    order = sorted(range(len(right)), key=lambda i: -confidence[i])
    return np.mean([np.mean([not right[i] for i in order[: k + 1]]) for k in range(len(order))])


def test_equals_scikit_learn_and_slow_loops(task):
    test, other = task("test", 300), task("other", 200)
    result = classify(test, calibrate=other, bins=10, coverages=(0.5, 1.0))
    (logits, truth), (of_other, labels) = arrays(test), arrays(other)

    def loss(log_t):
        return -log_softmax(of_other / math.exp(log_t), axis=1)[np.arange(len(labels)), labels].mean()

    temperature = math.exp(minimize_scalar(loss, bounds=(-3, 4), method="bounded", options={"xatol": 1e-10}).x)
    assert result.parameters["temperature"] == pytest.approx(temperature, rel=1e-6)
    assert temperature > 2
    plain, calibrated = softmax(logits, axis=1), softmax(logits / temperature, axis=1)
    confidence, right = plain.max(axis=1), plain.argmax(axis=1) == truth
    values = {name: metric.value for name, metric in result.metrics.items() if not name.startswith("per_class/")}
    assert values == pytest.approx(
        {
            "classify/top1": accuracy_score(truth, plain.argmax(axis=1)),
            "classify/top5": top_k_accuracy_score(truth, plain, k=5),
            "classify/macro_top1": balanced_accuracy_score(truth, plain.argmax(axis=1)),
            "classify/nll": log_loss(truth, plain),
            "classify/ece": slow_ece(plain, truth, 10),
            "classify/calibrated/nll": log_loss(truth, calibrated),
            "classify/calibrated/ece": slow_ece(calibrated, truth, 10),
            "classify/aurc": slow_aurc(confidence, right),
            "classify/selective_top1@0.5": right[np.argsort(-confidence)[:150]].mean(),
            "classify/selective_top1@1": right.mean(),
        },
        abs=1e-9,
    )
    assert values["classify/calibrated/nll"] < values["classify/nll"]
    assert values["classify/calibrated/ece"] < values["classify/ece"]
    for metric in result.metrics.values():
        assert metric.ci95[0] <= metric.value <= metric.ci95[1]
    counts = result.parameters["confusion"]
    matrix = [[counts[a].get(b, 0) for b in NAMES] for a in NAMES]
    np.testing.assert_array_equal(matrix, confusion_matrix(truth, plain.argmax(axis=1)))
    for number, name in enumerate(NAMES):
        assert result.metrics[f"per_class/{name}/classify/top1"].value == right[truth == number].mean()


def test_a_head_is_matched_by_name_and_its_other_classes_stay_in_the_softmax(make_store, rng, tmp_path):
    labels = np.arange(60) % 3
    embedding = np.eye(4)[[3, 2, 1]][labels] + 0.3 * rng.normal(size=(60, 4))
    test = make_store("test", embedding, labels=labels, class_names=["ant", "bee", "cat"], fingerprint="f")
    weight, bias = np.eye(4) + 0.1 * rng.normal(size=(4, 4)), 0.1 * rng.normal(size=4)
    head = Head(weight, bias, np.arange(4), class_names=["dog", "cat", "bee", "ant"])
    (tmp_path / "head.safetensors").write_bytes(head.to_bytes())
    result = classify(test, head=tmp_path / "head.safetensors")
    stored = Rows.of(test).take(np.arange(60)).astype(np.float64)
    p, column = softmax(stored @ weight.T + bias, axis=1), np.array([3, 2, 1])[labels]
    assert result.metrics["classify/nll"].value == pytest.approx(-np.log(p[np.arange(60), column]).mean(), abs=1e-6)
    assert result.metrics["classify/top1"].value == (p.argmax(axis=1) == column).mean()
    assert result.parameters["classes_by"] == "name"
    assert set(result.parameters["confusion"]) == {"ant", "bee", "cat"}


def test_a_probes_head_has_the_probes_accuracy(make_store, rng, clusters, tmp_path):
    centres = rng.normal(size=(3, 5))
    train, test = (make_store(n, clusters(centres, 20, 1.0), labels=np.repeat([0, 2, 5], 20)) for n in ("a", "b"))
    of_probe = probe(train, test, c=1.0, save=tmp_path / "head.safetensors")
    result = classify(test, head=tmp_path / "head.safetensors")
    for what in ("top1", "top5", "macro_top1"):
        assert result.metrics[f"classify/{what}"] == of_probe.metrics[f"probe/{what}"]
        assert result.parameters["chance"][f"classify/{what}"] == of_probe.parameters["chance"][f"probe/{what}"]


def test_equal_confidences_count_as_the_mean_over_their_orders():
    from itertools import permutations

    from evalsuite.intervals import aurc, selective_accuracy

    confidence, right = np.array([0.9, 0.5, 0.5, 0.5, 0.2]), np.array([True, False, True, True, False])
    orders = [[0, *middle, 4] for middle in permutations((1, 2, 3))]
    risks = np.mean([[np.mean(~right[order[:k]]) for k in range(1, 6)] for order in orders], axis=0)
    assert aurc(confidence, right).value == pytest.approx(risks.mean())
    assert selective_accuracy(confidence, right, 0.6).value == pytest.approx(1 - risks[2])


def test_two_are_compared_on_the_same_samples(task, rng, make_store):
    test = task("test", 400)
    logits, truth = arrays(test)
    noisy = make_store(
        "noisy",
        rng.normal(size=(400, 5)),
        labels=truth,
        class_names=NAMES,
        logits=logits + 3 * rng.normal(size=(400, 7)),
    )
    a, b = classify(test), classify(noisy)
    result = compare(a, b)
    assert set(result.metrics) == {
        "classify/top1", "classify/top5", "classify/nll", "classify/aurc",
        *(f"classify/selective_top1@{c}" for c in (0.8, 0.9, 0.95)),
    }  # fmt: skip
    for name, metric in result.metrics.items():
        assert metric.value == pytest.approx(b.metrics[name].value - a.metrics[name].value)
    assert result.metrics["classify/nll"].value > 0.1
    assert result.parameters["verdicts"]["classify/nll"] == "A better"
    nll = b.samples["classify/nll"] - a.samples["classify/nll"]
    half = 1.966 * nll.std(ddof=1) / 20
    assert np.subtract(*result.metrics["classify/nll"].ci95[::-1]) == pytest.approx(2 * half, rel=0.01)
    assert {"classify/ece", "classify/macro_top1"} <= set(result.parameters["not_compared"])


def test_the_report_draws_it(task, tmp_path):
    classify(task("test", 300), calibrate=task("other", 200)).write(tmp_path / "r.json")
    page = report([tmp_path / "r.json"], tmp_path / "page.html").read_text()
    assert all(said in page for said in ("Reliability", "Risk and coverage", "true class", ", calibrated"))
    (tmp_path / "r.samples.npz").unlink()
    assert "true class" in report([tmp_path / "r.json"], tmp_path / "page.html").read_text()


def test_an_image_on_both_sides_is_told_and_dropped(make_store, rng):
    labels = np.arange(40) % 2
    logits = rng.normal(size=(40, 2)) + 2 * np.eye(2)[labels]
    given = {"labels": labels, "logits": logits, "class_names": ["a", "b"]}
    test = make_store("test", rng.normal(size=(40, 3)), images=range(40), **given)
    other = make_store("other", rng.normal(size=(40, 3)), images=range(30, 70), **given)
    result = classify(test, calibrate=other)
    assert result.inputs["test"]["identical"] == 10
    assert "10 of 40 test rows are images of calibrate too: its temperature was fitted to them" in result.remarks[0]
    assert classify(test, calibrate=other, drop_identical=True).inputs["test"]["rows"] == 30


def test_rows_that_are_all_right_have_no_temperature(make_store, rng):
    labels = np.arange(40) % 2
    test, other = (
        make_store(name, rng.normal(size=(40, 3)), labels=labels, logits=np.eye(2)[labels], class_names=["a", "b"])
        for name in ("test", "other")
    )
    with pytest.warns(RuntimeWarning, match="at the end of those tried, as .almost. all of its rows are right"):
        result = classify(test, calibrate=other)
    assert result.parameters["temperature"] == pytest.approx(0.01)
    assert result.metrics["classify/aurc"].ci95[0] == 0 < result.metrics["classify/aurc"].ci95[1]


def test_what_cannot_be_judged_says_why(make_store, rng, tmp_path):
    x, labels = rng.normal(size=(12, 3)), np.arange(12) % 3
    bare = make_store("bare", x, labels=labels)
    unlabelled = make_store("unlabelled", x, logits=x)
    wide = make_store("wide", x, labels=labels, logits=np.ones((12, 5)), class_names=["a", "b", "c"])
    fine = make_store("fine", x, labels=labels, logits=x, class_names=["a", "b", "c"])
    head = Head(np.ones((2, 3)), np.ones(2), np.arange(2), class_names=["a", "b"])
    (tmp_path / "head.safetensors").write_bytes(head.to_bytes())
    for given, said in (
        ({"test": bare}, "has no logits"),
        ({"test": unlabelled}, "has no labels"),
        ({"test": wide}, "5 logits and 3 classes"),
        ({"test": fine, "calibrate": fine}, "is both test and calibrate"),
        ({"test": fine, "head": tmp_path / "head.safetensors"}, "1 of 3 classes that .* does not have"),
        ({"test": fine, "coverages": (0.5, 1.5)}, "coverages must be shares"),
        ({"test": fine, "bins": 0}, "bins must be at least 1"),
        ({"test": fine, "drop_identical": True}, "give calibrate too"),
    ):
        with pytest.raises(ValueError, match=said):
            classify(**given)


def test_as_a_command(task, tmp_path, monkeypatch, capsys):
    from featcache_cli.programs import run_evalsuite

    test, other, out = task("test", 300), task("other", 200), tmp_path / "r.json"
    words = f"evalsuite classify --test {test.path} --calibrate {other.path} --coverages .5 --json {out}".split()
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        run_evalsuite()
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert all(
        said in shown for said in ("classify/calibrated/ece", "15 bins of equal width; T = ", "lowest classify/top1")
    )
    assert "classify/selective_top1@0.5" in json.loads(out.read_text())["metrics"]

import math

import numpy as np
import pytest
from PIL import Image
from report_cases import Page, knn_result
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, r2_score
from tiny import tiny_encoder

import featcache
from evalsuite import report, select
from evalsuite.evaluators.select import Select
from evalsuite.logistic import held_out
from evalsuite.reconstruction import PENALTIES, reconstruct, thumbnails
from featcache.inputs.images import KeptPixels
from featcache.rows import Rows

ROWS = 600
NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def task(rng, make_store):
    """Inputs (8), and stores that tell more and more of them and of the labels."""
    labels = np.arange(ROWS) % 3
    inputs = rng.normal(size=(ROWS, 8)) + 2 * np.eye(3, 8)[labels]

    def made(name, noise, order=range(ROWS), **given):
        order = list(order)
        x = inputs @ np.random.default_rng(1).normal(size=(8, 12)) + noise * rng.normal(size=(ROWS, 12))
        given = {"class_names": NAMES, "labels": labels[order], "fingerprint": name, "dtype": "float32"} | given
        return make_store(name, x[order], sample_ids=[f"{row:04d}" for row in order], **given)

    return made, inputs, labels


def values(store):
    rows = Rows.of(store)
    return rows.take(np.arange(len(rows))).astype(np.float64)


def test_equals_scikit_learn(task):
    made, _, labels = task
    near, far, of = made("near", 0.5), made("far", 6.0), made("of", 0.0)
    result = select({"near": near, "far": far}, of=of, c=(1.0,), seed=3, weight=2.0)
    held, x = held_out(labels, 3), values(of)
    entropy = math.log(3)
    for name, store in (("near", near), ("far", far)):
        f = values(store)
        mean = f[~held].mean(axis=0)
        length = np.sqrt(((f[~held] - mean) ** 2).sum(axis=1).mean())
        probe = LogisticRegression(C=1.0, tol=1e-9, max_iter=10_000).fit((f[~held] - mean) / length, labels[~held])
        p = probe.predict_proba((f[held] - mean) / length)
        penalty = reconstruct(f, x, held, labels, 3).penalty * length**2 * (~held).sum()
        ridge = Ridge(alpha=penalty).fit(f[~held], x[~held])
        left = ((x[held] - ridge.predict(f[held])) ** 2).sum() / ((x[held] - x[~held].mean(axis=0)) ** 2).sum()
        expected = {
            "probe_top1": (p.argmax(axis=1) == labels[held]).mean(),
            "of_labels": entropy - log_loss(labels[held], p),
            "inputs_r2": 1 - left,
            "of_inputs": -0.5 * math.log(left),
        }
        expected["sum"] = 2 * expected["of_inputs"] + expected["of_labels"]
        for what, value in expected.items():
            metric = result.metrics[f"{name}/{what}"]
            assert metric.value == pytest.approx(value, abs=2e-5), what
            assert metric.ci95 is None or metric.ci95[0] < metric.value < metric.ci95[1]
        assert 1 - left == pytest.approx(
            r2_score(x[held], ridge.predict(f[held]), multioutput="variance_weighted"), abs=0.02
        )
    assert result.parameters["ranking"] == result.parameters["ranking_by_probe"] == ["near", "far"]
    behind = result.metrics["far/behind_sum"]
    assert behind.value == pytest.approx(result.metrics["near/sum"].value - result.metrics["far/sum"].value)
    assert behind.ci95[0] > 0
    assert "near/behind_sum" not in result.metrics


def test_stores_are_joined_by_their_samples(task):
    made, _, _ = task
    one, two = made("one", 1.0), made("two", 1.0, order=range(ROWS - 1, 19, -1))
    of = made("of", 0.0, order=range(ROWS - 30))
    result = select({"one": one, "two": two}, of=of, c=(1.0,))
    assert sum(result.parameters["rows"].values()) == ROWS - 50
    assert [each["rows"] for each in result.inputs["stores"].values()] == [ROWS, ROWS - 20]
    shown = Select.table(result)
    assert [row[0] for row in shown.rows] == result.parameters["ranking"]
    assert shown.rows[0][-1] is None


def test_a_penalty_is_chosen_where_there_are_more_dimensions_than_rows(rng):
    features, classes = rng.normal(size=(60, 90)), np.arange(60) % 2
    inputs = features[:, :3] + rng.normal(size=(60, 3))
    found = reconstruct(features, inputs, held_out(classes, 0), classes, 0)
    assert PENALTIES[0] < found.penalty <= PENALTIES[-1]
    assert found.error.shape == found.spread.shape == (6,)
    same = reconstruct(np.ones((60, 2)), inputs, held_out(classes, 0), classes, 0)
    np.testing.assert_allclose(same.error, same.spread)


def test_kept_images_are_reconstructed(tmp_path, rng):
    """Two colours a class; the teachers keep what they see at 16 px."""
    for name, colour in (("dark", 40), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            picture = rng.integers(-40, 40, (16, 16, 3)) + colour
            Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    stores = {
        f"seed{seed}": featcache.extract(
            str(tmp_path / "photos"),
            tiny_encoder(seed),
            tmp_path / f"{seed}.zarr",
            pixels=KeptPixels(size=16),
            device="cpu",
        )
        for seed in (0, 1)
    }
    result = select(stores, c=(1.0,), pixels=2)
    assert result.parameters["inputs"].endswith("0.zarr, 2 px")
    assert result.metrics["seed0/inputs_r2"].value > 0.5
    small = thumbnails(Rows.of(stores["seed0"]).labelled(), 2)
    assert small.shape == (40, 12)
    assert np.abs(small[:20].mean() - 40 / 255) < 0.05
    assert np.abs(small[20:].mean() - 200 / 255) < 0.05


def test_what_cannot_be_ranked_says_why(task):
    made, _, labels = task
    one, two, other = made("one", 1.0), made("two", 1.0), made("other", 1.0, labels=(labels + 1) % 3)
    for stores, given, said in (
        ({"one": one}, {}, "give two stores or more"),
        ({"one": one, "two": two}, {}, "keep no images that could be reconstructed; give --of STORE"),
        ({"one": one, "other": other}, {"of": two}, "labels the samples of .*one.zarr otherwise"),
        ({"one": one, "two": two}, {"c": ()}, "c must hold positive numbers"),
        ({"one": one, "two": two}, {"weight": -1.0}, "weight must be a number from 0"),
    ):
        with pytest.raises(ValueError, match=said):
            select(stores, **given)


def test_the_report_has_the_stores_in_their_order_and_ranked(task, tmp_path):
    made, _, _ = task
    stores = {name: made(name, noise) for name, noise in (("early", 6.0), ("<b>late", 0.5), ("last", 2.0))}
    result = select(stores, of=made("of", 0.0), c=(1.0,))
    result.write(tmp_path / "chosen.json")
    page = Page(report([tmp_path / "chosen.json", knn_result("f", "vit", 0.5)], tmp_path / "r.html"))
    information, probe, table = page.charts("select")
    assert [each["name"] for each in information["series"]] == ["sum", "I(Y; F)", "I(X; F)"]
    for line, what in zip(
        information["series"] + probe["series"], ("sum", "of_labels", "of_inputs", "probe_top1"), strict=True
    ):
        metrics = [result.metrics[f"{name}/{what}"] for name in stores]
        assert line["x"] == [1, 2, 3]
        assert line["y"] == pytest.approx([metric.value for metric in metrics])
        assert line["low"] == pytest.approx([metric.ci95[0] for metric in metrics])
    assert information["note"] == "1 early · 2 <b>late · 3 last"
    assert [row[0] for row in table["rows"]] == result.parameters["ranking"]
    assert table["title"] == "chosen.json"
    alone = Page(report([result], tmp_path / "alone.html"))
    assert len(alone.charts("select")) == 3


def test_as_a_command_stores_are_arguments(task, tmp_path):
    from typer.testing import CliRunner

    from featcache_cli import programs

    made, _, _ = task
    one, two, of = (made(name, noise) for name, noise in (("one", 1.0), ("two", 3.0), ("of", 0.0)))
    line = ["select", str(one.path), f"late={two.path}", "--of", str(of.path), "--c", "1"]
    ran = CliRunner().invoke(programs.app("evalsuite"), line)
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert ran.output.index("one") < ran.output.index("late")
    assert "I(X; F)" in ran.output
    ran = CliRunner().invoke(programs.app("evalsuite"), ["select", str(one.path), str(one.path)])
    assert "give each store a name of its own" in str(ran.exception) + ran.output

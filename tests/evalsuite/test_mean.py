"""The mean of a scalar field, its interval against a bootstrap over rows, and two of them compared."""

import json
import warnings

import numpy as np
import pytest
from typer.testing import CliRunner

from evalsuite import compare, mean, report
from evalsuite.intervals import difference
from evalsuite.intervals import mean as mean_of
from featcache.store.from_arrays import write_store
from featcache_cli import programs


@pytest.fixture
def store(tmp_path):
    """`store(name, nll, predicted)`: texts with these numbers."""

    def made(name, nll, predicted=None, **given):
        fields = {"nll": np.asarray(nll, np.float32)}
        fields |= {} if predicted is None else {"predicted": np.asarray(predicted, np.int32)}
        embedding = np.random.default_rng(1).normal(size=(len(nll), 4))
        return write_store(tmp_path / f"{name}.zarr", embedding, fields=fields | given.pop("fields", {}), **given)

    return made


@pytest.fixture
def texts(rng):
    """Nats a token of 400 texts, skewed, more in the short ones; and how many tokens each has."""
    tokens = rng.integers(1, 60, 400)
    return rng.gamma(4, 0.5, 400) + 3 / tokens, tokens


def test_it_is_of_all_tokens_and_its_interval_is_the_bootstraps(store, texts, rng):
    nll, tokens = texts
    result = mean(store("a", nll, tokens))
    exact = np.asarray(nll, np.float32).astype(np.float64)
    assert result.metrics["mean/nll"].value == pytest.approx((exact * tokens).sum() / tokens.sum(), rel=1e-12)
    assert result.metrics["mean/predicted"].value == pytest.approx(tokens.mean())
    assert result.parameters == {"field": "nll", "weight": "predicted"}
    drawn = rng.integers(0, 400, (20_000, 400))
    again = (exact[drawn] * tokens[drawn]).sum(axis=1) / tokens[drawn].sum(axis=1)
    low, high = result.metrics["mean/nll"].ci95
    spread = again.std()
    assert low == pytest.approx(np.quantile(again, 0.025), abs=0.15 * spread)
    assert high == pytest.approx(np.quantile(again, 0.975), abs=0.15 * spread)
    plain = mean(store("b", nll), weight="none").metrics
    assert plain.keys() == {"mean/nll"}
    assert plain["mean/nll"].value == pytest.approx(exact.mean())


@pytest.mark.parametrize("rows", [100, 300])
def test_the_interval_holds_the_truth(rows):
    """Of texts whose nats follow their length: 95 of 100 intervals hold the ratio of the two expectations."""
    rng, held = np.random.default_rng(3), 0
    for _ in range(600):
        tokens = rng.integers(1, 40, rows).astype(np.float64)
        nll = rng.gamma(2, 1 / tokens + 0.5)
        low, high = mean_of(nll, tokens).ci95
        held += low <= (2 * (1 + 0.5 * 20)) / 20 <= high
    assert 0.91 < held / 600 < 0.98


def test_rows_of_weight_zero_are_none(store, texts):
    nll, tokens = texts
    tokens = np.where(np.arange(400) % 2, tokens, 0)
    found, other = mean(store("a", nll, tokens)), mean(store("b", nll[1::2], tokens[1::2]))
    assert found.metrics["mean/nll"].value == pytest.approx(other.metrics["mean/nll"].value, rel=1e-12)
    assert found.metrics["mean/nll"].ci95 == pytest.approx(other.metrics["mean/nll"].ci95, rel=1e-9)


def test_few_rows_and_equal_values_have_no_interval(store):
    assert "9 rows" in mean(store("few", np.linspace(1, 2, 9))).metrics["mean/nll"].no_ci95
    assert "the same" in mean(store("same", np.full(50, 2.5))).metrics["mean/nll"].no_ci95


def test_a_comparison_is_paired_and_lower_nats_are_better(store, texts, rng, tmp_path):
    nll, tokens = texts
    better = nll - 0.05 + rng.normal(size=400) / 20
    a, b = mean(store("a", nll, tokens)), mean(store("b", better, tokens))
    found = compare(a, b)
    x = np.float32(nll).astype(np.float64), np.float32(better).astype(np.float64)
    apart = ((x[1] - x[0]) * tokens).sum() / tokens.sum()
    assert found.metrics["mean/nll"].value == pytest.approx(apart, rel=1e-9)
    assert found.parameters["verdicts"] == {"mean/nll": "B better"}
    drawn = rng.integers(0, 400, (10_000, 400))
    again = ((x[1] - x[0])[drawn] * tokens[drawn]).sum(axis=1) / tokens[drawn].sum(axis=1)
    np.testing.assert_allclose(
        found.metrics["mean/nll"].ci95, np.quantile(again, [0.025, 0.975]), atol=0.15 * again.std()
    )
    with pytest.warns(RuntimeWarning, match="400 samples have another predicted on the other side"):
        compare(a, mean(store("c", better, tokens + 1)))
    page = report([a.write(tmp_path / "a.json")], tmp_path / "page.html")
    assert "mean/nll" in page.read_text()


def test_small_numbers_are_told_apart():
    values = np.random.default_rng(0).normal(size=200) * 1e-6
    assert difference(mean_of(values), mean_of(values + 1e-6 + values[::-1] / 3)).ci95[0] > 0


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"field": "nothing"}, "has no nothing; extract it again with --fields embedding,nothing"),
        ({"field": "embedding"}, "embedding is 4 numbers a row, and the mean is of one"),
        ({"weight": "bad"}, r"its bad is negative \(2\)"),
        ({"weight": "zero"}, "by its zero, no row has a weight above 0"),
        ({"weight": "nll"}, "the very field that is averaged"),
    ],
)
def test_what_has_no_mean(store, given, match):
    fields = {"bad": np.array([1, 1, -1], np.int32), "zero": np.zeros(3, np.int32)}
    made = store("a", [1.0, 2.0, 3.0], fields=fields)
    with pytest.raises(ValueError, match=match):
        mean(made, **given)


def test_failed_rows_are_left_out_and_said(store):
    made = store("a", [1.0, 2.0, 90.0], failed={2: "empty"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = mean(made)
    assert result.metrics["mean/nll"].value == pytest.approx(1.5)
    assert "1 failed" in result.remarks[0]


def test_on_the_command_line(store, texts, tmp_path):
    made, run = store("a", *texts), CliRunner()
    ran = run.invoke(programs.app("evalsuite"), ["mean", "--test", str(made.path), "--json", str(tmp_path / "r.json")])
    assert ran.exit_code == 0
    assert "mean/nll" in ran.output
    assert json.loads((tmp_path / "r.json").read_text())["parameters"]["weight"] == "predicted"
    ran = run.invoke(programs.app("evalsuite"), ["mean", "--test", str(made.path), "--field", "label"])
    assert ran.exit_code == 1

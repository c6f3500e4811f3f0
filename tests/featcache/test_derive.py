"""Stores computed from stores: against loops in float64, killed, refused, and from the command line."""

import json

import numpy as np
import pytest
from fit_cases import files
from hashed import with_images
from typer.testing import CliRunner

import featcache
from featcache.derivations.mean import Mean
from featcache.store import FeatureStore, create_store
from featcache.store.from_arrays import write_store
from featcache_cli import programs

ROWS, VIEWS, WIDTH, CLASSES = 20, 2, 6, 4
IDS = [f"{row:02d}.png" for row in range(ROWS)]


@pytest.fixture
def make(tmp_path, rng):
    """`make(name)`: a store of 20 samples, in an order of its own, and what it holds by sample."""

    def make(name, *, order=range(ROWS), width=WIDTH, failed=(), **given):
        embedding, logits = rng.normal(size=(ROWS, VIEWS, width)), 3 * rng.normal(size=(ROWS, VIEWS, CLASSES))
        order = list(order)
        store = write_store(
            tmp_path / f"{name}.zarr", embedding[order], logits=logits[order], labels=np.array(order) % 3,
            sample_ids=[IDS[row] for row in order], class_names=["a", "b", "c"], fingerprint=name, encoder_name=name,
            failed={order.index(row): f"{name} cannot read it" for row in failed}, dtype="float32", **given,
        )  # fmt: skip
        store = with_images(store, [IDS[row] for row in order])
        return store, embedding.astype(np.float32).astype(float), logits.astype(np.float32).astype(float)

    return make


@pytest.fixture
def pair(make):
    """Two stores of which the second lacks 17 to 19, in another order; 3 failed in the first, 5 in the second."""
    return make("one", failed=[3]), make("two", order=[16, *range(16)], failed=[5])


def softmax(row):
    return np.exp(row) / np.exp(row).sum()


def test_mean_embedding_and_what_is_taken_over(pair, tmp_path, caplog):
    (one, x, _), (two, y, _) = pair
    store = featcache.derive("mean", [one, two.path], tmp_path / "mean.zarr", weights=(1, 3))
    assert store.sample_ids.tolist() == IDS[:17]
    assert store.labels.tolist() == [row % 3 for row in range(17)]
    assert store.class_names == ["a", "b", "c"]
    np.testing.assert_array_equal(store.content, one.content[:17])
    assert store.reasons == {"03.png": "one cannot read it", "05.png": "two cannot read it"}
    assert (store.encoder_name, store.embedding_dim, store.views) == ("derive:mean(one, two)", WIDTH, VIEWS)
    for row in store.ok.tolist():
        for view in range(VIEWS):
            expected = [0.25 * x[row, view, i] + 0.75 * y[row, view, i] for i in range(WIDTH)]
            np.testing.assert_allclose(store.gather([row], view=view)[0], expected, rtol=1e-5, atol=1e-6)
    assert [line for line in caplog.messages if "left out" in line] == [
        f"{one.path}: 3 of 20 rows left out, as not all stores have them"
    ]
    assert store.verify() == []


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_mean_probabilities_are_the_softmax_of_the_kept_logits(pair, tmp_path, temperature):
    (one, _, a), (two, _, b) = pair
    store = featcache.derive("mean", [one, two], tmp_path / "m.zarr", of="probabilities", temperature=temperature)
    for row in store.ok.tolist():
        expected = (softmax(a[row, 1] / temperature) + softmax(b[row, 1] / temperature)) / 2
        np.testing.assert_allclose(store.gather([row], view=1)[0], expected, rtol=1e-5)
        np.testing.assert_allclose(softmax(store.gather([row], "logits", 1)[0].astype(float)), expected, rtol=1e-5)


def test_mean_logits(pair, tmp_path):
    (one, _, a), (two, _, b) = pair
    store = featcache.derive("mean", [one, two], tmp_path / "m.zarr", of="logits")
    for field in ("embedding", "logits"):
        np.testing.assert_allclose(store.gather(store.ok, field), ((a + b) / 2)[store.ok, 0], rtol=1e-5, atol=1e-6)


def test_join_puts_unit_embeddings_side_by_side(make, tmp_path):
    (one, x, _), (two, y, _) = make("one"), make("two", width=3)
    store = featcache.derive("join", [one, two], tmp_path / "j.zarr", unit=True)
    for row in range(ROWS):
        expected = [*(x[row, 1] / np.linalg.norm(x[row, 1])), *(y[row, 1] / np.linalg.norm(y[row, 1]))]
        np.testing.assert_allclose(store.gather([row], view=1)[0], expected, rtol=1e-5, atol=1e-7)


def test_join_takes_different_fields_as_they_are(make, tmp_path):
    (one, _, _), (two, _, _) = make("one"), make("two", width=3)
    store = featcache.derive("join", [one, two], tmp_path / "j.zarr", take=("embedding", "logits"))
    np.testing.assert_array_equal(store.gather(range(ROWS)), one.gather(range(ROWS)))
    np.testing.assert_array_equal(store.gather(range(ROWS), "logits"), two.gather(range(ROWS), "logits"))


def test_kept_in_the_asked_dtype_and_what_it_cannot_hold_fails(tmp_path):
    rows = np.ones((4, 1, 3)) * np.array([1, 1e5, 2, 3])[:, None, None]
    store = write_store(tmp_path / "s.zarr", rows, dtype="float32")
    assert featcache.derive("join", [store], tmp_path / "wide.zarr").gather([1]).tolist() == [[1e5] * 3]
    half = featcache.derive("join", [store], tmp_path / "half.zarr", dtype="float16")
    assert half.gather([0]).dtype == np.float16
    assert half.reasons == {"1": "embedding is beyond float16; derive with --dtype float32"}


def test_stores_of_one_derivation_compare_and_of_another_do_not(make, tmp_path):
    (one, _, _), (two, _, _) = make("one"), make("two")
    first, second, other = (
        featcache.derive("mean", stores, tmp_path / f"{number}.zarr", **options)
        for number, (stores, options) in enumerate([([one, two], {}), ([one, two], {}), ([two, one], {"of": "logits"})])
    )
    assert first.fingerprint == second.fingerprint != other.fingerprint
    record = first.manifest.derivation
    assert (record.name, record.options["of"]) == ("mean", "embedding")
    assert [each["digest"] for each in record.inputs] == [store.manifest.sealed.digest for store in (one, two)]


class Killed(BaseException):
    """As if the process had been killed there."""


@pytest.fixture
def small_units(monkeypatch):
    """Three rows a unit or so."""
    monkeypatch.setattr("featcache.store.layout.CHUNK_BYTES", 200)


@pytest.mark.parametrize("units", [0, 1, 3])
def test_killed_and_resumed_it_is_byte_identical(pair, tmp_path, monkeypatch, small_units, units):
    stores = [pair[0][0], pair[1][0]]
    whole = featcache.derive("mean", stores, tmp_path / "whole.zarr", of="probabilities")
    assert whole.chunks > 4
    rows, calls = Mean.rows, []

    def killed(self, index, view):
        calls.append(view)
        if len(calls) > units * VIEWS:
            raise Killed
        return rows(self, index, view)

    monkeypatch.setattr(Mean, "rows", killed)
    with pytest.raises(Killed):
        featcache.derive("mean", stores, tmp_path / "again.zarr", of="probabilities")
    monkeypatch.setattr(Mean, "rows", rows)
    assert not FeatureStore(tmp_path / "again.zarr").sealed
    again = featcache.derive("mean", stores, tmp_path / "again.zarr", of="probabilities")
    assert files(tmp_path / "again.zarr") == files(tmp_path / "whole.zarr")
    assert again.sealed


def test_a_finished_store_is_returned_and_a_damaged_one_repaired(pair, tmp_path, monkeypatch, small_units):
    stores, out = [pair[0][0], pair[1][0]], tmp_path / "m.zarr"
    featcache.derive("mean", stores, out)
    before, told = files(out), []
    featcache.derive("mean", stores, out, progress=lambda *at: told.append(at))
    assert told == []
    chunk = out / "embedding" / "c" / "1" / "0" / "0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(ValueError, match="the same `featcache derive` command repairs it"):
        FeatureStore(out).read("embedding")
    featcache.derive("mean", stores, out, progress=lambda *at: told.append(at))
    assert len(told) == 1
    assert files(out) == before


def test_another_store_is_not_replaced_unless_asked(pair, make, tmp_path):
    (one, _, _), (two, _, _) = pair
    out = tmp_path / "m.zarr"
    featcache.derive("mean", [one, two], out)
    for refused, change in {
        "was made as mean of=embedding .*, not mean of=logits temperature=1.0 weights=\\[\\]": {
            "options": {"of": "logits"}
        },
        "was made as mean .*, not join .*": {"name": "join"},
        "was made from other stores, or they have changed since": {"stores": [two, one]},
        r"was made in float32, not float16 \(--dtype\)": {"options": {"dtype": "float16"}},
    }.items():
        given = {"name": "mean", "stores": [one, two], "options": {}} | change
        with pytest.raises(
            ValueError, match=rf"m\.zarr: {refused}; choose another --out, or replace it with --overwrite"
        ):
            featcache.derive(given["name"], given["stores"], out, **given["options"])
    with pytest.raises(ValueError, match=r"one\.zarr: was made by another encoder"):
        featcache.derive("mean", [two], one.path)
    with pytest.raises(ValueError, match=r"one\.zarr: is one of the stores to derive from"):
        featcache.derive("mean", [one, two], one.path)
    replaced = featcache.derive("mean", [one, two], out, of="logits", overwrite=True)
    assert replaced.manifest.derivation.options["of"] == "logits"


def test_stores_that_do_not_suit_are_refused(make, tmp_path, rng):
    one = make("one")[0]
    narrow = make("narrow", width=3)[0]
    others = {
        r"have no sample id in common": write_store(tmp_path / "ids.zarr", np.ones((2, VIEWS, WIDTH))),
        r"views\.zarr has views \{'count': 1\}": write_store(
            tmp_path / "views.zarr", rng.normal(size=(ROWS, WIDTH)), sample_ids=IDS
        ),
        r"images\.zarr holds other images than \S*one\.zarr under 1 ids \(first: 07\.png\)": with_images(
            write_store(tmp_path / "images.zarr", rng.normal(size=(ROWS, VIEWS, WIDTH)), sample_ids=IDS),
            [None, *IDS[1:7], "another", *IDS[8:]],
        ),
        r"mean: \S*narrow\.zarr has embedding of 3 values, \S*one\.zarr of 6: .*`featcache derive join`": narrow,
    }
    for refused, other in others.items():
        with pytest.raises(ValueError, match=refused):
            featcache.derive("mean", [one, other], tmp_path / "m.zarr")
    create_store(tmp_path / "unfinished.zarr", one.manifest)
    with pytest.raises(ValueError, match=r"unfinished\.zarr: .* has not finished"):
        featcache.derive("mean", [one, tmp_path / "unfinished.zarr"], tmp_path / "m.zarr")
    assert not (tmp_path / "m.zarr").exists()


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"weigths": (1.0,)}, r"mean has no option 'weigths'; did you mean weights\?"),
        ({"of": "tokens"}, "mean: of is 'tokens'; give embedding, logits or probabilities"),
        ({"temperature": "hot"}, "mean: temperature is 'hot'; give a number"),
        ({"temperature": 2}, "mean: temperature says nothing of embedding"),
        ({"weights": (1, 2, 3)}, "mean: 3 weights for 2 stores; give one a store"),
        ({"weights": (0, 1)}, "mean: weights are .*; give numbers above 0"),
    ],
)
def test_options_that_do_not_suit_are_refused(pair, tmp_path, options, refused):
    with pytest.raises(ValueError, match=refused):
        featcache.derive("mean", [pair[0][0], pair[1][0]], tmp_path / "m.zarr", **options)
    with pytest.raises(ValueError, match=r"unknown derivation 'meen'; did you mean mean\?"):
        featcache.derive("meen", [pair[0][0]], tmp_path / "m.zarr")


def test_a_damaged_input_is_not_derived_from(pair, tmp_path):
    one = pair[0][0]
    chunk = next(path for path in (one.path / "embedding" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"does not match its checksum; `featcache verify \S*one\.zarr` says more"):
        featcache.derive("mean", [FeatureStore(one.path), pair[1][0]], tmp_path / "m.zarr")


def run(program, *line):
    ran = CliRunner().invoke(programs.app(program), list(map(str, line)))
    assert ran.exit_code == 0, (ran.output, ran.exception)
    return ran


def test_from_the_command_line_to_an_evaluation(make, tmp_path):
    one, two = (make(name)[0].path for name in ("one", "two"))
    out, said = tmp_path / "mean.zarr", tmp_path / "derive.json"
    run("featcache", "derive", "mean", one, two, "--out", out, "--weights", "1,3", "--set", "of=logits", "--json", said)
    told = json.loads(said.read_text())
    assert told["command"] == "derive"
    assert told["reused"] is False
    assert told["derivation"]["options"] == {"of": "logits", "temperature": 1.0, "weights": [1.0, 3.0]}
    run("featcache", "derive", "mean", one, two, "--out", out, "--weights", "1,3", "--of", "logits", "--json", said)
    assert json.loads(said.read_text())["reused"] is True
    run("featcache", "verify", out)
    assert "mean of=logits" in run("featcache", "info", out).stdout
    run("evalsuite", "knn", "--bank", out, "--query", out, "--k", "3", "--json", tmp_path / "knn.json")
    assert json.loads((tmp_path / "knn.json").read_text())["inputs"]["bank"]["encoder"] == "derive:mean(one, two)"

"""`featcache check` against slow loops in float64, and what it must and must not be alarmed by."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hashed import with_images

import featcache
import featcache.store.layout
from featcache import write_store
from featcache.store import FeatureStore, StoreWriter, create_store
from featcache_cli import programs

checking = importlib.import_module("featcache.store.check")  # the package's own name is the function


@pytest.fixture
def make(tmp_path):
    """`make(name, embedding, images, …)`: a sealed store; `images` name its rows' images, None: no hashes."""

    def store(name, embedding, images="own", **given):
        made = write_store(tmp_path / f"{name}.zarr", np.asarray(embedding), **given)
        if isinstance(images, str):
            images = [f"{images}-{name}-{i}" for i in range(len(embedding))]
        return made if images is None else with_images(made, images)

    return store


def labelled(n, classes=3):
    return {"labels": np.arange(n) % classes, "class_names": [f"c{i}" for i in range(classes)]}


def of(report, text):
    """The remarks that have this text, but for folders, which are named after the test."""
    return [remark for remark in report.remarks if text in re.sub(r"/\S*/", "", remark.text)]


def slow(embedding, images):
    """Median distance to the nearest row of another image, and between pairs of such, and the effective rank, one by one."""
    x = np.asarray(embedding).astype(np.float16).astype(np.float64)
    unit = np.array([row / np.linalg.norm(row) if row.any() else row for row in x])
    nearest = [
        min(1 - float(unit[i] @ unit[j]) for j in range(len(x)) if images[j] != images[i]) for i in range(len(x))
    ]
    apart = [1 - float(unit[i] @ unit[j]) for i in range(len(x)) for j in range(i) if images[j] != images[i]]
    values = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False)
    share = values[values > 1e-9] / values[values > 1e-9].sum()
    return np.median(nearest), np.median(apart), np.exp(-sum(p * np.log(p) for p in share))


def test_a_sound_store_has_no_remark_and_its_measures_equal_slow_loops(make, rng, monkeypatch):
    monkeypatch.setattr(checking, "_BLOCK_FLOATS", 7 * 7)  # several blocks
    x = rng.normal(size=(90, 7))
    store = make("a", x, **labelled(90))
    report = featcache.check(store)
    assert (report.remarks, report.falsified) == ([], False)
    found = report.stores[0]
    expected = slow(x, range(90))
    assert (found.nearest, found.apart, found.effective_rank) == pytest.approx(expected, abs=1e-5)
    assert (found.rows, found.failed, found.identical, found.near_identical) == (90, 0, 0, 0.0)
    assert (found.zero_rows, found.not_finite, found.constant_dimensions, found.unlabelled) == (0, 0, 0, 0)
    assert found.classes == {"c0": 30, "c1": 30, "c2": 30}


def test_two_sound_halves_have_no_remark(make, rng):
    stores = [make(name, rng.normal(size=(60, 24)), **labelled(60)) for name in "ab"]
    report = featcache.check([str(store.path) for store in stores])
    assert report.remarks == []
    (pair,) = report.pairs
    assert (pair.identical_a, pair.identical_b, pair.near_a, pair.near_b) == (0, 0, 0.0, 0.0)
    assert pair.classes == ["c0", "c1", "c2"]
    assert len(featcache.check([stores[0], str(stores[0].path)]).stores) == 1


@pytest.mark.parametrize("hashed", [True, False])
def test_identical_images_within_and_across_stores(make, rng, hashed):
    x = {"a": rng.normal(size=(200, 24)), "b": rng.normal(size=(50, 24))}
    images = {name: [f"{name}{i}" for i in range(len(of_it))] for name, of_it in x.items()}
    for (name, i), (source, j) in [
        (("a", 7), ("a", 3)),
        (("a", 8), ("a", 3)),
        *((("b", i), ("a", 3 + i)) for i in range(5)),
    ]:
        x[name][i], images[name][i] = x[source][j], images[source][j]
    a, b = (make(name, x[name], images[name] if hashed else None, **labelled(len(x[name]))) for name in "ab")
    report = featcache.check([a, b])
    assert [each.identical for each in report.stores] == [2, 1]  # both a3 and a7, its copy, are in b
    (pair,) = report.pairs
    counted = [sum(each in images[other] for each in images[name]) for name, other in ("ab", "ba")]
    assert [pair.identical_a, pair.identical_b] == counted == [6, 5]
    what = "are images of" if hashed else "are embeddings of"
    assert [remark.falsifies for remark in of(report, what)] == [True, True]
    assert "5 of 50 (10.0%)" in of(report, what)[1].text
    assert len(of(report, "keeps no hashes")) == (0 if hashed else 2)
    assert all(each.near_identical == 0 for each in report.stores)  # what is identical is not near-identical too


def test_few_copies_are_a_note(make, rng):
    x = rng.normal(size=(202, 24))
    report = featcache.check([make("a", x, [*range(201), 0], **labelled(202))])
    (remark,) = report.remarks
    assert "1 of 202 (0.5%) rows are images that earlier rows are" in remark.text
    assert not report.falsified


def test_near_identical_rows_of_other_images(make, rng):
    x = rng.normal(size=(100, 16))
    near = x[:20] + 0.05 * rng.normal(size=(20, 16))
    report = featcache.check(
        [make("a", np.concatenate([x, near[:6]])), make("b", np.concatenate([near, rng.normal(size=(80, 16))]))]
    )
    a, b = report.stores
    assert a.near_identical == pytest.approx(12 / 106)
    assert b.near_identical == 0
    (pair,) = report.pairs
    assert (pair.near_a, pair.near_b) == pytest.approx((26 / 106, 20 / 100))
    assert [remark.falsifies for remark in of(report, "near-identical")] == [True] * 3
    # the same where all rows have a large direction in common, as encoders' have
    shifted = np.concatenate([x, near[:6]]) + 4
    assert featcache.check(make("c", shifted)).stores[0].near_identical == pytest.approx(12 / 106)


def test_a_collapsed_student_is_told_and_others_are_not(make, rng):
    direction, noise = rng.normal(size=(1, 32)), rng.normal(size=(150, 32))
    collapsed = featcache.check(make("flat", 10 * direction + 0.3 * noise))
    assert collapsed.stores[0].nearest == pytest.approx(slow(10 * direction + 0.3 * noise, range(150))[0], rel=0.05)
    assert collapsed.stores[0].nearest < 1e-3
    (remark,) = of(collapsed, "collapsed")
    assert remark.falsifies
    assert "nearest other is" in remark.text
    sound = featcache.check(make("sound", 10 * direction + 10 * noise))
    assert not of(sound, "collapsed")
    lines = rng.normal(size=(150, 2)) @ rng.normal(size=(2, 64)) + 0.001 * rng.normal(size=(150, 64))
    few = featcache.check(make("few", lines))
    assert few.stores[0].effective_rank < 3
    assert of(few, "collapsed to few directions: effective rank")[0].falsifies


@pytest.mark.parametrize("dimensions", [2, 3, 4, 8])
def test_few_dimensions_are_no_collapse_to_few_directions(make, rng, dimensions):
    report = featcache.check(make("a", rng.normal(size=(40, dimensions))))
    assert report.stores[0].effective_rank <= dimensions
    assert not of(report, "few directions: ")


def test_constant_and_zero_dimensions_and_zero_rows(make, rng):
    x = rng.normal(size=(120, 9))
    x[:, 2], x[:, 5], x[:, 7] = 0, 1.5, 0
    x[[4, 9]] = 0
    x[:, 5] = 1.5
    x[[4, 9], 5] = 0  # so that dimension 5 has two values
    found = featcache.check(make("a", x))
    assert (found.stores[0].constant_dimensions, found.stores[0].zero_dimensions, found.stores[0].zero_rows) == (
        2,
        2,
        2,
    )
    assert not of(found, "dimensions have one value")[0].falsifies
    assert of(found, "2 of 120 (1.7%) rows are all zeros")[0].falsifies
    alike = featcache.check(make("alike", np.ones((30, 4))))
    assert alike.stores[0].constant_dimensions == 4
    assert of(alike, "4 of 4 dimensions have one value in all rows")[0].falsifies
    assert alike.stores[0].effective_rank is None
    assert of(alike, "collapsed")


def test_rows_that_are_not_finite_are_counted_and_spoil_nothing_else(make, rng):
    x = rng.normal(size=(60, 24))
    sound = featcache.check(make("sound", x, [f"i{i}" for i in range(60)])).stores[0]
    bad = StoreWriter(make("bad", x, [f"i{i}" for i in range(60)]).path)
    values = x.astype(np.float16)[:, None]
    values[[3, 50], 0, [1, 2]] = np.nan, np.inf
    bad.manifest = bad.manifest.changed(sealed=None)
    bad.write_rows("embedding", 0, values)
    bad.seal()
    report = featcache.check(FeatureStore(bad.path))
    assert report.stores[0].not_finite == 2
    assert of(report, "2 of 60 (3.3%) rows hold a NaN or an infinity")[0].falsifies
    assert report.stores[0].sampled == 58
    assert report.stores[0].nearest == pytest.approx(sound.nearest, rel=0.2)
    json.dumps(report.record(), allow_nan=False)


def test_failed_rows_and_their_reasons(make, rng):
    failed = {i: f"OSError: cannot identify <BytesIO object at 0x7f{i}a>" for i in range(9)} | {
        9: "ValueError: too large"
    }
    report = featcache.check(make("a", rng.normal(size=(120, 24)), failed=failed, **labelled(120)))
    assert report.stores[0].failures == {
        "OSError: cannot identify <BytesIO object at 0x…>": 9,
        "ValueError: too large": 1,
    }
    (remark,) = of(report, "failed")
    assert "10 of 120 (8.3%) rows failed (9: OSError" in remark.text
    assert not remark.falsifies
    many = featcache.check(make("b", rng.normal(size=(20, 24)), failed={0: "x", 1: "y"}))
    assert of(many, "failed")[0].falsifies
    none = featcache.check(make("c", rng.normal(size=(3, 24)), failed=dict.fromkeys(range(3), "x")))
    assert of(none, "not one row can be used")[0].falsifies


def test_labels(make, rng):
    x = rng.normal(size=(60, 24))
    labels = np.zeros(60, int)
    labels[:3] = 1, 2, -1
    report = featcache.check(make("a", x, labels=labels, class_names=["ant", "bee", "cat", "dog"]))
    assert report.stores[0].classes == {"ant": 57, "bee": 1, "cat": 1}
    assert [remark.text.partition(": ")[2] for remark in report.remarks] == [
        "1 of 60 (1.7%) rows have no label: knn and probe leave them out",
        "2 of 3 classes have one row (bee, cat): accuracy within them is 0 or 1",
        "classes are of 1 to 57 rows; naming the largest is right in 96.6%: look at macro accuracies",
    ]
    assert not report.falsified
    other = make("b", rng.normal(size=(60, 24)), labels=np.arange(60) % 2, class_names=["cat", "emu"])
    third = make("c", rng.normal(size=(60, 24)), labels=np.arange(60) % 2)
    report = featcache.check([report.stores[0].store, other, third])
    assert of(report, "2 of 3 classes of")[0].text.endswith("b.zarr (ant, bee)")
    assert of(report, "1 of 2 classes of")
    assert len(of(report, "names its classes")) == 2
    assert len(of(report, "no class in common")) == 2


def test_precisions_and_encoders(make, rng, tmp_path):
    def made(name, fingerprint, extraction):
        store = make(name, rng.normal(size=(40, 24)), fingerprint=fingerprint, encoder_name=fingerprint, **labelled(40))
        store = StoreWriter(store.path)
        store.manifest = store.manifest.changed(sealed=None, extraction=extraction)
        store.seal()
        return FeatureStore(store.path)

    one = made("one", "vit", {"precision": "fp32", "cosine": 1.0})
    two = made("two", "vit", {"precision": "bf16+channels_last", "cosine": 0.99851})
    other = made("other", "resnet", {"precision": "fp32", "cosine": 1.0})
    assert (
        featcache.check([one, other])
        .remarks[0]
        .text.startswith("stores of different encoders (vit (vit), resnet (resnet))")
    )
    assert featcache.check([one, other]).pairs == []
    assert not featcache.check([one, other]).falsified
    report = featcache.check([two])
    assert "0.99851" in of(report, "a cosine to fp32 of")[0].text
    assert not report.falsified
    (remark,) = of(featcache.check([one, two, other]), "two.zarr is in bf16+channels_last, one.zarr in fp32: ")
    assert remark.falsifies


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("views", [1, 2])
def test_the_smallest_stores(make, rng, rows, dimensions, views):
    x = rng.normal(size=(rows, views, dimensions))
    report = featcache.check([make("a", x), make("b", x, None)])
    found = report.stores[0]
    assert found.usable == rows
    assert (found.nearest is None) == (rows == 1)
    json.dumps(report.record(), allow_nan=False)


def test_only_the_plain_view_counts(make, rng):
    x = rng.normal(size=(40, 3, 5))
    twice = x.copy()
    twice[:, 1:] = 0
    one, other = (featcache.check(make(name, values)).stores[0] for name, values in (("a", x), ("b", twice)))
    assert (one.nearest, one.zero_rows) == (other.nearest, other.zero_rows)


def test_what_extraction_has_not_finished_is_checked_as_far_as_it_goes(tmp_path, rng):
    whole = write_store(tmp_path / "whole.zarr", rng.normal(size=(30, 4)), per_chunk=10)
    half = create_store(tmp_path / "half.zarr", whole.manifest)
    arrays = {name: whole.read(name, 10, 20) for name in whole.layout}
    half.write_chunk(1, arrays)
    report = featcache.check(str(half.path))
    assert (report.stores[0].rows, report.stores[0].usable, report.stores[0].pending) == (30, 10, 20)
    assert of(report, "extraction has not finished (20 of 30 rows are missing)")[0].falsifies
    empty = create_store(tmp_path / "empty.zarr", whole.manifest)
    assert featcache.check(empty).falsified


def test_a_sample_is_drawn_by_the_seed_and_said(make, rng, monkeypatch):
    monkeypatch.setattr(checking, "SAMPLED", 50)
    monkeypatch.setattr(checking, "RANKED", 60)
    x = rng.normal(size=(400, 24))
    x[200:] = x[:200] + 0.02 * rng.normal(size=(200, 24))
    store = make("a", x)
    first, again, other = (featcache.check(store, seed=seed) for seed in (1, 1, 2))
    assert first.record() == again.record()
    assert first.stores[0].nearest != other.stores[0].nearest
    assert (first.stores[0].sampled, first.stores[0].ranked) == (50, 60)
    assert first.stores[0].near_identical == 1.0  # looked for among all 400
    assert "about 100.0% of 400 (50 were sampled)" in of(first, "near-identical")[0].text


def test_a_url_is_checked_like_a_folder(make, rng, s3_bucket):
    import fsspec

    local = make("a", rng.normal(size=(50, 24)), **labelled(50))
    url = f"{s3_bucket}/a.zarr"
    filesystem, root = fsspec.core.url_to_fs(url)
    for path in Path(local.path).rglob("*"):
        if path.is_file():
            filesystem.put(str(path), f"{root}/{path.relative_to(local.path).as_posix()}")
    remote = featcache.check([url]).stores[0]
    assert remote.store == url
    assert {**vars(remote), "store": ""} == {**vars(featcache.check(local).stores[0]), "store": ""}


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["featcache", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        programs.run_featcache()
    return ended.value.code or 0, *capsys.readouterr()


def test_the_command_ends_in_0_1_and_2(make, rng, monkeypatch, capsys, tmp_path):
    sound = make("sound", rng.normal(size=(90, 24)), **labelled(90))
    code, out, err = run(monkeypatch, capsys, sound.path)
    assert (code, err.strip()) == (0, "nothing to remark")
    assert "effective rank" in out
    flat = make("flat", np.ones((20, 6)))
    code, out, err = run(monkeypatch, capsys, sound.path, flat.path, "--json", tmp_path / "r.json")
    assert code == 1
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["falsified"] is True
    lines = [line.partition(": ")[2] for line in err.splitlines()]
    assert lines == [remark["text"] for remark in record["remarks"]]
    assert [line.startswith("falsifies") for line in err.splitlines()] == [
        each["falsifies"] for each in record["remarks"]
    ]
    code, out, err = run(monkeypatch, capsys, flat.path, "--json", "-")
    assert (code, json.loads(out)["stores"][0]["rows"]) == (1, 20)
    code, out, err = run(monkeypatch, capsys, tmp_path / "none.zarr")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "none.zarr" in err

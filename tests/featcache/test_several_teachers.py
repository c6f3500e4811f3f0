"""Several teachers in one pass: each store as if it had been made alone, every image read and decoded once."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import warm
from stopped import Stop, files, stop_after
from tiny import patch_encoder

import featcache.store.layout
from featcache import extract, extract_all, open_corpus
from featcache.extraction.job import Job
from featcache.extraction.rehearsal import PROBE_IMAGES
from featcache.extraction.samples import Wanted, read_sample
from featcache.inputs import Views
from featcache.inputs.images import Preprocess
from featcache.store import FeatureStore

EXACT = {"device": "cpu", "precision": "fp32+channels_last", "workers": 3, "batch_size": 4}
ROWS = 22
TEACHERS = {"a": (6, 16), "b": (10, 24), "c": (3, 16)}
"""Width and side in px: a and c share a preprocessing; units are of 8, 4 and 16 rows."""


def encoders(names):
    return [patch_encoder(*TEACHERS[name]) for name in names]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 8 * 6 * 2)


@pytest.fixture
def folder(make_images):
    return make_images(ROWS)


@pytest.fixture
def alone(folder, tmp_path, monkeypatch):
    """`alone(names)`: the files of each teacher's store, made in a pass of its own."""

    def make(names, **given):
        with monkeypatch.context() as elsewhere:  # so that no other run copies their rows
            elsewhere.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))
            return {
                name: files(
                    extract(folder, patch_encoder(*TEACHERS[name]), tmp_path / f"{name}.alone", **EXACT, **given).path
                )
                for name in names
            }

    return make


def counting(monkeypatch, corpus):
    """Counts, as they will be: {row: reads}, and [decoded, rendered] images."""
    reads, work, read = Counter(), Counter(), corpus.read

    def counted(i):
        reads[i] += 1
        return read(i)

    monkeypatch.setattr(corpus, "read", counted)
    decode, render = Preprocess.decode, Preprocess.render

    def counted_decode(encoded):
        work["decode"] += 1
        return decode(encoded)

    def counted_render(*given):
        work["render"] += 1
        return render(*given)

    monkeypatch.setattr(Preprocess, "decode", staticmethod(counted_decode))
    monkeypatch.setattr(Preprocess, "render", counted_render)
    return reads, work


@pytest.mark.parametrize("names", ["ab", "ba", "abc"])
@pytest.mark.parametrize("given", [{}, {"views": 2, "augment": "rrc", "fields": ["tokens"]}], ids=["plain", "tokens"])
def test_each_store_is_as_if_made_alone(folder, tmp_path, alone, names, given):
    (Path(folder) / "bee/004.png").write_bytes(b"no image")
    outs = [tmp_path / f"{name}.zarr" for name in names]
    made = extract_all(folder, encoders(names), outs, **EXACT, **given)
    assert [store.path for store in made] == outs
    assert [store.embedding_dim for store in made] == [TEACHERS[name][0] for name in names]
    assert len({store.chunks for store in made}) == len(names)
    expected = alone(names, **given)
    for name, store in zip(names, made, strict=True):
        assert files(store.path) == expected[name]


def test_every_image_is_read_and_decoded_once_and_pixels_are_shared(folder, tmp_path, monkeypatch):
    corpus = open_corpus(folder)
    reads, work = counting(monkeypatch, corpus)
    extract_all(corpus, encoders("abc"), [tmp_path / f"{name}.zarr" for name in "abc"], **EXACT)
    preprocessings = 2  # each has a probe, of the first 8 images, read once more for the clock
    assert reads == {row: 1 + 2 * preprocessings * (row < PROBE_IMAGES) for row in range(ROWS)}
    probed = 2 * PROBE_IMAGES
    assert work == {"decode": ROWS + preprocessings * probed, "render": preprocessings * (ROWS + probed)}


def test_teachers_of_one_preprocessing_get_the_very_same_pixels(folder):
    a, b, c = (Wanted(encoder.preprocess) for encoder in encoders("abc"))
    sample = read_sample(open_corpus(folder), 3, Views(count=2, augment="rrc"), [a, b, None, c])
    assert sample.seen[0] is sample.seen[3]
    assert sample.seen[2] is None
    assert [seen.pixels.shape for seen in sample.seen[:2]] == [(2, 16, 16, 3), (2, 24, 24, 3)]


@pytest.mark.parametrize("finished", [0, 1])
def test_a_finished_store_is_left_alone_and_the_other_is_made(folder, tmp_path, alone, monkeypatch, finished):
    outs, teachers, expected = [tmp_path / "a.zarr", tmp_path / "b.zarr"], encoders("ab"), alone("ab")
    extract(folder, patch_encoder(*TEACHERS["ab"[finished]]), outs[finished], **EXACT)
    corpus = open_corpus(folder)
    _, work = counting(monkeypatch, corpus)
    times = {p: p.stat().st_mtime_ns for p in outs[finished].rglob("*")}
    plans = []
    made = extract_all(corpus, teachers, outs, announce=plans.append, **EXACT)
    assert teachers[finished].module.seen == []
    assert work["render"] == ROWS + 2 * PROBE_IMAGES
    assert {p: p.stat().st_mtime_ns for p in outs[finished].rglob("*")} == times
    assert [store.path for store in plans[0].unfinished] == [outs[1 - finished]]
    assert [files(store.path) for store in made] == [expected["a"], expected["b"]]


def test_when_all_are_finished_no_encoder_runs(folder, tmp_path):
    outs = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    extract_all(folder, encoders("ab"), outs, **EXACT)
    teachers, told = encoders("ba"), []
    assert [s.path for s in extract_all(folder, teachers, outs[::-1], progress=told.append, **EXACT)] == outs[::-1]
    assert [teacher.module.seen for teacher in teachers] == [[], []]
    assert told == []


@pytest.mark.parametrize("then", [["abc"], ["cba"], ["b", "abc"], ["ca", "b"]], ids="+".join)
def test_resumed_in_any_order_or_one_by_one(folder, tmp_path, alone, then):
    (Path(folder) / "cat/011.png").write_bytes(b"no image")
    expected = alone("abc")
    outs = [tmp_path / f"{name}.zarr" for name in "abc"]
    for stop in np.random.default_rng(len("".join(then))).integers(0, 3, 2):
        with pytest.raises(Stop):
            extract_all(folder, encoders("abc"), outs, progress=stop_after(stop), **EXACT)
    for names in then:
        extract_all(folder, encoders(names), [tmp_path / f"{name}.zarr" for name in names], **EXACT)
    for name in "abc":
        assert files(tmp_path / f"{name}.zarr") == expected[name]


def test_units_that_one_teacher_has_finished_are_not_made_again_for_it(folder, tmp_path, monkeypatch):
    """The other one's units are larger: it has finished none of these rows. (Killed: nothing in progress is saved.)"""
    monkeypatch.setattr(Job, "save", lambda self: None)
    outs = [tmp_path / "b.zarr", tmp_path / "c.zarr"]
    with pytest.raises(Stop):
        extract_all(folder, encoders("bc"), outs, progress=stop_after(2), **EXACT)
    assert [len(FeatureStore(out).pending_chunks()) for out in outs] == [6 - 3, 2]
    teachers, told = encoders("bc"), []
    extract_all(folder, teachers, outs, progress=told.append, **EXACT)
    assert told[-1].resumed == 0
    assert [len(set(teacher.module.seen)) for teacher in teachers] == [ROWS - 12 + PROBE_IMAGES, ROWS]


@pytest.mark.parametrize(
    ("teachers", "outs", "said"),
    [
        ("ab", ["x", "x"], "2 teachers, 1 stores"),
        ("ab", ["x", "./x"], "2 teachers, 1 stores|2 teachers, 2 stores"),
        ("ab", ["x"], "2 teachers, 1 stores"),
        ("a", ["x", "y"], "1 teachers, 2 stores"),
        ("aa", None, "2 teachers, 1 stores"),
    ],
)
def test_each_teacher_needs_a_store_of_its_own(folder, tmp_path, monkeypatch, teachers, outs, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"({said}): give one store of its own for each") as refused:
        extract_all(folder, encoders(teachers), outs, **EXACT)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_an_image_that_fails_fails_in_all(folder, tmp_path):
    (Path(folder) / "ant/003.png").write_bytes(b"no image")
    told = []
    outs = [tmp_path / f"{name}.zarr" for name in "ab"]
    made = extract_all(folder, encoders("ab"), outs, progress=told.append, **EXACT)
    assert [list(store.reasons) for store in made] == [["ant/003.png"]] * 2
    assert made[0].reasons == made[1].reasons
    assert told[-1].failed == 1
    assert not any(store.gather(store.failed).any() for store in made)


def test_disks_must_hold_all_stores_together(folder, tmp_path, monkeypatch):
    sizes = []
    outs = [tmp_path / f"{name}.zarr" for name in "ab"]
    for name, out in zip("ab", outs, strict=True):
        plans = []
        extract(folder, patch_encoder(*TEACHERS[name]), out.with_suffix(".one"), announce=plans.append, **EXACT)
        sizes.append(plans[0].bytes_to_write)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=sum(sizes) - 1))
    with pytest.raises(OSError, match=r"a\.zarr, .*b\.zarr: .* to write.*make room"):
        extract_all(folder, encoders("ab"), outs, **EXACT)
    assert not any(out.exists() for out in outs)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=sum(sizes)))
    assert all(store.sealed for store in extract_all(folder, encoders("ab"), outs, **EXACT))


def test_from_the_command_line(folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from tiny import patch_encoder\n\n"
        "def small():\n    return patch_encoder(6, 16)\n\n"
        "def wide():\n    return patch_encoder(10, 24)\n"
    )

    def command(*arguments):
        given = ["featcache", "extract", folder, "--device", "cpu", "--precision", "fp32", *arguments]
        return warm.run(warm.PROGRAM, *given, cwd=tmp_path, env=os.environ | {"COLUMNS": "300"})

    both = ["--teacher", "mine:small,mine:wide", "--out", "x.zarr,y.zarr", "--json", "-"]
    ran = command(*both)
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout)
    assert [made["store"] for made in summary["stores"]] == ["x.zarr", "y.zarr"]
    assert [made["encoder"] for made in summary["stores"]] == ["patches6", "patches10"]
    assert [(made["rows"], made["ok"], made["reused"]) for made in summary["stores"]] == [(ROWS, ROWS, False)] * 2
    assert [FeatureStore(tmp_path / name).embedding_dim for name in ("x.zarr", "y.zarr")] == [6, 10]
    again = json.loads(command(*both).stdout)
    assert [made["reused"] for made in again["stores"]] == [True, True]
    refused = command("--teacher", "mine:small,mine:wide", "--out", "z.zarr")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == "error: 2 teachers, 1 stores: give one store of its own for each"
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "z.zarr").exists()

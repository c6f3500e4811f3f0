"""Engines: whatever computes the units, in whatever order, the stores are the same, byte for byte."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from stopped import Stop, files, stop_after
from warm import python_path

import featcache.extraction.job
import featcache.store.layout
from featcache import extract, extract_all, load_encoder, open_corpus
from featcache.engines import Engine, Report, local, open_engine
from featcache.store import FeatureStore
from featcache_cli.programs import run_featcache

EXACT = {"device": "cpu", "precision": "fp32+channels_last", "workers": 2, "batch_size": 4}
ROWS = 45
TEACHERS = """
from tiny import patch_encoder
def small(): return patch_encoder(6, 16)
def wide(): return patch_encoder(10, 24)
def other(): return patch_encoder(6, 16, weights=1)
"""
SPECS = ["mine:small", "mine:wide"]  # units of 8 and of 4 rows
POOL = '''
"""Spans in any order, in two processes of their own that get the work as bytes."""
import pickle, random
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from featcache.engines import Engine

class Pool(Engine):
    def map(self, spans, work):
        spans = random.Random(0).sample(spans, len(spans))
        with ProcessPoolExecutor(2, get_context("spawn"), begin, (pickle.dumps(work),)) as pool:
            for done in as_completed([pool.submit(compute, span) for span in spans]):
                yield from done.result()

def begin(pickled):
    global work
    work = pickle.loads(pickled)

def compute(span):
    return list(work([span]))

def open_engine(rest):
    return Pool()
'''


class Shuffled(Engine):
    """Two workers in this process, each with the work as it was pickled, take spans in turn in an order of chance."""

    def map(self, spans, work):
        workers = [pickle.loads(pickle.dumps(work)) for _ in range(2)]
        self.spans = random.Random(1).sample(spans, len(spans))
        for i, span in enumerate(self.spans):
            yield from workers[i % 2]([span])


@pytest.fixture
def folder(make_images, tmp_path, monkeypatch):
    """45 images, two of which cannot be read; small units, each batch saved; the teachers can be imported."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 8 * 6 * 2)
    monkeypatch.setattr(featcache.extraction.job, "SAVE_SECONDS", 0.0)
    made = Path(make_images(ROWS))
    for row in (3, 30):
        sorted(made.rglob("*.png"))[row].write_bytes(b"no image")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/mine.py").write_text(TEACHERS)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return str(made)


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Another package's engine, found through its entry point; for new processes too."""
    site = tmp_path / "site"
    (site / "pools-1.dist-info").mkdir(parents=True)
    (site / "pools.py").write_text(POOL)
    (site / "pools-1.dist-info/METADATA").write_text("Name: pools\nVersion: 1\n")
    (site / "pools-1.dist-info/entry_points.txt").write_text("[featcache.engines]\npool = pools\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", python_path(site, tmp_path / "code"))


@pytest.fixture
def whole(folder, tmp_path, monkeypatch):
    """Of each teacher, the files of a store that this process made alone, with nothing to copy from."""

    def make(**given):
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))
            made = extract_all(folder, SPECS, [tmp_path / f"whole{i}" for i in range(2)], **EXACT, **given)
        return [files(store.path) for store in made]

    return make


def outs(tmp_path):
    return [tmp_path / "a.zarr", tmp_path / "b.zarr"]


@pytest.mark.parametrize("given", [{}, {"views": 2, "augment": "rrc", "fields": ["tokens"]}], ids=["plain", "tokens"])
def test_spans_in_any_order_make_the_same_bytes(folder, tmp_path, whole, given):
    engine, told, plans = Shuffled(), [], []
    made = extract_all(
        folder, SPECS, outs(tmp_path), engine=engine, progress=told.append, announce=plans.append, **EXACT, **given
    )
    assert [files(store.path) for store in made] == whole(**given)
    unit = max(store.manifest.chunk_rows for store in made)
    assert sorted(engine.spans, key=lambda span: span.start) == [
        range(first, min(first + unit, ROWS)) for first in range(0, ROWS, unit)
    ]
    assert (told[-1].done, told[-1].resumed, told[-1].failed, told[-1].reused) == (ROWS, 0, 2, 0)
    assert told[-1].images_per_second > 0
    assert all(store.verify() == [] for store in made)


@pytest.mark.parametrize("batches", [0, 5, 9])
@pytest.mark.parametrize("then", [("local", "shuffled"), ("shuffled", "local"), ("shuffled", "shuffled")], ids="+".join)
def test_what_one_engine_began_another_ends(folder, tmp_path, whole, batches, then):
    engines = {"local": local.Local(), "shuffled": Shuffled()}
    with pytest.raises(Stop):
        extract_all(folder, SPECS, outs(tmp_path), engine=engines[then[0]], progress=stop_after(batches), **EXACT)
    if then[0] == "shuffled":  # units in progress are one worker's own
        assert not any((out / "unfinished.npz").exists() for out in outs(tmp_path))
    told = []
    made = extract_all(folder, SPECS, outs(tmp_path), engine=engines[then[1]], progress=told.append, **EXACT)
    assert [files(store.path) for store in made] == whole()
    assert told[-1].done == ROWS


def test_rows_of_other_stores_are_reused_by_every_engine(folder, tmp_path, whole):
    extract(folder, SPECS[0], tmp_path / "known.zarr", **EXACT)
    told = []
    made = extract(folder, SPECS[0], tmp_path / "a.zarr", engine=Shuffled(), progress=told.append, **EXACT)
    assert told[-1].reused == ROWS - 2
    assert files(made.path) == whole()[0]


def test_failures_are_counted_over_all_workers(folder, tmp_path):
    with pytest.raises(RuntimeError, match=r"2 images could not be read, more than --max-failures 1 \(last: .*png: "):
        extract(folder, SPECS[0], tmp_path / "a.zarr", engine=Shuffled(), max_failures=1, **EXACT)


# -- what travels -----------------------------------------------------------------------------------------


class Caught(Engine):
    """Takes the work's pickle and computes nothing."""

    def map(self, spans, work):
        self.pickled = pickle.dumps(work)
        yield from ()
        raise Stop


@pytest.fixture
def pickled(folder, tmp_path):
    """The work of one teacher, as a worker gets it, and its spans."""
    engine = Caught()
    with pytest.raises(Stop):
        extract(folder, SPECS[0], tmp_path / "a.zarr", engine=engine, **EXACT)
    return engine.pickled


def test_work_travels_without_model_or_pixels(pickled):
    weights = len(pickle.dumps(load_encoder(SPECS[0]).module.state_dict()))
    assert len(pickled) < 2000 < weights


def test_a_worker_refuses_another_encoder_and_other_samples(pickled, folder, tmp_path):
    work, code = pickle.loads(pickled), tmp_path / "code/mine.py"
    code.write_text(TEACHERS.replace("patch_encoder(6, 16)", "patch_encoder(6, 16, weights=2)"))
    del sys.modules["mine"]
    with pytest.raises(ValueError, match=r"not the encoder that \S*a\.zarr was begun with"):
        list(work([range(8)]))
    code.write_text(TEACHERS)
    del sys.modules["mine"]
    next(iter(sorted(Path(folder).rglob("*.png")))).unlink()
    with pytest.raises(ValueError, match=r"not the samples and labels that \S*a\.zarr was begun with"):
        list(work([range(8)]))
    assert len(FeatureStore(tmp_path / "a.zarr").pending_chunks()) == 6


def test_a_worker_that_computes_other_bits_refuses(pickled, tmp_path):
    """The same weights, one factor besides: as other kernels would, in all but size."""
    work, code = pickle.loads(pickled), tmp_path / "code/mine.py"
    begun = FeatureStore(tmp_path / "a.zarr").manifest.extraction.canary
    assert work.canaries == [begun]
    assert begun["threads"] == str(work.threads)
    off = "lambda module, given, found: {name: each * 1.0001 for name, each in found.items()}"
    code.write_text(
        TEACHERS.replace("return patch_encoder(6, 16)\n", "return off(patch_encoder(6, 16))\n")
        + f"""
def off(encoder):
    encoder.module.register_forward_hook({off})
    return encoder
"""
    )
    del sys.modules["mine"]
    with pytest.raises(
        ValueError, match=r"a\.zarr: features computed here have other bits .* are the same, so the first images"
    ):
        list(work([range(8)]))
    work.canaries = [{**begun, "threads": "64", "bits": "others"}]
    code.write_text(TEACHERS)
    del sys.modules["mine"]
    with pytest.raises(
        ValueError, match=r"other bits than those that it was begun with \(threads 64, here 1\); take machines of"
    ):
        list(work([range(8)]))
    assert len(FeatureStore(tmp_path / "a.zarr").pending_chunks()) == 6


def test_a_driver_that_computes_other_bits_refuses_and_a_sealed_store_has_no_canary(folder, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        extract(folder, SPECS[0], tmp_path / "a.zarr", engine=Shuffled(), progress=stop_after(1), **EXACT)
    encoder = load_encoder(SPECS[0])
    hook = encoder.module.register_forward_hook(lambda module, given, found: {n: v * 1.0001 for n, v in found.items()})
    with pytest.raises(ValueError, match="features computed here have other bits"):
        extract(folder, encoder, tmp_path / "a.zarr", **EXACT)
    hook.remove()
    made = extract(folder, encoder, tmp_path / "a.zarr", **EXACT)
    assert "canary" not in made.manifest.extraction.written


def test_an_encoder_made_by_hand_stays_in_its_process(folder, tmp_path):
    encoder = load_encoder(SPECS[0])
    encoder.reload = None
    assert extract(folder, encoder, tmp_path / "a.zarr", **EXACT).sealed
    with pytest.raises(ValueError, match="stays in its process: take --engine local"):
        extract(folder, encoder, tmp_path / "b.zarr", engine=Shuffled(), **EXACT)


# -- found by name ----------------------------------------------------------------------------------------


def test_another_package_s_engine_in_processes_of_its_own(folder, tmp_path, whole, pool, monkeypatch):
    """By name, as from the command line; stopped in its middle, and run again."""
    given = {**EXACT, "engine": "pool"}
    with pytest.raises(Stop):
        extract_all(folder, SPECS, outs(tmp_path), progress=stop_after(3), **given)
    monkeypatch.setattr(
        sys, "argv",
        ["featcache", "extract", folder, "--engine", "pool", "--teacher", ",".join(SPECS), "--out",
         ",".join(map(str, outs(tmp_path))), "--device", "cpu", "--workers", "2"],
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        run_featcache()
    assert not ended.value.code
    assert [files(out) for out in outs(tmp_path)] == whole()


def test_engines_are_listed_and_an_unknown_one_is_refused_in_a_line(folder, pool, tmp_path, monkeypatch, capsys):
    code = "import sys; from featcache_cli.programs import run_featcache; sys.argv = ['featcache', 'extract', '--help']; run_featcache()"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert "Where it is computed: local, pool, ray." in ran.stdout
    monkeypatch.setattr(sys, "argv", ["featcache", "extract", folder, "--teacher", SPECS[0], "--engine", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        run_featcache()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: unknown engine 'nowhere'; known: local, pool, ray"


def test_reports_add_up_to_the_whole(folder, tmp_path):
    reports = []

    class Told(local.Local):
        def map(self, spans, work):
            for report in super().map(spans, work):
                reports.append(report)
                yield report

    extract(folder, SPECS[0], tmp_path / "a.zarr", engine=Told(), **EXACT)
    assert sum(report.rows for report in reports) == ROWS
    assert [failure.split(":")[0] for report in reports for failure in report.failures] == [
        open_corpus(folder).ids[row] for row in (3, 30)
    ]
    assert all(pickle.loads(pickle.dumps(report)) == report for report in reports)
    tails = {file: tail for report in reports for file, tail in report.tails.get(str(tmp_path / "a.zarr"), {}).items()}
    chunks = {name: written for name, written in files(tmp_path / "a.zarr").items() if not name.endswith("zarr.json")}
    assert tails == {name: written[-4:] for name, written in chunks.items()}
    assert Report() == Report(rows=0)


def test_local_takes_no_options():
    with pytest.raises(ValueError, match="engine local:8: takes no options"):
        open_engine("local:8")

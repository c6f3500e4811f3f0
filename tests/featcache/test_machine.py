"""Systems that lack a call of Linux, and code that travels to other processes."""

import copy
import mmap
import os
import pickle
import signal
import subprocess
import sys
from types import ModuleType

import cloudpickle
import numpy as np
import pytest

import featcache
from featcache import machine
from featcache.machine import cores, free_bytes
from featcache.stop import stoppable

ABSENT: dict[ModuleType, tuple[str, ...]] = {
    os: ("sysconf", "sched_getaffinity", "posix_fadvise"),
    signal: ("SIGHUP", "pthread_kill"),
}
"""What macOS or Windows do not have."""


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in ABSENT.items():
        for name in names:
            monkeypatch.delattr(module, name, raising=False)


def test_cores_and_memory_have_an_answer_everywhere(elsewhere, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert cores() == os.cpu_count()
    assert free_bytes() == 4 * 2**30
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1


@pytest.mark.parametrize(("limit", "expected"), [("max", 9 * 1024), ("7000", 7000 - 3000 + 1000), ("2000", 0)])
def test_free_memory_counts_the_page_cache_and_a_containers_limit(monkeypatch, tmp_path, limit, expected):
    (tmp_path / "meminfo").write_text("MemTotal: 20 kB\nMemFree: 1 kB\nMemAvailable: 9 kB\n")
    told = {"memory.max": limit, "memory.current": "3000", "memory.stat": "anon 5\ninactive_file 1000"}
    for name, text in told.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "CONTAINERS", [(tmp_path, *machine.CONTAINERS[0][1:])])
    assert free_bytes() == expected


def test_extract_works_without_the_calls_of_linux(elsewhere, monkeypatch, tmp_path, encoder, make_images):
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    with stoppable():
        store = featcache.extract(make_images(4), encoder, tmp_path / "t.zarr", device="cpu", precision="fp32")
    store.release("embedding")
    assert len(store.gather([0, 1])) == 2


NOTEBOOK = """
import sys, cloudpickle
import featcache
from featcache import Views, open_store

def rows(path):
    import featcache as again
    assert again is featcache
    assert Views().count == 1 and featcache.load_encoder and featcache.extract
    return featcache.open_store(path).gather([2, 0]).tolist(), open_store(path).sample_ids[:1].tolist()

cloudpickle.dump(rows, open(sys.argv[1], "wb"))
"""
"""What a notebook, or Ray, sends to its workers: a function of `__main__`, by value."""


def test_a_function_that_uses_featcache_travels_to_another_process(tmp_path, stored):
    here = dict(cwd=tmp_path, check=True, text=True, capture_output=True)
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    subprocess.run([sys.executable, "notebook.py", "rows.pickle"], **here)
    code = "import pickle; print(pickle.load(open('rows.pickle', 'rb'))('t.zarr'))"
    shown = subprocess.run([sys.executable, "-c", code], **here).stdout
    assert shown == f"{(stored.gather([2, 0]).tolist(), stored.sample_ids[:1].tolist())}\n"


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda it: pickle.loads(cloudpickle.dumps(it))])
def test_handles_open_again(stored, again):
    expected, digest = stored.gather([2, 0]), stored.identity
    store = again(stored)
    assert store.identity == digest
    np.testing.assert_array_equal(store.gather([2, 0]), expected)
    for spec in ("images", "mixed:3:images", "digits:test"):
        corpus = featcache.open_corpus(spec)
        corpus.read(1)
        other = again(corpus)
        assert (other.spec, other.ids[1], other.read(1)) == (spec, corpus.ids[1], corpus.read(1))
    assert len(pickle.dumps(stored)) < 200


@pytest.fixture
def stored(tmp_path, make_images, monkeypatch) -> featcache.FeatureStore:
    """`images/` and `t.zarr`, rows of its own making, in the folder at hand; used before."""
    monkeypatch.chdir(tmp_path)
    make_images(4)
    rows = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    store = featcache.write_store("t.zarr", rows, sample_ids=list("abcd"))
    store.gather([1])
    return store

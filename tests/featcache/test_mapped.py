"""Chunk files side by side in memory: the same rows as zarr reads, refusals, and memory given back."""

import gc
import mmap
import os
import pickle
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

import featcache.store.gather
import featcache.store.mapped
from featcache.store import open_store
from featcache.store.from_arrays import write_store
from featcache.store.mapped import CHECKSUM_BYTES, map_chunks

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX memory maps")
PAGE = mmap.PAGESIZE
CHUNKS = 3


@pytest.fixture
def written(tmp_path, rng):
    """`written(rows_per_chunk, tail, dtype)`: an array's values (the last chunk is short) and its chunk files."""

    def write(rows_per_chunk, tail=(), dtype="uint8", chunks=CHUNKS):
        rows = rows_per_chunk * chunks - 1
        values = rng.integers(0, 200, (rows, *tail)).astype(dtype)
        with zarr.config.set({"array.write_empty_chunks": True}):
            array = zarr.create_array(
                tmp_path / "a.zarr",
                shape=values.shape,
                chunks=(rows_per_chunk, *tail),
                dtype=dtype,
                compressors=[Crc32cCodec()],
                filters=None,
            )
            array[:] = values
        return values, [
            tmp_path.joinpath("a.zarr", "c", str(chunk), *["0"] * len(tail)) for chunk in range(array.cdata_shape[0])
        ]

    return write


def maps_of(folder: Path) -> int:
    """How many of this process's memory maps are of files in `folder`."""
    table = Path("/proc/self/maps")
    if not table.exists():
        pytest.skip("needs /proc/self/maps")
    return sum(str(folder) in line for line in table.read_text().splitlines())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64", "bool"])
@pytest.mark.parametrize("tail", [(), (1,), (3,), (2, 5), (2, 3, 4)], ids=str)
def test_the_rows_are_those_that_zarr_reads(written, tmp_path, dtype, tail):
    values, paths = written(PAGE, tail, dtype)
    rows = map_chunks(paths, PAGE, tail, dtype)
    assert rows.shape == (CHUNKS * PAGE, *tail)
    assert rows.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(rows[: len(values)], zarr.open_array(tmp_path / "a.zarr")[:])
    np.testing.assert_array_equal(rows[: len(values)], values)


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_rows_on_both_sides_of_every_seam(written, pages):
    per_chunk = pages * PAGE // 8
    values, paths = written(per_chunk, (4,), "float16")
    seams = np.arange(1, CHUNKS) * per_chunk
    at = np.concatenate([seams, seams - 1, [0, len(values) - 1, 0]])
    np.testing.assert_array_equal(map_chunks(paths, per_chunk, (4,), "float16").take(at, axis=0), values[at])


@pytest.mark.parametrize("per_chunk", [1, 7, PAGE - 1, PAGE + 1])
def test_a_single_chunk_need_not_fill_pages(written, per_chunk):
    values, paths = written(per_chunk + 1, (5,), "float16", chunks=1)
    np.testing.assert_array_equal(map_chunks(paths, per_chunk + 1, (5,), "float16")[:per_chunk], values)


@pytest.mark.parametrize("per_chunk", [1, PAGE - 1, PAGE + 1, PAGE // 2])
def test_several_chunks_must_fill_pages(written, per_chunk):
    _, paths = written(per_chunk, (3,), chunks=4)
    assert map_chunks(paths, per_chunk, (3,), "uint8") is None


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + CHECKSUM_BYTES - 1, PAGE + CHECKSUM_BYTES + 1, 2 * PAGE])
@pytest.mark.parametrize("which", range(CHUNKS))
def test_a_file_of_another_size_is_refused_unread(written, tmp_path, which, size):
    _, paths = written(PAGE)
    os.truncate(paths[which], size)
    assert map_chunks(paths, PAGE, (), "uint8") is None
    assert maps_of(tmp_path) == 0


@pytest.mark.parametrize("which", range(CHUNKS))
def test_a_missing_file_is_refused(written, tmp_path, which):
    _, paths = written(PAGE)
    paths[which].unlink()
    assert map_chunks(paths, PAGE, (), "uint8") is None
    assert maps_of(tmp_path) == 0


def test_no_files_and_rows_without_bytes_are_refused(written):
    _, paths = written(PAGE)
    assert map_chunks([], PAGE, (), "uint8") is None
    assert map_chunks(paths, PAGE, (0,), "uint8") is None


def test_a_map_that_the_system_refuses(written, tmp_path, monkeypatch):
    """Here of the second file, when the first is mapped already."""
    _, paths = written(PAGE)
    real, calls = featcache.store.mapped._libc_mmap(), []

    def refuse_second(*arguments):
        calls.append(arguments)
        return real(*arguments) if len(calls) != 2 else 2**64 - 1

    monkeypatch.setattr(featcache.store.mapped, "_libc_mmap", lambda: refuse_second)
    assert map_chunks(paths, PAGE, (), "uint8") is None
    assert len(calls) == 2
    assert maps_of(tmp_path) == 0


def test_a_range_that_the_system_refuses(written):
    """More bytes than there are addresses."""
    _, paths = written(PAGE)
    assert map_chunks(paths, PAGE, (2**47 // PAGE,), "uint8") is None


def test_the_array_cannot_be_written(written):
    _, paths = written(PAGE)
    rows = map_chunks(paths, PAGE, (), "uint8")
    assert not rows.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        rows.flags.writeable = True


def test_files_are_unmapped_with_the_last_view(written, tmp_path):
    values, paths = written(PAGE)
    assert maps_of(tmp_path) == 0
    rows = map_chunks(paths, PAGE, (), "uint8")
    assert maps_of(tmp_path) == CHUNKS
    view = rows.reshape(3, -1)[2, 5:7]
    del rows
    assert maps_of(tmp_path) == CHUNKS
    np.testing.assert_array_equal(view, values[2 * PAGE + 5 :][:2])
    del view
    assert maps_of(tmp_path) == 0


def test_no_file_stays_open(written):
    _, paths = written(PAGE)
    free = os.dup(0)
    os.close(free)
    rows = map_chunks(paths, PAGE, (), "uint8")
    again = os.dup(0)
    os.close(again)
    assert again == free
    assert rows is not None


def test_files_that_are_replaced_or_removed_stay_readable(written):
    """As after a repair: the map keeps what it was made of."""
    values, paths = written(PAGE)
    rows = map_chunks(paths, PAGE, (), "uint8")
    paths[0].unlink()
    paths[0].write_bytes(bytes(PAGE + CHECKSUM_BYTES))
    paths[1].unlink()
    np.testing.assert_array_equal(rows[: len(values)], values)


def test_a_process_maps_only_so_many_files(written, monkeypatch):
    _, paths = written(PAGE)
    monkeypatch.setattr(featcache.store.mapped, "_live", weakref.WeakKeyDictionary())  # not those that other tests left
    monkeypatch.setattr(featcache.store.mapped, "MOST_MAPS", 2 * CHUNKS)
    kept = [map_chunks(paths, PAGE, (), "uint8") for _ in range(2)]
    assert all(rows is not None for rows in kept)
    assert map_chunks(paths, PAGE, (), "uint8") is None
    kept.pop()
    assert map_chunks(paths, PAGE, (), "uint8") is not None


def test_threads_map_and_read_at_once(written, tmp_path):
    values, paths = written(PAGE, (4,), "float16")

    def read(seed):
        at = np.random.default_rng(seed).integers(0, len(values), 500)
        return bool((map_chunks(paths, PAGE, (4,), "float16")[at] == values[at]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))
    assert maps_of(tmp_path) == 0


def test_a_forked_process_reads_and_the_parent_goes_on(written):
    values, paths = written(PAGE)
    rows = map_chunks(paths, PAGE, (), "uint8")
    child = os.fork()
    if not child:  # no pytest in here: leave by the status alone
        same = (rows[: len(values)] == values).all()
        del rows
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(rows[: len(values)], values)


@pytest.fixture
def store(tmp_path, rng):
    """Three chunks of one page each; two views."""
    values = rng.normal(size=(2 * PAGE // 16 + 5, 2, 4)).astype(np.float16)
    write_store(tmp_path / "s.zarr", values, per_chunk=PAGE // 16)
    return open_store(tmp_path / "s.zarr")


def test_a_store_gathers_alike_through_one_map_and_through_single_ones(store, tmp_path, monkeypatch, rng):
    rows = rng.integers(0, len(store), 200)
    view = rng.integers(0, 2, 200)
    through_one, first = store.gather(rows, view=view), store.row("content", 7)
    assert maps_of(tmp_path / "s.zarr" / "embedding") == 3
    monkeypatch.setattr(featcache.store.mapped, "MOST_MAPS", 0)
    other = open_store(store.path)
    np.testing.assert_array_equal(through_one, other.gather(rows, view=view))
    np.testing.assert_array_equal(first, other.row("content", 7))
    for number in (0, 1):
        np.testing.assert_array_equal(
            through_one[view == number], store.gather_portable(rows[view == number], view=number)
        )


def test_a_store_lets_go_of_its_maps(store, tmp_path):
    other = open_store(store.path)
    taken = other.gather([1])
    assert maps_of(tmp_path) == 3
    del other
    gc.collect()
    assert maps_of(tmp_path) == 0
    assert taken.shape == (1, 4)


def test_a_store_is_pickled_without_its_rows(store):
    expected = store.gather([3, 1])
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).gather([3, 1]), expected)


def test_a_store_with_a_chunk_cut_short_says_so_and_the_process_lives(store):
    chunk = store.path / "embedding" / "c" / "1" / "0" / "0"
    os.truncate(chunk, 100)
    with pytest.raises(
        ValueError,
        match=rf"^{store.path}: a chunk of embedding is damaged \(mmap length is greater than file size\); `featcache verify ",
    ):
        open_store(store.path).gather([PAGE // 16])


@pytest.mark.parametrize("name", ["embedding", "label", "state", "content", "sample_id"])
@pytest.mark.parametrize("how", ["missing", "cut short", "changed"])
def test_a_damaged_chunk_of_a_sealed_store_is_never_taken_for_zeros(store, name, how):
    chunk = sorted(path for path in (store.path / name / "c").rglob("*") if path.is_file())[-1]
    if how == "missing":
        chunk.unlink()
    elif how == "cut short":
        os.truncate(chunk, 5)
    elif name == "embedding":
        pytest.skip("features are mapped: `verify` reads their checksums")
    else:
        chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    damaged = open_store(store.path)
    read = {
        "embedding": lambda: damaged.gather([len(damaged) - 1]),
        "label": lambda: damaged.labels,
        "state": lambda: damaged.ok,
        "content": lambda: damaged.content,
        "sample_id": lambda: damaged.sample_ids,
    }[name]
    with pytest.raises(
        ValueError, match=rf"^{store.path}: a chunk of {name} is damaged \(.*`featcache verify "
    ) as told:
        read()
    if how == "missing":
        assert f"({chunk.relative_to(store.path)} is missing)" in str(told.value)


@pytest.mark.parametrize("whole", [True, False])
def test_released_rows_leave_memory_and_are_read_again(tmp_path, monkeypatch, whole):
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not say how much of a file is in memory")
    if not whole:
        monkeypatch.setattr(featcache.store.gather, "map_chunks", lambda *_: None)
    rows = np.random.default_rng(0).normal(size=(40_000, 256)).astype(np.float16)
    store = write_store(tmp_path / "s.zarr", rows)
    every = np.arange(len(rows))

    def of_files():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) * 1024

    assert (store.gather(every) == rows).all()
    before = of_files()
    store.release("embedding")
    assert before - of_files() > 0.9 * rows.nbytes
    assert (store.gather(every) == rows).all()

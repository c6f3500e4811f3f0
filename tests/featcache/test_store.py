"""The store: what lies on disk, reading rows both ways, refusing, verifying."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import featcache.store.write
from featcache.inputs.images import PARAMETERS
from featcache.store import FeatureStore, create_store, open_store
from featcache.store.from_arrays import write_store
from featcache.store.layout import CHUNK_BYTES, FAILED, OK, chunk_rows
from featcache.store.manifest import CorpusRecord, EncoderRecord, Manifest, ViewsRecord

ROWS, VIEWS, WIDTH, PER_CHUNK = 11, 3, 5, 4  # the last chunk is short


def crc32c(data: bytes) -> int:
    """Castagnoli CRC, bit by bit (RFC 3720, polynomial 0x1EDC6F41 reflected)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_oracle_knows_the_standard_check_value():
    assert crc32c(b"123456789") == 0xE3069283


def halves(rows=ROWS, views=VIEWS, width=WIDTH, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, views, width)).astype(np.float16)


@pytest.fixture
def path(tmp_path):
    write_store(
        tmp_path / "s.zarr",
        halves(),
        labels=np.arange(ROWS) % 2,
        sample_ids=[f"ü/{i}.jpg" for i in range(ROWS)],
        class_names=["ant", "bee"],
        failed={9: "OSError: truncated"},
        per_chunk=PER_CHUNK,
    )
    return tmp_path / "s.zarr"


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# -- on disk --------------------------------------------------------------------------------------------


def test_a_chunk_file_is_raw_rows_and_four_bytes_of_crc32c(path):
    padded = np.zeros((12, VIEWS, WIDTH), np.float16)
    padded[:ROWS] = halves()
    for chunk in range(3):
        raw = padded[chunk * PER_CHUNK : (chunk + 1) * PER_CHUNK].astype("<f2").tobytes()
        expected = raw + crc32c(raw).to_bytes(4, "little")
        assert (path / f"embedding/c/{chunk}/0/0").read_bytes() == expected


def test_any_zarr_reader_opens_it(path):
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(group["embedding"][:], halves())
    np.testing.assert_array_equal(group["label"][:], np.arange(ROWS) % 2)
    assert list(group["sample_id"][:]) == [f"ü/{i}.jpg" for i in range(ROWS)]
    assert group["content"].shape == (ROWS, 16)
    assert group["view"].shape == (ROWS, VIEWS, len(PARAMETERS))
    assert group["state"][:].tolist() == [OK] * 9 + [FAILED, OK]


def test_array_metadata(path):
    for name in ("embedding", "label", "content", "view", "state"):
        metadata = json.loads((path / name / "zarr.json").read_text())
        assert metadata["zarr_format"] == 3
        assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "crc32c"]
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [PER_CHUNK, *metadata["shape"][1:]]
        assert metadata["shape"][0] == ROWS
    embedding = json.loads((path / "embedding/zarr.json").read_text())
    assert (embedding["data_type"], embedding["shape"]) == ("float16", [ROWS, VIEWS, WIDTH])


@pytest.mark.parametrize("shape", [(0, 16), (0, 2, 16), (3, 0)])
def test_a_store_of_nothing_is_refused_before_it_is_written(tmp_path, shape):
    with pytest.raises(ValueError, match=r"s\.zarr: an embedding of shape .* has no rows to write; give at least one"):
        write_store(tmp_path / "s.zarr", np.zeros(shape))
    assert not (tmp_path / "s.zarr").exists()


def test_all_zero_chunks_are_written(tmp_path):
    write_store(tmp_path / "z.zarr", np.zeros((8, 4)), labels=np.zeros(8), per_chunk=4)
    assert {name for name in files(tmp_path / "z.zarr") if name.startswith(("embedding/c", "label/c"))} == {
        "embedding/c/0/0/0",
        "embedding/c/1/0/0",
        "label/c/0",
        "label/c/1",
    }
    assert open_store(tmp_path / "z.zarr").verify() == []


@given(row_bytes=st.integers(1, CHUNK_BYTES), rows=st.integers(1, 10**8))
def test_chunks_hold_8_to_16_MiB_unless_the_store_is_smaller(row_bytes, rows):
    chunk = chunk_rows(row_bytes, rows)
    assert 1 <= chunk <= rows
    assert chunk * row_bytes <= 16 * 2**20
    assert chunk == rows or chunk * row_bytes > 8 * 2**20


def test_a_row_larger_than_a_chunk_stands_alone():
    assert chunk_rows(17 * 2**20, 100) == 1


# -- reading rows ---------------------------------------------------------------------------------------


def test_what_was_given_is_what_is_read(path):
    store = open_store(path)
    assert (len(store), store.views, store.embedding_dim, store.chunks) == (ROWS, VIEWS, WIDTH, 3)
    assert store.sealed
    assert store.class_names == ["ant", "bee"]
    assert store.labels.tolist() == [i % 2 for i in range(ROWS)]
    assert store.sample_ids[3] == "ü/3.jpg"


def test_failed_rows_and_their_reasons(path):
    store = open_store(path)
    assert store.failed.tolist() == [9]
    assert store.ok.tolist() == [*range(9), 10]
    assert store.reasons == {"ü/9.jpg": "OSError: truncated"}
    sealed = store.manifest.sealed
    assert (sealed.rows, sealed.ok, sealed.failed) == (11, 10, 1)


@settings(max_examples=12)
@given(data=st.data(), rows=st.integers(1, 20), views=st.integers(1, 3), per_chunk=st.integers(1, 20))
def test_both_ways_of_reading_equal_the_array(data, rows, views, per_chunk):
    source = halves(rows, views, 3, seed=rows)
    wanted = data.draw(st.lists(st.integers(0, rows - 1), max_size=30))
    view = data.draw(st.integers(0, views - 1))
    per_row = np.array(data.draw(st.lists(st.integers(0, views - 1), min_size=len(wanted), max_size=len(wanted))), int)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "s.zarr", source, per_chunk=min(per_chunk, rows))
        gathered = store.gather(wanted, view=view)
        assert gathered.dtype == np.float16
        np.testing.assert_array_equal(gathered, source[np.array(wanted, int), view])
        np.testing.assert_array_equal(gathered, store.gather_portable(wanted, view=view))
        np.testing.assert_array_equal(store.gather(wanted, view=per_row), source[np.array(wanted, int), per_row])


def test_float32_is_rounded_to_nearest_half(tmp_path):
    source = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    store = write_store(tmp_path / "s.zarr", source)
    np.testing.assert_allclose(store.gather(range(4)), source, rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize(("rows", "view"), [([ROWS], 0), ([-1], 0), ([0, 3], VIEWS), ([0], -1), ([0, 1], [0, VIEWS])])
def test_out_of_range_is_an_index_error(path, rows, view):
    with pytest.raises(IndexError, match="out of range"):
        open_store(path).gather(rows, view=np.array(view))


def test_an_unknown_field_names_those_there_are(path):
    with pytest.raises(ValueError, match=r"no field 'tokens', only embedding; extract with --fields tokens"):
        open_store(path).gather([0], field="tokens")


# -- refusing -------------------------------------------------------------------------------------------


def manifest(rows=4):
    return Manifest(
        encoder=EncoderRecord(name="e", fingerprint="f"),
        corpus=CorpusRecord(spec=None, rows=rows, class_names=None),
        views=ViewsRecord(count=1),
        fields={"embedding": [2]},
        chunk_rows=2,
    )


def test_an_unsealed_store_is_refused_and_says_how_to_resume(tmp_path):
    store = create_store(tmp_path / "s.zarr", manifest())
    assert store.pending_chunks() == [0, 1]
    with pytest.raises(ValueError, match=r"not finished \(0 of 2 chunks done\); run the same `featcache extract`"):
        open_store(tmp_path / "s.zarr")


def test_a_missing_path_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"no such store; make one with `featcache extract .* --out"):
        open_store(tmp_path / "none.zarr")


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"attributes": {}}', '{"attributes": []}'])
def test_another_folder_is_not_a_store(tmp_path, content):
    (tmp_path / "x").mkdir()
    if content:
        (tmp_path / "x/zarr.json").write_text(content)
    with pytest.raises(ValueError, match=r"not a feature store; make one with `featcache extract"):
        open_store(tmp_path / "x")


def test_another_format_is_refused(path):
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"]["featcache"]["format"] = 99
    (path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="store format 99, this featcache reads 2 to 5; extract it again"):
        open_store(path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_create_never_replaces_what_is_not_a_store(tmp_path, overwrite):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").write_bytes(b"dear")
    (tmp_path / "letter").write_bytes(b"dear too")
    for name in ("photos", "letter"):
        with pytest.raises(ValueError, match=r"already exists and is not a store; choose another --out"):
            create_store(tmp_path / name, manifest(), overwrite=overwrite)
    assert files(tmp_path) == {"photos/holiday.jpg": b"dear", "letter": b"dear too"}


def test_create_replaces_a_store_only_when_told(path):
    before = files(path)
    with pytest.raises(ValueError, match="already exists; choose another --out"):
        create_store(path, manifest())
    assert files(path) == before
    assert len(create_store(path, manifest(), overwrite=True)) == 4
    assert not [name for name in files(path) if "/c/" in name]
    assert [p.name for p in path.parent.iterdir()] == ["s.zarr"]


def test_an_empty_folder_may_become_a_store(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    assert not create_store(tmp_path / "s.zarr", manifest()).sealed


# -- verifying ------------------------------------------------------------------------------------------

ARRAYS = ("embedding", "label", "sample_id", "content", "view", "reason", "state")


def test_a_whole_store_has_no_problems(path):
    assert open_store(path).verify() == []


@pytest.mark.parametrize("name", ARRAYS)
def test_one_flipped_bit_in_any_byte_of_a_chunk_is_named(path, name):
    (chunk,) = (p for p in (path / name / "c").rglob("*") if p.is_file() and p.relative_to(path).parts[2] == "1")
    whole = chunk.read_bytes()
    for position in {0, len(whole) // 2, len(whole) - 5, len(whole) - 1}:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        chunk.write_bytes(damaged)
        assert FeatureStore(path).verify() == [f"{name} chunk 1 (rows 4–7): checksum does not match its bytes"]
    chunk.write_bytes(whole)
    assert FeatureStore(path).verify() == []


@pytest.mark.parametrize("name", ARRAYS)
def test_one_flipped_bit_in_array_metadata_is_found(path, name):
    store, file = open_store(path), path / name / "zarr.json"
    whole = file.read_bytes()
    for position in range(0, len(whole), 41):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        assert store.verify() == ["zarr.json, of the group or of an array: changed since the store was sealed"]


def test_a_changed_manifest_is_found(path):
    whole = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(whole.replace('"fingerprint": "arrays"', '"fingerprint": "others"'))
    assert FeatureStore(path).verify() == ["zarr.json, of the group or of an array: changed since the store was sealed"]


def test_a_valid_chunk_of_another_store_is_found(path, tmp_path):
    other = write_store(tmp_path / "o.zarr", halves(seed=1), per_chunk=PER_CHUNK)
    (path / "embedding/c/1/0/0").write_bytes((other.path / "embedding/c/1/0/0").read_bytes())
    assert len(open_store(path).verify()) == 1


@pytest.mark.parametrize("chunk", ["embedding/c/2/0/0", "label/c/2", "state/c/2"])
def test_a_missing_chunk_is_named(path, chunk):
    store = open_store(path)
    (path / chunk).unlink()
    assert store.verify() == [f"{chunk.split('/')[0]} chunk 2 (rows 8–10): missing"]


def test_missing_metadata_is_named(path):
    store = open_store(path)
    (path / "label/zarr.json").unlink()
    assert store.verify() == ["label/zarr.json: missing"]


@pytest.mark.parametrize("size", [0, 2, 4, 40])
def test_a_truncated_chunk_is_named(path, size):
    (path / "embedding/c/0/0/0").write_bytes(b"\0" * size)
    assert open_store(path).verify() == ["embedding chunk 0 (rows 0–3): checksum does not match its bytes"]


def test_a_left_over_file_is_named(path):
    for name in ("embedding/c/0/0/0.tmp", "notes.txt"):
        (path / name).write_bytes(b"x" * 8)
    assert open_store(path).verify() == [
        "embedding/c/0/0/0.tmp: not part of the store",
        "notes.txt: not part of the store",
    ]


def test_sealing_sweeps_partial_files_away(tmp_path):
    store = create_store(tmp_path / "s.zarr", manifest(2))
    (store.path / "embedding/c/0/0").mkdir(parents=True)
    (store.path / "embedding/c/0/0/0.1f.partial").write_bytes(b"half")
    store.write_chunk(
        0,
        {
            "embedding": np.ones((2, 1, 2), np.float16),
            "label": np.zeros(2, np.int64),
            "sample_id": np.array(["a", "b"], object),
            "content": np.zeros((2, 16), np.uint8),
            "view": np.zeros((2, 1, len(PARAMETERS)), np.float32),
            "reason": np.array(["", ""], object),
            "state": np.ones(2, np.uint8),
        },
    )
    store.seal()
    assert open_store(store.path).verify() == []


def test_the_state_chunk_is_written_last(path, monkeypatch, tmp_path):
    synced, sync = [], featcache.store.write.sync_folders

    def record(file, *, root):
        synced.append(file.relative_to(root))
        sync(file, root=root)

    monkeypatch.setattr(featcache.store.write, "sync_folders", record)
    write_store(tmp_path / "t.zarr", halves(), per_chunk=PER_CHUNK)
    order = [file.parts[0] for file in synced if file.name.isdecimal()]
    assert [position for position, name in enumerate(order) if name == "state"] == [6, 13, 20]


def test_every_flipped_byte_of_the_groups_metadata_is_found(tmp_path):
    write_store(tmp_path / "s.zarr", np.ones((5, 4)))
    root = tmp_path / "s.zarr/zarr.json"
    whole = root.read_bytes()
    for position in range(len(whole)):
        root.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            problems = FeatureStore(tmp_path / "s.zarr").verify()
        except ValueError as refused:
            problems = [str(refused)]
        assert problems, (position, whole[max(0, position - 20) : position + 20])

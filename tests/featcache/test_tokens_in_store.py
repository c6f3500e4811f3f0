"""Tokens beside the embedding: chunks of their own, read, damaged, repaired, exported and reused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import patch_encoder
from torchvision import transforms

import featcache.inputs.images
import featcache.store.layout
from featcache import extract, open_corpus, open_store
from featcache.extraction.rehearsal import PROBE_IMAGES
from featcache.interchange import export_store, import_store
from featcache.store import create_store
from featcache.store.manifest import CorpusRecord, EncoderRecord, Manifest, ViewsRecord

EXACT = {"device": "cpu", "precision": "fp32+channels_last", "workers": 2, "batch_size": 4}
FIELDS = {"embedding": (6,), "tokens": (4, 6), "prefix_tokens": (2, 6)}
ROWS, VIEWS = 19, 2


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


@pytest.fixture
def small_chunks(monkeypatch):
    """With two views: 8 rows a unit, 2 of tokens a chunk, 4 of prefix tokens."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 8 * VIEWS * 6 * 2)


@pytest.fixture
def folder(make_images):
    """19 images, of which row 5 cannot be read."""
    made = Path(make_images(ROWS))
    sorted(made.rglob("*.png"))[5].write_bytes(b"no image")
    return str(made)


@pytest.fixture
def store(folder, tmp_path, small_chunks):
    return extract(folder, patch_encoder(), tmp_path / "s.zarr", fields=FIELDS, views=VIEWS, augment="flip", **EXACT)


def by_hand(encoder, encoded, mirrored):
    """One image through torchvision's transforms and the module alone."""
    p = encoder.preprocess
    steps = [
        transforms.Resize(p.resize, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(p.crop),
        transforms.RandomHorizontalFlip(p=float(mirrored)),
        transforms.ToTensor(),
        transforms.Normalize(p.mean, p.std),
    ]
    image = transforms.Compose(steps)(Image.open(io.BytesIO(encoded)).convert("RGB"))
    with torch.inference_mode():
        return {name: value[0].numpy() for name, value in encoder.module(image[None]).items()}


def test_each_field_has_chunks_of_its_own(store):
    assert store.manifest.wide_chunk_rows == {"embedding": 8, "tokens": 2, "prefix_tokens": 4}
    chunks = {name: len(list((store.path / name / "c").glob("*"))) for name in FIELDS}
    assert (store.chunks, chunks) == (3, {"embedding": 3, "tokens": 10, "prefix_tokens": 5})
    for name, shape in FIELDS.items():
        array = zarr.open_group(store.path, mode="r")[name]
        assert (array.shape, array.chunks) == (
            (ROWS, VIEWS, *shape),
            (store.manifest.wide_chunk_rows[name], VIEWS, *shape),
        )


@pytest.mark.parametrize("field", FIELDS)
def test_values_equal_a_plain_loop_and_a_failed_row_is_zero(folder, store, field):
    corpus, encoder = open_corpus(folder), patch_encoder()
    assert store.failed.tolist() == [5]
    for view in range(VIEWS):
        rows = store.ok.tolist()
        expected = np.stack([by_hand(encoder, corpus.read(row), mirrored=view == 1)[field] for row in rows])
        np.testing.assert_allclose(store.gather(rows, field, view), expected, rtol=2**-10, atol=1e-4)
        assert not store.gather([5], field, view).any()


@pytest.fixture(scope="module")
def read_only_store(tmp_path_factory):
    """Chunks that do not fill whole pages, and no image at all: values are random."""
    rng = np.random.default_rng(3)
    arrays = {name: rng.normal(size=(ROWS, VIEWS, *shape)).astype(np.float16) for name, shape in FIELDS.items()}
    path = tmp_path_factory.mktemp("random") / "s.zarr"
    manifest = Manifest(
        encoder=EncoderRecord(name="e", fingerprint="f"),
        corpus=CorpusRecord(spec=None, rows=ROWS, class_names=None),
        views=ViewsRecord(count=VIEWS),
        fields={name: list(shape) for name, shape in FIELDS.items()},
        chunk_rows=8,
        wide_chunk_rows={"embedding": 8, "tokens": 2, "prefix_tokens": 4},
    )
    made = create_store(path, manifest)
    narrow = {
        "label": np.zeros(ROWS, np.int64),
        "sample_id": np.array([str(i) for i in range(ROWS)], object),
        "content": np.zeros((ROWS, 16), np.uint8),
        "view": np.zeros((ROWS, VIEWS, len(featcache.inputs.images.PARAMETERS)), np.float32),
        "reason": np.full(ROWS, "", object),
        "state": np.ones(ROWS, np.uint8),
    }
    for unit in range(made.chunks):
        rows = slice(made.rows_of(unit).start, made.rows_of(unit).stop)
        made.write_chunk(unit, {name: array[rows] for name, array in (arrays | narrow).items()})
    made.seal()
    return open_store(path), arrays


@given(data=st.data(), field=st.sampled_from(sorted(FIELDS)))
def test_any_rows_of_any_views_as_zarr_itself_reads_them(read_only_store, data, field):
    store, arrays = read_only_store
    rows = data.draw(st.lists(st.integers(0, ROWS - 1), max_size=30))
    view = data.draw(st.integers(0, VIEWS - 1))
    each = np.array(data.draw(st.lists(st.integers(0, VIEWS - 1), min_size=len(rows), max_size=len(rows))), int)
    read = zarr.open_group(store.path, mode="r")[field][:]
    np.testing.assert_array_equal(read, arrays[field])
    at = np.array(rows, int)
    for found in (store.gather(rows, field, view), store.gather_portable(rows, field, view)):
        assert (found.dtype, found.shape) == (np.float16, (len(rows), *FIELDS[field]))
        np.testing.assert_array_equal(found, read[at, view])
    np.testing.assert_array_equal(store.gather(rows, field, each), read[at, each])
    for row in rows[:2]:
        np.testing.assert_array_equal(store.row(field, row), read[row])


@pytest.mark.parametrize("field", ["tokens", "prefix_tokens"])
def test_verify_names_a_flipped_byte_anywhere_in_any_chunk(store, field):
    per_chunk = store.manifest.wide_chunk_rows[field]
    for chunk in range(-(-ROWS // per_chunk)):
        path = store.path / field / "c" / str(chunk) / "0/0/0"
        whole = path.read_bytes()
        rows = f"rows {chunk * per_chunk}–{min((chunk + 1) * per_chunk, ROWS) - 1}"
        for position in range(0, len(whole), 17):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            assert store.verify() == [f"{field} chunk {chunk} ({rows}): checksum does not match its bytes"]
        path.write_bytes(whole)
    assert store.verify() == []


@pytest.mark.parametrize("damage", ["flipped", "missing", "cut"])
def test_extract_repairs_the_unit_of_a_damaged_token_chunk_and_no_other(folder, store, tmp_path, monkeypatch, damage):
    whole, unit = files(store.path), range(8, 16)
    path = store.path / "tokens/c/6/0/0/0"  # rows 12 and 13, in the second unit
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-30] if damage == "cut" else content[:9] + bytes([content[9] ^ 1]) + content[10:])
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))  # nothing to copy from
    untouched = {name: (store.path / name).stat().st_mtime_ns for name in whole if is_of_other_units(name)}
    encoder, told = patch_encoder(), []
    given = {"fields": FIELDS, "views": VIEWS, "augment": "flip", "progress": told.append, **EXACT}
    assert extract(folder, encoder, store.path, **given).verify() == []
    assert files(store.path) == whole
    assert {name: (store.path / name).stat().st_mtime_ns for name in untouched} == untouched
    assert told[-1].resumed == ROWS - len(unit)
    # The probe is the first 8 readable rows, 0–4 and 6–8: it shares the plain view of row 8 with the unit.
    assert len(set(encoder.module.seen)) == VIEWS * len(unit) + PROBE_IMAGES - 1


def is_of_other_units(name):
    """Whether a chunk file holds rows besides 8–15."""
    array, *rest = name.split("/")
    return "c" in rest and int(rest[1]) * {"tokens": 2, "prefix_tokens": 4}.get(array, 8) not in range(8, 16)


@pytest.mark.parametrize("format", ["npy", "parquet", "safetensors"])
def test_a_store_with_tokens_comes_back_byte_for_byte(store, tmp_path, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    exported = export_store(store, tmp_path / "out", format)
    assert (exported.rows, exported.left_out) == (ROWS, [])
    back = import_store(tmp_path / "out", tmp_path / "back.zarr")
    assert files(back.path) == files(store.path)
    assert back.verify() == []


def test_tokens_are_copied_from_another_store_and_not_made_again(folder, store, tmp_path, small_chunks):
    source = open_corpus(folder)
    (tmp_path / "few").mkdir()
    for row in (0, 3, 4, 11, 18):  # other names, other neighbours, other chunks
        (tmp_path / "few" / f"{20 - row}.png").write_bytes(source.read(row))
    encoder, told = patch_encoder(), []
    given = {"fields": FIELDS, "views": VIEWS, "augment": "flip", "progress": told.append, **EXACT}
    few = extract(str(tmp_path / "few"), encoder, tmp_path / "few.zarr", **given)
    assert told[-1].reused == 5
    assert len(set(encoder.module.seen)) == 5  # the probe alone
    rows = [20 - int(str(sample_id).removesuffix(".png")) for sample_id in few.sample_ids]
    for field in FIELDS:
        for view in range(VIEWS):
            np.testing.assert_array_equal(few.gather(range(5), field, view), store.gather(rows, field, view))


def test_without_tokens_in_the_other_store_nothing_is_copied(folder, tmp_path, small_chunks):
    extract(folder, patch_encoder(), tmp_path / "plain.zarr", **EXACT)
    told = []
    extract(folder, patch_encoder(), tmp_path / "t.zarr", fields=["tokens"], progress=told.append, **EXACT)
    assert told[-1].reused == 0

"""A unit in progress is saved: a run stopped in its middle goes on from there, and only from there."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stopped import Stop, files, stop_after
from tiny import patch_encoder

import featcache.extraction.job
import featcache.store.layout
from featcache import KeptPixels, extract, open_corpus
from featcache.extraction.samples import content_hash
from featcache.store import FeatureStore

EXACT = {"device": "cpu", "precision": "fp32+channels_last", "workers": 2, "batch_size": 4}
ROWS, UNIT, PROBE = 40, 16, 8
SAVED = "unfinished.npz"
WHAT = {
    "embedding": {},
    "tokens": {"fields": ["embedding", "tokens", "prefix_tokens"]},
    "pixels": {"pixels": KeptPixels(size=12)},
    "tokens, raw pixels, two views": {
        "fields": ["embedding", "tokens"],
        "pixels": KeptPixels(size=12, format="raw"),
        "views": 2,
        "augment": "rrc",
    },
}


@pytest.fixture(params=WHAT)
def given(request, monkeypatch):
    """What to extract, 16 rows a unit; token chunks hold fewer, those of kept images one each; a batch is 4 rows."""
    views = WHAT[request.param].get("views", 1)
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", UNIT * views * 6 * 2)
    monkeypatch.setattr(featcache.extraction.job, "SAVE_SECONDS", 0.0)
    return {**EXACT, **WHAT[request.param], "batch_size": 4 * views}


@pytest.fixture
def plain(monkeypatch):
    """Embeddings alone, 16 rows a unit."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", UNIT * 6 * 2)
    monkeypatch.setattr(featcache.extraction.job, "SAVE_SECONDS", 0.0)
    return EXACT


@pytest.fixture
def folder(make_images):
    """40 images, of which rows 17 and 21 cannot be read."""
    made = Path(make_images(ROWS))
    paths = sorted(made.rglob("*.png"))
    paths[17].write_bytes(b"no image")
    paths[21].write_bytes(paths[21].read_bytes()[:200])
    return str(made)


@pytest.fixture
def whole(folder, tmp_path, monkeypatch):
    """`whole(given)`: the files of a store made without a stop, and the hashes that its encoder saw, in row order."""

    def make(given):
        with monkeypatch.context() as elsewhere:  # so that no other run copies its rows
            elsewhere.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))
            encoder = patch_encoder()
            store = extract(folder, encoder, tmp_path / "whole.zarr", **given)
        seen = encoder.module.seen[-given.get("views", 1) * len(store.ok) :]
        return files(store.path), seen

    return make


def stopped(folder, out, given, batches):
    with pytest.raises(Stop):
        extract(folder, patch_encoder(), out, progress=stop_after(batches), **given)
    return FeatureStore(out)


@pytest.mark.parametrize("batches", [1, 5, 7])
def test_saved_images_are_not_encoded_again(folder, tmp_path, given, whole, batches):
    complete, hashes = whole(given)
    store = stopped(folder, tmp_path / "s.zarr", given, batches)
    rows = min(4 * (batches + 1), ROWS)  # the callback stops the run when one batch more is saved
    assert (store.path / SAVED).exists() == (rows % UNIT != 0)
    encoder, told = patch_encoder(), []
    made = extract(folder, encoder, tmp_path / "s.zarr", progress=told.append, **given)
    assert told[-1].resumed == rows
    views = given.get("views", 1)
    left = len([row for row in range(rows, ROWS) if row not in (17, 21)]) * views
    assert encoder.module.seen[-left:] == hashes[-left:]
    probe = {hashes[i * views] for i in range(PROBE)}
    assert not set(encoder.module.seen) & set(hashes[:-left]) - probe
    assert files(made.path) == complete
    assert not (made.path / SAVED).exists()


@pytest.mark.parametrize("given", ["tokens, raw pixels, two views"], indirect=True)
def test_stopped_again_and_again(folder, tmp_path, given, whole):
    complete, _ = whole(given)
    for _ in range(ROWS // 4 - 1):
        stopped(folder, tmp_path / "s.zarr", given, 0)
    assert files(extract(folder, patch_encoder(), tmp_path / "s.zarr", **given).path) == complete


@pytest.mark.parametrize("damage", ["empty", "half", "no end", "not a zip", "encrypted", "newer zip", "flipped value"])
def test_a_damaged_save_is_ignored_and_the_unit_made_again(folder, tmp_path, plain, whole, damage):
    complete, _ = whole(plain)
    store = stopped(folder, tmp_path / "s.zarr", plain, 5)
    saved = (store.path / SAVED).read_bytes()
    directory = saved.index(b"PK\1\2")  # the first entry of the zip's directory
    (store.path / SAVED).write_bytes(
        {
            "empty": b"",
            "half": saved[: len(saved) // 2],
            "no end": saved[:-1],
            "not a zip": b"x" * len(saved),
            "encrypted": flipped(saved, directory + 8),
            "newer zip": flipped(saved, directory + 6, 128),
            "flipped value": flipped(saved, saved.index(b"\n") + 1),
        }[damage]
    )
    told = []
    made = extract(folder, patch_encoder(), tmp_path / "s.zarr", progress=told.append, **plain)
    assert told[-1].resumed == UNIT
    assert files(made.path) == complete


def flipped(content, position, bit=1):
    return content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]


def test_the_save_of_a_finished_unit_is_not_used(folder, tmp_path, plain, whole):
    """Killed between the unit's last byte and the removal of its save."""
    complete, _ = whole(plain)
    store = stopped(folder, tmp_path / "s.zarr", plain, 2)
    saved = (store.path / SAVED).read_bytes()
    stopped(folder, tmp_path / "s.zarr", plain, 0)
    assert len(store.pending_chunks()) == 2
    (store.path / SAVED).write_bytes(saved)
    assert files(extract(folder, patch_encoder(), tmp_path / "s.zarr", **plain).path) == complete


def test_a_save_that_was_itself_cut_off_leaves_the_one_before(folder, tmp_path, plain, whole):
    complete, _ = whole(plain)
    store = stopped(folder, tmp_path / "s.zarr", plain, 5)
    (store.path / "unfinished.npz.partial").write_bytes(b"half")
    told = []
    made = extract(folder, patch_encoder(), tmp_path / "s.zarr", progress=told.append, **plain)
    assert told[-1].resumed == 24
    assert files(made.path) == complete


@pytest.mark.parametrize("given", ["tokens, raw pixels, two views"], indirect=True)
def test_damage_in_an_earlier_unit_does_not_lose_the_unit_in_progress(folder, tmp_path, given, whole):
    complete, _ = whole(given)
    store = stopped(folder, tmp_path / "s.zarr", given, 5)
    chunk = store.path / "embedding/c/0/0/0"
    chunk.write_bytes(flipped(chunk.read_bytes(), 5))
    told = []
    made = extract(folder, patch_encoder(), tmp_path / "s.zarr", progress=told.append, **given)
    assert told[-1].resumed == 24 - UNIT
    assert files(made.path) == complete


@pytest.mark.parametrize("change", ["other picture", "gone bad", "mended"])
def test_images_changed_since_the_save_are_encoded_again(folder, tmp_path, monkeypatch, plain, change):
    stopped(folder, tmp_path / "s.zarr", plain, 5)
    path = sorted(Path(folder).rglob("*.png"))[17 if change == "mended" else 19]
    if change == "gone bad":
        path.write_bytes(b"no image any more")
    else:
        Image.fromarray(np.full((20, 30, 3), 77, np.uint8)).save(path)
    made = extract(folder, patch_encoder(), tmp_path / "s.zarr", **plain)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))  # nothing to copy from
    fresh = extract(folder, patch_encoder(), tmp_path / "fresh.zarr", **plain)
    assert files(made.path) == files(fresh.path)
    corpus = open_corpus(folder)
    assert [made.content[row].tobytes() for row in (17, 19)] == [content_hash(corpus.read(row)) for row in (17, 19)]


def test_a_store_that_replaces_another_begins_anew(folder, tmp_path, monkeypatch, plain):
    stopped(folder, tmp_path / "s.zarr", plain, 5)
    made = extract(folder, patch_encoder(weights=1), tmp_path / "s.zarr", overwrite=True, **plain)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))
    fresh = extract(folder, patch_encoder(weights=1), tmp_path / "fresh.zarr", **plain)
    assert files(made.path) == files(fresh.path)

"""No row is ever computed twice; damage is repaired and nothing else."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_encoder

import featcache.layout
from featcache import extract, open_corpus, open_store
from featcache.cache import forget, known_stores
from featcache.samples import content_hash

EXACT = {"device": "cpu", "precision": "fp32", "workers": 2, "batch_size": 4}


def images_encoded(encoder) -> int:
    """Distinct images that went through the module."""
    return len(set(encoder.module.seen))


def files(store) -> dict[str, bytes]:
    return {str(p.relative_to(store.path)): p.read_bytes() for p in Path(store.path).rglob("*") if p.is_file()}


def test_only_unseen_content_is_encoded_when_images_are_added_renamed_and_merged(make_images, tmp_path):
    folder = Path(make_images(12))
    first = extract(str(folder), tiny_encoder(), tmp_path / "first.zarr", **EXACT)
    grown = tmp_path / "grown"
    shutil.copytree(folder, grown)
    for i, path in enumerate(sorted(grown.rglob("*.*"))):
        path.rename(path.with_name(f"renamed-{i}{path.suffix}"))
    make_images(5)  # other pictures
    shutil.copytree(folder, grown / "more")
    corpus = open_corpus(str(grown))
    seen = {bytes(row) for row in first.content}
    unseen = {content_hash(corpus.read(i)) for i in range(len(corpus))} - seen
    assert unseen
    counting, told = tiny_encoder(), []
    store = extract(corpus, counting, tmp_path / "grown.zarr", progress=lambda at: told.append(at), **EXACT)
    probe = 8  # images that the precision is chosen on
    assert images_encoded(counting) <= len(unseen) + probe
    assert told[-1].reused == sum(bytes(row) in seen for row in store.content)
    fresh = extract(corpus, tiny_encoder(), tmp_path / "fresh.zarr", overwrite=True, **EXACT)
    np.testing.assert_allclose(store.gather(range(len(store))), fresh.gather(range(len(fresh))), atol=1e-3)


def test_random_crops_are_reused_for_the_same_sample_only(make_images, tmp_path):
    folder = Path(make_images(6))
    extract(str(folder), tiny_encoder(), tmp_path / "a.zarr", views=2, augment="rrc", **EXACT)
    told = []
    shutil.copytree(folder, tmp_path / "same")
    extract(
        str(tmp_path / "same"),
        tiny_encoder(),
        tmp_path / "b.zarr",
        views=2,
        augment="rrc",
        progress=told.append,
        **EXACT,
    )
    assert told[-1].reused == 6
    paths = sorted(p for p in (tmp_path / "same").rglob("*.*"))
    paths[0].rename(paths[0].with_name(f"other{paths[0].suffix}"))
    extract(
        str(tmp_path / "same"),
        tiny_encoder(),
        tmp_path / "c.zarr",
        views=2,
        augment="rrc",
        progress=told.append,
        **EXACT,
    )
    assert told[-1].reused == 5


@pytest.mark.parametrize("change", ["weights", "views", "forgotten", "removed", "replaced"])
def test_rows_of_another_recipe_or_of_a_store_that_is_gone_are_not_reused(make_images, tmp_path, change):
    folder, told = make_images(6), []
    first = extract(folder, tiny_encoder(), tmp_path / "a.zarr", **EXACT)
    given = {"views": 2, "augment": "flip"} if change == "views" else {}
    if change == "forgotten":
        forget(first)
    if change == "removed":
        shutil.rmtree(first.path)
    if change == "replaced":
        extract(folder, tiny_encoder(5), tmp_path / "a.zarr", overwrite=True, **EXACT)
    extract(
        folder,
        tiny_encoder(1 if change == "weights" else 0),
        tmp_path / "b.zarr",
        progress=told.append,
        **given,
        **EXACT,
    )
    assert told[-1].reused == 0


def test_known_stores_are_listed_until_they_are_gone(make_images, tmp_path):
    a = extract(make_images(6), tiny_encoder(), tmp_path / "a.zarr", **EXACT)
    b = extract(str(tmp_path / "images"), tiny_encoder(1), **EXACT)
    assert set(known_stores()) == {a.path.resolve(), b.path}
    shutil.rmtree(a.path)
    assert known_stores() == [b.path]


@pytest.mark.parametrize("damage", ["flip", "missing", "leftover", "array metadata", "state"])
def test_extract_repairs_what_verify_names_and_only_that(make_images, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(featcache.layout, "CHUNK_BYTES", 4 * 6 * 2)  # four rows a chunk
    folder = make_images(12)
    store = extract(folder, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    whole = files(store)
    victim = {"array metadata": "embedding/zarr.json", "state": "state/c/1"}.get(damage, "embedding/c/1/0/0")
    path = store.path / victim
    if damage == "missing":
        path.unlink()
    elif damage == "leftover":
        (store.path / "embedding/c/9.partial").write_bytes(b"x")
    else:
        path.write_bytes(path.read_bytes()[:-5] + b"?" + path.read_bytes()[-4:])
    assert open_store(store.path).verify()
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))  # nothing to copy from
    encoder, told = tiny_encoder(), []
    mended = extract(folder, encoder, tmp_path / "s.zarr", progress=told.append, **EXACT)
    assert files(mended) == whole
    if damage in ("flip", "missing", "state"):
        assert told[-1].resumed == len(store) - 4


def test_max_failures_stops_the_run_and_keeps_what_is_done(make_images, tmp_path, monkeypatch):
    monkeypatch.setattr(featcache.layout, "CHUNK_BYTES", 4 * 6 * 2)
    folder = Path(make_images(12))
    broken = sorted(p for p in folder.rglob("*.*"))[-3:]
    for path in broken:
        path.write_bytes(b"no image")
    with pytest.raises(RuntimeError, match="more than --max-failures 1"):
        extract(str(folder), tiny_encoder(), tmp_path / "s.zarr", max_failures=1, **EXACT)
    told = []
    store = extract(str(folder), tiny_encoder(), tmp_path / "s.zarr", max_failures=3, progress=told.append, **EXACT)
    assert len(store.failed) == 3
    assert told[-1].resumed == 8


def test_a_disk_too_small_is_refused_before_anything_is_written(make_images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="make room"):
        extract(make_images(6), tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    assert not (tmp_path / "s.zarr").exists()


def test_the_plan_says_what_will_be_written(make_images, tmp_path):
    plans = []
    store = extract(make_images(6), tiny_encoder(), tmp_path / "s.zarr", announce=plans.append, **EXACT)
    chunks = [
        p for name in ("embedding", "label", "content", "view", "state") for p in (store.path / name / "c").rglob("*")
    ]
    on_disk = sum(p.stat().st_size - 4 for p in chunks if p.is_file())
    assert plans[0].bytes_to_write == on_disk
    assert plans[0].seconds > 0

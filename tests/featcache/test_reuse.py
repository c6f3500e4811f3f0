"""No row is ever computed twice; damage is repaired and nothing else."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_encoder

import featcache.store.layout
from featcache import extract, open_corpus, open_store
from featcache.disk.home import cache_home
from featcache.extraction.samples import content_hash
from featcache.store.index import forget, known_stores

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


@pytest.mark.parametrize("augment", ["rrc", "rotate4_crop"])
def test_random_crops_are_reused_for_the_same_sample_only(make_images, tmp_path, augment):
    folder, recipe = Path(make_images(6)), {"views": 2, "augment": augment, **EXACT}
    extract(str(folder), tiny_encoder(), tmp_path / "a.zarr", **recipe)
    told = []
    shutil.copytree(folder, tmp_path / "same")
    extract(str(tmp_path / "same"), tiny_encoder(), tmp_path / "b.zarr", progress=told.append, **recipe)
    assert told[-1].reused == 6
    paths = sorted(p for p in (tmp_path / "same").rglob("*.*"))
    paths[0].rename(paths[0].with_name(f"other{paths[0].suffix}"))
    extract(str(tmp_path / "same"), tiny_encoder(), tmp_path / "c.zarr", progress=told.append, **recipe)
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


@pytest.mark.parametrize(("precision", "reused"), [("auto", 6), ("fp32", 6), ("bf16", 0)])
def test_rows_of_another_precision_than_the_one_asked_for_are_not_reused(make_images, tmp_path, precision, reused):
    folder, told = make_images(6), []
    for out, given in (("a.zarr", "fp32"), ("b.zarr", precision)):
        extract(folder, tiny_encoder(), tmp_path / out, progress=told.append, **(EXACT | {"precision": given}))
    assert told[-1].reused == reused


def test_known_stores_are_listed_until_they_are_gone(make_images, tmp_path):
    a = extract(make_images(6), tiny_encoder(), tmp_path / "a.zarr", **EXACT)
    b = extract(str(tmp_path / "images"), tiny_encoder(1), **EXACT)
    assert set(known_stores()) == {a.path.resolve(), b.path}
    shutil.rmtree(a.path)
    assert known_stores() == [b.path]


@pytest.mark.parametrize("damaged", ["embedding/c/1/0/0", "view/c/1/0/0", "sample_id/c/1"])
@pytest.mark.parametrize("how", ["flip", "cut"])
def test_damage_in_one_store_is_not_copied_into_another(make_images, tmp_path, monkeypatch, caplog, damaged, how):
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 4 * 6 * 2)  # four rows a chunk
    folder, recipe = Path(make_images(12)), {"views": 2, "augment": "rrc", **EXACT}
    first = extract(str(folder), tiny_encoder(), tmp_path / "a.zarr", **recipe)
    whole = files(first)
    path = first.path / damaged
    data = path.read_bytes()
    path.write_bytes(data[:6] + bytes([data[6] ^ 64]) + data[7:] if how == "flip" else data[:9])
    second = extract(open_corpus(str(folder)), tiny_encoder(), tmp_path / "b.zarr", **recipe)
    assert {name: data for name, data in files(second).items() if name != "zarr.json"} == {
        name: data for name, data in whole.items() if name != "zarr.json"
    }
    assert f"{first.path}" in caplog.text
    assert caplog.text.count("no more of its rows are reused") == 1
    assert not second.verify()


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_a_damaged_index_entry_is_named_and_does_no_harm(make_images, tmp_path, caplog, text):
    folder, told = make_images(6), []
    for name in "ab":
        extract(folder, tiny_encoder(), tmp_path / f"{name}.zarr", **EXACT)
    entry = sorted(cache_home().glob("index/*/*.json"))[0]
    entry.write_text(text)
    assert len(known_stores()) == 1
    extract(folder, tiny_encoder(), tmp_path / "c.zarr", progress=told.append, **EXACT)
    assert told[-1].reused == 6
    assert str(entry) in caplog.text


def test_a_store_that_is_replaced_gives_its_rows_to_the_new_one(make_images, tmp_path):
    folder, out, told = Path(make_images(12)), tmp_path / "a.zarr", []
    extract(str(folder), tiny_encoder(), out, **EXACT)
    broken = sorted(p for p in folder.rglob("*.*"))[3]
    shutil.copy(broken, folder / "added.png")
    with Image.open(broken) as image:
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(broken)
    with pytest.raises(ValueError, match="images were added"):
        extract(str(folder), tiny_encoder(), out, **EXACT)
    store = extract(str(folder), tiny_encoder(), out, overwrite=True, progress=told.append, **EXACT)
    assert (len(store), told[-1].reused) == (13, 12)
    assert sorted(p.name for p in tmp_path.glob("a.zarr*")) == ["a.zarr", "a.zarr.lock"]


def test_an_image_that_can_be_read_again_is_all_that_is_made(make_images, tmp_path):
    folder, out, told = Path(make_images(12)), tmp_path / "a.zarr", []
    path = sorted(p for p in folder.rglob("*.*"))[3]
    data = path.read_bytes()
    path.write_bytes(data[:30])
    assert len(extract(str(folder), tiny_encoder(), out, **EXACT).failed) == 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"1 images have changed .* with --overwrite: the rows of the others are taken"
    ):
        extract(str(folder), tiny_encoder(), out, **EXACT)
    store = extract(str(folder), tiny_encoder(), out, overwrite=True, progress=told.append, **EXACT)
    assert (len(store.failed), told[-1].reused) == (0, 11)


def test_a_store_that_cannot_be_replaced_stays(make_images, tmp_path, monkeypatch):
    folder, out = Path(make_images(12)), tmp_path / "a.zarr"
    whole = files(extract(str(folder), tiny_encoder(), out, **EXACT))
    shutil.copy(sorted(p for p in folder.rglob("*.*"))[3], folder / "added.png")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("featcache.store.write.empty_store", full)
    with pytest.raises(OSError, match="its disk is full"):
        extract(str(folder), tiny_encoder(), out, overwrite=True, **EXACT)
    assert files(open_store(out)) == whole


class Stop(BaseException):
    pass


@pytest.mark.parametrize("change", ["images", "recipe"])
def test_an_interrupted_replacement_goes_on_where_it_was(make_images, tmp_path, monkeypatch, change):
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 4 * 6 * 2)
    folder, out, told = Path(make_images(12)), tmp_path / "a.zarr", []
    extract(str(folder), tiny_encoder(), out, **EXACT)
    if change == "images":
        shutil.copy(sorted(p for p in folder.rglob("*.*"))[3], folder / "added.png")
    recipe = {"views": 2, "augment": "flip"} if change == "recipe" else {}

    def stop(at):
        if at.done >= 8:
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            extract(str(folder), tiny_encoder(), out, overwrite=True, progress=stop, **recipe, **EXACT)
    store = extract(str(folder), tiny_encoder(), out, overwrite=True, progress=told.append, **recipe, **EXACT)
    rows = 13 if change == "images" else 12
    assert len(store) == rows
    assert told[-1].resumed > 8  # the second run began where the first one had ended
    assert told[-1].reused == (rows - told[-1].resumed if change == "images" else 0)
    assert not (tmp_path / "a.zarr.replaced").exists()
    fresh = extract(str(folder), tiny_encoder(), tmp_path / "fresh.zarr", **recipe, **EXACT)
    np.testing.assert_allclose(store.gather(range(rows)), fresh.gather(range(rows)), atol=1e-3)


def test_an_interrupted_replacement_starts_again_when_its_images_have_changed(make_images, tmp_path, monkeypatch):
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 4 * 6 * 2)
    folder, out, told = Path(make_images(12)), tmp_path / "a.zarr", []

    def stop(at):
        raise Stop

    with pytest.raises(Stop):
        extract(str(folder), tiny_encoder(), out, progress=stop, **EXACT)
    path = sorted(p for p in folder.rglob("*.*"))[0]
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    with pytest.raises(ValueError, match="1 images have changed"):
        extract(str(folder), tiny_encoder(), out, **EXACT)
    store = extract(str(folder), tiny_encoder(), out, overwrite=True, progress=told.append, **EXACT)
    assert (told[-1].resumed, len(store.ok)) == (0, 12)
    assert store.content[0].tobytes() == content_hash(path.read_bytes())


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_store_whose_own_zarr_json_is_gone_can_be_replaced(make_images, tmp_path, text):
    folder, out = make_images(6), tmp_path / "a.zarr"
    extract(folder, tiny_encoder(), out, **EXACT)
    (out / "zarr.json").unlink() if text is None else (out / "zarr.json").write_text(text)
    for use in (open_store, lambda path: extract(folder, tiny_encoder(), path, **EXACT)):
        with pytest.raises(ValueError, match=r"a\.zarr: its zarr\.json is damaged .* extract again with --overwrite"):
            use(out)
    assert not extract(folder, tiny_encoder(), out, overwrite=True, **EXACT).verify()


def test_a_folder_that_is_no_store_is_left_alone(make_images, tmp_path):
    folder, out = make_images(6), tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("…")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="mine: already exists and is not a store; choose another --out"):
            extract(folder, tiny_encoder(), out, overwrite=overwrite, **EXACT)
    (out / "thesis.tex").unlink()
    assert len(extract(folder, tiny_encoder(), out, **EXACT)) == 6


@pytest.mark.parametrize("damage", ["flip", "missing", "leftover", "array metadata", "state"])
def test_extract_repairs_what_verify_names_and_only_that(make_images, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 4 * 6 * 2)  # four rows a chunk
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
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 4 * 6 * 2)
    folder = Path(make_images(12))
    broken = sorted(p for p in folder.rglob("*.*"))[-3:]
    for path in broken:
        path.write_bytes(b"no image")
    for path in broken[:2]:
        shutil.copy(path, folder / f"0-{path.name}")
    for _ in range(2):  # the same command again stops as well: what could not be read before counts
        with pytest.raises(
            RuntimeError, match=rf"3 images .* more than --max-failures 2 \(last: \S*{broken[0].name}: "
        ):
            extract(str(folder), tiny_encoder(), tmp_path / "s.zarr", max_failures=2, **EXACT)
    told = []
    store = extract(str(folder), tiny_encoder(), tmp_path / "s.zarr", max_failures=5, progress=told.append, **EXACT)
    assert len(store.failed) == 5
    assert told[-1].resumed >= 8


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

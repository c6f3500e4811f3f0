"""Names and sizes in a store are a stranger's data: none becomes a path outside, or a claim that fills the memory."""

import json

import fsspec
import numpy as np
import pytest
from tiny import tiny_encoder
from typer.testing import CliRunner

from featcache.extraction.extract import extract
from featcache.interchange import export_store
from featcache.store import FeatureStore, open_store
from featcache.store.files import files_at
from featcache.store.from_arrays import write_store
from featcache_cli.featcache import app

EYE = np.eye(4)
BAD = ["../x", "/tmp/x", "a/b", "a\\b", "..", ".", "", "a\0b", "a b", "a.", "CON", "nul.x", "Embedding", "state", "zarr.json",
       "C:x", "é", "x" * 200, "__metadata__", "manifest", "sample_id", "class_name"]  # fmt: skip


def changed(path, change):
    """The store's manifest as somebody else might write it."""
    record = json.loads((path / "zarr.json").read_bytes())
    change(record["attributes"]["featcache"])
    (path / "zarr.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", BAD)
def test_a_field_whose_name_is_no_plain_one_is_refused_where_a_store_is_opened(tmp_path, name):
    store = write_store(tmp_path / "s.zarr", EYE)

    def rename(manifest):
        manifest["fields"][name] = [4]
        manifest["wide_chunk_rows"][name] = 4

    changed(store.path, rename)
    before = sorted(tmp_path.iterdir())
    for use in (
        lambda: FeatureStore(store.path),
        lambda: export_store(store.path, tmp_path / "out", "npy"),
        lambda: export_store(store.path, tmp_path / "out", "safetensors"),
    ):
        with pytest.raises(ValueError, match=r"its zarr\.json is damaged"):
            use()
    assert sorted(tmp_path.iterdir()) == before
    assert CliRunner().invoke(app, ["export", str(store.path), str(tmp_path / "out"), "--format", "npy"]).exit_code != 0


@pytest.mark.parametrize("name", ["a/b", "..", "state"])
def test_an_encoder_with_such_a_field_is_refused_before_anything_is_made(make_images, tmp_path, name):
    encoder = tiny_encoder()
    encoder.fields[name] = (3,)
    with pytest.raises(ValueError, match="tiny: a field is named"):
        extract(make_images(2), encoder, tmp_path / "s.zarr", fields=[name])
    assert not (tmp_path / "s.zarr").exists()


SIZES = {
    "rows": lambda m: m["corpus"].update(rows=10**15),
    "units": lambda m: (m["corpus"].update(rows=10**10), m.update(chunk_rows=1, wide_chunk_rows={"embedding": 1})),
    "width": lambda m: m["fields"].update(embedding=[2**40]),
    "no rows": lambda m: m["corpus"].update(rows=0),
    "rows in words": lambda m: m["corpus"].update(rows="4"),
    "a truth for a size": lambda m: m.update(chunk_rows=True),
    "chunks over units": lambda m: m["wide_chunk_rows"].update(embedding=4096),
    "no chunks": lambda m: m["wide_chunk_rows"].clear(),
    "an unknown dtype": lambda m: m.update(dtypes={"embedding": "object"}, format=3),
    "a dtype of nothing": lambda m: m.update(dtypes={"x": "float32"}, format=3),
    "class names that are none": lambda m: m["corpus"].update(class_names="abc"),
    "an extraction that is none": lambda m: m.update(extraction=5),
    "a precision that is a number": lambda m: m.update(extraction={"precision": 5}),
    "a preprocess that is none": lambda m: m["encoder"].update(preprocess="x"),
    "counts that are none": lambda m: m["corpus"].update(passed_over=["x"]),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_no_store_has_are_refused_at_once(tmp_path, case):
    store = write_store(tmp_path / "s.zarr", EYE)
    changed(store.path, SIZES[case])
    with pytest.raises(
        ValueError, match=r"its zarr\.json is damaged .*; restore it, or extract again with --overwrite"
    ):
        FeatureStore(store.path)


@pytest.mark.parametrize(
    "change",
    [{"shape": [10**12]}, {"data_type": "float64"}, {"codecs": [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}]},
     {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]}],
)  # fmt: skip
def test_an_array_that_is_not_the_manifests_is_refused(tmp_path, change):
    store = write_store(tmp_path / "s.zarr", EYE)
    file = store.path / "label/zarr.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | change))
    with pytest.raises(ValueError, match=r"its label/zarr\.json is damaged"):
        _ = open_store(store.path).labels


def test_labels_beyond_the_class_names_are_refused_where_they_are_read(tmp_path):
    """As `write_store` once let them through."""
    store = write_store(tmp_path / "s.zarr", EYE, labels=[0, 2, 1, -1], class_names=list("abc"))
    changed(store.path, lambda manifest: manifest["corpus"].update(class_names=["a", "b"]))
    with pytest.raises(ValueError, match=r"label 2 of row 1, of 2 classes; .* make it again"):
        _ = open_store(store.path).labels


@pytest.mark.parametrize("relative", ["../../x", "/etc/x", "a/../../x", "embedding//x", "./x"])
def test_an_object_whose_name_leads_out_of_the_mirror(tmp_path, relative):
    files = files_at(f"memory://{tmp_path.name}/s.zarr")
    for use in (
        lambda: files.fetch(relative),
        lambda: files.fetch_all([relative]),
        lambda: list(files.read_afresh([relative])),
        lambda: files.tails({relative: 9}),
        lambda: files.remove(relative),
        lambda: files.push(relative),
    ):
        with pytest.raises(ValueError, match="which leads out of the store; delete it"):
            use()


def test_a_stranger_in_a_bucket_deletes_nothing_here(tmp_path, monkeypatch):
    url = f"memory://{tmp_path.name}/s.zarr"
    write_store(url, EYE)
    files = files_at(url)
    victim = files.root.parent / "victim"
    victim.write_text("mine")
    listed = type(files).listing
    monkeypatch.setattr(type(files), "listing", lambda self, under="": listed(self, under) | {"../victim": 4})
    with pytest.raises(ValueError, match="leads out of the store"):
        open_store(url).remove()
    assert victim.read_text() == "mine"
    victim.unlink()
    assert fsspec.filesystem("memory").exists(f"/{tmp_path.name}/s.zarr/zarr.json")


# -- other readers ----------------------------------------------------------------------------------------


def test_xarray_opens_a_store(make_images, tmp_path):
    xarray = pytest.importorskip("xarray", reason="needs xarray")
    made = {
        "views": 2,
        "augment": "flip",
        "fields": ["embedding", "tokens", "logits"],
        "device": "cpu",
        "precision": "fp32",
    }
    store = extract(make_images(5), tiny_encoder(), tmp_path / "s.zarr", dtype="float32", **made)
    for given in ({}, {"consolidated": False}):
        dataset = xarray.open_zarr(store.path, chunks=None, **given).load()
        assert dict(dataset.sizes)["rows"] == 5
        assert dataset["embedding"].dims == ("rows", "views", "embedding_axis1")
        assert dataset["tokens"].dims == ("rows", "views", "tokens_axis1", "tokens_axis2")
        np.testing.assert_array_equal(dataset["tokens"].values[:, 1], store.gather(range(5), "tokens", 1))
        assert [str(name) for name in dataset["sample_id"].values] == store.sample_ids.tolist()
        np.testing.assert_array_equal(dataset["label"].values, store.labels)
    assert store.verify() == []


def test_a_store_without_names_of_dimensions_still_opens_and_verifies(tmp_path, monkeypatch):
    """As every store was, before."""
    with monkeypatch.context() as before:
        before.setattr("featcache.store.write.dimension_names", lambda name, count: None)
        store = write_store(tmp_path / "s.zarr", EYE, labels=[0, 1, 0, 1])
    assert "dimension_names" not in json.loads((store.path / "label/zarr.json").read_bytes())
    again = open_store(store.path)
    assert again.verify() == []
    np.testing.assert_array_equal(again.gather(range(4)), EYE)


# -- what a new user reads --------------------------------------------------------------------------------


def test_info_does_not_refer_to_info(tmp_path):
    path = write_store(tmp_path / "s.zarr", EYE, failed={2: "it is broken"}).path
    ran = CliRunner().invoke(app, ["info", str(path)])
    assert ran.exit_code == 0
    assert "featcache info" not in ran.output
    assert "4 rows, 1 failed (listed below)" in ran.output
    assert "it is broken" in ran.output
    assert "None" not in ran.output
    assert "embedding (4 float16)" in ran.output

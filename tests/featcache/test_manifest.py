"""The manifest as typed records: the JSON that comes out is the one that went in."""

import copy
import json
import pickle

import numpy as np
import pytest

from featcache.inputs.images import KeptPixels
from featcache.store import create_store
from featcache.store.from_arrays import write_store
from featcache.store.layout import STATE
from featcache.store.manifest import CorpusRecord, EncoderRecord, ExtractionRecord, Manifest, ViewsRecord

STORED = {
    "format": 3,
    "wide_chunk_rows": {"embedding": 4, "pixels": 2},
    "encoder": {"fingerprint": "f", "name": "e", "preprocess": {"size": 8}, "new": {"a": [1]}},
    "corpus": {"spec": None, "rows": 9, "class_names": ["b", "a"]},
    "views": {"count": 1, "scale": [0.1, 1.0]},
    "fields": {"embedding": [2]},
    "later": None,
    "dtypes": {"embedding": "float32"},
    "pixels": {"size": 16, "format": "jpeg"},
    "chunk_rows": 4,
    "extraction": {"precision": "bf16", "cosine": None, "checked": None},
    "sealed": {"rows": 9, "ok": 9, "failed": 0, "digest": "0f"},
}


def new(**given):
    return Manifest(
        encoder=EncoderRecord(name="e", fingerprint="f"),
        corpus=CorpusRecord(spec=None, rows=9, class_names=None),
        views=ViewsRecord(count=1),
        **{"fields": {"embedding": [2]}, "chunk_rows": 4, **given},
    )


def text(manifest):
    return json.dumps(manifest.to_json())


def test_json_comes_back_with_its_order_its_gaps_and_what_is_not_known():
    manifest = Manifest.from_json(STORED)
    assert text(manifest) == json.dumps(STORED)
    assert text(copy.deepcopy(manifest)) == text(pickle.loads(pickle.dumps(manifest))) == json.dumps(STORED)
    assert (manifest.encoder.output, manifest.encoder.other) == (None, {"new": {"a": [1]}})
    assert manifest.pixels == KeptPixels(size=16)
    assert manifest.extraction.spot_checked
    assert "cosine" in manifest.layout


def test_what_is_given_is_what_is_written():
    assert [*new().to_json()][2:] == ["encoder", "corpus", "views", "fields", "chunk_rows", "sealed"]
    assert new(pixels=None).to_json()["pixels"] is None
    assert "dtypes" not in new(dtypes={}).to_json()
    assert ViewsRecord(count=1, other={"scale": [1]}).to_json() == {"count": 1, "scale": [1]}
    assert new().to_json()["wide_chunk_rows"] == {"embedding": 4}
    assert not new(extraction=ExtractionRecord(cosine=1.0)).extraction.spot_checked


def test_a_changed_manifest_is_another_one():
    manifest = Manifest.from_json(STORED)
    other = manifest.changed(extraction=manifest.extraction.changed(cosine=0.5, device="cpu"), sealed=None)
    assert text(manifest) == json.dumps(STORED)
    assert other.to_json()["extraction"] == {"precision": "bf16", "cosine": 0.5, "checked": None, "device": "cpu"}
    assert [*other.to_json()] == [*STORED]
    assert manifest.without("pixels", "later").to_json().keys() == STORED.keys() - {"pixels", "later"}
    assert new().changed(dtypes={"embedding": "float32"}, chunk_rows=2).wide_chunk_rows == {"embedding": 2}
    with pytest.raises(AttributeError):
        manifest.chunk_rows = 3


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("encoder", "name", 5), ("corpus", "class_names", "ab"), ("corpus", "class_names", [1]), ("extraction", "precision", 5),
     ("extraction", "batch_size", True), ("views", "parameters", [0]), ("corpus", "passed_over", {"x": "y"}), ("sealed", "digest", None)],
)  # fmt: skip
def test_values_of_another_kind_are_named(section, name, value):
    with pytest.raises(ValueError, match=f"{name} is "):
        Manifest.from_json({**STORED, section: {**STORED[section], name: value}})


def test_a_seal_from_checksums_that_writing_returned_is_the_one_that_reads_them(tmp_path):
    read = write_store(tmp_path / "a.zarr", np.arange(18.0).reshape(9, 2), per_chunk=4)
    store = create_store(tmp_path / "b.zarr", read.manifest)
    tails = {}
    for unit in range(store.chunks):
        rows = store.rows_of(unit)
        arrays = {name: read.read(name, rows.start, rows.stop) for name in store.layout}
        tails |= store.write_rows("embedding", rows.start, arrays.pop("embedding"))
        tails |= store.write_chunk(unit, arrays)
    assert sorted(tails) == sorted(name for name in store.files.listing() if not name.endswith("zarr.json"))
    store.files.tails = lambda sizes: {} if not sizes else pytest.fail("read back")
    store.seal(tails=tails)
    for path in (p for p in read.path.rglob("*") if p.is_file()):
        assert (store.path / path.relative_to(read.path)).read_bytes() == path.read_bytes()
    assert not (store.state - read.read(STATE)).any()

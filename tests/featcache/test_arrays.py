"""write_store: checked first, then whole or absent; and the same checks where files are imported."""

import json
import os

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

import featcache.store.from_arrays
from evalsuite.evaluators.knn import knn
from featcache.inputs.images import Preprocess
from featcache.interchange import export_store, import_store
from featcache.store import StoreWriter, open_store
from featcache.store.from_arrays import write_store

pytestmark = pytest.mark.usefixtures("unchecked")
EYE = np.eye(4)
NAN = np.where(np.eye(4) == 1, np.nan, 1.0)

REFUSED = {
    "label beyond the names": ({"labels": [0, 1, 7, 2], "class_names": list("abc")}, "label 7 of row 2 is not one of the 3 class"),
    "label below -1": ({"labels": [0, 1, -5, 2]}, "label -5 of row 2 is not a class; number them from 0, -1 for none"),
    "fractions": ({"labels": [0, 0.5, 1, 2]}, "label holds fractions; write whole numbers"),
    "infinite label": ({"labels": [0, np.inf, 1, 2]}, "label holds fractions"),
    "labels in words": ({"labels": list("abca")}, r"label is <U1 of shape \(4,\); write a whole number a row"),
    "labels of nothing": ({"labels": [0, None, 1, 2]}, "label is object"),
    "too few labels": ({"labels": [0, 1, 2]}, r"of shape \(3,\)"),
    "labels of two columns": ({"labels": np.zeros((4, 2), int)}, r"of shape \(4, 2\)"),
    "a label no number of 64 bits holds": ({"labels": np.full(4, 2**63, np.uint64)}, "is not a class"),
    "names that are one text": ({"class_names": "abc"}, "class names are 'abc'; give a list of text"),
    "names that are numbers": ({"class_names": [1, 2]}, "give a list of text"),
    "ids twice": ({"sample_ids": ["a", "b", "a", "a"]}, "sample id 'a' stands 3 times; make sample ids unique"),
    "too few ids": ({"sample_ids": ["a"]}, "1 sample ids for 4 rows"),
    "ids that are numbers": ({"sample_ids": [1, 2, 3, 4]}, r"is missing, or no text \(1 in row 0\)"),
    "ids that are no text": ({"sample_ids": ["a", "b", "\udcff", "c"]}, "is no valid text"),
    "failed beyond": ({"failed": {9: "x"}}, "failed names row 9 of 4"),
    "failed from the end": ({"failed": {-1: "x"}}, "failed names row -1 of 4"),
    "failed without a reason": ({"failed": {1: ""}}, "failed row 1 has no reason"),
    "one number a row": ({"embedding": np.ones(4)}, r"embedding is float64 of shape \(4,\); give numbers of shape \(rows"),
    "four axes": ({"embedding": np.ones((2, 1, 1, 2))}, r"of shape \(2, 1, 1, 2\)"),
    "text": ({"embedding": [["a"]]}, "embedding is <U1"),
    "ragged": ({"embedding": [[1.0], [1.0, 2.0]]}, "embedding is no array of numbers"),
    "complex": ({"embedding": np.ones((4, 4), complex)}, "embedding is complex128"),
    "no rows": ({"embedding": np.ones((0, 4))}, "has no rows to write"),
    "NaN": ({"embedding": NAN}, "row 0 of embedding holds NaN or infinity; leave such rows out, or name them as failed"),
    "NaN in a logit": ({"logits": NAN[::-1]}, "row 0 of logits holds NaN"),
    "logits of other rows": ({"logits": np.ones((3, 2))}, "logits has 3 rows of 1 views, embedding 4 of 1"),
    "logits of other views": ({"logits": np.ones((4, 2, 2))}, "logits has 4 rows of 2 views"),
    "beyond float16, if that is asked for": ({"embedding": EYE * 1e5, "dtype": "float16"}, r"beyond float16 .*\(--dtype float32\)"),
    "vanishing, if that is asked for": ({"embedding": EYE * 1e-9, "dtype": "float16"}, "row 0 of embedding vanishes in float16"),
    "beyond float32": ({"embedding": EYE * 1e39}, "beyond float32"),
    "lost in float32": ({"embedding": 1e9 + EYE}, "subtract what all rows have in common"),
    "unknown dtype": ({"dtype": "float64"}, "unknown dtype 'float64'; known: auto, float16, float32"),
    "preprocess": ({"preprocess": {"resize": 3}}, "is no record of one"),
    "rows a chunk": ({"per_chunk": 0}, "per_chunk 0: give a whole number of rows"),
    "ragged labels": ({"labels": [[0], [0, 1], [2], [3]]}, "label is no array of numbers"),
    "masked labels": ({"labels": np.ma.masked_equal([0, 9, 1, 2], 9)}, "label has masked values"),
    "masked values": ({"embedding": np.ma.masked_equal(EYE, 1)}, "embedding has masked values; fill them in"),
    "names that are a number": ({"class_names": 3}, "class names are 3; give a list of text"),
    "names without order": ({"class_names": {"b", "a"}}, "class names are .*; give a list of text"),
    "ids that are one text": ({"sample_ids": "abcd"}, "sample ids are 'abcd'; give a list of text"),
    "ids that are a number": ({"sample_ids": 4}, "sample ids are 4; give a list of text"),
    "ids of a dictionary": ({"sample_ids": dict.fromkeys("dcba")}, "sample ids are .*; give a list of text"),
    "failed in a list": ({"failed": [2]}, r"failed is \[2\]; give a dictionary"),
    "failed for what is no text": ({"failed": {1: "\udcff"}}, r"reason '\\udcff' is no valid text"),
    "an encoder without a name": ({"encoder_name": None}, "encoder_name is None; give text"),
    "an encoder that is a number": ({"fingerprint": 7}, "fingerprint is 7; give text"),
    "preprocess in a list": ({"preprocess": [1]}, r"preprocess \[1\] is no record of one"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_store_is_refused_and_nothing_is_left(tmp_path, case):
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        write_store(tmp_path / "s.zarr", **{"embedding": EYE, **given})
    assert str(refused.value).startswith(f"{tmp_path / 's.zarr'}: ")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    write_store(tmp_path / "s.zarr", EYE)


def test_a_chunk_has_no_more_rows_than_there_are(tmp_path):
    store = write_store(tmp_path / "s.zarr", EYE, per_chunk=np.int64(10**12))
    assert store.manifest.chunk_rows == 4
    assert_array_equal(store.gather([3, 0])[:, 3], [1, 0])


def test_what_is_a_store_is_accepted(tmp_path):
    store = write_store(
        tmp_path / "s.zarr",
        np.where(np.arange(4)[:, None] == 2, np.nan, EYE),
        labels=[1.0, np.nan, -1, 0],
        class_names=np.array(["a", "b"]),
        sample_ids=np.array(["ü", "", "x/y", "z"]),
        failed={2: "broken"},
        preprocess=Preprocess(resize=8, crop=8, size=8).to_dict(),
    )
    assert store.labels.tolist() == [1, -1, -1, 0]
    assert store.class_names == ["a", "b"]
    assert store.sample_ids.tolist() == ["ü", "", "x/y", "z"]
    assert store.reasons == {"x/y": "broken"}
    assert Preprocess.from_dict(store.manifest.encoder.preprocess).crop == 8
    assert write_store(tmp_path / "t.zarr", EYE, labels=[True, False, True, True]).labels.tolist() == [1, 0, 1, 1]
    assert write_store(tmp_path / "u.zarr", EYE, labels=[3, 7, 9, 3]).labels.tolist() == [3, 7, 9, 3]
    assert_array_equal(
        write_store(tmp_path / "v.zarr", np.arange(8).reshape(4, 2)).gather(range(4)).astype(int).ravel(), range(8)
    )


@pytest.mark.parametrize("breaks", ["write_chunk", "seal"])
def test_a_write_that_fails_leaves_the_path_free(tmp_path, monkeypatch, breaks):
    with monkeypatch.context() as broken:

        def fail(*_):
            raise OSError(28, "No space left on device")

        broken.setattr(StoreWriter, breaks, fail)
        with pytest.raises(OSError, match=r"s\.zarr: its disk is full"):
            write_store(tmp_path / "s.zarr", EYE)
    assert list(tmp_path.iterdir()) == []
    assert len(write_store(tmp_path / "s.zarr", EYE)) == 4


def test_what_was_there_stays(tmp_path):
    before = write_store(tmp_path / "s.zarr", EYE)
    for given in (EYE * 2, NAN):
        with pytest.raises(ValueError, match=r"already exists|NaN"):
            write_store(tmp_path / "s.zarr", given)
    assert_array_equal(open_store(before.path).gather(range(4)), EYE)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file: already exists"):
        write_store(tmp_path / "file", EYE)
    assert (tmp_path / "file").read_text() == "mine"


def test_at_a_url_too(tmp_path, monkeypatch):
    url = f"memory://{tmp_path.name}/s.zarr"
    with monkeypatch.context() as broken:
        broken.setattr(StoreWriter, "seal", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_store(url, EYE)
    assert_array_equal(write_store(url, EYE).gather(range(4)), EYE)


def two_clusters(rng, offset, scale):
    labels = np.arange(120) % 2
    return offset + scale * (rng.normal(size=(120, 8)) + 4 * (2 * labels[:, None] - 1)), labels


@pytest.mark.parametrize(("offset", "scale"), [(1000, 0.1), (0, 1e5), (0, 1e-9), (30000, 1.0)])
def test_evaluators_read_what_float16_would_lose(tmp_path, rng, offset, scale):
    values, labels = two_clusters(rng, offset, scale)
    store = write_store(tmp_path / "s.zarr", values.astype(np.float32), labels=labels, class_names=["a", "b"])
    assert store.manifest.dtypes == {"embedding": "float32"}
    assert store.gather([0]).dtype == np.float32
    assert_array_equal(store.gather(range(120)), values.astype(np.float32))
    centred = write_store(
        tmp_path / "c.zarr", store.gather(range(120)) - np.float32(offset), labels=labels, class_names=["a", "b"]
    )
    assert knn(centred, centred, k=5).metrics["top1@5"].value == 1.0


def test_fields_have_their_own_dtype(tmp_path, rng):
    half, wide = rng.normal(size=(9, 3)).astype(np.float32), (1000 + 0.1 * rng.normal(size=(9, 2))).astype(np.float32)
    store = write_store(tmp_path / "s.zarr", half, logits=wide, per_chunk=4)
    assert store.manifest.dtypes == {"logits": "float32"}
    assert_array_equal(store.gather(range(9)), half.astype(np.float16))
    assert_array_equal(store.gather([7, 1, 7], "logits"), wide[[7, 1, 7]])
    assert_array_equal(zarr.open_group(store.path, mode="r")["logits"][:, 0], wide)
    assert store.verify() == []
    assert write_store(tmp_path / "t.zarr", half, dtype="float32").gather([0]).dtype == np.float32
    assert not write_store(tmp_path / "u.zarr", half, dtype="float16").manifest.dtypes


@pytest.mark.parametrize("format", ["npy", "parquet", "safetensors"])
def test_float32_comes_back_from_every_format(tmp_path, rng, format):
    pytest.importorskip("pyarrow")
    store = write_store(tmp_path / "s.zarr", 1000 + 0.1 * rng.normal(size=(9, 2, 3)), logits=rng.normal(size=(9, 2, 2)))
    export_store(store, tmp_path / "out", format)
    back = import_store(tmp_path / "out", tmp_path / "b.zarr")
    assert back.manifest.dtypes == {"embedding": "float32"}
    for view in (0, 1):
        assert_array_equal(back.gather(range(9), view=view), store.gather(range(9), view=view))
    assert (back.path / "zarr.json").read_bytes() == (store.path / "zarr.json").read_bytes()
    with pytest.raises(ValueError, match="leave --dtype out"):
        import_store(tmp_path / "out", tmp_path / "c.zarr", dtype="float16")


@pytest.mark.parametrize("as_is", [True, False])
def test_a_clip_retrieval_folder_of_float32(tmp_path, rng, as_is):
    pytest.importorskip("pyarrow")
    values = (1000 + 0.1 * rng.normal(size=(9, 3))).astype(np.float32)
    export_store(write_store(tmp_path / "s.zarr", values), tmp_path / "out", "clip-retrieval", as_is=as_is)
    held = np.load(tmp_path / "out/img_emb/img_emb_0000.npy")
    expected = values if as_is else values / np.linalg.norm(values.astype(np.float64), axis=1)[:, None]
    assert held.dtype == np.float32
    np.testing.assert_allclose(held, expected, rtol=1e-7)
    assert_array_equal(import_store(tmp_path / "out", tmp_path / "b.zarr").gather(range(9)), held)


def test_an_import_chooses_the_dtype_by_the_whole_file(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("featcache.store.layout.CHUNK_BYTES", 8 * 4 * 4)
    values = rng.normal(size=(50, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    assert import_store(tmp_path / "x.npy", tmp_path / "half.zarr").gather([0]).dtype == np.float16
    assert_array_equal(import_store(tmp_path / "x.npy", tmp_path / "w.zarr", dtype="float32").gather(range(50)), values)
    values[49, 3] = 1e6
    np.save(tmp_path / "y.npy", values)
    store = import_store(tmp_path / "y.npy", tmp_path / "wide.zarr")
    assert_array_equal(store.gather(range(50)), values)
    assert store.manifest.chunk_rows == 8
    with pytest.raises(ValueError, match=r"row 49 of embedding is beyond float16 .*; keep it as float32"):
        import_store(tmp_path / "y.npy", tmp_path / "no.zarr", dtype="float16")
    assert not (tmp_path / "no.zarr").exists()


def crafted(tmp_path, change):
    """A safetensors export whose arrays were changed, and its checksums with them."""
    pytest.importorskip("safetensors")
    store = write_store(tmp_path / "s.zarr", EYE, labels=[0, 1, 0, 1], class_names=["a", "b"], sample_ids=list("abcd"))
    export_store(store, tmp_path / "out", "npy")
    folder = tmp_path / "out"
    change(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["export"]["crc32c"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


CRAFTED = {
    "label": (lambda f: np.save(f / "label.npy", np.array([0, 1, 9, 1])), "label 9 of row 2 is not one of the 2 class names"),
    "ids": (lambda f: (f / "sample_id.txt").write_text("a\nb\na\nd\n"), "sample id 'a' stands 2 times"),
    "state": (lambda f: np.save(f / "state.npy", np.array([1, 1, 7, 1], np.uint8)), "state holds other numbers than 1 and 2"),
    "NaN": (lambda f: np.save(f / "embedding.npy", np.full((4, 4), np.nan, np.float16)), "row 0 of embedding holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", CRAFTED)
def test_an_export_is_checked_like_arrays(tmp_path, case):
    change, message = CRAFTED[case]
    with pytest.raises(ValueError, match=message):
        import_store(crafted(tmp_path, change), tmp_path / "b.zarr")
    assert not (tmp_path / "b.zarr").exists()


def test_an_imported_label_below_none_is_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"embedding": [[1.0]] * 2, "label": [0, -5]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: label -5 of row 1 is not a class"):
        import_store(tmp_path / "x.parquet", tmp_path / "s.zarr")


def test_a_killed_write_does_not_block_the_path(tmp_path):
    """What is being written lies beside the path, under a name of its own."""
    seen = []
    real = featcache.store.from_arrays.create_store

    def watched(path, manifest):
        seen.append(os.fspath(path))
        assert not (tmp_path / "s.zarr").exists()
        return real(path, manifest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(featcache.store.from_arrays, "create_store", watched)
        write_store(tmp_path / "s.zarr", EYE)
    assert seen != [str(tmp_path / "s.zarr")]
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]

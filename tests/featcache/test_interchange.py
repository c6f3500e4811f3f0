"""Import and export: exact round trips, other programs' readers and files, refusals."""

import json
import os
import pickle
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

import featcache.interchange._foreign
import featcache.interchange.safetensors
from featcache.inputs.images import PARAMETERS
from featcache.interchange import clip_retrieval, export_store, import_store
from featcache.store import FeatureStore, create_store, open_store
from featcache.store.from_arrays import write_store
from featcache.store.layout import FAILED, OK
from featcache.store.manifest import CorpusRecord, EncoderRecord, ExtractionRecord, Manifest, ViewsRecord

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS, WIDTH, CLASSES, PER_CHUNK = 11, 5, 3, 4  # the last chunk is short
WITH_LANCE = pytest.param("lance", marks=pytest.mark.skipif(not find_spec("lance"), reason="pylance is not installed"))
WHOLE = ("npy", "parquet", "safetensors", "hf-dataset", WITH_LANCE)
IDS = ["a/ü.png", "back\\slash", "line\nbreak", "r\r", "\\n", "日本.jpg", " x ", "", "u\u2028v", 'q"', "z"]


def make_store(path, *, views=2, logits=True, failed=(2, 9)):
    """A store as extraction leaves it: views with parameters, logits, content hashes, failed rows."""
    rng = np.random.default_rng(0)
    fields = {"embedding": [WIDTH], **({"logits": [CLASSES]} if logits else {})}
    store = create_store(
        path,
        Manifest(
            encoder=EncoderRecord(
                name="timm/x",
                fingerprint="f00d",
                embedding_dim=WIDTH,
                preprocess={"size": 8, "mean": [0.1, 1 / 3, 0.5]},
            ),
            corpus=CorpusRecord(spec="photos/", rows=ROWS, digest="d", class_names=["ant", "béé"]),
            views=ViewsRecord(count=views, augment="rrc", seed=3, other={"scale": [0.08, 1.0]}),
            fields=fields,
            chunk_rows=PER_CHUNK,
            versions={"python": "3"},
            extraction=ExtractionRecord(precision="fp32", batch_size=2),
        ),
    )
    ok = ~np.isin(np.arange(ROWS), failed)
    arrays = {
        **{
            name: rng.normal(size=(ROWS, views, *w)).astype(np.float16) * ok[:, None, None]
            for name, w in fields.items()
        },
        "label": np.arange(ROWS) % 3 - 1,
        "sample_id": np.array(IDS, object),
        "content": rng.integers(0, 256, (ROWS, 16), np.uint8),
        "view": rng.normal(size=(ROWS, views, len(PARAMETERS))).astype(np.float32),
        "reason": np.array(["" if fine else "OSError: bad\n\\line" for fine in ok], object),
        "state": np.where(ok, OK, FAILED).astype(np.uint8),
    }
    for chunk in range(store.chunks):
        rows = store.rows_of(chunk)
        store.write_chunk(chunk, {name: array[rows.start : rows.stop] for name, array in arrays.items()})
    store.seal()
    return store


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def gathered(store, field="embedding"):
    """(N, V, D)"""
    return np.stack([store.gather(range(len(store)), field, view) for view in range(store.views)], axis=1)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# -- there and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WHOLE)
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("logits", [False, True])
def test_a_store_comes_back_byte_for_byte(tmp_path, format, views, logits):
    store = make_store(tmp_path / "s.zarr", views=views, logits=logits)
    exported = export_store(store, tmp_path / "out", format)
    assert (exported.rows, exported.left_out) == (ROWS, [])
    back = import_store(tmp_path / "out", tmp_path / "deep/back.zarr")
    assert files(back.path) == files(store.path)
    assert back.verify() == []
    assert back.reasons == store.reasons
    assert names(tmp_path) == ["deep", "out", "s.zarr"]


@pytest.mark.parametrize("format", WHOLE)
def test_a_store_of_arrays_comes_back_whatever_is_in_it(tmp_path, format):
    values = np.array([[np.nan, np.inf], [-0.0, 6e-8], [65504, -1]], np.float16)  # a failed row may hold anything
    store = write_store(tmp_path / "s.zarr", values, failed={0: "x"}, per_chunk=8)
    export_store(store.path, tmp_path / "out", format)
    assert files(import_store(tmp_path / "out", tmp_path / "b.zarr").path) == files(store.path)


def test_clip_retrieval_as_it_is_comes_back_byte_for_byte(tmp_path):
    store = make_store(tmp_path / "s.zarr", views=1, logits=False, failed=())
    assert export_store(store, tmp_path / "out", "clip-retrieval", as_is=True).left_out == []
    assert files(import_store(tmp_path / "out", tmp_path / "b.zarr").path) == files(store.path)


def test_clip_retrieval_names_what_it_leaves_out(tmp_path):
    store = make_store(tmp_path / "s.zarr")
    exported = export_store(store, tmp_path / "out", "clip-retrieval")
    assert exported.rows == ROWS - 2
    assert exported.left_out == ["2 failed rows", "all views but the first", "logits", "the lengths of the embeddings"]
    back = import_store(tmp_path / "out", tmp_path / "b.zarr")
    ok = store.ok
    wide = gathered(store)[ok, 0].astype(np.float64)
    np.testing.assert_allclose(back.gather(range(len(back))), wide / np.linalg.norm(wide, axis=1)[:, None], rtol=2**-10)
    np.testing.assert_array_equal(back.labels, store.labels[ok])
    np.testing.assert_array_equal(back.sample_ids, store.sample_ids[ok])
    np.testing.assert_array_equal(back.content, store.content[ok])
    np.testing.assert_array_equal(back.array("view")[:], store.array("view")[:][ok, :1])
    assert back.class_names == store.class_names
    assert back.manifest.encoder.preprocess == store.manifest.encoder.preprocess
    assert back.fingerprint == "f00d+l2"  # it must not pass for the encoder's own output
    export_store(back, tmp_path / "again", "clip-retrieval")
    assert import_store(tmp_path / "again", tmp_path / "c.zarr").fingerprint == "f00d+l2"


@pytest.mark.parametrize("format", [*WHOLE, "clip-retrieval"])
def test_progress_ends_at_all_rows(tmp_path, format):
    seen = []
    store = make_store(tmp_path / "s.zarr", views=1, logits=False, failed=())
    export_store(store, tmp_path / "out", format, progress=lambda done, total: seen.append((done, total)))
    import_store(tmp_path / "out", tmp_path / "b.zarr", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 11), (8, 11), (11, 11)] * 2


# -- other programs read it -------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 3])
def test_numpy_reads_npy(tmp_path, views):
    store = make_store(tmp_path / "s.zarr", views=views)
    export_store(store, tmp_path / "out", "npy")
    load = {
        name: np.load(tmp_path / f"out/{name}.npy") for name in ("embedding", "logits", "label", "state", "content")
    }
    for name in ("embedding", "logits"):
        expected = gathered(store, name)
        np.testing.assert_array_equal(load[name], expected[:, 0] if views == 1 else expected)
        assert load[name].dtype == np.float16
    np.testing.assert_array_equal(load["label"], store.labels)
    np.testing.assert_array_equal(load["state"], store.state)
    np.testing.assert_array_equal(load["content"], store.content)
    lines = (tmp_path / "out/sample_id.txt").read_bytes().decode().split("\n")
    assert lines == [*(i.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for i in IDS), ""]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {name: manifest[name] for name in store.manifest.to_json()} == store.manifest.to_json()


def test_pyarrow_reads_parquet(tmp_path):
    store = make_store(tmp_path / "s.zarr")
    export_store(store, tmp_path / "out.parquet", "parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    for column, field, view in (
        ("embedding", "embedding", 0),
        ("embedding_1", "embedding", 1),
        ("logits_1", "logits", 1),
    ):
        assert table.schema.field(column).type == pa.list_(pa.float16(), *store.manifest.fields[field])
        np.testing.assert_array_equal(np.array(table[column].to_pylist(), np.float16), gathered(store, field)[:, view])
    assert table["sample_id"].to_pylist() == IDS
    assert table["label"].to_pylist() == store.labels.tolist()
    assert table["class_name"].to_pylist() == [[None, "ant", "béé"][i + 1] for i in store.labels]
    assert table["content"].to_pylist() == [row.tobytes() for row in store.content]
    assert table["state"].to_pylist() == store.state.tolist()
    metadata = pq.read_metadata(tmp_path / "out.parquet")
    assert json.loads(metadata.metadata[b"featcache"])["encoder"] == store.manifest.encoder.to_json()
    assert metadata.num_row_groups == store.chunks  # so that a reader can stream it, too


def test_lance_reads_lance(tmp_path):
    lance = pytest.importorskip("lance")
    store = make_store(tmp_path / "s.zarr")
    export_store(store, tmp_path / "out.lance", "lance")
    dataset = lance.dataset(str(tmp_path / "out.lance"))
    table = dataset.to_table()
    for column, field, view in (("embedding", "embedding", 0), ("logits_1", "logits", 1)):
        assert table.schema.field(column).type == pa.list_(pa.float16(), *store.manifest.fields[field])
        np.testing.assert_array_equal(np.array(table[column].to_pylist(), np.float16), gathered(store, field)[:, view])
    assert table["sample_id"].to_pylist() == IDS
    assert table["label"].to_pylist() == store.labels.tolist()
    assert dataset.version == 1
    # What is nearest is what a loop over the vectors finds.
    query = np.asarray(table["embedding"][4].as_py(), np.float32)
    found = dataset.to_table(
        nearest={"column": "embedding", "q": query, "k": 4, "metric": "cosine"},
        columns=["sample_id", "_distance"],
        filter="state = 1",
        prefilter=True,
    )
    ok, vectors = store.ok, gathered(store)[store.ok, 0].astype(np.float64)
    apart = 1 - vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    nearest = np.argsort(apart)[:4]
    assert found["sample_id"].to_pylist() == [IDS[ok[i]] for i in nearest]
    np.testing.assert_allclose(found["_distance"].to_numpy(), apart[nearest], atol=1e-3)  # float16


def test_another_programs_lance_dataset(tmp_path):
    lance = pytest.importorskip("lance")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(floats().ravel()), WIDTH)
    table = pa.table({"embedding": vectors, "label": ["cat", None, *["ant"] * 9], "caption": ["words"] * ROWS})
    lance.write_dataset(table, str(tmp_path / "x"), max_rows_per_file=4)
    store = import_store(tmp_path / "x", tmp_path / "s.zarr", encoder_name="m")
    np.testing.assert_array_equal(store.gather(range(ROWS)), floats().astype(np.float16))
    assert store.labels.tolist() == [1, -1, *[0] * 9]
    lance.dataset(str(tmp_path / "x")).delete("label = 'cat'")
    assert import_store(tmp_path / "x", tmp_path / "t.zarr").labels.tolist() == [-1, *[0] * 9]


def test_a_lance_export_that_was_changed_is_refused(tmp_path):
    lance = pytest.importorskip("lance")
    export_store(make_store(tmp_path / "s.zarr"), tmp_path / "out", "lance")
    dataset = lance.dataset(str(tmp_path / "out"))
    dataset.update({"label": "1"}, where="label = 0")
    with pytest.raises(ValueError, match=r"changed since the export"):
        import_store(tmp_path / "out", tmp_path / "b.zarr")
    dataset.delete("label = 1")
    with pytest.raises(ValueError, match="11 when it was exported; export again"):
        import_store(tmp_path / "out", tmp_path / "b.zarr")
    export_store(tmp_path / "s.zarr", tmp_path / "cut", "lance")
    shutil.rmtree(tmp_path / "cut/data")
    with pytest.raises(ValueError, match="cut: not a whole Lance dataset"):
        import_store(tmp_path / "cut", tmp_path / "b.zarr")
    assert names(tmp_path) == ["cut", "out", "s.zarr"]


def test_without_pylance_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(ValueError, match=r"Lance needs pylance: pip install 'featcache\[lance\]'"):
        export_store(make_store(tmp_path / "s.zarr"), tmp_path / "out", "lance")


@pytest.mark.parametrize("views", [1, 2])
def test_safetensors_reads_safetensors(tmp_path, views):
    store = make_store(tmp_path / "s.zarr", views=views)
    export_store(store, tmp_path / "out.safetensors", "safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    expected = gathered(store)
    np.testing.assert_array_equal(tensors["embedding"], expected[:, 0] if views == 1 else expected)
    np.testing.assert_array_equal(tensors["label"], store.labels)
    np.testing.assert_array_equal(tensors["view"], store.array("view")[:])


@pytest.mark.parametrize("as_is", [False, True])
def test_embedding_reader_reads_clip_retrieval(tmp_path, monkeypatch, as_is):
    """Its rule: files of each folder in text order, and row i of one belongs to row i of the other."""
    monkeypatch.setattr(clip_retrieval, "PART_ROWS", PER_CHUNK)
    (tmp_path / "photos").mkdir()
    store = write_store(
        tmp_path / "s.zarr", np.arange(1, 99).reshape(49, 2), per_chunk=4, failed=dict.fromkeys(range(4, 9), "x")
    )
    export_store(store, tmp_path / "out", "clip-retrieval", as_is=as_is)
    parts, metadata = (sorted(str(p) for p in (tmp_path / "out").glob(f"{kind}/*")) for kind in ("img_emb", "metadata"))
    assert [os.path.basename(p) for p in parts] == [f"img_emb_{i:04d}.npy" for i in range(12)]  # 13 less one all failed
    assert [os.path.basename(p) for p in metadata] == [f"metadata_{i:04d}.parquet" for i in range(12)]
    loaded = [np.load(part) for part in parts]
    described = [pq.read_table(part) for part in metadata]
    assert [len(part) for part in loaded] == [len(part) for part in described]
    expected = gathered(store)[store.ok, 0].astype(np.float32)
    if not as_is:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_array_equal(np.concatenate(loaded), expected.astype(np.float16))
    paths = [path for table in described for path in table["image_path"].to_pylist()]
    assert paths == [str(row) for row in store.ok]
    header = Path(parts[0]).read_bytes()[:300].split(b"\n")[0]  # how embedding-reader parses it
    assert b"'descr': '<f2'" in header
    assert b"'shape': (4, 2)" in header
    back = import_store(tmp_path / "out", tmp_path / "b.zarr")
    np.testing.assert_array_equal(back.gather(range(len(back))), expected.astype(np.float16))


def test_image_paths_lead_to_the_images_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    export_store(make_store(tmp_path / "s.zarr", failed=()), tmp_path / "out", "clip-retrieval")
    table = pq.read_table(tmp_path / "out/metadata/metadata_0000.parquet")
    assert table["image_path"].to_pylist() == [f"photos/{name}" for name in IDS]


# -- what other programs made -----------------------------------------------------------------------------


def floats(dtype=np.float32, rows=ROWS, width=WIDTH, seed=1):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_plain_npy(tmp_path, dtype, order):
    np.save(tmp_path / "x.npy", np.asarray(floats(), dtype, order=order))
    store = import_store(tmp_path / "x.npy", tmp_path / "s.zarr")
    np.testing.assert_array_equal(store.gather(range(ROWS)), floats().astype(np.float16))
    assert store.sample_ids.tolist() == [str(i) for i in range(ROWS)]
    assert set(store.labels) == {-1}
    assert store.verify() == []


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_labels_in_words_follow_the_rule_of_tables(tmp_path, format):
    texts = ["2.0", "10.0", "NA", "nan", " 3 ", "", "-1", "0", "2", "10", "3"]
    if format == "npy":
        (tmp_path / "x").mkdir()
        np.save(tmp_path / "x/embedding.npy", floats())
        np.save(tmp_path / "x/label.npy", np.array(texts))
        source = tmp_path / "x"
    else:
        source = parquet(tmp_path, embedding=list(floats()), label=texts)
    store = import_store(source, tmp_path / "s.zarr", encoder_name="m")
    assert store.labels.tolist() == [2, 10, -1, -1, 3, -1, -1, 0, 2, 10, 3]
    assert store.class_names == [str(number) for number in range(11)]


def test_names_beside_numbers_are_kept(tmp_path):
    """Also where a number is no row's, and a row has neither."""
    given = {"embedding": list(floats()), "label": [3, 1, None, 3, 0], "class_name": ["owl", "bee", None, "owl", "ant"]}
    rows = len(given["embedding"])
    given |= {name: (given[name] * rows)[:rows] for name in ("label", "class_name")}
    store = import_store(parquet(tmp_path, **given), tmp_path / "s.zarr")
    assert list(store.class_names) == ["ant", "bee", "2", "owl"]
    assert store.labels[:5].tolist() == [3, 1, -1, 3, 0]
    given["class_name"][0] = "hen"
    with pytest.raises(ValueError, match="label and class_name name different classes; leave one of the columns out"):
        import_store(parquet(tmp_path, **given), tmp_path / "t.zarr")


def test_a_folder_of_npy_with_labels_and_names(tmp_path):
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x/embedding.npy", floats())
    np.save(tmp_path / "x/label.npy", np.arange(ROWS, dtype=np.uint8))
    (tmp_path / "x/sample_id.txt").write_text("".join(f"c:\\new\\{i}.png\r\n" for i in range(ROWS)), newline="")
    store = import_store(tmp_path / "x", tmp_path / "s.zarr")
    assert store.labels.tolist() == list(range(ROWS))
    assert store.sample_ids[1] == "c:\\new\\1.png"  # only an export escapes


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_parquet_of_lists(tmp_path, kind, dtype, monkeypatch):
    monkeypatch.setattr(featcache.interchange._foreign, "chunk_rows", lambda row_bytes, rows: PER_CHUNK)
    inner = pa.from_numpy_dtype(np.dtype(dtype))
    outer = {"list": pa.list_(inner), "large_list": pa.large_list(inner), "fixed": pa.list_(inner, WIDTH)}[kind]
    table = pa.table(
        {
            "embedding": pa.array(list(floats(dtype)), outer),
            "label": [None, "cat", "ant"] + ["cat"] * 8,
            "image_path": ["p"] * 2 + [f"p{i}" for i in range(9)],
            "caption": ["words"] * ROWS,
        }
    )
    pq.write_table(table, tmp_path / "x", row_group_size=3)  # row groups straddle chunks
    store = import_store(tmp_path / "x", tmp_path / "s.zarr")
    np.testing.assert_array_equal(store.gather(range(ROWS)), floats(dtype).astype(np.float16))
    assert store.class_names == ["ant", "cat"]
    assert store.labels.tolist() == [-1, 1, 0] + [1] * 8
    assert store.sample_ids.tolist() == ["p", "p#2"] + [f"p{i}" for i in range(9)]


def test_whole_numbers_as_pandas_writes_them_with_gaps(tmp_path):
    table = {"embedding": list(floats()), "label": [None, 7.0] + [1.0] * 9, "sample_id": list(range(ROWS))}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    store = import_store(tmp_path / "x.parquet", tmp_path / "s.zarr")
    assert store.labels.tolist() == [-1, 7] + [1] * 9
    assert store.class_names is None
    assert store.sample_ids[3] == "3"


def test_safetensors_of_numpy_and_of_torch_in_bfloat16(tmp_path):
    save_file({"embedding": floats(), "label": np.arange(ROWS), "other": np.ones(3)}, tmp_path / "x.safetensors")
    store = import_store(tmp_path / "x.safetensors", tmp_path / "s.zarr")
    np.testing.assert_array_equal(store.gather(range(ROWS)), floats().astype(np.float16))
    assert store.labels.tolist() == list(range(ROWS))
    rounded = torch.from_numpy(floats()).bfloat16()
    save_torch_file({"embedding": rounded}, tmp_path / "y.safetensors")
    store = import_store(tmp_path / "y.safetensors", tmp_path / "t.zarr")
    np.testing.assert_array_equal(store.gather(range(ROWS)), rounded.half().numpy())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_folder_that_clip_retrieval_wrote(tmp_path, monkeypatch, dtype):
    """12 parts, zero-padded to two digits as it does, image paths and captions, pandas' index in the metadata."""
    pd = pytest.importorskip("pandas")
    monkeypatch.setattr(featcache.interchange._foreign, "chunk_rows", lambda row_bytes, rows: PER_CHUNK)
    parts = [floats(dtype, rows=1 + i % 3, seed=i) for i in range(12)]
    for folder in ("img_emb", "metadata", "text_emb"):
        (tmp_path / "x" / folder).mkdir(parents=True)
    for i, part in enumerate(parts):
        np.save(tmp_path / f"x/img_emb/img_emb_{i:02d}.npy", part)
        described = pd.DataFrame(
            {"image_path": [f"{i}/{j}.jpg" for j in range(len(part))], "caption": ["a"] * len(part)}
        )
        described.to_parquet(tmp_path / f"x/metadata/metadata_{i:02d}.parquet")
    store = import_store(tmp_path / "x", tmp_path / "s.zarr", encoder_name="ViT-B/32")
    np.testing.assert_array_equal(store.gather(range(len(store))), np.concatenate(parts).astype(np.float16))
    assert store.sample_ids.tolist() == [f"{i}/{j}.jpg" for i in range(12) for j in range(1 + i % 3)]
    shutil.rmtree(tmp_path / "x/metadata")
    assert import_store(tmp_path / "x", tmp_path / "t.zarr").sample_ids[-1] == str(len(store) - 1)


def test_stores_compare_when_their_encoder_is_given_the_same_name(tmp_path):
    for name, seed, width in (("bank", 0, 5), ("query", 1, 5), ("wide", 1, 6)):
        np.save(tmp_path / f"{name}.npy", floats(width=width, seed=seed))

    def fingerprint(name, encoder):
        out = tmp_path / f"{name}-{encoder}.zarr"
        store = import_store(tmp_path / f"{name}.npy", out, encoder_name=encoder)
        assert store.encoder_name == (encoder or "imported")
        return open_store(out).fingerprint

    bank = fingerprint("bank", "clip")
    assert bank.startswith("imported:")
    assert fingerprint("query", "clip") == bank
    others = [
        fingerprint("query", "dino"),
        fingerprint("wide", "clip"),
        fingerprint("bank", None),
        fingerprint("query", None),
    ]
    assert len({bank, *others}) == 5
    shutil.copy(tmp_path / "bank.npy", tmp_path / "copy.npy")
    assert fingerprint("copy", None) == others[2]


# -- refusing ---------------------------------------------------------------------------------------------


def array(tmp_path, values):
    np.save(tmp_path / "x.npy", values)
    return tmp_path / "x.npy"


def parquet(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


def spoiled(at, value, rows=ROWS):
    values = floats(np.float64, rows=rows)
    values[at] = value
    return values


def raw(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    return tmp_path / "x"


REFUSED = {
    "NaN": (lambda p: array(p, spoiled((7, 1), np.nan)), "row 7 of embedding holds NaN or infinity; leave such rows out"),
    "inf": (lambda p: array(p, spoiled((3, 0), -np.inf)), "row 3 of embedding holds NaN or infinity"),
    "large": (lambda p: array(p, spoiled((9, 4), 1e39)), "beyond float32 .*; subtract what all rows have in common, or"),
    "integers": (lambda p: array(p, np.ones((4, 2), int)), "embeddings are int64; write them as float16"),
    "complex": (lambda p: array(p, np.ones((4, 2), complex)), "embeddings are complex128"),
    "flat": (lambda p: array(p, np.ones(4)), r"shape \(4,\); give \(rows, dimensions\)"),
    "cube": (lambda p: array(p, np.ones((4, 2, 2))), r"shape \(4, 2, 2\)"),
    "empty": (lambda p: array(p, np.ones((0, 2))), r"shape \(0, 2\); give \(rows, dimensions\), one row at least"),
    "no columns": (lambda p: array(p, np.ones((2, 0))), r"shape \(2, 0\)"),
    "objects": (lambda p: array(p, np.array([[{}]], object)), "pickled objects, which are never opened; save it again"),
    "cut": (lambda p: raw(p, array(p, floats()).read_bytes()[:-9]), "not a whole .npy"),
    "pickle": (lambda p: raw(p, pickle.dumps(floats())), "a pickle or an archive, which is never opened"),
    "text": (lambda p: raw(p, b"1,2,3,4,5,6\n"), "not a file that can be imported; give an export, .*a .npy"),
    "nothing": (lambda p: p / "none", "no such file or folder; give an export"),
    "folder": (lambda p: p, "not a folder that can be imported; give an export, a clip-retrieval folder"),
    "no column": (lambda p: parquet(p, emb=[[1.0]]), "no column `embedding`, only emb; rename"),
    "scalars": (lambda p: parquet(p, embedding=[1.0]), "embedding is double, not lists of floats"),
    "lists of integers": (lambda p: parquet(p, embedding=[[1]]), "embeddings are .*int64"),
    "ragged": (lambda p: parquet(p, embedding=[[1.0], [1.0, 2.0]]), "embeddings of different lengths"),
    "ragged to the same sum": (lambda p: parquet(p, embedding=[[1.0, 2.0], [1.0], [1.0] * 3]), "different lengths"),
    "null row": (lambda p: parquet(p, embedding=[[1.0], None]), "an embedding is null; leave such rows out"),
    "null value": (lambda p: parquet(p, embedding=[[1.0], [None]]), "an embedding is null"),
    "no rows": (lambda p: parquet(p, embedding=pa.array([], pa.list_(pa.float32()))), r"shape \(0, 0\)"),
    "twice": (lambda p: parquet(p, embedding=[[1.0]] * 2, sample_id=["a"] * 2), "'a' stands 2 times; make sample ids unique"),
    "no id": (lambda p: parquet(p, embedding=[[1.0]] * 2, sample_id=["a", None]), "a sample id is missing"),
    "fractions": (lambda p: parquet(p, embedding=[[1.0]], label=[0.5]), "label holds fractions"),
    "cut parquet": (lambda p: raw(p, b"PAR1" + b"\0" * 40), "not a whole parquet file .*; write it again"),
    "cut safetensors": (lambda p: raw(p, (99).to_bytes(8, "little") + b"{}"), "not a whole safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_with_its_name_and_the_remedy(tmp_path, case):
    make, message = REFUSED[case]
    (tmp_path / "in").mkdir()
    src = make(tmp_path / "in")
    with pytest.raises(ValueError, match=message) as refused:
        import_store(src, tmp_path / "s.zarr")
    assert str(refused.value).startswith(str(src))
    assert "\n" not in str(refused.value)
    assert names(tmp_path) == ["in"]


def test_a_tensor_of_another_name_or_kind_is_refused(tmp_path):
    save_file({"features": floats()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no tensor `embedding`, only features; save it under that name"):
        import_store(tmp_path / "x.safetensors", tmp_path / "s.zarr")
    save_file({"embedding": floats(), "label": np.zeros(3, np.int64)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"label has shape \(3,\) for 11 embeddings; give one a row"):
        import_store(tmp_path / "x.safetensors", tmp_path / "s.zarr")


def clip_folder(path, parts=((2, 3), (2, 3)), described=(2, 2)):
    for folder in ("img_emb", "metadata"):
        (path / folder).mkdir(parents=True)
    for i, shape in enumerate(parts):
        np.save(path / f"img_emb/img_emb_{i}.npy", np.ones(shape, np.float16))
    for i, rows in enumerate(described):
        pq.write_table(
            pa.table({"image_path": [f"{i}/{j}" for j in range(rows)]}), path / f"metadata/metadata_{i}.parquet"
        )
    return path


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"described": (2,)}, r"2 \.npy in img_emb, 1 \.parquet in metadata"),
        ({"described": (2, 3)}, r"metadata_1\.parquet: 3 rows, img_emb_1\.npy 2"),
        ({"parts": ((2, 3), (2, 4))}, r"img_emb_1\.npy: 4-d, img_emb_0\.npy 3-d"),
        ({"parts": (), "described": ()}, r"0 \.npy"),
    ],
)
def test_a_clip_retrieval_folder_that_does_not_fit_together_is_refused(tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        import_store(clip_folder(tmp_path / "x", **broken), tmp_path / "s.zarr")


@pytest.mark.parametrize("format", [*WHOLE, "clip-retrieval"])
def test_nothing_is_overwritten(tmp_path, format):
    store = make_store(tmp_path / "s.zarr")
    (tmp_path / "out").write_text("dear")
    for call in (
        lambda: export_store(store, tmp_path / "out", format),
        lambda: import_store(store.path, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="out: already exists; choose another path, or remove it first"):
            call()
    assert (tmp_path / "out").read_text() == "dear"


def test_what_is_no_sealed_store_is_not_exported(tmp_path):
    create_store(tmp_path / "s.zarr", make_store(tmp_path / "t.zarr").manifest)
    for store in (tmp_path / "s.zarr", FeatureStore(tmp_path / "s.zarr")):
        with pytest.raises(ValueError, match="extraction has not finished"):
            export_store(store, tmp_path / "out", "npy")
    with pytest.raises(
        ValueError,
        match="--format csv: unknown; known: clip-retrieval, embedding-atlas, fiftyone, hf-dataset, lance, npy",
    ):
        export_store(tmp_path / "t.zarr", tmp_path / "out", "csv")
    with pytest.raises(ValueError, match="already a Zarr group"):
        import_store(tmp_path / "t.zarr", tmp_path / "out")
    assert names(tmp_path) == ["s.zarr", "t.zarr"]


def test_clip_retrieval_of_nothing_is_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", failed=range(ROWS))
    with pytest.raises(ValueError, match="no row has features; use --format npy, parquet or safetensors"):
        export_store(store, tmp_path / "out", "clip-retrieval")


def test_a_header_too_long_for_safetensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(featcache.interchange.safetensors, "SAFETENSORS_HEADER", 1000)
    with pytest.raises(ValueError, match=r"sample ids take more than the 1,000 bytes .* use --format parquet or npy"):
        export_store(make_store(tmp_path / "s.zarr"), tmp_path / "out", "safetensors")
    assert names(tmp_path) == ["s.zarr"]


@pytest.mark.parametrize("format", [*WHOLE, "clip-retrieval"])
def test_an_export_says_its_encoder_itself(tmp_path, format):
    export_store(make_store(tmp_path / "s.zarr"), tmp_path / "out", format)
    with pytest.raises(ValueError, match=r"which encoder made it \(timm/x\); leave --encoder out"):
        import_store(tmp_path / "out", tmp_path / "b.zarr", encoder_name="mine")


@pytest.mark.parametrize("format", ["parquet", "clip-retrieval"])
def test_without_pyarrow_the_remedy_is_named(tmp_path, monkeypatch, format):
    store = make_store(tmp_path / "s.zarr")
    export_store(store, tmp_path / "out", format)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (
        lambda: export_store(store, tmp_path / "more", format),
        lambda: import_store(tmp_path / "out", tmp_path / "b.zarr"),
    ):
        with pytest.raises(ValueError, match=r"parquet needs pyarrow: pip install 'featcache\[parquet\]'"):
            call()
    assert names(tmp_path) == ["out", "s.zarr"]


# -- damage and interruption ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedding.npy", "content.npy", "sample_id.txt", "state.npy", "view.npy"])
def test_an_export_that_was_changed_is_refused(tmp_path, name):
    export_store(make_store(tmp_path / "s.zarr"), tmp_path / "out", "npy")
    data = bytearray((tmp_path / "out" / name).read_bytes())
    data[-2] ^= 1
    (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name.split('.')[0]} changed since the export; export again"):
        import_store(tmp_path / "out", tmp_path / "b.zarr")
    assert names(tmp_path) == ["out", "s.zarr"]


def test_an_export_that_lost_a_file_or_rows_is_refused(tmp_path):
    export_store(make_store(tmp_path / "s.zarr"), tmp_path / "out", "npy")
    shutil.copytree(tmp_path / "out", tmp_path / "less")
    np.save(tmp_path / "out/content.npy", np.zeros((ROWS, 15), np.uint8))
    with pytest.raises(ValueError, match=r"content is uint8 \(4, 15\), not uint8 \(4, 16\)"):
        import_store(tmp_path / "out", tmp_path / "b.zarr")
    (tmp_path / "out/content.npy").unlink()
    with pytest.raises(ValueError, match="content is missing"):
        import_store(tmp_path / "out", tmp_path / "b.zarr")
    np.save(tmp_path / "less/embedding.npy", np.load(tmp_path / "less/embedding.npy")[1:])
    with pytest.raises(ValueError, match="has shape"):
        import_store(tmp_path / "less", tmp_path / "b.zarr")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: "[]", "damaged"),
        (lambda m: "{", "damaged"),
        (lambda m: json.dumps({**m, "fields": {"embedding": [WIDTH], "../../x": [3]}}), "damaged"),
        (lambda m: json.dumps({**m, "fields": {"embedding": [WIDTH], "state": [3]}}), "damaged"),
        (lambda m: json.dumps({**m, "chunk_rows": 0}), "damaged"),
        (lambda m: json.dumps({**m, "views": {"count": "2"}}), "damaged"),
        (lambda m: json.dumps({**m, "format": 99}), "store format 99, this featcache reads 2"),
        (lambda m: json.dumps({**m, "corpus": {**m["corpus"], "rows": 12}}), "11 rows, 12 when it was exported"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, edit, message):
    export_store(make_store(tmp_path / "s.zarr"), tmp_path / "out", "npy")
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text(edit(json.loads(manifest.read_text())))
    with pytest.raises(ValueError, match=message):
        import_store(tmp_path / "out", tmp_path / "b.zarr")
    assert names(tmp_path) == ["out", "s.zarr"]


@pytest.mark.parametrize("format", [*WHOLE, "clip-retrieval"])
def test_a_damaged_store_is_not_exported(tmp_path, format):
    store = make_store(tmp_path / "s.zarr", failed=())
    chunk = store.path / "embedding/c/2/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-5] + b"12345")
    with pytest.raises(ValueError, match="checksum"):
        export_store(store, tmp_path / "out", format)
    assert names(tmp_path) == ["s.zarr"]


KILLED = """
import os, signal, sys
from featcache.interchange import export_store, import_store

def die(done, total):
    if done > 4:
        os.kill(os.getpid(), signal.SIGKILL)

src, out, format = sys.argv[1:]
if format == "import":
    import_store(src, out, progress=die)
else:
    export_store(src, out, format, progress=die)
"""


@pytest.mark.parametrize("format", ["npy", "import"])
def test_a_kill_leaves_nothing_under_the_name(tmp_path, format):
    store = make_store(tmp_path / "s.zarr", failed=())
    src = store.path
    if format == "import":
        src = export_store(store, tmp_path / "src", "npy").path
    assert warm.run(KILLED, src, tmp_path / "out", format).returncode == -9
    assert not (tmp_path / "out").exists()
    export_store(store, tmp_path / "out", "npy")  # what the kill left is in nobody's way

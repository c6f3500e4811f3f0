"""Fields of any shape and dtype: sequences, maps, single numbers; from a model to a store and back."""

import json

import numpy as np
import pytest
import torch
import zarr
from scipy.special import log_softmax
from torch import nn

import featcache
from featcache import Encoder, Field, open_store, write_store
from featcache.inputs.images import Preprocess
from featcache.rows import Rows
from featcache.store.manifest import Manifest
from featcache.store.top_k import pack, unpack

POSITIONS, CLASSES = 4, 7
FIELDS = {
    "embedding": 3,
    "hidden": (POSITIONS, 3),
    "length": Field((), "int32"),
    "nll": Field((), "float32"),
    "dense": Field((2, 2), "uint8"),
    "token_logits": (POSITIONS, CLASSES),
}
EXACT = {"device": "cpu", "precision": "fp32", "workers": 1, "batch_size": 4, "fields": FIELDS}


class Sequences(nn.Module):
    """Of an image, a made-up sequence of 1 to 4 positions, as long as its colours say."""

    def forward(self, images):
        embedding = images.mean((2, 3)) + 1
        length = (images.flatten(1).sum(1).abs() * 1000).to(torch.int64) % POSITIONS + 1
        filled = torch.arange(POSITIONS) < length[:, None]
        steps = torch.arange(1, POSITIONS + 1)[:, None] * filled[:, :, None]
        return {
            "embedding": embedding,
            "hidden": embedding[:, None] * steps,
            "length": length,
            "nll": embedding[:, 0] / 3,
            "dense": (images[:, 0, :2, :2].abs() * 50).to(torch.uint8),
            "token_logits": (embedding[:, None] @ torch.linspace(-3, 3, 3 * CLASSES).view(3, CLASSES)) * steps,
        }


def encoder(**fields):
    return Encoder(
        name="sequences",
        module=Sequences(),
        preprocess=Preprocess(resize=18, crop=16, size=16),
        fields=FIELDS | fields,
        output="made up",
    )


@pytest.fixture
def folder(make_images):
    return make_images(9)


@pytest.fixture
def store(folder, tmp_path):
    return featcache.extract(folder, encoder(), tmp_path / "s.zarr", **EXACT)


def test_each_is_kept_in_its_own_dtype_and_whole_numbers_are_exact(store, folder):
    assert store.manifest.format == 5
    assert store.manifest.dtypes == {"dense": "uint8", "length": "int32", "nll": "float32"}
    assert store.verify() == []
    rows, group = Rows.of(store), zarr.open_group(store.path, mode="r")
    length, hidden = rows.gather(rows.index, "length"), rows.gather(rows.index, "hidden")
    assert (length.dtype, length.shape, hidden.shape) == (np.int32, (9,), (9, POSITIONS, 3))
    assert group["length"].shape == (9, 1)
    assert 1 <= length.min() < length.max() <= POSITIONS
    np.testing.assert_array_equal(rows.take(rows.index, "length"), length)
    for row, many in enumerate(length):
        assert not hidden[row, many:].any()
        assert hidden[row, :many].all()
    embedding, nll = rows.gather(rows.index), rows.gather(rows.index, "nll")
    assert (nll.dtype, embedding.dtype) == (np.float32, np.float16)
    np.testing.assert_allclose(nll, embedding[:, 0] / 3, rtol=2e-3)
    np.testing.assert_array_equal(hidden[:, 0], embedding)
    for name in FIELDS:
        np.testing.assert_array_equal(store.gather_portable(store.ok, name), store.gather(store.ok, name))


def test_dtype_is_of_the_fields_that_do_not_say_theirs(folder, tmp_path):
    wide = featcache.extract(folder, encoder(), tmp_path / "w.zarr", dtype="float32", **EXACT)
    kept = {name: wide.manifest.dtype(name) for name in ("embedding", "hidden", "length", "dense")}
    assert kept == {"embedding": "float32", "hidden": "float32", "length": "int32", "dense": "uint8"}


def test_a_store_that_was_begun_goes_on_in_the_same_bytes(store, folder, tmp_path):
    def stop(at):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        featcache.extract(folder, encoder(), tmp_path / "t.zarr", progress=stop, **EXACT)
    again = featcache.extract(folder, encoder(), tmp_path / "t.zarr", **EXACT)
    assert again.digest == store.digest


def test_the_largest_of_every_position(store, folder, tmp_path):
    top = featcache.extract(folder, encoder(), tmp_path / "top.zarr", top_k=3, **EXACT)
    assert (top.manifest.top_k, top.manifest.format) == ({"token_logits": 3}, 5)
    whole, found = (each.gather(store.ok, "token_logits").astype(np.float64) for each in (store, top))
    filled = np.arange(POSITIONS) < store.gather(store.ok, "length")[:, None]
    assert not found[~filled].any()
    kept = np.sort(log_softmax(whole[filled], axis=1))
    np.testing.assert_allclose(np.sort(found[filled])[:, -3:], kept[:, -3:], atol=5e-3)
    np.testing.assert_allclose(np.exp(found[filled]).sum(axis=1), 1, atol=3e-3)
    left = np.exp(kept[:, :-3]).sum(axis=1)
    assert top.manifest.extraction.outside_mean == pytest.approx(left.mean(), rel=5e-3)


def test_packed_positions_are_those_of_rows(rng):
    logits = torch.from_numpy(rng.normal(size=(2, 3, 11)).astype(np.float32))
    packed = pack(logits, 4, "float16")
    np.testing.assert_array_equal(packed.reshape(6, -1), pack(logits.flatten(0, 1), 4, "float16"))
    np.testing.assert_array_equal(
        unpack(packed, 11, 4, "float16").reshape(6, 11), unpack(packed.reshape(6, -1), 11, 4, "float16")
    )


def test_what_is_no_such_field_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"gives torch\.float32 as 'nll', no int32; correct `fields`"):
        featcache.extract(folder, encoder(nll=Field((), "int32")), tmp_path / "a.zarr", **EXACT)
    with pytest.raises(ValueError, match="fields name dtype 'float64'; known: float16, float32, uint8"):
        encoder(nll=Field((), "float64"))
    small = encoder(length=Field((), "uint8"))
    small.module.forward = lambda images: Sequences().forward(images) | {"length": torch.full((len(images),), 300)}
    with pytest.raises(ValueError, match=r"gives torch\.int64 as 'length', no uint8"):
        featcache.extract(folder, small, tmp_path / "b.zarr", **EXACT)


def test_an_older_reader_would_not_take_it_for_its_own(store):
    text = (store.path / "zarr.json").read_text()
    assert json.loads(text)["attributes"]["featcache"]["format"] == 5
    (store.path / "zarr.json").write_text(text.replace('"format": 5', '"format": 3'))
    with pytest.raises(ValueError, match="store format 3, this featcache reads 2 to 5"):
        open_store(store.path)


def test_formats_of_stores_without_them_stay(store):
    plain = store.manifest.without("wide_chunk_rows", "sealed").changed(fields={"embedding": [3]}, dtypes={})
    assert [plain.format, plain.changed(dtypes={"embedding": "float32"}).format] == [2, 3]
    logits = plain.changed(fields={"embedding": [3], "logits": [9]}, top_k={"logits": 2})
    assert logits.format == 4
    with pytest.raises(ValueError, match="the 2 largest of length"):
        Manifest.from_json({**store.manifest.to_json(), "top_k": {"length": 2}})


def test_arrays_are_kept_as_they_are(tmp_path, rng):
    fields = {"length": np.arange(4, dtype=np.int64) + 2**40, "nll": rng.normal(size=4).astype(np.float32)}
    made = write_store(tmp_path / "a.zarr", rng.normal(size=(4, 3)), fields=fields)
    for name, values in fields.items():
        np.testing.assert_array_equal(made.gather(np.arange(4), name), values)
        assert made.gather([0], name).dtype == values.dtype
    several = write_store(tmp_path / "v.zarr", rng.normal(size=(4, 2, 3)), fields={"n": np.arange(8).reshape(4, 2)})
    np.testing.assert_array_equal(several.gather([1, 3], "n", 1), [3, 7])


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("nll", np.zeros(4), "nll is float64; give one of float16"),
        ("nll", np.zeros(3, np.float32), r"nll has shape \(3,\), embedding 4 rows of 1"),
        ("nll", np.array(1, np.float32), "embedding 4 rows of 1"),
        ("nll", np.array([0, np.nan, 0, 0], np.float32), "row 1 of nll holds NaN or infinity"),
        ("logits", np.zeros((4, 2), np.float32), "an argument of its own"),
        ("text", np.array(list("abcd")), "text is <U1|text is str"),
    ],
)
def test_arrays_that_are_no_field(tmp_path, rng, name, values, match):
    with pytest.raises(ValueError, match=match):
        write_store(tmp_path / "a.zarr", rng.normal(size=(4, 3)), fields={name: values})
    assert not (tmp_path / "a.zarr").exists()


def test_joined_fields_keep_their_shape_and_whole_numbers(store, tmp_path, rng):
    fields = {"weight": np.linspace(0, 1, 9, dtype=np.float32), "length": np.arange(9)}
    ids = [str(each) for each in store.sample_ids]
    other = write_store(tmp_path / "o.zarr", rng.normal(size=(9, 3)), fields=fields, sample_ids=ids)
    given = {"take": ["embedding+length+hidden+dense", "weight"]}
    made = featcache.derive("join", [store, other], tmp_path / "j.zarr", dtype="float16", **given)
    assert made.manifest.dtypes == {"length": "int32", "dense": "uint8"}
    for name in ("length", "hidden", "dense"):
        np.testing.assert_array_equal(made.gather(made.ok, name), store.gather(store.ok, name))
    np.testing.assert_allclose(made.gather(made.ok, "weight"), fields["weight"], atol=1e-3)
    with pytest.raises(ValueError, match="length is one number a sample, or whole numbers: take it of one of"):
        featcache.derive("join", [store, other], tmp_path / "k.zarr", take=["embedding+length"])

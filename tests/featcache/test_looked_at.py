"""What is exported to be looked at: embedding-atlas and FiftyOne, in their own programs where those are installed."""

import base64
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featcache
from featcache.inputs.images import KeptPixels
from featcache.interchange import Pictures, embedding_atlas, export_store, import_store
from featcache.interchange.embedding_atlas import nearest, principal_plane
from featcache.store.from_arrays import write_store

pq = pytest.importorskip("pyarrow.parquet")

IDS = ["ant/b\"'.png", "ant/ü, 1.jpg", "bee/broken.png", "bee/d.tif", "bee/日本.png"]
OK = [0, 1, 3, 4]
LOST = ["1 failed rows", "all views but the first", "logits"]


@pytest.fixture
def photos(tmp_path) -> Path:
    drawn = np.random.default_rng(0)
    for name, mode in zip(IDS, ["RGB", "CMYK", "", "L", "RGBA"], strict=True):
        path = tmp_path / "my photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if mode:
            Image.fromarray(drawn.integers(0, 256, (30, 300, 3), np.uint8)).convert(mode).save(path)
        else:
            path.write_bytes(b"\x89PNG and no more")
    return tmp_path / "my photos"


def extracted(photos, encoder, out, **options):
    return featcache.extract(str(photos), encoder, out, device="cpu", precision="fp32", max_failures=1, **options)


@pytest.fixture
def store(tmp_path, photos, encoder):
    return extracted(photos, encoder, tmp_path / "s.zarr", views=2, augment="rrc", fields=["embedding", "logits"])


# -- embedding-atlas --------------------------------------------------------------------------------------


def test_the_atlas_has_map_neighbours_and_small_images(tmp_path, store, photos):
    exported = export_store(store, tmp_path / "a b.parquet", "embedding-atlas")
    assert (exported.rows, exported.left_out) == (4, LOST)
    assert exported.opened_by == (
        f"embedding-atlas '{tmp_path}/a b.parquet' --x projection_x --y projection_y --neighbors neighbors "
        "--text class_name --image image"
    )
    table = pq.read_table(exported.path).to_pydict()
    assert table["sample_id"] == [IDS[i] for i in OK]
    assert (table["label"], table["class_name"]) == ([0, 0, 1, 1], ["ant", "ant", "bee", "bee"])
    vectors = store.gather(OK).astype(np.float64)
    np.testing.assert_array_equal(table["embedding"], vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row, found in enumerate(table["neighbors"]):
        apart = {other: 1 - unit[row] @ unit[other] for other in range(4) if other != row}
        assert found["ids"] == sorted(apart, key=apart.__getitem__)
        np.testing.assert_allclose(found["distances"], sorted(apart.values()), atol=1e-6)
    for name, image in zip(table["sample_id"], table["image"], strict=True):
        assert image["path"] == name
        small = Image.open(io.BytesIO(image["bytes"]))
        assert (small.format, small.size) == ("JPEG", (160, 16))
        with Image.open(photos / name) as whole:
            difference = np.asarray(whole.convert("RGB").resize((10, 1)), float) - np.asarray(small.resize((10, 1)))
        assert np.abs(difference).max() < 12


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_what_is_made_of_an_image_is_its_pixels_alone(tmp_path, encoder, name):
    """Neither EXIF, which says where and when, nor a comment, nor a colour profile, which a program would apply."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "my secret", 3
    image, said = Image.new("RGB", (8, 8), (200, 9, 9)), {"exif": exif, "icc_profile": b"my secret profile"}
    image.putpixel((0, 0), (0, 0, 255))
    (tmp_path / "photos/a").mkdir(parents=True)
    image.save(tmp_path / "photos/a" / name, **said, **({"comment": b"my secret"} if name == "a.jpg" else {}))
    store = extracted(tmp_path / "photos", encoder, tmp_path / "s.zarr")
    pictures = Pictures(store, None)
    made = [pictures.thumbnail(0, 8), *([pictures.shown(0)[0]] if name == "a.tif" else [])]
    for each in made:
        assert b"secret" not in each
        small = Image.open(io.BytesIO(each))
        assert not {"exif", "icc_profile", "comment"} & small.info.keys()
        assert np.asarray(small)[7, 7, 2] > np.asarray(small)[0, 0, 2], "it stays upright"


def test_the_plane_is_that_of_singular_values(rng):
    rows = rng.normal(size=(40, 6)).astype(np.float32) * [9, 1, 5, 1, 1, 1]
    rows = rows.astype(np.float32)
    left, values, _ = np.linalg.svd(rows.astype(np.float64) - rows.mean(axis=0), full_matrices=False)
    found = principal_plane(rows)
    np.testing.assert_allclose(np.abs(found), np.abs(left[:, :2] * values[:2]), atol=1e-3)
    assert principal_plane(rows[:1]).tolist() == [[0, 0]]
    assert (principal_plane(rows[:, :1])[:, 1] == 0).all()


def test_neighbours_are_those_of_a_loop_whatever_the_block(rng, monkeypatch):
    rows = rng.normal(size=(23, 4)).astype(np.float32)
    rows[7] = rows[3]  # twins: each other's nearest
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ids, apart = nearest(rows, 5)
    for row in range(23):
        exact = 1 - rows.astype(np.float64) @ rows[row]
        exact[row] = np.inf
        np.testing.assert_allclose(apart[row], np.sort(exact)[:5], atol=1e-6)
        np.testing.assert_allclose(exact[ids[row]], np.sort(exact)[:5], atol=1e-6)
        assert row not in ids[row]
    assert (ids[3, 0], ids[7, 0]) == (7, 3)
    monkeypatch.setattr(embedding_atlas, "_PAIRS", 60)
    np.testing.assert_array_equal(nearest(rows, 5)[0], ids)
    assert nearest(rows[:1], 5)[0].shape == (1, 0)


def test_without_images_or_with_too_many_rows_it_says_so(tmp_path, store, monkeypatch):
    monkeypatch.setattr(embedding_atlas, "MOST", 3)
    exported = export_store(store, tmp_path / "a.parquet", "embedding-atlas", images="none")
    assert exported.left_out == [*LOST, "the images", "neighbours (of more than 3 rows)"]
    assert "--image" not in exported.opened_by
    assert "--neighbors" not in exported.opened_by
    assert not {"image", "neighbors"} & {*pq.read_schema(exported.path).names}


def test_embeddings_and_labels_of_an_atlas_come_back_as_of_any_parquet(tmp_path, store):
    exported = export_store(store, tmp_path / "a.parquet", "embedding-atlas")
    back = import_store(exported.path, tmp_path / "b.zarr", encoder_name="mine")
    np.testing.assert_array_equal(back.gather(range(4)), store.gather(OK))
    assert back.labels.tolist() == [0, 0, 1, 1]
    assert back.sample_ids.tolist() == [IDS[i] for i in OK]


def test_an_atlas_is_what_ends_with_parquet(tmp_path, store):
    with pytest.raises(ValueError, match=r"a: what embedding-atlas opens ends with .parquet; give .*a\.parquet"):
        export_store(store, tmp_path / "a", "embedding-atlas")


def free_port() -> int:
    with closing(socket.socket()) as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def test_the_real_embedding_atlas_serves_it(tmp_path, store):
    pytest.importorskip("embedding_atlas")
    exported = export_store(store, tmp_path / "a b.parquet", "embedding-atlas")
    port = free_port()
    command = [sys.executable, "-m", "embedding_atlas.cli", *shlex.split(exported.opened_by)[1:], "--host", "127.0.0.1"]
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        try:

            def asked(path, body=None):
                data = None if body is None else json.dumps(body).encode()
                return json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/data/{path}", data, timeout=60))

            for _ in range(600):
                assert server.poll() is None, server.stderr.read().decode()
                try:
                    props = asked("metadata.json")["props"]["data"]
                    break
                except OSError:
                    time.sleep(0.2)
            assert props["projection"] == {"x": "projection_x", "y": "projection_y"}
            assert (props["neighbors"], props["image"], props["text"]) == ("neighbors", "image", "class_name")
            sql = (
                "select sample_id, len(embedding) d, neighbors.ids[1] n, octet_length(image.bytes) b from dataset "
                "order by __row_index__"
            )
            rows = asked("query", {"type": "json", "sql": sql})
            table = pq.read_table(exported.path).to_pydict()
            assert [row["sample_id"] for row in rows] == table["sample_id"]
            assert [row["n"] for row in rows] == [each["ids"][0] for each in table["neighbors"]]
            assert [row["b"] for row in rows] == [len(each["bytes"]) for each in table["image"]]
            assert {row["d"] for row in rows} == {6}
        finally:
            server.terminate()


# -- FiftyOne ---------------------------------------------------------------------------------------------


def samples_of(folder):
    return json.loads((folder / "samples.json").read_text())["samples"]


def vector(sample):
    return np.load(io.BytesIO(zlib.decompress(base64.b64decode(sample["embedding"]["$binary"]["base64"]))))


def test_fiftyone_is_pointed_to_the_files(tmp_path, store, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported = export_store(store, "fo", "fiftyone", images="my photos")
    assert (exported.rows, exported.left_out) == (4, LOST)
    assert exported.opened_by == (
        "fiftyone.Dataset.from_dir('fo', dataset_type=fiftyone.types.FiftyOneDataset), in Python"
    )
    samples = samples_of(tmp_path / "fo")
    assert [sample["filepath"] for sample in samples] == [str(photos / IDS[i]) for i in OK]
    assert [(sample["sample_id"], sample["row"]) for sample in samples] == [(IDS[i], i) for i in OK]
    assert [sample["ground_truth"]["label"] for sample in samples] == ["ant", "ant", "bee", "bee"]
    np.testing.assert_array_equal([vector(sample) for sample in samples], store.gather(OK).astype(np.float32))
    metadata = json.loads((tmp_path / "fo/metadata.json").read_text())
    assert "version" not in metadata  # which would bind it to a FiftyOne of one age
    assert metadata["info"]["fingerprint"] == store.fingerprint
    assert not (tmp_path / "fo/data").exists()


def test_kept_images_are_written_beside(tmp_path, photos, encoder):
    store = extracted(photos, encoder, tmp_path / "s.zarr", pixels=KeptPixels(size=16, format="raw"))
    for name in IDS:
        (photos / name).unlink()
    export_store(store, tmp_path / "fo", "fiftyone")
    for row, sample in zip(OK, samples_of(tmp_path / "fo"), strict=True):
        assert sample["filepath"] == f"data/{row:08d}.png"
        with Image.open(tmp_path / "fo" / sample["filepath"]) as image:
            assert (image.format, image.size) == ("PNG", (160, 16))


def test_rows_without_a_label_or_a_name(tmp_path, photos):
    for name, classes, labels, expected in (("a", ["x"], [0, -1], ["x", None]), ("b", None, [3, -1], ["3", None])):
        store = write_store(
            tmp_path / f"{name}.zarr", np.eye(2), labels=labels, class_names=classes, sample_ids=IDS[:2]
        )
        export_store(store, tmp_path / name, "fiftyone", images=str(photos))
        found = [sample["ground_truth"] and sample["ground_truth"]["label"] for sample in samples_of(tmp_path / name)]
        assert found == expected


OPEN = """
import sys, fiftyone, numpy
dataset = fiftyone.Dataset.from_dir(sys.argv[1], dataset_type=fiftyone.types.FiftyOneDataset)
print("\\n".join(dataset.values("filepath")))
numpy.save(sys.argv[2], numpy.stack(dataset.values("embedding")))
print(dataset.count_values("ground_truth.label"), dataset.info["encoder"], dataset.media_type)
"""


def test_the_real_fiftyone_opens_it(tmp_path, store, photos):
    pytest.importorskip("fiftyone")
    if "FIFTYONE_DATABASE_URI" not in os.environ:
        pytest.skip("needs FIFTYONE_DATABASE_URI, a MongoDB's")
    export_store(store, tmp_path / "fo", "fiftyone")
    command = [sys.executable, "-c", OPEN, tmp_path / "fo", tmp_path / "x.npy"]
    opened = subprocess.run(command, check=False, capture_output=True, text=True)
    assert opened.returncode == 0, opened.stderr
    *paths, last = opened.stdout.splitlines()[-5:]
    assert paths == [str(photos / IDS[i]) for i in OK]
    assert last == f"{{'ant': 2, 'bee': 2}} {store.encoder_name} image"
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), store.gather(OK))


# -- images that are not those of the store ---------------------------------------------------------------


@pytest.mark.parametrize(("format", "out"), [("embedding-atlas", "a.parquet"), ("fiftyone", "a")])
def test_images_are_those_of_the_store_or_it_is_refused(tmp_path, store, photos, format, out):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            export_store(store, tmp_path / out, format, **options)
        assert not (tmp_path / out).exists()

    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other/x.png")
    refused(
        r"other: 4 of 4 samples of .* are not in it .*; give the corpus that was extracted",
        images=str(tmp_path / "other"),
    )
    refused("no such", images=str(tmp_path / "none here"))
    whole = (photos / IDS[3]).read_bytes()
    Image.new("L", (9, 9)).save(photos / IDS[3])
    refused(r"bee/d.tif is not the image that was extracted; give the images that .* was made of as --images")
    (photos / IDS[3]).write_bytes(b"II*")
    refused(r"bee/d.tif is not the image that was extracted")
    (photos / IDS[3]).write_bytes(whole)
    photos.rename(tmp_path / "moved")
    refused(r"images that it was made of cannot be opened .*; give them as --images CORPUS, or --images none")
    export_store(store, tmp_path / out, format, images=str(tmp_path / "moved"))


def test_other_formats_take_no_images_and_fiftyone_needs_them(tmp_path, store):
    with pytest.raises(ValueError, match="--images: npy shows no images; leave it out"):
        export_store(store, tmp_path / "a", "npy", images="photos")
    with pytest.raises(ValueError, match="--images none: fiftyone is made of images; give the corpus that has them"):
        export_store(store, tmp_path / "a", "fiftyone", images="none")
    arrays = write_store(tmp_path / "t.zarr", np.eye(2))
    with pytest.raises(ValueError, match="does not say which images it was made of; give them as --images CORPUS"):
        export_store(arrays, tmp_path / "a", "fiftyone")


def test_what_is_to_be_looked_at_is_not_imported(tmp_path, store):
    export_store(store, tmp_path / "fo", "fiftyone")
    with pytest.raises(ValueError, match="not a folder that can be imported"):
        import_store(tmp_path / "fo", tmp_path / "b.zarr")

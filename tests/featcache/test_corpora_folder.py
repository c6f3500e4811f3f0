"""A folder as it lies on disk: names that are not UTF-8, links back into itself, colons, images that cannot be read."""

import io
import os
import sys

import pytest
from PIL import Image
from tiny import tiny_encoder

from featcache import extract, open_corpus, open_store

EXACT = {"device": "cpu", "precision": "fp32", "workers": 2}

linux_names = pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")


def image(colour=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder_of(tmp_path):
    """`folder_of(name, …)`: a folder of images under these names, str or bytes, each of its own colour; its path."""

    def make(*names):
        for colour, name in enumerate(names):
            path = os.path.join(os.fsencode(tmp_path), b"in", os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(image(colour))
        return str(tmp_path / "in")

    return make


# -- names that are not UTF-8 ---------------------------------------------------------------------------


@linux_names
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_bytes_that_are_not_utf8_are_escaped_in_ids_and_class_names(folder_of, scheme):
    corpus = open_corpus(scheme + folder_of(b"cat/bad\xff.png", b"do\xe9/\xc3\xa9.png", "owl/plain.png"))
    assert corpus.ids == [r"cat/bad\xff.png", r"do\xe9/é.png", "owl/plain.png"]
    assert corpus.class_names == ["cat", r"do\xe9", "owl"]
    assert [(corpus.label(i), corpus.read(i)) for i in range(3)] == [(i, image(i)) for i in range(3)]


@linux_names
def test_a_file_whose_name_is_not_utf8_is_an_ordinary_row(folder_of, tmp_path):
    extract(folder_of("cat/plain.png", b"d\xff/bad\xff.png"), tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    store = open_store(tmp_path / "s.zarr")
    assert list(store.sample_ids) == ["cat/plain.png", r"d\xff/bad\xff.png"]
    assert store.class_names == ["cat", r"d\xff"]
    assert store.ok.tolist() == [0, 1]
    assert store.verify() == []


@linux_names
@pytest.mark.parametrize("names", [(b"a/x\xff.png", rb"a/x\xff.png"), (b"x\xff/1.png", rb"x\xff/2.png")])
def test_names_that_would_be_written_the_same_are_refused(folder_of, names):
    with pytest.raises(ValueError, match=r"in: two names in it would both be written .*x\\xff.*; rename one of them"):
        open_corpus(folder_of(*names))


# -- links ----------------------------------------------------------------------------------------------


def test_a_link_back_to_a_folder_above_is_not_entered_and_is_named_once(folder_of, tmp_path, caplog):
    folder = folder_of("a/1.png", "a/b/2.png", "c/3.png")
    os.symlink("../../a", f"{folder}/a/b/up")
    os.symlink(folder, f"{folder}/c/top")
    for _ in range(2):
        assert open_corpus(folder).ids == ["a/1.png", "a/b/2.png", "c/3.png"]
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"{folder}/a/b/up: leads back to {folder}/a, inside which it lies; it is not entered again",
        f"{folder}/c/top: leads back to {folder}, inside which it lies; it is not entered again",
    ]


def test_other_links_to_folders_are_followed(folder_of, tmp_path, caplog):
    folder = folder_of("a/1.png", "b/2.png")
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/3.png").write_bytes(image(3))
    os.symlink(tmp_path / "elsewhere", f"{folder}/linked")
    os.symlink("../a", f"{folder}/b/sibling")
    assert open_corpus(folder).ids == ["a/1.png", "b/2.png", "b/sibling/1.png", "linked/deep/3.png"]
    assert not caplog.records


def test_a_folder_that_links_lead_out_of_and_into_again_is_entered_once(folder_of, tmp_path, caplog):
    folder = folder_of("a/1.png")
    (tmp_path / "2.png").write_bytes(image())
    os.symlink(tmp_path, f"{folder}/out")
    assert open_corpus(folder).ids == ["a/1.png", "out/2.png"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"{folder}/out/in"]


# -- colons ---------------------------------------------------------------------------------------------


def test_a_folder_with_a_colon_in_its_name_is_told_how_to_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos2024:a").mkdir()
    (tmp_path / "photos2024:a/1.png").write_bytes(image())
    with pytest.raises(
        ValueError, match=r"unknown kind of corpus 'photos2024' \(for a folder .* (\./photos2024:a)\)"
    ) as e:
        open_corpus("photos2024:a")
    assert "known: " in str(e.value)
    assert open_corpus("./photos2024:a").ids == ["1.png"]
    with pytest.raises(ValueError, match=r"unknown kind of corpus 'digit' .*; did you mean digits\?"):
        open_corpus("mixed:4:digit:test")


# -- images that cannot be read -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # Pillow's, beside the error that counts
def test_truncated_and_rangeless_images_are_failed_rows_with_a_reason(folder_of, tmp_path, rng):
    folder, noise = folder_of("0.png"), Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype="uint8"))
    for kind in ("png", "webp", "bmp", "tiff"):
        for percent in (10, 60, 95):
            file = io.BytesIO()
            noise.save(file, kind)
            whole = file.getvalue()
            (tmp_path / f"in/{kind}-{percent}.{kind}").write_bytes(whole[: len(whole) * percent // 100])
    for name, kind in (("float", "float32"), ("long", "int32")):
        Image.fromarray(rng.integers(0, 256, (8, 8)).astype(kind)).save(f"{folder}/{name}.tiff")
    store = extract(folder, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    assert [store.sample_ids[row] for row in store.ok] == ["0.png"]
    truncated = {name: reason for name, reason in store.reasons.items() if "-" in name}
    assert len(truncated) == 12
    assert all("truncated" in said or "could not create decoder" in said for said in truncated.values()), truncated
    assert store.reasons["float.tiff"].startswith("ValueError: floating-point pixels have no agreed range; convert")
    assert store.reasons["long.tiff"].startswith("ValueError: 32-bit integer pixels have no agreed range; convert")

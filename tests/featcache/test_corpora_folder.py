"""A folder as it lies on disk: names that are not UTF-8, links back into itself, colons, images that cannot be read."""

import errno
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from tiny import tiny_encoder

from featcache import extract, open_corpus, open_store
from featcache.inputs.images import known_formats

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


# -- what is passed over --------------------------------------------------------------------------------


def encoded(kind):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 8, 7)).save(file, kind)
    return file.getvalue()


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


SUFFIXES = {
    "avif": "avif", "gif": "gif", "jfif": "jpeg", "jpe": "jpeg", "jp2": "jpeg2000", "j2k": "jpeg2000", "tga": "tga",
    "pbm": "ppm", "dib": "dib", "JPG": "jpeg", "apng": "png", "mpo": "jpeg",
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_what_pillow_reads_is_an_image_and_the_rest_is_counted(tmp_path, scheme):
    images = {f"a/{suffix}.{suffix}": encoded(kind) for suffix, kind in SUFFIXES.items()}
    images |= {
        f"b/{kind}": encoded(kind)
        for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "jpeg2000", "ppm", "qoi")
    }
    images |= {"b/x.jpg_large": encoded("jpeg"), "b/1.part": encoded("png"), "b/broken.jpg": b"no image"}
    others = {
        "a/notes.txt": b"text", "b/more.TXT": b"", "b/labels": b"P. Smith", "b/BMWs": b"BMW is a car maker", "b/void": b"",
        "b/raw.nef": encoded("tiff"), "b/named.json": encoded("png"), "b/x.heic": b"\0\0\0\x18ftypheic", ".DS_Store": b"x",
        "b/._jpeg.jpg": b"x", ".git/objects/1.png": encoded("png"), "c/Thumbs.db": b"x",
    }  # fmt: skip
    if "HEIF" in known_formats():
        images["b/x.heic"] = others.pop("b/x.heic")
    folder = write(tmp_path / "in", images | others)
    if scheme == "memory://":
        import fsspec

        folder = f"/{tmp_path.name}-{scheme[:3]}"
        for name, data in (images | others).items():
            fsspec.filesystem("memory").pipe(f"{folder}/{name}", data)
        folder = folder[1:]
    corpus = open_corpus(scheme + folder)
    assert corpus.ids == sorted(images)
    expected = {
        ".txt files": 2, "files without a suffix": 3, ".nef files": 1, ".json files": 1, ".db files": 1,
        ".heic files (to read them: pip install pillow-heif)": 1, "hidden files and folders": 3,
    }  # fmt: skip
    if "HEIF" in known_formats():
        del expected[".heic files (to read them: pip install pillow-heif)"]
    assert dict(corpus.passed_over) == expected | ({} if scheme == "memory://" else {"class folders without images": 1})
    assert corpus.read(corpus.ids.index("b/png")) == encoded("png")


def test_existing_suffixes_keep_their_rows(folder_of):
    names = [
        f"a/{i}.{suffix}"
        for i, suffix in enumerate(["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "JPG"])
    ]
    assert open_corpus(folder_of(*names)).ids == names


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_pipes_sockets_and_devices_are_never_opened(folder_of, scheme):
    folder = folder_of("a/1.png")
    os.mkfifo(f"{folder}/a/p.jpg")
    os.mkfifo(f"{folder}/a/pipe")
    os.symlink("/dev/zero", f"{folder}/a/zero.png")
    os.symlink(f"{folder}/a/p.jpg", f"{folder}/a/link.png")
    corpus = open_corpus(scheme + folder)
    assert (corpus.ids, dict(corpus.passed_over)) == (["a/1.png"], {"pipes, sockets and devices": 4})
    os.unlink(f"{folder}/a/1.png")
    os.mkfifo(f"{folder}/a/1.png")  # meanwhile
    with pytest.raises(OSError, match="a pipe, a socket or a device"):
        corpus.read(0)


def test_links_to_nothing_that_are_called_images_fail_as_rows(folder_of, tmp_path):
    folder = folder_of("a/1.png")
    for name, target in (("gone.png", "nowhere"), ("self.png", "self.png"), ("gone", "nowhere"), ("self", "self")):
        os.symlink(target, f"{folder}/a/{name}")
    corpus = open_corpus(folder)
    assert (corpus.ids, dict(corpus.passed_over)) == (
        ["a/1.png", "a/gone.png", "a/self.png"],
        {"files without a suffix": 2},
    )
    store = extract(folder, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    assert set(store.reasons) == {"a/gone.png", "a/self.png"}
    assert store.manifest.corpus.passed_over == {"files without a suffix": 2}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("scheme", ["", "file://", "other://"])
def test_a_folder_that_cannot_be_listed_stops(folder_of, monkeypatch, scheme, number):
    folder, scandir, ls = folder_of("a/1.png", "b/deep/2.png"), os.scandir, LocalFileSystem.ls

    def refuse(path, *given, **named):
        if str(path).rstrip("/").endswith("deep"):
            raise OSError(number, os.strerror(number), str(path))
        return given[0](path) if given and callable(given[0]) else scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    if scheme == "other://":  # another service that is listed folder by folder

        class Other(LocalFileSystem):
            protocol = "other"

            def ls(self, path, detail=False, **named):
                return refuse(path, lambda path: ls(self, path, detail=detail))

            @classmethod
            def _strip_protocol(cls, path):
                return LocalFileSystem._strip_protocol(str(path).removeprefix("other://"))

        monkeypatch.setattr(os, "scandir", scandir)
        fsspec.register_implementation("other", Other, clobber=True)
    with pytest.raises((OSError, ValueError), match=r"(in/b/deep|in): cannot be listed \("):
        open_corpus(scheme + folder)


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="needs another user to become")
def test_what_another_user_has_closed_stops():
    folder = Path(tempfile.mkdtemp(prefix="open-to-all-"))
    try:
        write(folder, {"a/1.png": image(), "b/2.png": image(), "a/unclear": image(), "a/closed.png": image()})
        os.chmod(folder, 0o755)
        os.chmod(folder / "b", 0)
        os.seteuid(65534)
        with pytest.raises(
            OSError, match=r"/b: cannot be listed \(Permission denied\), so images would be missing; make it"
        ):
            open_corpus(str(folder))
        os.seteuid(0)
        os.chmod(folder / "b", 0o755)
        os.chmod(folder / "a/unclear", 0)
        os.chmod(folder / "a/closed.png", 0)
        os.seteuid(65534)
        with pytest.raises(
            OSError, match=r"a/unclear: cannot be read .*, and its name does not say whether it is an image"
        ):
            open_corpus(str(folder))
        os.seteuid(0)
        (folder / "a/unclear").unlink()
        os.seteuid(65534)
        corpus = open_corpus(str(folder))  # closed.png fails as a row
        assert corpus.ids == ["a/1.png", "a/closed.png", "b/2.png"]
        with pytest.raises(PermissionError):
            corpus.read(1)
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photo.jpg", "photo.jpg: a single image; give the folder that it lies in"),
        ("photos.zip", "photos.zip: an archive; unpack it"),
        ("photos.tar", "photos.tar: no such folder; open it as wds:.*photos.tar"),
        ("list.jsonl", "list.jsonl: no folder; give a directory of images, a .csv"),
    ],
)
def test_a_file_that_is_no_corpus_is_told_what_works(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{name}", b"x")
    for path in (str(tmp_path / name), f"memory://{tmp_path.name}/{name}"):
        with pytest.raises(ValueError, match=message):
            open_corpus(path)


def test_folders_of_other_things_are_told_what_works(tmp_path):
    for name, data, message in [
        ("shards", {"0.tar": b"x", "1.tar": b"x"}, r"but shards: open them as 'wds:.*shards/\*\.tar'"),
        ("tables", {"train.parquet": b"x"}, "but .parquet files: open them as hf:.*tables"),
        ("store", {"zarr.json": b"{}"}, "it is a store: the images that it keeps are store:.*store"),
        ("texts", {"a.txt": b"x", "b.txt": b"x"}, r"passed over: \.txt files \(2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_corpus(write(tmp_path / name, data))

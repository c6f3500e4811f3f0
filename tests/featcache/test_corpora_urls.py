"""A folder at a URL is the same corpus as the same folder on disk; S3 is spoken with a real server on loopback."""

import importlib
import socket
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from PIL import Image

from featcache.corpora import open_corpus

NAMES = ["b/2.png", "b/1.JPG", "a/deep/er/0.png", "loose.webp", "a/notes.txt", ".hidden/1.png", "b/._1.png"]


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(NAMES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def memory(folder):
    fsspec.filesystem("memory").put(f"{folder}/", "/urls-test/photos/", recursive=True)
    return "memory://urls-test/photos"


@pytest.fixture
def s3(folder, s3_bucket):
    fsspec.filesystem("s3").put(f"{folder}/", f"{s3_bucket}/photos/", recursive=True)
    return f"{s3_bucket}/photos"


def open_bytes(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture(params=["memory", "s3", "file"])
def url(request, folder):
    return f"file://{folder}" if request.param == "file" else request.getfixturevalue(request.param)


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_folder_at_a_url_is_the_folder(url, ending, folder):
    local, remote = open_corpus(str(folder)), open_corpus(url + ending)
    assert remote.ids == local.ids == ["a/deep/er/0.png", "b/1.JPG", "b/2.png", "loose.webp"]
    assert remote.class_names == local.class_names
    assert [remote.label(i) for i in range(4)] == [local.label(i) for i in range(4)]
    assert [remote.read(i) for i in (3, 0, 2, 1)] == [local.read(i) for i in (3, 0, 2, 1)]
    assert remote.spec == url + ending


def test_a_manifest_may_list_what_lies_in_a_bucket(s3, folder, tmp_path):
    (tmp_path / "m.csv").write_text(f"path,label\n{s3}/b/2.png,b\n{folder}/loose.webp,loose\n")
    corpus = open_corpus(str(tmp_path / "m.csv"))
    assert [corpus.read(i) for i in range(2)] == [open_bytes(folder / "b/2.png"), open_bytes(folder / "loose.webp")]


def test_a_bucket_is_read_from_many_threads(s3, folder):
    local, remote = open_corpus(str(folder)), open_corpus(s3)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(remote.read, [0, 1, 2, 3] * 8)) == [local.read(i) for i in range(4)] * 8


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://urls-test/nowhere", "no such folder, or an empty one"),
        ("nosuch://bucket/photos", r"Protocol not known: nosuch; give a local path or an address"),
    ],
)
def test_what_is_not_there_is_refused_with_the_remedy(url, message):
    with pytest.raises(ValueError, match=message):
        open_corpus(url)


def test_a_folder_without_images_is_refused():
    fsspec.filesystem("memory").pipe("/urls-test/text/a.txt", b"")
    with pytest.raises(ValueError, match=r"no images in this folder \(looked for"):
        open_corpus("memory://urls-test/text")


def test_a_bucket_that_is_not_there_is_one_clear_line(s3):
    with pytest.raises(ValueError, match=r"s3://nobucket/photos: (no such folder|cannot be listed \()") as refusal:
        open_corpus("s3://nobucket/photos")
    assert "\n" not in str(refusal.value)


def test_a_missing_image_and_a_lost_connection_are_told_apart(memory, monkeypatch):
    corpus, filesystem = open_corpus(memory), fsspec.filesystem("memory")
    filesystem.rm("/urls-test/photos/b/1.JPG")
    with pytest.raises(FileNotFoundError):
        corpus.read(1)

    def lose(*given, **named):
        raise RuntimeError("token\nexpired")

    monkeypatch.setattr(type(filesystem), "cat_file", lose)
    with pytest.raises(ConnectionError, match=r"b/2\.png: RuntimeError: token expired"):
        corpus.read(2)


def test_a_server_that_goes_away_is_a_lost_connection(folder, s3):
    corpus = open_corpus(s3)
    _, root = corpus._remote
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    gone = fsspec.filesystem(
        "s3", endpoint_url=closed, config_kwargs={"retries": {"max_attempts": 1}}, skip_instance_cache=True
    )
    gone.retries = 1
    corpus._remote = (gone, root)
    with pytest.raises(ConnectionError):
        corpus.read(0)


def test_without_s3fs_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'featcache\[s3\]'"):
        open_corpus("s3://bucket/photos")

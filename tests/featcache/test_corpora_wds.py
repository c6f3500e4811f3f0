"""Tar shards against tarfile, read member by member from the start."""

import bz2
import gzip
import http.server
import io
import lzma
import os
import re
import shutil
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from featcache.corpora import _shards, open_corpus, wds
from featcache.corpora._images import suffixes
from featcache.inputs.images import decode

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "shards"


@pytest.fixture
def photographs_tar():
    path = SHARED / "tiny-imagenet-val-half.tar"
    if not path.exists():
        pytest.skip("needs ../shared/data/tiny-imagenet-val-half.tar")
    return path


def write(path, members, **given):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w", **given) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_a_shard_is_indexed_again_when_more_formats_can_be_read(tmp_path, monkeypatch):
    """As after `pip install pillow-heif`, which the line on what was passed over recommends."""
    files = {kind: io.BytesIO() for kind in ("png", "gif")}
    for kind, file in files.items():
        Image.new("RGB", (8, 8)).save(file, kind)
    spec = f"wds:{write(tmp_path / 'a.tar', [('a.png', files['png'].getvalue()), ('b', files['gif'].getvalue())])}"
    with monkeypatch.context() as fewer:
        fewer.setattr("featcache.inputs._decoding.FORMATS", ("PNG",))
        suffixes.cache_clear()
        assert open_corpus(spec).ids == ["a/a"]
    suffixes.cache_clear()  # another process would
    assert open_corpus(spec).ids == ["a/a", "a/b"]


def sequential(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar if member.isfile()]


def contents(corpus):
    return {sample_id: (corpus.read(i), corpus.label(i)) for i, sample_id in enumerate(corpus.ids)}


def test_real_images_are_the_members_read_in_order(photographs_tar):
    corpus, members = open_corpus(f"wds:{photographs_tar}"), sequential(photographs_tar)
    assert corpus.ids == [f"tiny-imagenet-val-half/{os.path.splitext(name)[0]}" for name, _ in members]
    folders = [name.split("/")[0] for name, _ in members]
    assert corpus.class_names == sorted(set(folders))
    assert [corpus.class_names[corpus.label(i)] for i in range(len(corpus))] == folders
    for row in (len(corpus) - 1, 0, 7, len(corpus) // 2, -1):
        assert corpus.read(row) == members[row][1]
    assert decode(corpus.read(3)).size == (64, 64)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_shards_of_a_brace_range_follow_each_other(tmp_path, ending):
    for shard in range(8, 12):
        members = [(f"{shard}{i}.{kind}", f"{kind}{shard}{i}".encode()) for i in range(3) for kind in ("jpg", "json")]
        write(tmp_path / f"s-{shard:03d}{ending}", members)
    corpus = open_corpus(f"wds:{tmp_path}/s-{{008..011}}{ending}")
    assert corpus.ids == [f"s-{shard:03d}/{shard}{i}" for shard in range(8, 12) for i in range(3)]
    assert [corpus.read(i) for i in range(12)] == [f"jpg{s}{i}".encode() for s in range(8, 12) for i in range(3)]
    assert corpus.class_names is None
    assert {corpus.label(i) for i in range(12)} == {-1}
    assert open_corpus(f"wds:{tmp_path}/s-*{ending}").ids == corpus.ids
    with pytest.raises(IndexError):
        corpus.read(12)


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{a}{", ["{a}{"]),
    ],
)
def test_braces_are_expanded_as_the_shell_does(pattern, expanded):
    assert list(wds._expand(pattern)) == expanded


def test_labels_of_cls_members_win_over_folders(tmp_path):
    members = [("x/0.jpg", b"a"), ("x/0.cls", b"2\n"), ("x/1.cls", b"0"), ("x/1.png", b"b"), ("y/2.jpg", b"c")]
    corpus = open_corpus(f"wds:{write(tmp_path / 's.tar', members)}")
    assert contents(corpus) == {"s/x/0": (b"a", 2), "s/x/1": (b"b", 0), "s/y/2": (b"c", -1)}
    assert corpus.class_names == ["0", "1", "2"]


def test_names_that_are_not_utf_8_are_escaped(tmp_path):
    shard = write(tmp_path / "s.tar", [("cat/odd\udcff.jpg", b"a")], format=tarfile.GNU_FORMAT, encoding="utf-8")
    corpus = open_corpus(f"wds:{shard}")
    assert corpus.ids == ["s/cat/odd\\xff"]
    assert corpus.read(0) == b"a"


def test_a_key_ends_at_the_first_dot_of_the_base_name(tmp_path):
    members = [
        ("./v1.0/a.jpg", b"a"),
        ("./v1.0/a.mask.png", b"mask"),
        ("v1.0/b.left.JPEG", b"b"),
        ("v1.0/.hidden.jpg", b"no"),
        ("v1.0/._a.jpg", b"no"),
        ("n" * 150 + "/long.webp", b"long"),
    ]
    corpus = open_corpus(f"wds:{write(tmp_path / 's.tar', members)}")
    assert corpus.ids == ["s/v1.0/a", "s/v1.0/b", f"s/{'n' * 150}/long"]
    assert [corpus.read(i) for i in range(3)] == [b"a", b"b", b"long"]


def test_shards_of_one_name_in_several_folders_keep_apart(tmp_path):
    for part in "ab":
        write(tmp_path / part / "0.tar", [("k.jpg", part.encode())])
    assert open_corpus(f"wds:{tmp_path}/*/0.tar").ids == ["a/0/k", "b/0/k"]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_the_index_is_made_once_and_never_used_for_another_file(tmp_path, monkeypatch, cache, ending):
    path = write(tmp_path / f"s{ending}", [("a.jpg", b"first")])
    old = open_corpus(f"wds:{path}")
    made = []
    members = _shards._members
    monkeypatch.setattr(_shards, "_members", lambda *given: made.append(given) or members(*given))
    assert open_corpus(f"wds:{path}").read(0) == b"first"
    assert not made
    write(path, [("b.jpg", b"second"), ("c.jpg", b"third")])
    os.utime(path, ns=(1, 1))
    again = open_corpus(f"wds:{path}")
    assert contents(again) == {"s/b": (b"second", -1), "s/c": (b"third", -1)}
    assert len(made) == 1
    with pytest.raises(OSError, match=r"has changed since it was opened|No such file"):
        old.read(0)
    kept = list(cache.glob("*.json"))
    assert len(kept) == 1
    kept[0].write_text("{")
    assert open_corpus(f"wds:{path}").read(1) == b"third"
    assert not list(cache.glob("*.partial")) + list(cache.glob(".*.partial"))


def test_a_truncated_shard_is_refused_wherever_it_ends(tmp_path):
    path = write(tmp_path / "s.tar", [(f"{i}.jpg", bytes(700)) for i in range(3)])
    whole = path.read_bytes()
    for size in (0, 100, 512, 900, 1536, 2000, 3 * 1536):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"s\.tar: damaged or cut short .*copy or write this shard again"):
            open_corpus(f"wds:{path}")
    path.write_bytes(whole[:1536] + b"x" * 512 + whole[2048:])
    with pytest.raises(ValueError, match="damaged or cut short"):
        open_corpus(f"wds:{path}")


@pytest.mark.parametrize("size", [0, 3, 30, -9, -1])
def test_a_truncated_compressed_shard_is_refused(tmp_path, cache, size):
    path = write(tmp_path / "s.tar.gz", [("0.jpg", os.urandom(700))])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"s\.tar\.gz: damaged or cut short .*copy or write this shard again"):
        open_corpus(f"wds:{path}")
    assert not list(cache.glob("*.tar")) + list(cache.glob(".*.partial"))


def test_no_room_to_unpack_is_one_clear_line(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar.gz", [("0.jpg", bytes(9000))])
    monkeypatch.setattr(shutil, "disk_usage", lambda place: os.terminal_size((0, 0)) and type("U", (), {"free": 5000}))
    with pytest.raises(ValueError, match=r"0\.00 GB free; unpacking it under .* free some, or set FEATCACHE_HOME"):
        open_corpus(f"wds:{path}")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"")], r"no images in .*s\.tar \(looked for .*\.jpg"),
        ([], "no images in"),
        ([("a.jpg", b""), ("a.png", b"")], r"a has several images \(\.jpg, \.png\); write one image a key"),
        ([("a.jpg", b""), ("a.jpg", b"")], r"a has several images \(\.jpg, \.jpg\)"),
        ([("a.jpg", b""), ("a.cls", bytes(70_000))], "a.cls holds more than 65536 bytes, which is no label"),
        ([("a.jpg", b""), ("a.cls", b"-7")], "-7 is no class number; number the classes from 0"),
    ],
)
def test_what_is_wrong_inside_a_shard_is_named(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        open_corpus(f"wds:{write(tmp_path / 's.tar', members)}")


def test_what_is_wrong_with_a_pattern_is_named(tmp_path):
    write(tmp_path / "s-0.tar", [("a.jpg", b"")])
    (tmp_path / "s-0.tar.gz").write_bytes(gzip.compress((tmp_path / "s-0.tar").read_bytes()))
    for pattern, message in [
        ("s-{0..4}.tar", r"no such file: .*s-1\.tar, .*s-2\.tar, .*s-3\.tar and 1 more; correct the pattern"),
        ("t-*.tar", r"no such file: .*t-\*\.tar"),
        ("s-0.tar*", "more than one shard is called s-0"),
        ("s-{0,0}.tar", "more than one shard is called s-0"),
        (".", "is not a .tar"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_corpus(f"wds:{tmp_path}/{pattern}")
    with pytest.raises(ValueError, match=r"open it as wds:.*s-0\.tar"):
        open_corpus(str(tmp_path / "s-0.tar"))


class Files(http.server.SimpleHTTPRequestHandler):
    """A web server's answers: whole files only, unless `ranges`."""

    ranges = False

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not self.ranges or not asked or not path.is_file():
            return super().do_GET()
        first, last = int(asked[1]), int(asked[2])
        data = path.read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *given):
        pass


class FilesAndRanges(Files):
    ranges = True


@pytest.fixture
def web(tmp_path):
    """`web(handler)`: the address of a server of `tmp_path`."""
    pytest.importorskip("aiohttp", reason="needs aiohttp, which comes with featcache[s3]")
    servers = []

    def serve(handler):
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(params=["memory", "s3", "web", "web without ranges", "file"])
def upload(request, tmp_path):
    """`upload(path)`: the URL of a copy of a file under `tmp_path`, which has the same name; one made of each kind."""
    kind = request.param
    if kind.startswith("web"):
        root = request.getfixturevalue("web")(FilesAndRanges if kind == "web" else Files)
        return lambda path: f"{root}/{path.relative_to(tmp_path)}"
    if kind == "file":
        return lambda path: f"file://{path}"
    root = request.getfixturevalue("s3_bucket") if kind == "s3" else f"memory://{tmp_path.name}"
    return lambda path: put(path.read_bytes(), f"{root}/{path.relative_to(tmp_path)}")


def put(data, url):
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.pipe(path, data)
    return url


@pytest.fixture
def transferred(monkeypatch):
    """(path, number of bytes) of every read that memory:// answers."""
    kind, reads = fsspec.get_filesystem_class("memory"), []
    cat_file = kind.cat_file

    def count(self, path, **given):
        data = cat_file(self, path, **given)
        reads.append((path, len(data)))
        return data

    monkeypatch.setattr(kind, "cat_file", count)
    return reads


def real_like(shard, count=3, size=3000):
    """Members of every sort that a shard may have, with long names, labels and bytes that differ by shard."""
    rng = np.random.default_rng(shard)
    for i in range(count):
        stem = f"{'ab'[i % 2]}/{'n' * 120}{shard}-{i}"
        yield f"{stem}.jpg", rng.bytes(size + i)
        yield f"{stem}.cls", str((shard + i) % 5).encode()
        yield f"{stem}.json", b"{}"


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_shards_at_urls_are_the_same_corpus_as_on_disk(tmp_path, upload, ending):
    urls = [upload(write(tmp_path / "in" / f"s-{shard:02d}{ending}", real_like(shard))) for shard in range(8, 11)]
    local = open_corpus(f"wds:{tmp_path}/in/s-{{08..10}}{ending}")
    spec = f"wds:{urls[0].replace('/s-08', '/s-{08..10}')}"
    remote = open_corpus(spec)
    assert remote.spec == spec
    assert remote.ids == local.ids
    assert remote.class_names == local.class_names == ["0", "1", "2", "3", "4"]
    assert contents(remote) == contents(local)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(remote.read, [*range(9)] * 4)) == [local.read(i) for i in range(9)] * 4
    kept = open_corpus(spec)
    assert contents(kept) == contents(local)
    assert open_corpus(f"wds:{urls[1]}").ids == open_corpus(f"wds:{tmp_path}/in/s-09{ending}").ids


@pytest.mark.parametrize("place", ["memory", "s3"])
def test_a_glob_of_urls_is_the_glob_on_disk(tmp_path, place, request):
    root = request.getfixturevalue("s3_bucket") if place == "s3" else f"memory://{tmp_path.name}"
    for i, name in enumerate(["a/0.tar", "b/0.tar", "b/1.tar", "b/1.txt"]):
        put(write(tmp_path / name, [(f"{i}.jpg", b"image")]).read_bytes(), f"{root}/{name}")
    for pattern in ("*/0.tar", "b/*.tar", "{a,b}/?.tar", "b/[1].tar"):
        assert open_corpus(f"wds:{root}/{pattern}").ids == open_corpus(f"wds:{tmp_path}/{pattern}").ids
    put(write(tmp_path / "c/0.tar", [("9.jpg", b"later")]).read_bytes(), f"{root}/c/0.tar")
    assert open_corpus(f"wds:{root}/*/0.tar").ids == ["a/0/0", "b/0/1", "c/0/9"]


def test_of_large_members_only_the_headers_are_transferred(tmp_path, transferred):
    path = write(tmp_path / "s.tar", [(f"{i}.jpg", bytes([i]) * (2 << 20)) for i in range(4)])
    url = put(path.read_bytes(), f"memory://{tmp_path.name}/s.tar")
    corpus = open_corpus(f"wds:{url}")
    assert sum(size for _, size in transferred) < 64 << 10 < path.stat().st_size // 100
    transferred.clear()
    assert corpus.read(2) == bytes([2]) * (2 << 20)
    assert [size for _, size in transferred] == [(2 << 20) + 512]
    transferred.clear()
    assert open_corpus(f"wds:{url}").ids == corpus.ids
    assert not transferred


def test_small_members_are_read_through_in_few_requests(tmp_path, transferred):
    path = write(tmp_path / "s.tar", [(f"{i:04d}.jpg", bytes(3000)) for i in range(2000)])
    corpus = open_corpus(f"wds:{put(path.read_bytes(), f'memory://{tmp_path.name}/s.tar')}")
    assert len(corpus) == 2000
    assert len(transferred) <= 5
    assert sum(size for _, size in transferred) < path.stat().st_size + (16 << 10)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_changed_shard_at_a_url_is_indexed_again(tmp_path, upload, cache, ending):
    url = upload(write(tmp_path / f"s{ending}", [("a.jpg", b"first")]))
    old = open_corpus(f"wds:{url}")
    assert old.read(0) == b"first"
    path = write(tmp_path / f"s{ending}", [("b.jpg", b"2"), ("c.jpg", bytes(9))])
    os.utime(path, (1, 1))
    assert upload(path) == url
    if not url.startswith("http") and ending == ".tar":
        with pytest.raises(OSError, match=r"s\.tar has changed since it was opened; open the corpus again") as changed:
            old.read(0)
        assert not isinstance(changed.value, (ConnectionError, FileNotFoundError))
    assert contents(open_corpus(f"wds:{url}")) == {"s/b": (b"2", -1), "s/c": (bytes(9), -1)}
    assert len(list(cache.glob("*.json"))) == 1
    assert not list(cache.glob("*.download")) + list(cache.glob(".*.partial"))


def test_a_shard_that_has_gone_is_not_one_bad_image(tmp_path):
    path = write(tmp_path / "s.tar", [("a.jpg", b"a")])
    url = put(path.read_bytes(), f"memory://{tmp_path.name}/s.tar")
    for corpus, remove in [
        (open_corpus(f"wds:{path}"), path.unlink),
        (open_corpus(f"wds:{url}"), lambda: fsspec.filesystem("memory").rm(f"/{tmp_path.name}/s.tar")),
    ]:
        remove()
        with pytest.raises(OSError, match="has changed since it was opened") as gone:
            corpus.read(0)
        assert not isinstance(gone.value, FileNotFoundError)


def test_what_is_wrong_at_a_url_is_one_clear_line(tmp_path, upload, cache):
    url = upload(write(tmp_path / "s-0.tar", [("a.jpg", bytes(700))]))
    upload(write(tmp_path / "t.tar", [("a.txt", b"")]))
    whole = (tmp_path / "s-0.tar").read_bytes()
    upload_bytes(upload, tmp_path / "cut.tar", whole[:1000])
    upload_bytes(upload, tmp_path / "cut.tar.gz", gzip.compress(whole)[:-9])
    upload_bytes(upload, tmp_path / "empty.tar", b"")
    root = url.rsplit("/", 1)[0]
    for pattern, message in [
        ("s-{0..4}.tar", r"no such file: .*/s-1\.tar, .*/s-2\.tar, .*/s-3\.tar and 1 more; correct the pattern"),
        ("s-{0,0}.tar", "more than one shard is called s-0"),
        ("t.tar", r"no images in .*/t\.tar \(looked for"),
        ("cut.tar", r"cut\.tar: damaged or cut short .*copy or write this shard again"),
        ("cut.tar.gz", r"cut\.tar\.gz: damaged or cut short .*copy or write this shard again"),
        ("empty.tar", r"empty\.tar: damaged or cut short"),
    ]:
        with pytest.raises(ValueError, match=message) as refusal:
            open_corpus(f"wds:{root}/{pattern}")
        assert "\n" not in str(refusal.value)
    assert not list(cache.glob("cut*.tar")) + list(cache.glob("*.download")) + list(cache.glob(".*.partial"))


def upload_bytes(upload, path, data):
    path.write_bytes(data)
    upload(path)


def test_no_room_for_the_copy_of_a_remote_shard_is_one_clear_line(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tar.gz", [("0.jpg", os.urandom(9000))])
    url = put(path.read_bytes(), f"memory://{tmp_path.name}/s.tar.gz")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: type("U", (), {"free": 5000}))
    with pytest.raises(
        ValueError, match=r"s\.tar\.gz: 0\.00 GB free; unpacking it .* free some, or set FEATCACHE_HOME"
    ):
        open_corpus(f"wds:{url}")


@pytest.mark.parametrize("refused", ["info", "cat_file"])
def test_access_that_is_denied_is_one_clear_line(tmp_path, monkeypatch, refused):
    url = put(write(tmp_path / "s.tar", [("a.jpg", b"a")]).read_bytes(), f"memory://{tmp_path.name}/s.tar")

    def deny(*given, **named):
        raise PermissionError("Access\nDenied")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), refused, deny)
    with pytest.raises(
        ValueError, match=r"s\.tar: PermissionError: Access Denied; check the address, the network and cr"
    ):
        open_corpus(f"wds:{url}")


def test_a_bucket_that_is_not_there_is_one_clear_line(s3_bucket):
    for pattern in ("s.tar", "*.tar"):
        with pytest.raises(
            ValueError, match=r"wds:s3://nobucket/.*tar: (no such file|.*; check the address)"
        ) as refusal:
            open_corpus(f"wds:s3://nobucket/{pattern}")
        assert "\n" not in str(refusal.value)


def test_a_server_lost_in_the_middle_is_a_lost_connection(tmp_path, s3_bucket, monkeypatch):
    server = pytest.importorskip("moto.server", reason="needs moto").ThreadedMotoServer(port=0, verbose=False)
    server.start()  # another door to the same buckets
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    path = write(tmp_path / "s.tar", [("a.jpg", b"a"), ("b.jpg", b"b")])
    try:
        corpus = open_corpus(f"wds:{put(path.read_bytes(), f'{s3_bucket}/s.tar')}")
        assert corpus.read(0) == b"a"
    finally:
        server.stop()
    with pytest.raises(ConnectionError, match=r"s\.tar: "):
        corpus.read(1)
    with pytest.raises(ValueError, match=r"wds:s3://.*s\.tar: .*; check the address, the network and credentials"):
        open_corpus(corpus.spec)


# -- links, archives after an end mark, other packings, choices -------------------------------------------


def tar_of(*members, links=()):
    """A tar file in memory. `links`: name, target, and whether the link is a hard one, in their order after `members`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target, hard in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.LNKTYPE if hard else tarfile.SYMTYPE), target
            tar.addfile(member)
    return file.getvalue()


@pytest.fixture(params=["local", "memory", "gz"])
def place(request, tmp_path):
    """`place(content)`: the spec of a shard s.tar of this content, on disk, at a URL, compressed."""

    def put_there(content, name="s.tar"):
        if request.param == "memory":
            return f"wds:{put(content, f'memory://{tmp_path.name}/{name}')}"
        (tmp_path / name).write_bytes(gzip.compress(content) if request.param == "gz" else content)
        return f"wds:{tmp_path / name}"

    return put_there


def test_links_stand_for_what_they_lead_to(place):
    links = [
        ("b/hard.jpg", "a/0.jpg", True), ("b/soft.jpg", "../a/0.jpg", False), ("b/again.jpg", "soft.jpg", False),
        ("b/hard.cls", "a/0.cls", True), ("b/none.jpg", "../a/nothing.jpg", False), ("b/loop.jpg", "loop.jpg", False),
        ("b/plain", "../a/0.jpg", False), ("b/folder", "../a", False),
    ]  # fmt: skip
    corpus = open_corpus(place(tar_of(("a/0.jpg", b"first"), ("a/0.cls", b"3"), ("a/notes.txt", b"x"), links=links)))
    assert corpus.ids == [f"s/{key}" for key in ("a/0", "b/hard", "b/soft", "b/again", "b/none", "b/loop", "b/plain")]
    assert [corpus.label(i) for i in range(7)] == [3, 3, -1, -1, -1, -1, -1]
    assert [corpus.read(i) for i in (0, 1, 2, 3, 6)] == [b"first"] * 5
    for row in (4, 5):
        with pytest.raises(ValueError, match=r"s\.tar: b/(none|loop) is a link to nothing in this shard"):
            corpus.read(row)
    assert corpus.passed_over == {".txt files": 1, "files without a suffix": 1}


@pytest.mark.parametrize("padding", [0, 512, 10_240, 1 << 18])
def test_archives_after_an_end_mark_are_read_too(place, padding):
    parts = [tar_of((f"{i}.jpg", bytes([i]) * 700), (f"{i}.cls", str(i).encode())) for i in range(4)]
    joined = b"".join(part + bytes(padding) for part in parts)
    corpus = open_corpus(place(joined))
    assert contents(corpus) == {f"s/{i}": (bytes([i]) * 700, i) for i in range(4)}
    with tarfile.open(fileobj=io.BytesIO(joined), ignore_zeros=True) as tar:  # the oracle
        assert [member.name for member in tar if member.name.endswith("jpg")] == [f"{i}.jpg" for i in range(4)]
    bare = parts[0].rstrip(b"\0")  # one mark of 512 bytes is enough for tarfile
    assert len(open_corpus(place(bare + bytes(-len(bare) % 512 + 512) + parts[1], "bare.tar"))) == 2


@pytest.mark.parametrize("damage", [b"x" * 512, b"no header", tar_of(("b.jpg", bytes(2000)))[:1500]])
def test_what_is_no_archive_after_an_end_mark_stops(place, damage):
    with pytest.raises(ValueError, match=r"s\.tar: damaged or cut short .*; copy or write this shard again"):
        open_corpus(place(tar_of(("a.jpg", b"a")) + damage))


PACKERS = {"plain": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ending", [".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tbz2"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_shard_is_unpacked_by_its_content_whatever_its_name(tmp_path, packing, ending, remote):
    data = PACKERS[packing](tar_of(("a.jpg", b"a" * 900), ("a.cls", b"1")))
    if remote:
        spec = f"wds:{put(data, f'memory://{tmp_path.name}/s{ending}')}"
    else:
        (tmp_path / f"s{ending}").write_bytes(data)
        spec = f"wds:{tmp_path}/s{ending}"
    assert contents(open_corpus(spec)) == {"s/a": (b"a" * 900, 1)}


@pytest.mark.parametrize("packing", ["bzip2", "xz"])
def test_other_packings_that_are_cut_short_are_refused(tmp_path, packing, cache):
    data = PACKERS[packing](tar_of(("a.jpg", os.urandom(5000))))
    for size in (20, len(data) // 2, len(data) - 3):
        (tmp_path / "s.tar").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"s\.tar: damaged or cut short .*; copy or write this shard again"):
            open_corpus(f"wds:{tmp_path}/s.tar")
    assert not list(cache.glob("*.tar")) + list(cache.glob(".*.partial"))


def test_zstd_is_unpacked_or_its_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "s.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(50))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"s\.tar\.zst: unpacking zstd needs a package: pip install zstandard"):
        open_corpus(f"wds:{tmp_path}/s.tar.zst")


def test_images_and_labels_are_chosen_by_what_follows_the_first_dot(place):
    members = [
        ("a.left.png", b"left"), ("a.right.png", b"right"), ("a.cls", b"3"), ("a.json", b'{"kind": "cat", "n": 10}'),
        ("b.left.png", b"LEFT"), ("b.right.png", b"RIGHT"), ("b.cls", b"1"), ("b.json", b'{"kind": null, "n": 9}'),
        ("c.right.png", b"3"), ("c.txt", b"dog"),
    ]  # fmt: skip
    spec = place(tar_of(*members))
    with pytest.raises(ValueError, match=r"a has several images \(\.left\.png, \.right\.png\).*@image=left\.png"):
        open_corpus(spec)
    assert contents(open_corpus(f"{spec}@image=left.png")) == {"s/a": (b"left", 3), "s/b": (b"LEFT", 1)}
    right = open_corpus(f"{spec}@label=json.kind@image=right.png")
    assert contents(right) == {"s/a": (b"right", 0), "s/b": (b"RIGHT", -1), "s/c": (b"3", -1)}
    assert right.class_names == ["cat"]
    assert open_corpus(right.spec).ids == right.ids
    assert [open_corpus(f"{spec}@image=right.png@label=json.n").label(i) for i in range(3)] == [10, 9, -1]
    assert open_corpus(f"{spec}@image=right.png@label=").class_names is None
    assert open_corpus(f"{spec}@image=left.png").passed_over == {
        ".png files": 1,
        "further images of a sample": 2,
        ".txt files": 1,
    }
    with pytest.raises(ValueError, match="@images=png: no such option; did you mean image"):
        open_corpus(f"{spec}@images=png")
    with pytest.raises(ValueError, match=r"no images in .*s\.tar \(@image=jpg\); passed over: "):
        open_corpus(f"{spec}@image=jpg")


def test_labels_in_words_are_classes(place):
    members = [
        ("0.jpg", b"a"),
        ("0.cls", b"dog\n"),
        ("1.jpg", b"b"),
        ("1.cls", b"ant"),
        ("2.jpg", b"c"),
        ("2.cls", b"NA"),
    ]
    corpus = open_corpus(place(tar_of(*members)))
    assert ([corpus.label(i) for i in range(3)], corpus.class_names) == ([1, 0, -1], ["ant", "dog"])


def test_members_are_images_by_their_content_too(place, rng):
    files = {}
    for kind in ("png", "jpeg", "avif", "gif"):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, kind)
        files[kind] = file.getvalue()
    members = [("x/0001", files["png"]), ("x/2.img", files["jpeg"]), ("3.avif", files["avif"]), ("4.gif", files["gif"])]
    corpus = open_corpus(place(tar_of(*members, ("README", b"read me"), ("5.txt", files["png"]), ("._6.jpg", b"x"))))
    assert corpus.ids == ["s/x/0001", "s/x/2", "s/3", "s/4"]
    assert [corpus.read(i) for i in range(4)] == list(files[k] for k in ("png", "jpeg", "avif", "gif"))
    assert corpus.passed_over == {"files without a suffix": 1, ".txt files": 1, "hidden files and folders": 1}


def test_a_folder_among_which_a_pattern_chooses_and_that_cannot_be_listed_stops(tmp_path, monkeypatch):
    for part in "ab":
        write(tmp_path / part / "0.tar", [("k.jpg", part.encode())])
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for scheme in ("", "file://"):
        with pytest.raises(OSError, match=r"/b: cannot be listed \(Permission denied\), so images would be missing"):
            open_corpus(f"wds:{scheme}{tmp_path}/*/*.tar")


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(ValueError, match=r"no such file: .*s\.tar"):
        open_corpus(f"wds:{tmp_path}/s.tar")


def test_labels_at_a_url_are_read_along_with_the_headers(tmp_path, transferred):
    members = [(f"{i}.{kind}", bytes(2 << 20) if kind == "jpg" else b"1") for i in range(10) for kind in ("jpg", "cls")]
    url = put(tar_of(*members), f"memory://{tmp_path.name}/s.tar")
    assert len(open_corpus(f"wds:{url}")) == 10
    assert sum(size for _, size in transferred) < 400 << 10


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_kept_indices_are_as_the_umask_says(tmp_path, cache, umask):
    """A home that several people share."""
    write(tmp_path / "a.tar", [("x.png", b"one"), ("x.cls", b"1")])
    was = os.umask(umask)
    try:
        open_corpus(f"wds:{tmp_path}/a.tar")
    finally:
        os.umask(was)
    kept = [path for path in cache.rglob("*.json") if path.is_file()]
    assert kept
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o666 & ~umask}

"""Tar shards against tarfile, read member by member from the start."""

import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from featcache.corpora import wds
from featcache.corpus import open_corpus
from featcache.views import decode

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
    members = wds._members
    monkeypatch.setattr(wds, "_members", lambda *given: made.append(given) or members(*given))
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
        ([("a.jpg", b""), ("a.cls", b"cat")], "a.cls holds b'cat', which is no integer label"),
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
    with pytest.raises(ValueError, match="copy the shards there first"):
        open_corpus("wds:s3://bucket/s-0.tar")
    with pytest.raises(ValueError, match=r"open it as wds:.*s-0\.tar"):
        open_corpus(str(tmp_path / "s-0.tar"))

"""Where stores and what is kept for them may lie: links, mounted disks, homes that cannot be written."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_encoder
from typer.testing import CliRunner
from warm import python_path

import featcache.disk.home
from featcache.corpora import open_corpus
from featcache.extraction.extract import extract
from featcache.interchange import export_store, import_store
from featcache.store import FeatureStore, open_store
from featcache.store.from_arrays import write_store
from featcache.store.index import known_stores
from featcache_cli.featcache import app

EXACT = {"device": "cpu", "precision": "fp32"}
EYE = np.eye(4)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def linked(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """A link, and where it leads."""
    link, target = tmp_path / "link.zarr", tmp_path / "disk" / "real.zarr"
    target.parent.mkdir()
    if kind == "folder":
        target.mkdir()
    if kind == "store":
        write_store(target, EYE)
    link.symlink_to(target)
    return link, target


# -- inside another store ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["extract", "write", "import", "export"])
def test_nothing_is_made_inside_a_store(make_images, tmp_path, how):
    """Mending the outer one would remove it."""
    outer = write_store(tmp_path / "outer.zarr", EYE)
    np.save(tmp_path / "x.npy", EYE)
    inside = outer.path / "below" / "inner"
    with pytest.raises(ValueError, match=r"would lie inside a store, .*outer\.zarr, .*choose another path"):
        {
            "extract": lambda: extract(make_images(2), tiny_encoder(), inside, **EXACT),
            "write": lambda: write_store(inside, EYE),
            "import": lambda: import_store(tmp_path / "x.npy", inside),
            "export": lambda: export_store(outer, inside, "npy"),
        }[how]()
    assert outer.verify() == []


# -- links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "dangling"])
@pytest.mark.parametrize("how", ["extract", "write", "import"])
def test_what_a_link_leads_to_is_written_and_the_link_stays(make_images, tmp_path, kind, how):
    link, target = linked(tmp_path, kind)
    if how == "extract":
        images = make_images(3)
        extract(images, tiny_encoder(), link, **EXACT)
        assert open_store(link).identity == open_store(target).identity
        extract(images, tiny_encoder(1), link, overwrite=True, **EXACT)
    elif how == "write":
        write_store(link, EYE)
    else:
        np.save(tmp_path / "x.npy", EYE)
        import_store(tmp_path / "x.npy", link)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert open_store(link).verify() == open_store(target).verify() == []
    assert [name for name in names(target.parent) if not name.endswith(".lock")] == ["real.zarr"]


def test_a_store_replaced_through_a_link_gives_its_rows_to_the_new_one(make_images, tmp_path):
    link, _ = linked(tmp_path, "folder")
    images = Path(make_images(4))
    extract(str(images), tiny_encoder(), link, **EXACT)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(images / "ant/000.png")
    encoder = tiny_encoder()
    store = extract(str(images), encoder, link, overwrite=True, **EXACT)
    assert link.is_symlink()
    assert len(store.ok) == 4
    assert names(link.resolve().parent) == ["real.zarr", "real.zarr.lock"]


def test_two_names_of_one_store_have_one_writer(tmp_path):
    link, target = linked(tmp_path, "store")
    with FeatureStore(link).files.only_writer(), pytest.raises(ValueError, match="another process is writing"):
        FeatureStore(target).files.only_writer().__enter__()


def test_a_link_to_what_is_not_there_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "away.zarr").symlink_to(tmp_path / "unmounted/real.zarr")
    with pytest.raises(
        ValueError, match=r"away\.zarr: a link to .*unmounted/real\.zarr, whose folder is not there; mount"
    ):
        write_store(tmp_path / "away.zarr", EYE)
    (tmp_path / "round.zarr").symlink_to(tmp_path / "round.zarr")
    with pytest.raises(ValueError, match="a link that leads to itself"):
        write_store(tmp_path / "round.zarr", EYE)
    assert names(tmp_path) == ["away.zarr", "round.zarr"]


def test_what_a_link_leads_to_is_not_overwritten(tmp_path):
    link, target = linked(tmp_path, "store")
    with pytest.raises(ValueError, match="already exists"):
        write_store(link, EYE * 2)
    with pytest.raises(ValueError, match="already exists"):
        export_store(target, link, "npy")
    assert open_store(target).verify() == []


def test_rm_of_a_link_takes_the_link_alone(tmp_path):
    link, target = linked(tmp_path, "store")
    ran = CliRunner().invoke(app, ["rm", str(link), "--json", str(tmp_path / "r.json")])
    assert ran.exit_code == 0
    assert not link.is_symlink()
    assert open_store(target).verify() == []
    assert json.loads((tmp_path / "r.json").read_text())["stays"] == str(target.resolve())
    assert CliRunner().invoke(app, ["rm", str(target)]).exit_code == 0
    assert names(target.parent) == []


# -- mounted disks ----------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """A folder that is a mount point, as far as the system tells."""
    point = tmp_path / "disk"
    point.mkdir()
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == point or ismount(path))
    return point


def test_a_mount_point_is_refused_before_any_work(make_images, tmp_path, mounted):
    images = make_images(2)
    np.save(tmp_path / "x.npy", EYE)
    for make in (
        lambda: write_store(mounted, EYE),
        lambda: extract(images, tiny_encoder(), mounted, **EXACT),
        lambda: import_store(tmp_path / "x.npy", mounted),
    ):
        with pytest.raises(
            ValueError, match=r"disk: a disk is mounted here, .* give a folder inside it, such as .*disk/teacher"
        ):
            make()
    assert names(mounted) == []
    write_store(mounted / "teacher.zarr", EYE)


def test_a_store_at_a_mount_point_is_neither_half_removed_nor_half_replaced(make_images, tmp_path, mounted):
    shutil.copytree(
        extract(make_images(2), tiny_encoder(), tmp_path / "s.zarr", **EXACT).path, mounted, dirs_exist_ok=True
    )
    with pytest.raises(ValueError, match="a disk is mounted here"):
        open_store(mounted).remove()
    with pytest.raises(ValueError, match="a disk is mounted here"):
        extract(make_images(2), tiny_encoder(1), mounted, overwrite=True, **EXACT)
    assert open_store(mounted).verify() == []


def test_a_folder_that_cannot_be_moved_keeps_its_store(tmp_path, monkeypatch):
    """As where a folder is mounted over another one of the same disk, which nothing but the attempt tells."""
    store = write_store(tmp_path / "s.zarr", EYE)

    def busy(*_):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as held:
        held.setattr(os, "replace", busy)
        with pytest.raises(OSError, match="busy"):
            store.remove()
    assert open_store(store.path).verify() == []


# -- homes ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """$FEATCACHE_HOME below a file, where not even root can write."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "file/home"))
    featcache.disk.home._say_refused.cache_clear()


def shard(path: Path, packed: str = "") -> str:
    with tarfile.open(path, f"w:{packed}") as tar:
        for i in range(3):
            png = io.BytesIO()
            Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(png, "PNG")
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(png.getvalue())
            tar.addfile(info, io.BytesIO(png.getvalue()))
    return f"wds:{path}"


@pytest.mark.parametrize(("name", "packed"), [("s.tar", ""), ("s.tar.gz", "gz")])
def test_shards_are_read_without_a_home(tmp_path, no_home, caplog, name, packed):
    with caplog.at_level(logging.WARNING):
        corpus = open_corpus(shard(tmp_path / name, packed))
        assert [corpus.read(i)[:4] for i in range(3)] == [b"\x89PNG"] * 3
        open_corpus(shard(tmp_path / f"other-{name}", packed))
    assert caplog.text.count("cannot be written") == 1
    assert "set FEATCACHE_HOME to a folder of your own" in caplog.text


def test_a_store_is_made_and_read_without_a_home(make_images, no_home, tmp_path, caplog):
    store = extract(make_images(3), tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    assert store.verify() == []
    assert known_stores() == []
    ran = CliRunner().invoke(app, ["rm", str(store.path)])
    assert ran.exit_code == 0


def test_a_store_at_a_url_is_read_without_a_home(no_home, tmp_path):
    url = f"memory://{tmp_path.name}/s.zarr"
    write_store(url, EYE)
    np.testing.assert_array_equal(open_store(url).gather(range(4)), EYE)


def test_a_user_whom_the_system_does_not_know_has_a_home(monkeypatch):
    monkeypatch.delenv("FEATCACHE_HOME")
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert featcache.disk.home.cache_home().name == f"featcache-{os.getuid()}"


SECOND_USER = """
import sys, logging, pathlib
logging.basicConfig(level=logging.WARNING)
from featcache.corpora import open_corpus
from featcache.store.index import known_stores
from featcache.extraction.receipts import void
corpus = open_corpus(sys.argv[1])
assert len(corpus) == 3 and corpus.read(2)[:4] == b"\\x89PNG"
known_stores()
void(sys.argv[2])
print("fine")
"""


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o1777])
def test_a_second_user_of_a_home(tmp_path, monkeypatch, make_images, mode):
    if os.name != "posix" or os.getuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv, to be another user")
    home, spec = tmp_path / "home", shard(tmp_path / "s.tar")
    monkeypatch.setenv("FEATCACHE_HOME", str(home))
    open_corpus(spec)
    store = extract(make_images(2), tiny_encoder(), tmp_path / "t.zarr", **EXACT)
    (home / "receipts").mkdir()
    (home / "receipts/x.json").write_text(json.dumps({"stores": [{"store": str(store.path)}]}))
    for folder in (home, *(path for path in home.rglob("*") if path.is_dir())):
        folder.chmod(mode)
    os.utime(tmp_path / "s.tar", (1, 1))  # the index that is kept is stale now
    for folder in tmp_path.parents:
        if folder.stat().st_uid == 0 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    tmp_path.chmod(0o755)
    readable = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", "import featcache"],
        capture_output=True, env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    if readable.returncode:
        pytest.skip("another user may not read this checkout")
    ran = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", SECOND_USER, spec, str(store.path)],
        capture_output=True, text=True, timeout=100, cwd="/",
        env={**os.environ, "PYTHONPATH": python_path(), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert ran.stdout.strip() == "fine", ran.stderr
    assert "Traceback" not in ran.stderr

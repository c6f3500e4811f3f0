"""A target that refuses to be written, by the real kernel: files that may not grow, a full disk, a read-only one.

What a user must read: which path, what happened, what to do. What is done must be kept.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import warm
from PIL import Image
from tiny import patch_encoder

import featcache.store.layout
from featcache import extract, open_store, write_store
from featcache.interchange import export_store, import_store

pytest.importorskip("resource", reason="limits of this kind are POSIX's")

ROWS, UNIT = 24, 8
EXACT = {"device": "cpu", "precision": "fp32+channels_last", "workers": 2, "batch_size": 4}
COMMAND = """
import resource, sys
import featcache.extraction.fastest, featcache.precision, featcache.store.layout
featcache.store.layout.CHUNK_BYTES = 8 * 6 * 2  # 8 rows a unit
featcache.extraction.fastest.CANDIDATES = {"fp32": featcache.precision.FP32}  # none is chosen by the clock
if largest_file := int(sys.argv.pop(1)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
from featcache_cli import programs
programs.run_featcache()
"""


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def done_files(path):
    """When each chunk file of the units that are done was last written; a chunk of kept images holds one row."""
    done = {int(p.name) for p in (path / "state/c").iterdir() if p.name.isdecimal()}
    chunks = [p for p in path.rglob("*") if p.is_file() and "c" in p.relative_to(path).parts]
    number = {p: p.relative_to(path).parts[2] for p in chunks if not p.name.endswith(".partial")}
    unit = {p: int(chunk) // (UNIT if p.is_relative_to(path / "pixels") else 1) for p, chunk in number.items()}
    return {p: p.stat().st_mtime_ns for p in unit if unit[p] in done}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures: the first 8 small, all later ones large; and a module with a teacher beside them."""
    here = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    (here / "photos").mkdir()
    for i in range(ROWS):
        side = 20 if i < UNIT else 64
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(here / f"photos/{i:02d}.png")
    (here / "mine.py").write_text("from tiny import patch_encoder as small\n")
    return here


def featcache_extract(here: Path, out: Path, home: Path, largest_file: int = 0) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it, in a process of its own; images are kept, so that later units need more space."""
    arguments = ["extract", "photos", "--teacher", "mine:small", "--out", str(out), "--json", "-"]
    arguments += ["--pixels", "64", "--pixels-format", "raw", "--batch-size", "4", "--device", "cpu"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "FEATCACHE_HOME": str(home)}
    return warm.run(COMMAND, largest_file, *arguments, "--precision", "fp32", cwd=here, env=environment)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store that nothing went wrong with."""
    out = tmp_path_factory.mktemp("whole") / "s.zarr"
    ran = featcache_extract(photos, out, out.parent / "home")
    assert ran.returncode == 0, ran.stderr
    return files(out)


def said(ran: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed command ends with."""
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    assert "Errno" not in ran.stderr
    assert ran.stderr.count("error:") == 1
    line = ran.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`mount(size)`: a real, small, empty disk; again with other options to change it."""
    point = tmp_path / "disk"

    def mounted(size: str, *options: str) -> Path:
        again = ["remount"] if point.is_mount() else []
        point.mkdir(exist_ok=True)
        flags = ",".join([*again, f"size={size}", *options])
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", flags, "none", point], capture_output=True, text=True)
        assert not (again and made.returncode), made.stderr
        if made.returncode:
            pytest.skip(f"needs the right to mount a small disk ({made.stderr.strip()})")
        return point

    if not shutil.which("mount"):
        pytest.skip("needs `mount`, to make a small disk")
    yield mounted
    if point.is_mount():
        subprocess.run(["umount", point], check=True)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", UNIT * 6 * 2)


# -- files that may not grow ------------------------------------------------------------------------------


def test_a_chunk_larger_than_a_file_may_be(photos, whole, tmp_path):
    out, limit = tmp_path / "s.zarr", 8000
    largest = {name: len(content) for name, content in whole.items() if len(content) > limit}
    assert {name.split("/")[0] for name in largest} == {"pixels"}  # nothing else is stopped
    ran = featcache_extract(photos, out, tmp_path / "home", largest_file=limit)
    assert said(ran) == (
        f"{out}: its files may not be that large here (File too large); "
        "raise the limit (`ulimit -f`), then run the same command again: it resumes"
    )
    before = done_files(out)
    assert len(before) == 8 + UNIT  # a chunk of each array, and 8 of images
    resumed = featcache_extract(photos, out, tmp_path / "home")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["resumed_rows"] == UNIT
    assert files(out) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before


# -- a full disk ------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_on_the_way(photos, whole, tmp_path, mount):
    out = mount("420k") / "s.zarr"  # the preflight cannot know that every small file takes 4 KiB
    first = said(featcache_extract(photos, out, tmp_path / "home"))
    assert first.startswith(f"{out}: its disk is full (No space left on device")
    assert first.endswith("); make room, then run the same command again: it resumes")
    before = done_files(out)
    assert before
    assert said(featcache_extract(photos, out, tmp_path / "home")) == first  # no room yet: the same again
    mount("8m")
    resumed = featcache_extract(photos, out, tmp_path / "home")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["resumed_rows"] % UNIT == 0
    assert json.loads(resumed.stdout)["resumed_rows"] > 0
    assert files(out) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("pages", range(1, 23, 3))
def test_wherever_the_disk_fills_up_the_same_call_resumes(
    make_images, tmp_path, mount, small_chunks, monkeypatch, pages
):
    """From the first metadata file to the seal."""
    folder, out = make_images(12), mount(f"{4 * pages}k") / "s.zarr"
    with pytest.raises(OSError, match=r"s\.zarr: .*make room") as full:
        extract(folder, patch_encoder(), out, **EXACT)
    assert str(out) in str(full.value)
    mount("8m")
    made = extract(folder, patch_encoder(), out, **EXACT)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))  # nothing to copy from
    assert files(made.path) == files(extract(folder, patch_encoder(), tmp_path / "whole.zarr", **EXACT).path)
    assert {path.name for path in out.parent.iterdir()} <= {"s.zarr", "s.zarr.lock"}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(photos, tmp_path, mount):
    disk = mount("64k")
    line = said(featcache_extract(photos, disk / "s.zarr", tmp_path / "home"))
    assert line.startswith(f"{disk / 's.zarr'}: 0.4 MB to write, the disk of {disk} has 0.1 MB free; make room")
    assert sum(path.stat().st_size for path in disk.rglob("*")) == 0


# -- a target that cannot be written ----------------------------------------------------------------------


def test_a_read_only_disk(photos, tmp_path, mount):
    disk = mount("1m", "ro")
    line = said(featcache_extract(photos, disk / "s.zarr", tmp_path / "home"))
    assert line.startswith(f"{disk / 's.zarr'}: cannot be written (Read-only file system")
    assert line.endswith("); choose another --out, or make it writable and run the same command again: it resumes")


def test_a_finished_store_on_a_read_only_disk_is_reused(make_images, mount):
    folder, out = make_images(6), mount("1m") / "s.zarr"
    extract(folder, patch_encoder(), out, **EXACT)
    mount("1m", "ro")
    encoder = patch_encoder()
    again = extract(folder, encoder, out, **EXACT)
    assert encoder.module.seen == []
    assert open_store(out).gather(range(6)).any(axis=1).all()
    assert again.verify() == []


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_an_export_and_an_import_that_the_disk_has_no_room_for(tmp_path, mount, format):
    point = mount("200k")
    store = write_store(tmp_path / "s.zarr", np.ones((4000, 64), np.float32))
    export = tmp_path / f"whole.{format}"
    export_store(store, export, format)
    for write in (
        lambda: export_store(store, point / "out", format),
        lambda: import_store(export, point / "out"),
    ):
        with pytest.raises(OSError, match=r"disk/out: its disk is full .*make room, then run the same command again$"):
            write()
        assert list(point.iterdir()) == []
    mount("2m")
    export_store(store, point / "out", format)
    assert import_store(point / "out", tmp_path / "back.zarr").gather([3999]).tolist() == [[1.0] * 64]


def test_a_folder_without_the_right_to_write(make_images, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("the superuser may write anywhere")
    folder, closed = make_images(6), tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"cannot be written .Permission denied.*choose another --out") as refused:
        extract(folder, patch_encoder(), closed / "s.zarr", **EXACT)
    assert str(closed / "s.zarr") in str(refused.value)
    assert list(closed.iterdir()) == []


def test_a_file_where_a_folder_should_be(make_images, tmp_path):
    folder = make_images(6)
    (tmp_path / "notes.txt").write_text("dear")
    with pytest.raises(OSError, match=r"notes\.txt/s\.zarr: cannot be read or written .*check the path"):
        extract(folder, patch_encoder(), tmp_path / "notes.txt" / "s.zarr", **EXACT)
    assert (tmp_path / "notes.txt").read_text() == "dear"


def test_proc_takes_no_store(make_images):
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    with pytest.raises(OSError, match=r"/proc/none/s\.zarr: cannot be .*run the same command again") as refused:
        extract(make_images(6), patch_encoder(), "/proc/none/s.zarr", **EXACT)
    assert "\n" not in str(refused.value)


def test_a_store_is_finished_though_its_rows_cannot_be_put_in_the_index(
    make_images, tmp_path, mount, monkeypatch, caplog
):
    folder = make_images(6)
    monkeypatch.setenv("FEATCACHE_HOME", str(mount("1m", "ro") / "home"))
    made = extract(folder, patch_encoder(), tmp_path / "s.zarr", **EXACT)
    assert made.verify() == []
    assert f"{tmp_path / 's.zarr'}: other stores will not find its rows" in caplog.text
    assert "Read-only file system" in caplog.text

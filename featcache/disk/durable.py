"""What is written appears whole: under its name is either all of it, on the disk for good, or what was there before."""

import contextlib
import glob
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import filelock

from featcache.disk.refusals import destination, refuse_inside_store, refuse_mount_point

_PARTIAL, _LOCK = ".partial", ".lock"


@contextlib.contextmanager
def replacing(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """Where to write a file; at the end it is at `path` in one step, or, after an error, what was there is as it was.

    Args:
        alone: nobody else writes to `path`: what a killed process left half-written has one name, and is written over.
            Else several may, and whoever ends last wins.
    """
    own = (
        f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial"  # tempfile's would be readable by the owner alone
    )
    partial = path.with_name(f"{path.name}.partial" if alone else own)
    try:
        yield partial
        sync_file(partial)
        os.replace(partial, path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path, *, alone: bool = False) -> Iterator[IO[bytes]]:
    """`replacing`, with the file open to be written."""
    with replacing(path, alone=alone) as partial, partial.open("wb") as file:
        yield file


@contextlib.contextmanager
def appearing(path: Path, *, folder: bool, making_room: Callable[[], None] | None = None) -> Iterator[Path]:
    """Where to write a file or folder that is not there yet; at the end it is at `path` in one step, on disk, or not at all.

    Nothing that was there is lost: at most an empty folder is replaced. Where a link stands, what it leads to is written.

    Args:
        making_room: takes away what is there, when all has been written.

    Raises:
        ValueError: something is there, or a link that leads nowhere, or a mounted disk; or it would lie inside a store.
    """
    out = refuse_taken(path, folder=folder, making_room=bool(making_room))
    out.parent.mkdir(parents=True, exist_ok=True)
    begin = f".{out.name[:80]}."
    _clear_killed(out.parent, begin)
    around = Path(tempfile.mkdtemp(prefix=begin, suffix=_PARTIAL, dir=out.parent))
    held = filelock.FileLock(around / _LOCK)
    try:
        held.acquire()
        yield around / out.name
        sync_tree(around)
        if making_room:
            making_room()
        os.replace(around / out.name, out)
        sync_directory(out.parent)
    finally:
        held.release()
        shutil.rmtree(around, ignore_errors=True)


def refuse_taken(path: Path, *, folder: bool, making_room: bool = False) -> Path:
    """Where `appearing` would write; raises ValueError as it would before it does."""
    out = destination(path)
    free = not out.exists() or (folder and out.is_dir() and not any(out.iterdir()))
    if not (free or making_room):
        raise ValueError(f"{path}: already exists; choose another path, or remove it first")
    refuse_mount_point(out)
    refuse_inside_store(out)
    return out


def is_held(lock: Path) -> bool:
    """Whether a process holds this lock, as far as this machine can tell. Writes nothing."""
    try:
        import fcntl

        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of when the file is closed, at once
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # of another system; or there is no such file
        return False
    return False


def _clear_killed(folder: Path, begin: str) -> None:
    """Take away what killed processes left of `appearing`: the folders whose lock nobody holds."""
    for left in folder.glob(f"{glob.escape(begin)}*{_PARTIAL}"):
        if (left / _LOCK).exists():  # else somebody is about to take it
            with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(left / _LOCK, timeout=0):
                shutil.rmtree(left, ignore_errors=True)


def sync_file(path: Path) -> None:
    """fsync a file. What gave it its name is in its folder: see `sync_directory`."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folders(path: Path, *, root: Path) -> None:
    """fsync the directories from that of `path` to `root`."""
    for directory in path.parents:
        sync_directory(directory)
        if directory == root:
            break


def sync_tree(root: Path) -> None:
    """fsync all files and directories in `root`: zarr renames in one step but never syncs."""
    for folder, _, names in os.walk(root):
        for name in names:
            sync_file(Path(folder, name))
        sync_directory(Path(folder))


def sync_directory(path: Path) -> None:
    """fsync a directory: the names in it."""
    with contextlib.suppress(PermissionError):  # some network file systems refuse to open directories
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

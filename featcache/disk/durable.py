"""Files and directories put on disk for good: zarr renames atomically but never syncs."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from featcache.disk.refusals import destination, refuse_inside_store, refuse_mount_point


def sync_file(path: Path, *, root: Path) -> None:
    """fsync a file and the directories between it and `root`."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    for directory in path.parents:
        sync_directory(directory)
        if directory == root:
            break


def sync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            sync_file(path, root=root)


def sync_directory(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # some network file systems refuse to open directories
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def appearing(path: Path, *, folder: bool) -> Iterator[Path]:
    """A path to write to; what is there at the end appears at `path` in one step, on disk, or nothing does.

    Nothing that was there is lost: at most an empty folder is replaced. Where a link stands, what it leads to is written.

    Raises:
        ValueError: something is there, or a link that leads nowhere, or a mounted disk; or it would lie inside a store.
    """
    out = destination(path)
    if out.exists() and not (folder and out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{path}: already exists; choose another path, or remove it first")
    refuse_mount_point(out)
    refuse_inside_store(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=f".{out.name[:80]}.", suffix=".partial", dir=out.parent))
    try:
        yield around / out.name
        sync_tree(around)
        os.replace(around / out.name, out)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(around, ignore_errors=True)

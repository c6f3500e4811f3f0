"""Files and directories put on disk for good: zarr renames atomically but never syncs."""

import contextlib
import os
from pathlib import Path


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

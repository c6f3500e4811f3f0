"""The files of a store, wherever it lies: on this machine as they are, at a URL through a mirror. Same methods for both."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import filelock

from featcache.disk.refusals import destination, refuse_mount_point
from featcache.disk.urls import is_url
from featcache.store.layout import EMBEDDING, METADATA, STATE
from featcache.store.remote import Mirror, checksum_in


class LocalFiles:
    """The files of a store in a local folder; what a `Mirror` moves lies where it belongs already.

    Paths are relative to the store, with slashes.

    Attributes:
        path: where the store is, as messages name it.
        root: the folder to read and write: where a link at `path` leads.

    Raises:
        ValueError: a link that leads nowhere.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.root = Path(path), destination(path)

    @property
    def identity(self) -> str:
        """The same for every way of naming the same place."""
        return str(self.root.resolve())

    def exists(self) -> bool:
        """Whether anything but an empty folder is there."""
        return self.taken()

    def taken(self) -> bool:
        """Whether anything is there that a new store would have to replace."""
        return self.root.exists() and any(self.root.iterdir() if self.root.is_dir() else [self.root])

    def open(self) -> "LocalFiles":
        """Raises FileNotFoundError when there is nothing."""
        self.root.stat()
        return self

    def fetch(self, relative: str) -> Path:
        return self.root / relative

    def fetch_all(self, relatives: Iterable[str]) -> None:
        pass

    def read_afresh(self, relatives: Iterable[str]) -> Iterator[bytes]:
        """The bytes of each file, as they are now."""
        return ((self.root / relative).read_bytes() for relative in relatives)

    def listing(self, under: str = "") -> dict[str, int]:
        """Size in bytes of every file, or of those in the folder `under`, by path."""
        found = {}
        for directory, _, names in os.walk(self.root / under, onerror=_raise_unless_absent):
            for name in names:
                path = Path(directory, name)
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def tails(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """The checksum that each file ends with, given its size."""
        return {relative: checksum_in(self.root / relative) for relative in sizes}

    def push(self, *relatives: str) -> None:
        pass

    def remove(self, *relatives: str) -> None:
        for relative in relatives:
            (self.root / relative).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """In one step: a folder that cannot be removed stays as it is.

        Raises:
            ValueError: a disk is mounted there.
        """
        if self.root.exists():
            refuse_mount_point(self.root)
            removed = self.root.with_name(f"{self.root.name}.removed")
            shutil.rmtree(removed, ignore_errors=True)  # of a removal that was killed
            os.replace(self.root, removed)
            shutil.rmtree(removed)

    def only_writer(self) -> "_OnlyWriter":
        """Held while the store is written.

        Raises:
            ValueError: another process is writing it.
        """
        return _OnlyWriter(self.root)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


BUSY = "{}: another process is writing this store; wait for it, or choose another --out"


class _OnlyWriter(filelock.FileLock):
    """The operating system lets go of it when the process dies."""

    def __init__(self, path: Path):
        super().__init__(f"{path}.lock", blocking=False)
        self._store = path

    def __enter__(self) -> "_OnlyWriter":
        try:
            self.acquire()
        except filelock.Timeout:
            raise ValueError(BUSY.format(self._store)) from None
        return self


Files = LocalFiles | Mirror


def files_at(path: str | os.PathLike[str]) -> Files:
    """The files of the store at a path or URL, whether it is there or not."""
    return Mirror(str(path)) if is_url(str(path)) else LocalFiles(path)


def looks_like_store(path: Path) -> bool:
    """Whether the folder holds one, by its zarr.json, or by its arrays where that is damaged or gone."""
    try:
        return "featcache" in json.loads((path / METADATA).read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return all((path / name / METADATA).exists() for name in (STATE, EMBEDDING, "content"))

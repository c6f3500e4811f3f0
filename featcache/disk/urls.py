"""Files by URL (`s3://`, `https://`, `memory://`, …), through fsspec."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from featcache.disk.plain import read_plain

# What services call the thing that changes when a file does, the surest first. Of one S3 file, a listing and the file's
# own answer give times of different precision, but the same ETag: only the first that is there counts.
_MARKS = (
    "ETag etag generation md5Hash Content-MD5 mtime LastModified last_modified Last-Modified modified modify created"
)


def is_url(path: str) -> bool:
    return "://" in path


def local_path(url: str) -> str | None:
    """The path that a `file://` URL stands for; None for what is no such URL."""
    if not url.startswith(("file://", "local://")):
        return None
    return LocalFileSystem._strip_protocol(url)


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system that `url` points into, and the path inside it.

    Raises:
        ValueError: no such protocol, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        remedy = "pip install 'featcache[s3]'" if url.startswith("s3") else str(error).splitlines()[0]
        raise ValueError(f"{url}: nothing installed here reads such addresses: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{url}: {error}; give a local path or an address such as s3://bucket/photos") from None


def read_url(url: str) -> bytes:
    """The whole file at `url`; raises as `read_file` does."""
    return read_file(*open_filesystem(url))


def read_file(filesystem: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
    """The file at `path` of an fsspec file system; bytes `start` to `end` of it, if given.

    Raises:
        FileNotFoundError: this file is not there.
        ConnectionError: anything else, whatever the service calls it: the network, the service or the credentials
            have gone, which says nothing about this one image.
    """
    if isinstance(filesystem, LocalFileSystem):
        return read_plain(path)[start:end]
    with asking_service(path):
        return filesystem.cat_file(path, start=start, end=end)


def read_starts(filesystem: Any, paths: Sequence[str], counts: Sequence[int]) -> list[bytes]:
    """The first bytes of each file, as many as `counts` says, many files asked for at once; raises as `read_file` does."""
    if not paths:
        return []
    with asking_service(paths[0]):
        return filesystem.cat_ranges(list(paths), [0] * len(paths), list(counts), on_error="raise")


def listed(filesystem: Any, root: str) -> dict[str, int | None]:
    """Size of every file under `root`, by path; None where the service does not tell. A file lists itself.

    Raises:
        Exception: whatever the service raises where one folder cannot be listed: fsspec's own `find` leaves it out.
    """
    kind, generic = type(filesystem), fsspec.AbstractFileSystem
    walks = kind._find is AsyncFileSystem._find if issubclass(kind, AsyncFileSystem) else kind.find is generic.find
    if not walks:  # a bucket is listed in one go
        return {path: info.get("size") for path, info in filesystem.find(root, detail=True).items()}
    found, ahead, entered = {}, [root], set()
    while ahead:
        folder = ahead.pop()
        entered.add(folder.rstrip("/"))
        for info in filesystem.ls(folder, detail=True):
            if info["type"] != "directory":
                found[info["name"]] = info.get("size")
            elif info["name"].rstrip("/") not in entered:
                ahead.append(info["name"])
    return found


def cannot_be_read(error: Exception, what: str = "read") -> str:
    """What to say of a URL, whatever its service raises: every one has its own kinds; to the user they are one."""
    reason = " ".join(str(error).split())
    return f"cannot be {what} ({type(error).__name__}: {reason}); check the address, the network and credentials"


def file_state(filesystem: Any, path: str) -> list[int | str | None]:
    """Size in bytes and what else changes when the file at `path` does; None for what the service does not tell.

    Raises as `read_file` does.
    """
    with asking_service(path):
        filesystem.invalidate_cache(path)  # else a listing made earlier answers
        found = filesystem.info(path)
        if found.get("type", "file") != "file":
            raise FileNotFoundError(path)
        return [found.get("size"), next((str(found[mark]) for mark in _MARKS.split() if found.get(mark)), None)]


def reads_ranges(filesystem: Any, path: str, size: int | None) -> bool:
    """Whether the file at `path`, of `size` bytes, can be read from the middle; some web servers send all or nothing.

    Raises as `read_file` does.
    """
    if not size:
        return False
    with asking_service(path), filesystem.open(path, "rb", block_size=4096) as file:
        try:
            file.seek(size - 1)
            return len(file.read(1)) == 1
        except ValueError:
            return False


@contextmanager
def asking_service(path: str) -> Iterator[None]:
    """Errors of the service that `path` lies in become the two kinds that `read_file` raises."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ConnectionError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error

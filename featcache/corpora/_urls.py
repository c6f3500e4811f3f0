"""Files by URL (`s3://`, `https://`, `memory://`, …), through fsspec."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

# What services call the thing that changes when a file does, the surest first. Of one S3 file, a listing and the file's
# own answer give times of different precision, but the same ETag: only the first that is there counts.
_MARKS = (
    "ETag etag generation md5Hash Content-MD5 mtime LastModified last_modified Last-Modified modified modify created"
)


def is_url(path: str) -> bool:
    return "://" in path


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
    with asking_service(path):
        return filesystem.cat_file(path, start=start, end=end)


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

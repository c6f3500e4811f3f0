"""Files by URL (`s3://`, `https://`, `memory://`, …), through fsspec."""

from typing import Any

import fsspec


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


def read_file(filesystem: Any, path: str) -> bytes:
    """The whole file at `path` of an fsspec file system.

    Raises:
        FileNotFoundError: this file is not there.
        ConnectionError: anything else, whatever the service calls it: the network, the service or the credentials
            have gone, which says nothing about this one image.
    """
    try:
        return filesystem.cat_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ConnectionError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error

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
    """The whole file at `url`."""
    filesystem, path = open_filesystem(url)
    return filesystem.cat_file(path)

"""All chunk files of one array in one range of addresses, so that many rows anywhere are taken in a single step.

A chunk file holds raw rows and a checksum behind them. Where a chunk's rows fill whole pages of memory, its file can
be mapped at the very address where the chunk before it ends: the rows of all files are then one plain array, and the
checksums lie outside of it.
"""

import ctypes
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from featcache.store.layout import CHECKSUM_BYTES

MOST_MAPS = 16_384
"""Files that one process maps in this way, of all arrays together: a quarter of what Linux allows it by default."""

_MAP_FIXED = 0x10  # Linux and macOS; Python's mmap does not name it
_live: "weakref.WeakKeyDictionary[mmap.mmap, int]" = weakref.WeakKeyDictionary()  # range → how many files are in it
_lock = threading.Lock()


def map_chunks(
    paths: Sequence[str | os.PathLike[str]], rows_per_chunk: int, tail_shape: tuple[int, ...], dtype: DTypeLike
) -> np.ndarray | None:
    """The rows of all chunk files as one read-only array that lies on disk; no file stays open.

    The files are unmapped when neither the array nor a view of it is left.

    Args:
        paths: chunk files in order: `rows_per_chunk` raw rows each, then `CHECKSUM_BYTES`.
        tail_shape: shape of one row.

    Returns:
        (len(paths) · rows_per_chunk, *tail_shape); or None where that is not possible, and the files must be mapped
        one by one: a file is missing or has another size (reading past its end would kill the process), several
        chunks that do not fill whole pages, more than `MOST_MAPS` files, or a system without such maps.
    """
    dtype = np.dtype(dtype)
    chunk_bytes = rows_per_chunk * math.prod(tail_shape) * dtype.itemsize
    whole_pages = chunk_bytes % mmap.PAGESIZE == 0 or len(paths) == 1
    if os.name != "posix" or not paths or not chunk_bytes or not whole_pages:
        return None
    with _lock:
        if sum(_live.values()) + len(paths) > MOST_MAPS:
            return None
        try:  # Python reserves the range, and unmaps all of it when the last array that reads it is gone
            reserved = mmap.mmap(-1, len(paths) * chunk_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        except OSError:
            return None
        _live[reserved] = len(paths)
    rows = np.frombuffer(reserved, dtype).reshape(-1, *tail_shape)
    for number, path in enumerate(paths):
        if not _map_at(rows.ctypes.data + number * chunk_bytes, chunk_bytes, path):
            return None
    return rows


def release_pages(rows: np.ndarray) -> None:
    """Take the pages of an array made by `map_chunks` out of this process's memory; read again, they come from the
    system's cache or the disk."""
    whole: Any = rows
    while isinstance(whole, np.ndarray):
        whole = whole.base
    whole = whole.obj if isinstance(whole, memoryview) else whole
    if hasattr(mmap, "MADV_DONTNEED"):
        whole.madvise(mmap.MADV_DONTNEED)


def _map_at(address: int, chunk_bytes: int, path: str | os.PathLike[str]) -> bool:
    """Map a chunk file's rows over reserved addresses; False when it is not there, of another size, or refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if os.fstat(descriptor).st_size != chunk_bytes + CHECKSUM_BYTES:
            return False
        at = _libc_mmap()(address, chunk_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        return bool(at == address)
    finally:
        os.close(descriptor)


@lru_cache(maxsize=1)
def _libc_mmap() -> Callable[..., int | None]:
    """The system's own mmap: Python's cannot be told the address."""
    call = ctypes.CDLL(None).mmap
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    call.restype = ctypes.c_void_p
    return call

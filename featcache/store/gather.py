"""A store's rows through memory maps of its chunk files: all chunks of an array as one map where that is possible, each
by itself where it is not. The images that a store keeps are rows of another kind: a chunk packs one file after another.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from featcache.store.files import Files
from featcache.store.integrity import checksum_holds
from featcache.store.layout import PIXELS, ArrayLayout, chunk_name
from featcache.store.mapped import map_chunks, release_pages


class MappedRows:
    """The rows of one store, as its files are now: when they change, make another.

    Args:
        length: rows of the store.
        sealed: whether all chunk files are there to stay; only then is an array mapped whole.
    """

    def __init__(self, files: Files, layout: Mapping[str, ArrayLayout], length: int, *, sealed: bool):
        self._files, self._layout = files, layout
        # Caches of functions, not of methods: a cache that leads back here would keep the maps until the next collection.
        self._whole = lru_cache(maxsize=None)(partial(_map_whole, files.root, layout, length if sealed else 0))
        # Least recently used closed first, well under the usual limit of open files.
        self._chunk = lru_cache(maxsize=512)(partial(_map_chunk, files, layout))
        self._packed = lru_cache(maxsize=512)(partial(_map_packed, files, layout))
        self._intact = lru_cache(maxsize=None)(partial(_is_intact, files, layout))
        # Of every chunk ever read, 8 bytes an image: finding them touches pages all over the chunk.
        self._starts = lru_cache(maxsize=None)(partial(_find_starts, self._packed))

    def gather(self, rows: Int64[np.ndarray, " b"], field: str, view: Int64[np.ndarray, " b"]) -> np.ndarray:
        """(B, …): row `rows[i]` of view `view[i]` of a feature array. Both are in range."""
        if (whole := self._whole(field)) is not None:
            return whole.reshape(-1, *whole.shape[2:]).take(rows * whole.shape[1] + view, axis=0)
        (views, *tail), dtype, per_chunk = self._layout[field]
        order = np.argsort(rows, kind="stable")
        chunk, offset = np.divmod(rows[order], per_chunk)
        offset = offset * views + view[order]
        starts = np.flatnonzero(np.r_[True, chunk[1:] != chunk[:-1]]) if rows.size else np.empty(0, np.int64)
        self._files.fetch_all(chunk_name(self._layout, field, int(chunk[start])) for start in starts)
        gathered = np.empty((len(rows), *tail), dtype)
        for start, stop in itertools.pairwise([*starts.tolist(), len(order)]):
            every_view = self._chunk(field, int(chunk[start])).reshape(-1, *tail)
            gathered[order[start:stop]] = every_view.take(offset[start:stop], axis=0)
        return gathered

    def row(self, name: str, row: int) -> np.ndarray:
        """One row of any array of fixed width."""
        if (whole := self._whole(name)) is not None:
            return np.asarray(whole[row])
        chunk, offset = divmod(row, self._layout[name].chunk_rows)
        return np.asarray(self._chunk(name, chunk)[offset])

    def intact(self, name: str, row: int) -> bool:
        """Whether the chunk that holds the row is as it was written; each is read once."""
        return self._intact(name, row // self._layout[name].chunk_rows)

    def pixels(self, row: int) -> bytes:
        """One kept image, an encoded file."""
        chunk, item = divmod(row, self._layout[PIXELS].chunk_rows)
        start, stop = self._starts(chunk)[item : item + 2].tolist()
        return self._packed(chunk)[start + 4 : stop].tobytes()

    def release(self, field: str) -> None:
        """Take what was read of a feature array out of this process's memory."""
        if (whole := self._whole(field)) is not None:
            release_pages(whole)
        else:
            self._chunk.cache_clear()


def _map_whole(root: Path, layout: Mapping[str, ArrayLayout], length: int, name: str) -> np.ndarray | None:
    """All rows of an array of fixed width as one map; None where only single chunks can be mapped."""
    tail, dtype, per_chunk = layout[name]
    paths = [root / chunk_name(layout, name, chunk) for chunk in range(-(-length // per_chunk))]
    return map_chunks(paths, per_chunk, tail, dtype)


def _map_chunk(files: Files, layout: Mapping[str, ArrayLayout], name: str, chunk: int) -> np.ndarray:
    tail, dtype, per_chunk = layout[name]
    path = files.fetch(chunk_name(layout, name, chunk))
    # As a plain array: every operation on the memmap class itself costs microseconds more.
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(per_chunk, *tail)))


def _is_intact(files: Files, layout: Mapping[str, ArrayLayout], name: str, chunk: int) -> bool:
    return checksum_holds(files.fetch(chunk_name(layout, name, chunk)).read_bytes())


def _map_packed(files: Files, layout: Mapping[str, ArrayLayout], chunk: int) -> np.ndarray:
    """A chunk of variable-length bytes: a count, then (length, bytes)…"""
    return np.asarray(np.memmap(files.fetch(chunk_name(layout, PIXELS, chunk)), np.uint8, mode="r"))


def _find_starts(packed_chunk: Callable[[int], np.ndarray], chunk: int) -> np.ndarray:
    """Where each item's length stands in a packed chunk, and the end of the last item."""
    packed, starts = packed_chunk(chunk), [4]
    for _ in range(int(packed[:4].view("<u4")[0])):
        starts.append(starts[-1] + 4 + int.from_bytes(packed[starts[-1] : starts[-1] + 4].tobytes(), "little"))
    return np.array(starts)

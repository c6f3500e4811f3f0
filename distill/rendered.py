"""Pixels that were rendered, or token ids, kept for the epochs and the fits after: an image is decoded once for each of its views."""

import logging
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from featcache.corpora import Corpus
from featcache.inputs import Input
from featcache.inputs.images import Preprocess
from featcache.machine import free_bytes
from featcache.store import FeatureStore

MEMORY_SHARE = 0.25
"""Rendered pixels are kept in memory, as many as fit into this share of what is free when they are first asked for."""
DISK_SHARE = 0.5
"""All that do not fit there are kept in a file, where a folder is given for it and they fit into this share of its disk."""

log = logging.getLogger("distill")


class Rendered:
    """The pixels of (row, view)s, each rendered once where there is room for it. May be used by several threads.

    Args:
        shape: (rows, views) that there are.
        wanted: how many of them may be asked for.
        like: one that is rendered; or of square images of uint8 their px.
        room: bytes of memory that they may take.
        folder: where a file may lie of what does not all fit there. It has no name, and is gone when the process ends.
    """

    def __init__(
        self, shape: tuple[int, int], wanted: int, like: int | np.ndarray, room: int, folder: Path | None = None
    ):
        self._slots = np.full(shape, -1, np.int32)
        one = np.empty((like, like, 3), np.uint8) if isinstance(like, int) else like
        self._shape, self._dtype, self._wanted, self._bytes, self._used = one.shape, one.dtype, wanted, one.nbytes, 0
        self._fit = min(wanted, room // self._bytes)
        on_disk = folder and shutil.disk_usage(folder).free * DISK_SHARE >= wanted * self._bytes
        self._folder = folder if on_disk and self._fit < wanted and hasattr(os, "posix_fallocate") else None
        self._pixels: np.ndarray | None = None
        self._lock = threading.Lock()

    @property
    def all_kept(self) -> bool:
        """Whether there is room for all of them."""
        return self._folder is not None or self._fit == self._wanted

    @property
    def description(self) -> str:
        """Which of them are rendered once, and where they are kept, in words."""
        kept = self._wanted if self._folder else self._fit
        size = f"{kept * self._bytes / 1e6:,.1f} MB"
        if kept < self._wanted:
            return f"rendered every epoch, but for {kept:,} of {self._wanted:,} kept in memory ({size})"
        return f"rendered once, kept in {f'a file in {self._folder}' if self._folder else 'memory'} ({size})"

    def take(
        self,
        rows: Int64[np.ndarray, " b"],
        views: Int64[np.ndarray, " b"],
        render: Callable[[Int64[np.ndarray, " n"]], Iterable[np.ndarray]],
    ) -> Shaped[np.ndarray, "b ..."]:
        """Pixels of these views, the caller's to change; `render` gives those of the positions (0…b−1) that are not kept."""
        with self._lock:
            slots = self._slots[rows, views]
            kept = slots >= 0
            if self._pixels is not None and kept.all():
                return self._pixels[slots]
            pixels = np.empty((len(rows), *self._shape), self._dtype)
            if self._pixels is not None:
                pixels[kept] = self._pixels[slots[kept]]
        fresh = np.flatnonzero(~kept)
        for at, rendered in zip(fresh, render(fresh), strict=True):
            pixels[at] = rendered
        with self._lock:
            self._keep(rows[fresh], views[fresh], pixels[fresh])
        return pixels

    def _keep(self, rows: np.ndarray, views: np.ndarray, pixels: np.ndarray) -> None:
        if self._pixels is None:
            self._pixels = self._opened()
        _, once = np.unique(rows * self._slots.shape[1] + views, return_index=True)
        once = once[: len(self._pixels) - self._used]
        slots = self._used + np.arange(len(once))
        self._pixels[slots], self._slots[rows[once], views[once]] = pixels[once], slots
        self._used += len(once)

    def _opened(self) -> np.ndarray:
        """Room for as many as fit. Memory is mapped, not allocated: it goes back to the system when it is not used any more
        (see `featcache.machine.keep_freed_memory`)."""
        if self._folder:
            size = self._wanted * self._bytes
            try:
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk later on would end the process
                    return np.frombuffer(mmap.mmap(file.fileno(), size), self._dtype).reshape(-1, *self._shape)
            except OSError as error:
                log.warning("%s: no file for pixels (%s); what does not fit into memory is rendered every epoch", *(
                    self._folder, error.strerror))  # fmt: skip
                self._folder = None
        if not self._fit:
            return np.empty((0, *self._shape), self._dtype)
        return np.frombuffer(mmap.mmap(-1, self._fit * self._bytes), self._dtype).reshape(-1, *self._shape)


class Renderings:
    """What the fits of one process rendered: those of the same stores, corpora, views and input share their pixels.

    Args:
        folder: see `Rendered`; it must exist.
    """

    def __init__(self, folder: Path | None = None):
        self._folder, self._found = folder, dict[Hashable, Rendered]()

    def of(
        self,
        stores: Sequence[FeatureStore],
        corpora: Sequence[Corpus],
        preprocess: Input[Any, Any],
        *,
        every_view: bool,
        processes: int = 1,
    ) -> Rendered:
        """Of the rows of `stores`, numbered store after store, failed ones included, in every stored view or the plain one.

        Args:
            processes: that share this machine's memory.
        """
        pixels = preprocess
        if isinstance(preprocess, Preprocess):
            pixels = replace(
                preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
            )  # what comes after is each model's own
        made_of = tuple(
            (str(store.path), store.digest, corpus.spec) for store, corpus in zip(stores, corpora, strict=True)
        )
        key = (made_of, pixels, every_view, processes)
        if key not in self._found:
            views = [store.views if every_view else 1 for store in stores]
            wanted = sum(len(store.ok) * count for store, count in zip(stores, views, strict=True))
            room = int(MEMORY_SHARE * free_bytes() / processes)
            self._found[key] = Rendered(
                (sum(map(len, stores)), max(views)), wanted, preprocess.blank(1)[0].numpy(), room, self._folder
            )
        return self._found[key]

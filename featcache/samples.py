"""Samples: one image read, decoded and rendered, many at a time."""

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from featcache.cache import KnownRows
from featcache.corpus import Corpus
from featcache.preprocess import Preprocess
from featcache.views import PARAMETERS, Views, decode, render

_MACHINE = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOTCONN, errno.ESTALE, errno.EHOSTDOWN, errno.ENETDOWN}
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Sample:
    """One sample, read: its content hash and view parameters, and its pixels, or its known features, or neither."""

    content: bytes
    parameters: np.ndarray  # (V, P) float32
    pixels: np.ndarray | None = None  # (V, S, S, 3) uint8
    known: dict[str, np.ndarray] | None = None  # field → (V, D) float16
    reason: str = ""  # why neither


def read_sample(
    corpus: Corpus, row: int, recipe: Views, preprocess: Preprocess, known: KnownRows | None = None
) -> Sample:
    """Read, decode and render one sample. What is wrong with one image is data; what is wrong with the machine is not.

    Raises:
        MemoryError, OSError: out of memory or files, or the place where the images live is gone.
    """
    content, nothing = bytes(16), np.zeros((recipe.count, len(PARAMETERS)), np.float32)
    try:
        encoded = corpus.read(row)
        content = content_hash(encoded)
        if known and (found := known.find(content, corpus.ids[row])):
            return Sample(content, found[1], known=found[0])
        image = decode(encoded)
        views = [recipe.draw(image.size, preprocess, corpus.ids[row], number) for number in range(recipe.count)]
        pixels = np.stack([render(image, view, preprocess) for view in views])
    except Exception as error:
        if isinstance(error, (MemoryError, ConnectionError, TimeoutError)) or getattr(error, "errno", None) in _MACHINE:
            raise
        return Sample(content, nothing, reason=f"{type(error).__name__}: {error}")
    return Sample(content, np.array([view.parameters for view in views], np.float32), pixels)


def content_hash(encoded: bytes) -> bytes:
    """128-bit BLAKE2b of an encoded image: what a row is known by, wherever its file moves."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch(function: Callable[[T], R], items: Iterable[T], pool: ThreadPoolExecutor, ahead: int) -> Iterator[R]:
    """`map(function, items)` on `pool`, in order, with at most `ahead` results waiting to be taken."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

"""Samples: one image or text read, decoded and rendered for every teacher, many at a time."""

import errno
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from featcache.corpora import Corpus
from featcache.inputs import Input, Views
from featcache.inputs.images import KeptPixels, Preprocess
from featcache.store.index import KnownRows

_MACHINE = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOTCONN, errno.ESTALE, errno.EHOSTDOWN, errno.ENETDOWN}
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Wanted:
    """What one teacher wants of a sample: pixels by its preprocessing, unless its features are known already."""

    preprocess: Input[Any, Any]
    known: KnownRows | None = None


@dataclass(frozen=True)
class Seen:
    """What one teacher gets of a sample: view parameters, and either pixels or known features."""

    parameters: np.ndarray  # (V, P) float32
    pixels: np.ndarray | None = None  # (V, S, S, 3) uint8, or (1, L) int32 token ids
    known: dict[str, np.ndarray] | None = None  # field → (V, …), as stored


@dataclass(frozen=True)
class Sample:
    """One sample, read.

    Attributes:
        content: hash of the encoded image; zeros when it could not be read.
        seen: one for each teacher that wanted it, None for the others, or where the image could not be decoded.
        reason: why it could not; "" otherwise.
        size: (width, height) in px of the decoded image; (0, 0) when it was not decoded.
        kept: the image as the store keeps it; b"" when it does not.
    """

    content: bytes
    seen: tuple[Seen | None, ...]
    reason: str = ""
    size: tuple[int, int] = (0, 0)
    kept: bytes = b""


def read_sample(
    corpus: Corpus, row: int, recipe: Views, wanted: Sequence[Wanted | None], keep: KeptPixels | None = None
) -> Sample:
    """Read, decode and render one sample. What is wrong with one image is data; what is wrong with the machine is not.

    Raises:
        MemoryError, OSError: out of memory or files, or the place where the images live is gone.
    """
    content, size, kept = bytes(16), (0, 0), b""
    try:
        encoded = corpus.read(row)
        content, sample_id = content_hash(encoded), corpus.ids[row]
        found = [want.known.find(content, sample_id) if want and want.known else None for want in wanted]
        seen = [Seen(known[1], known=known[0]) if known else None for known in found]
        if keep or any(want and not known for want, known in zip(wanted, found, strict=True)):
            item = next((type(want.preprocess) for want in wanted if want), Preprocess).decode(encoded)
            if keep:
                size, kept = item.size, keep.encode(item)
            rendered: dict[Input[Any, Any], Seen] = {}  # teachers of one preprocessing share the pixels
            for i, want in enumerate(wanted):
                if want is None or seen[i]:
                    continue
                if want.preprocess not in rendered:
                    size = want.preprocess.size_of(item)
                    views = [want.preprocess.draw(size, recipe, sample_id, number) for number in range(recipe.count)]
                    rendered[want.preprocess] = Seen(
                        np.array([view.parameters for view in views], np.float32),
                        np.stack([want.preprocess.render(item, view) for view in views]),
                    )
                seen[i] = rendered[want.preprocess]
    except MemoryError:
        raise MemoryError(
            f"{corpus.ids[row]}: does not fit into memory; take fewer --workers, or set FEATCACHE_MAX_PIXELS to leave it out"
        ) from None
    except Exception as error:
        if of_the_machine(error):
            raise
        return Sample(content, (None,) * len(wanted), reason=f"{type(error).__name__}: {error}")
    return Sample(content, tuple(seen), size=size, kept=kept)


def of_the_machine(error: Exception) -> bool:
    """Whether what was wrong while an image was read is not of that image: memory, or the place where the images live."""
    gone = isinstance(error, (MemoryError, ConnectionError, TimeoutError))
    return gone or getattr(error, "errno", None) in _MACHINE


def content_hash(encoded: bytes) -> bytes:
    """128-bit BLAKE2b of an encoded image: what a row is known by, wherever its file moves."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def digest_of_rows(ids: Iterable[str], labels: Iterable[int]) -> str:
    """128-bit BLAKE2b, in hex, of every id and label: what a store's rows are."""
    rows = hashlib.blake2b(digest_size=16)
    for sample_id, label in zip(ids, labels, strict=True):
        rows.update(f"{sample_id}\0{label}\0".encode())
    return rows.hexdigest()


def digest_of_corpus(corpus: Corpus) -> str:
    return digest_of_rows(corpus.ids, map(corpus.label, range(len(corpus))))


def content_now(corpus: Corpus, row: int) -> bytes:
    """`content_hash` of an image as it is now; zeros where it is gone or cannot be read."""
    try:
        return content_hash(corpus.read(row))
    except Exception:  # that is no change when the row had failed for it
        return bytes(16)


def bursts(function: Callable[[T], R], items: Iterable[T], pool: ThreadPoolExecutor, ahead: int) -> Iterator[R]:
    """`map(function, items)` on `pool`, in order, `ahead` at a time, the pool idle while those results are used.

    For callers that then compute on the same cores: threads that read meanwhile hold up a computation that is spread
    over all cores by more than their own work. Where the first burst mostly waits, for a network or a disk, the rest is
    read meanwhile all the same, as `prefetch` does.
    """
    items = iter(items)
    while burst := list(islice(items, ahead)):
        wall, busy = time.perf_counter(), time.process_time()
        results = list(pool.map(function, burst))
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        yield from results
        if busy < wall / 4:
            yield from prefetch(function, items, pool, ahead)


def prefetch(function: Callable[[T], R], items: Iterable[T], pool: ThreadPoolExecutor, ahead: int) -> Iterator[R]:
    """`map(function, items)` on `pool`, in order, with at most `ahead` results waiting to be taken."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

"""Pairs: the pixels of a (sample, view), joined with what the teacher saw in them."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float16, Int64, UInt8

from featcache.corpora.store import KeptImages
from featcache.corpus import Corpus
from featcache.preprocess import Preprocess
from featcache.samples import content_hash, cores, prefetch
from featcache.store import FeatureStore
from featcache.views import Views, decode, render

MEMORY_SHARE = 0.25
"""Rendered pixels are kept in memory when they fit in this share of what is free."""


class Pairs:
    """Batches of (pixels, teacher embedding) for the same sample and view.

    The views are replayed from the store's recipe, so the student sees the very box and mirroring that the
    teacher saw, at the student's own resolution. Failed rows are left out.

    Args:
        store: sealed, with its preprocessing recorded.
        corpus: the one the store was made from, or the images that a store keeps of it.
        preprocess: the student's.
        workers: threads that read and render; by default one a core.

    Raises:
        ValueError: the corpus is not the one that the store was made from.
    """

    def __init__(self, store: FeatureStore, corpus: Corpus, preprocess: Preprocess, workers: int | None = None):
        self._teacher = teacher_preprocess(store)
        sample_of = {sample_id: i for i, sample_id in enumerate(corpus.ids)}
        missing = [str(store.sample_ids[row]) for row in store.ok if store.sample_ids[row] not in sample_of]
        if missing:
            raise ValueError(
                f"{corpus.spec} does not match {store.path}: it lacks {len(missing)} of the store's {len(store.ok)} samples "
                f"(first: {missing[0]}); give the corpus that the store was extracted from"
            )
        self.store, self.corpus, self.preprocess = store, corpus, preprocess
        self.rows = store.ok
        if not len(self.rows):
            raise ValueError(f"{store.path}: not one row has features; `featcache info` says why")
        self._sample = np.array([sample_of[sample_id] for sample_id in store.sample_ids[self.rows]])
        recipe = {key: store.manifest["views"][key] for key in ("count", "augment", "seed")}
        self._recipe = Views(**recipe)
        shape = (len(self.rows), store.views, preprocess.size, preprocess.size, 3)
        self._memory = np.empty(shape, np.uint8) if np.prod(shape) < MEMORY_SHARE * _free_bytes() else None
        self._held = np.zeros(shape[:2], bool)
        self._workers = workers or cores()

    def __len__(self) -> int:
        """Samples with features; each is seen once an epoch, in one of its views."""
        return len(self.rows)

    def epoch(
        self, number: int, *, batch_size: int, seed: int
    ) -> Iterator[tuple[UInt8[np.ndarray, "b s s 3"], Float16[np.ndarray, "b d"]]]:
        """Shuffled batches, each sample in one view drawn at random; a pure function of (seed, number).

        The last, short batch is left out unless it is the only one. The next batch is prepared meanwhile.
        """
        rng = np.random.default_rng([seed, number])
        order, views = rng.permutation(len(self)), rng.integers(self.store.views, size=len(self))
        stop = max(batch_size, len(self) - len(self) % batch_size)
        batches = [order[start : start + batch_size] for start in range(0, min(stop, len(self)), batch_size)]
        with ThreadPoolExecutor(self._workers) as readers, ThreadPoolExecutor(1) as ahead:

            def prepare(batch: Int64[np.ndarray, " b"]) -> tuple[np.ndarray, np.ndarray]:
                view = views[batch]
                return self._pixels(batch, view, readers), self.store.gather(self.rows[batch], view=view)

            yield from prefetch(prepare, batches, ahead, ahead=2)

    def _pixels(self, batch: np.ndarray, views: np.ndarray, readers: ThreadPoolExecutor) -> np.ndarray:
        if self._memory is None:
            return np.stack(list(readers.map(self.render, batch.tolist(), views.tolist())))
        fresh = np.flatnonzero(~self._held[batch, views])
        rendered = readers.map(self.render, batch[fresh].tolist(), views[fresh].tolist())
        for i, pixels in zip(fresh, rendered, strict=True):
            self._memory[batch[i], views[i]] = pixels
        self._held[batch[fresh], views[fresh]] = True
        return self._memory[batch, views]

    def render(self, index: int, view: int) -> UInt8[np.ndarray, "s s 3"]:
        """Pixels of the `index`-th sample with features, in the given view.

        Raises:
            ValueError: the image is no longer the one that the teacher saw.
        """
        sample, row = int(self._sample[index]), int(self.rows[index])
        seen = self.store.content[row].tobytes()
        encoded, kept = self.corpus.read(sample), self.corpus if isinstance(self.corpus, KeptImages) else None
        if kept and kept.content(sample) != seen:
            kept = None  # the teacher saw the kept image itself, if anything: its store was extracted from `store:PATH`
        if not kept and any(seen) and content_hash(encoded) != seen:
            raise ValueError(
                f"{self.corpus.ids[sample]}: has changed since {self.store.path} was extracted; extract it again"
            )
        image = decode(encoded)
        width, height = kept.original_size(sample) if kept else image.size
        drawn = self._recipe.draw((width, height), self._teacher, self.corpus.ids[sample], view)
        return render(image, drawn.scaled(image.width / width, image.height / height), self.preprocess)


def _free_bytes() -> int:
    """Memory that is free; 4 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except ValueError:
        return 4 * 2**30


def teacher_preprocess(store: FeatureStore) -> Preprocess:
    """Of the encoder that made `store`.

    Raises:
        ValueError: the store does not record it, or not the views, so its images cannot be replayed.
    """
    record = store.manifest["encoder"].get("preprocess")
    if not record or "augment" not in store.manifest["views"]:
        raise ValueError(
            f"{store.path}: does not record how its images were cropped, so they cannot be replayed; extract it with featcache"
        )
    return Preprocess.from_dict(record)

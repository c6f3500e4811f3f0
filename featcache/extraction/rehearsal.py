"""Before the first batch: how a store's features are computed, and what a few images say of it."""

import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped

from featcache.corpora import Corpus, kind_of
from featcache.encoder import Encoder
from featcache.extraction.fastest import fastest_faithful, pass_seconds
from featcache.extraction.pins import settle
from featcache.extraction.samples import Sample, Wanted, read_sample
from featcache.extraction.settings import ExtractSettings
from featcache.inputs import Input, Views
from featcache.machine import machine_kind
from featcache.precision import CANDIDATES, FP32
from featcache.store import FeatureStore
from featcache.store.comparable import NAMES, is_half
from featcache.store.layout import EMBEDDING, FLOAT16
from featcache.store.manifest import ExtractionRecord, Manifest
from featcache.store.rounding import TOLERANCE, share_lost

PROBE_IMAGES = 8
CHOOSING_IMAGES = 32
"""All over the corpus: what a precision is chosen on must be faithful to them."""
log = logging.getLogger("featcache")


class FewImages:
    """Some images of a corpus, as pixels of view 0."""

    def __init__(self, corpus: Corpus, recipe: Views, pool: ThreadPoolExecutor):
        self._corpus, self._recipe, self._pool = corpus, recipe, pool
        self.first = cache(self._first)

    def _read(self, preprocess: Input[Any, Any], rows: Iterable[int]) -> Iterator[Sample]:
        return self._pool.map(lambda row: read_sample(self._corpus, row, self._recipe, [Wanted(preprocess)]), rows)

    def _first(self, preprocess: Input[Any, Any]) -> tuple[Shaped[torch.Tensor, "n ..."], float]:
        """The first readable ones; and how many seconds a sample took to read.

        Raises:
            ValueError: not one can be read.
        """
        found: dict[int, np.ndarray] = {}
        reason = ""
        rows = iter(range(len(self._corpus)))
        while len(found) < PROBE_IMAGES and (some := list(islice(rows, PROBE_IMAGES - len(found)))):
            for row, sample in zip(some, self._read(preprocess, some), strict=True):
                if (seen := sample.seen[0]) and seen.pixels is not None:
                    found[row] = seen.pixels[0]
                reason = reason or (f"{self._corpus.ids[row]}: {sample.reason}" if sample.reason else "")
        if not found:
            raise ValueError(
                f"{self._corpus.spec}: not one of {len(self._corpus)} {kind_of(self._corpus)}s could be read (the first: {reason})"
            )
        began = time.perf_counter()
        for _ in self._read(preprocess, found):  # once more: the first time is not like the others
            pass
        seconds = (time.perf_counter() - began) / len(found)
        return torch.from_numpy(np.stack(list(found.values()))), seconds

    def spread(self, preprocess: Input[Any, Any]) -> Shaped[torch.Tensor, "n ..."]:
        """Those all over the corpus that can be read: the first ones alone may be of one class."""
        rows = sorted({i * len(self._corpus) // CHOOSING_IMAGES for i in range(CHOOSING_IMAGES)})
        samples = self._read(preprocess, rows)
        found = [seen.pixels[0] for sample in samples if (seen := sample.seen[0]) and seen.pixels is not None]
        return torch.from_numpy(np.stack(found)) if found else self.first(preprocess)[0]


def how_computed(
    path: str | Path,
    store: FeatureStore | None,
    encoder: Encoder,
    images: FewImages,
    settings: ExtractSettings,
    keep: bool = True,
) -> tuple[ExtractionRecord, str]:
    """How the store's features are computed, as its manifest records it, and why in that precision, in words.

    An interrupted store goes on as it was begun, one that is replaced is made as it was. A precision that is measured is
    kept for the encoder's later stores, unless `keep` is False.

    Raises:
        ValueError: the store was begun in half precision on another kind of machine, or the encoder has one precision and
        is asked for another.
    """
    machine, batch = machine_kind(settings.processor), settings.batch
    if store is not None:
        made = store.manifest.extraction
        refuse_other_machine(path, made, machine)
        return made, "as it was begun"
    name, why = None, "as the store it replaces"
    if encoder.own_precision:
        if settings.precision not in ("auto", FP32.name):
            raise ValueError(f"{encoder.name}: computes in its own precision alone; leave --precision out")
        name, why = FP32.name, "what it is given and gives; inside, its own"
    elif settings.precision == "auto":
        name = _of_replaced(path, encoder.fingerprint, machine)
    if name is None:
        name, why = settle(
            encoder.fingerprint,
            machine,
            settings.precision,
            lambda: fastest_faithful(encoder, images.spread(encoder.preprocess), batch, settings.processor),
            keep=keep,
        )
    checked: dict[str, Any] = {"cosine": None, "checked": None} if is_half(name) else {"cosine": 1.0}
    record = ExtractionRecord(batch_size=batch, device=settings.processor, machine=machine, precision=name, **checked)
    return record, why


def refuse_other_machine(path: str | Path, made: ExtractionRecord, machine: str) -> None:
    """Features of half precision have the same bits on one kind of machine only.

    Raises:
        ValueError: the store at `path` was begun on another.
    """
    if is_half(str(made.precision)) and (made.machine or machine) != machine:
        raise ValueError(
            f"{path}: was begun in {made.precision} on {made.machine}, and this is {machine}, where the bits "
            "are others; finish it there, or begin again with --overwrite"
        )


def _of_replaced(path: str | Path, fingerprint: str, machine: str) -> str | None:
    """The precision of a store of the same encoder that is there already, made on this kind of machine."""
    try:
        there = FeatureStore(path)
    except ValueError:
        return None
    made = there.manifest.extraction
    same = there.fingerprint == fingerprint and made.machine == machine
    return made.precision if same and made.precision in NAMES else None


def rehearse(encoder: Encoder, manifest: Manifest, pixels: Shaped[torch.Tensor, "n ..."]) -> float:
    """Put the encoder into the store's precision and warn of what a few of its features show; seconds an image."""
    made = manifest.extraction
    assert made.device
    assert made.precision
    assert made.batch_size
    encoder.to(made.device, CANDIDATES[made.precision])
    began = time.perf_counter()
    features = encoder.encode_padded(pixels, made.batch_size, tuple(manifest.fields))
    seconds = time.perf_counter() - began
    if made.device == "cuda":  # whose first pass sets it up
        seconds = pass_seconds(encoder, pixels, made.batch_size)
    if torch.allclose(features[EMBEDDING].norm(dim=1).cpu(), torch.ones(len(pixels)), atol=1e-3):
        log.warning(
            "%s: its embeddings are L2-normalised already: lengths, which some methods use, are lost", encoder.name
        )
    for name, of_few in features.items():
        rows = of_few.reshape(len(of_few), -1)
        finite = rows[rows.isfinite().all(1)].cpu().numpy()
        if manifest.dtype(name) == FLOAT16 and len(finite) and share_lost(finite) > TOLERANCE:
            log.warning(
                "%s: float16 loses much of what tells one %s from another; extract with --dtype float32",
                encoder.name,
                name,
            )
    return seconds / made.batch_size

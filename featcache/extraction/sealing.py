"""The last stage of a store, extracted or derived: sealed, and its rows in the index."""

import logging
from collections.abc import Mapping

import numpy as np

from featcache.disk.refusals import writing
from featcache.inputs.texts import TOKENS
from featcache.store import StoreWriter
from featcache.store.index import discard_replaced, register
from featcache.store.layout import COSINE, OK
from featcache.store.top_k import outside, words

log = logging.getLogger("featcache")


def finished(store: StoreWriter, tails: Mapping[str, bytes]) -> StoreWriter:
    """The store as it is now, whoever wrote it, sealed and in the index; every unit of it is done.

    Args:
        tails: as `StoreWriter.seal` takes them.

    Raises:
        ValueError: not one row has features.
    """
    store = store if store.sealed else _sealed(StoreWriter(store.path), tails)
    try:
        register(store)
    except OSError as error:  # it is finished all the same
        lost = "`featcache ls` does not list it" if store.manifest.derivation else "other stores will not find its rows"
        log.warning("%s: %s, because $FEATCACHE_HOME refuses: %s", store.path, lost, error)
    discard_replaced(store.path)
    return store


def _sealed(store: StoreWriter, tails: Mapping[str, bytes]) -> StoreWriter:
    """Its manifest says how far its features are from fp32 at worst, how many texts were cut, and what is left out where only the
    largest are kept."""
    manifest = store.manifest
    if not len(store.ok):
        reason = next(iter(store.reasons.values()))
        named = store.path if manifest.derivation else manifest.corpus.spec
        raise ValueError(f"{named}: not one row has features (the first: {reason}); nothing was sealed")
    with writing(store.path):
        if manifest.extraction.canary:  # a sealed store is the same, whoever computed it
            manifest = manifest.changed(extraction=manifest.extraction.without("canary"))
        if COSINE in store.layout:
            units = (store.rows_of(unit) for unit in range(store.chunks))
            cosines = np.concatenate([store.read(COSINE, rows.start, rows.stop) for rows in units])
            known = cosines[~np.isnan(cosines)]
            worst = round(float(known.min()), 6) if len(known) else None
            manifest = manifest.changed(extraction=manifest.extraction.changed(cosine=worst, checked=len(known)))
        if TOKENS in manifest.views.parameters and not manifest.derivation:
            manifest = manifest.changed(extraction=manifest.extraction.changed(truncated=_truncated(store)))
        for name in manifest.top_k:
            manifest = manifest.changed(extraction=manifest.extraction.changed(**_outside(store, name)))
        store.seal(manifest, tails=tails)
    return store


def _truncated(store: StoreWriter) -> int:
    """Texts that are longer than their encoder takes."""
    column = [*store.manifest.views.parameters].index(TOKENS)
    longest = store.manifest.encoder.preprocess["max_length"]
    units = (store.rows_of(unit) for unit in range(store.chunks))
    return sum(int((store.read("view", rows.start, rows.stop)[:, 0, column] > longest).sum()) for rows in units)


def _outside(store: StoreWriter, name: str) -> dict[str, float]:
    """The probability outside the largest values of a field, mean and worst over rows and views."""
    k, (*_, classes), dtype = store.manifest.top_k[name], store.manifest.fields[name], store.manifest.dtype(name)
    total, count, worst = 0.0, 0, 0.0
    for rows in (store.rows_of(unit) for unit in range(store.chunks)):
        ok = store.state[rows.start : rows.stop] == OK
        packed = store.read(name, rows.start, rows.stop)[ok].reshape(-1, words(classes, k, dtype))
        left = outside(packed[packed.any(axis=1)], classes, k, dtype)
        total, count, worst = (
            total + float(left.sum(dtype=np.float64)),
            count + left.size,
            max(worst, *left.tolist(), 0.0),
        )
    return {"outside_mean": float(f"{total / count:.4g}"), "outside_worst": float(f"{worst:.4g}")}

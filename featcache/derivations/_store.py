"""A derivation's store, made unit by unit: sealed, resumed and checked like one that an encoder made."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from featcache.derivations import Derivation, made
from featcache.disk.refusals import writing
from featcache.extraction.claims import claim, look, refuse_small_disks, store_bytes
from featcache.extraction.samples import digest_of_rows
from featcache.extraction.sealing import finished
from featcache.rows import Rows
from featcache.specs import naming
from featcache.store import FeatureStore, create_store, open_store
from featcache.store.files import files_at
from featcache.store.index import default_store_path
from featcache.store.layout import DTYPES, EMBEDDING, FAILED, FLOAT16, INTEGERS, OK, STATE, chunk_rows
from featcache.store.manifest import (
    CorpusRecord,
    DerivationRecord,
    EncoderRecord,
    ExtractionRecord,
    Manifest,
    versions_of,
)
from featcache.store.rounding import rounded_to

log = logging.getLogger("featcache")


def derive(
    name: str,
    stores: Sequence[FeatureStore | str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> FeatureStore:
    """Compute features from those that stores hold of the same samples; returns the sealed store.

    Samples are joined by their ids, and by the hashes of their images where stores keep them. Those that not all stores
    have are left out, and said; those that failed in one are failed rows. Ids, hashes and views are the first store's, labels
    too unless the derivation gives others. An interrupted run is resumed, a damaged store repaired, a finished one returned at once.

    Args:
        name: of the derivation, see `featcache.derivations`.
        stores: sealed ones, or their paths or URLs.
        out: the store's path or URL; under $FEATCACHE_HOME, named by content, when left out.
        dtype: "float16" or "float32"; by default float32 where one of the stores keeps a field in it.
        overwrite: replace a store at `out` that was made from something else.
        progress: called with rows done and rows in all.
        options: the derivation's.

    Raises:
        ValueError: no such derivation or option; stores that are not sealed, not of the same samples and views, damaged, or
            that the derivation has no use for; or a store at `out` that holds something else.
        OSError: the disk is full or gone; running the same command again resumes.
    """
    derivation, samples, manifest, path = _prepared(name, stores, out, dtype, options)
    with contextlib.ExitStack() as held:
        store = claim(path, manifest, overwrite, held)
        if store is None:
            refuse_small_disks([(files_at(path), manifest)])
        tails: dict[str, bytes] = {}
        with writing(path):
            store = store or create_store(path, manifest, overwrite=overwrite)
            for unit in () if store.sealed else store.pending_chunks():
                rows = store.rows_of(unit)
                tails |= store.write_chunk(unit, _unit(derivation, samples, manifest, np.arange(rows.start, rows.stop)))
                if progress:
                    progress(rows.stop, len(store))
        return finished(store, tails)


@dataclass(frozen=True, kw_only=True)
class ForeseenStore:
    """A store that would be made: so many of its rows are to be computed, none of one that is there; bytes of those."""

    path: str
    encoder: str
    rows: int
    rows_to_do: int
    bytes_to_write: int


def preview(
    name: str,
    stores: Sequence[FeatureStore | str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> ForeseenStore:
    """What `derive` of the same arguments would make; refused as it would be, and nothing is written."""
    _, _, manifest, path = _prepared(name, stores, out, dtype, options)
    store, pending = look(path, manifest, overwrite)
    if store is None:
        refuse_small_disks([(files_at(path), manifest)])
    to_do, rows = int(pending.sum()), manifest.corpus.rows
    size = store_bytes(manifest) * to_do // max(rows, 1)
    return ForeseenStore(
        path=str(path), encoder=manifest.encoder.name, rows=rows, rows_to_do=to_do, bytes_to_write=size
    )


def _prepared(
    name: str,
    stores: Sequence[FeatureStore | str | os.PathLike[str]],
    out: str | os.PathLike[str] | None,
    dtype: str | None,
    options: dict[str, Any],
) -> tuple[Derivation, "_Samples", Manifest, str | Path]:
    """The derivation, opened, and of what; what the store will say of itself, and where. Raises ValueError as `derive`."""
    derivation = made(name, options)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    opened = [store if isinstance(store, FeatureStore) and store.sealed else _sealed(store) for store in stores]
    samples = _Samples.of(opened)
    with naming(name):
        derivation.open(samples.rows)
        samples = replace(samples, labels=derivation.labels(samples.labels, samples.ok))
    manifest = _manifest(name, derivation, samples, dtype)
    path = default_store_path(manifest) if out is None else files_at(out).path
    if files_at(path).identity in {store.identity for store in opened}:
        raise ValueError(f"{path}: is one of the stores to derive from; choose another --out")
    return derivation, samples, manifest, path


def _sealed(store: FeatureStore | str | os.PathLike[str]) -> FeatureStore:
    return open_store(store.path if isinstance(store, FeatureStore) else store)


class _Checked(Rows):
    """Rows whose chunks are held against their checksums before one is read."""

    def gather(
        self, positions: Sequence[int] | np.ndarray, field: str = EMBEDDING, view: int | np.ndarray = 0
    ) -> np.ndarray:
        (store,) = self.stores
        if field in store.layout:
            per_chunk = store.layout[field].chunk_rows
            for chunk in np.unique(self.index[np.asarray(positions, np.int64)] // per_chunk).tolist():
                try:
                    store.checked_row(field, chunk * per_chunk)
                except ValueError as error:
                    raise ValueError(f"{error}; `featcache verify {store.path}` says more") from None
        return super().gather(positions, field, view)


@dataclass(frozen=True)
class _Samples:
    """The samples that all stores have: `rows` of each, in one order, `ok` where all have features, `reason` where one has
    not; `labels` (before the derivation gives others), `sample_ids` and `content` are the first store's."""

    rows: list[Rows]
    ok: np.ndarray
    reason: np.ndarray
    labels: Int64[np.ndarray, " n"]
    sample_ids: np.ndarray
    content: np.ndarray

    @classmethod
    def of(cls, stores: Sequence[FeatureStore]) -> "_Samples":
        """Raises ValueError unless the stores are of the same samples and views."""
        if not stores:
            raise ValueError("no store is given to derive from")
        first, *others = stores
        for other in others:
            if _views(other) != _views(first):
                raise ValueError(
                    f"{other.path} has views {_views(other)}, {first.path} {_views(first)}; derive from stores of the same views"
                )
        at = [{str(sample_id): row for row, sample_id in enumerate(store.sample_ids)} for store in others]
        ids = list(map(str, first.sample_ids))
        joined = np.array([[row, *(of.get(name, -1) for of in at)] for row, name in enumerate(ids)])
        joined = joined[(joined >= 0).all(axis=1)]
        if not len(joined):
            raise ValueError(
                f"{', '.join(str(store.path) for store in stores)} have no sample id in common; derive from stores of the same "
                "images"
            )
        for store in stores:
            if left := len(store) - len(joined):
                log.warning(
                    "%s: %s of %s rows left out, as not all stores have them", store.path, f"{left:,}", len(store)
                )
        rows: list[Rows] = [
            _Checked([store], np.zeros(len(joined), np.int64), index)
            for store, index in zip(stores, joined.T, strict=True)
        ]
        for of in rows[1:]:
            _refuse_other_images(rows[0], of)
        states = np.stack([store.state[of.index] for store, of in zip(stores, rows, strict=True)])
        reason = np.full(len(joined), "", object)
        for store, state in zip(stores, states, strict=True):
            reasons = store.reasons
            for row in np.flatnonzero((state != OK) & (reason == "")):
                reason[row] = reasons[str(rows[0].sample_ids[row])]
        return cls(rows, (states == OK).all(axis=0), reason, rows[0].labels, rows[0].sample_ids, rows[0].content)

    def __len__(self) -> int:
        return len(self.ok)


def _views(store: FeatureStore) -> dict[str, Any]:
    """What decides what is seen of an image, besides the input."""
    recipe = store.manifest.views
    return (
        {"count": 1}
        if recipe.count == 1
        else {name: getattr(recipe, name) for name in ("count", "augment", "seed", "crop_area")}
    )


def _refuse_other_images(one: Rows, other: Rows) -> None:
    """Raises ValueError where two stores keep hashes of different images under one id; warns where labels differ."""
    mine, theirs = one.content, other.content
    known = mine.any(axis=1) & theirs.any(axis=1)
    differing = np.flatnonzero(known & (mine != theirs).any(axis=1))
    if len(differing):
        raise ValueError(
            f"{other.name} holds other images than {one.name} under {len(differing):,} ids (first: "
            f"{one.sample_ids[differing[0]]}); derive from stores of the same images"
        )
    if (one.labels != other.labels).any() or one.class_names != other.class_names:
        log.warning("%s and %s label their samples differently: what %s says is taken", one.name, other.name, one.name)


def _manifest(name: str, derivation: Derivation, samples: _Samples, dtype: str | None) -> Manifest:
    stores = [rows.stores[0] for rows in samples.rows]
    manifests = [store.manifest for store in stores]
    first = manifests[0]
    fields = {field: list(shape) for field, shape in derivation.fields.items()}
    if dtype is None:
        dtype = "float32" if any({*manifest.dtypes.values()} - {*INTEGERS} for manifest in manifests) else FLOAT16
    names = ", ".join(store.encoder_name for store in stores)
    identity = [name, derivation.record, [store.fingerprint for store in stores]]
    seals = [manifest.sealed.digest for manifest in manifests if manifest.sealed]
    (width,) = fields[EMBEDDING]
    classes: dict[str, Any] = {"classes": list(derivation.classes)} if derivation.classes else {}
    said: dict[str, Any] = {"said": list(derivation.said)} if derivation.said else {}
    return Manifest(
        encoder=EncoderRecord(
            name=f"derive:{name}({names})",
            fingerprint=hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest(),
            embedding_dim=width,
            preprocess=_preprocess(manifests),
            **classes,
        ),
        derivation=DerivationRecord(
            name=name,
            options=derivation.record,
            inputs=[
                {"encoder": store.encoder_name, "fingerprint": store.fingerprint, "digest": digest}
                for store, digest in zip(stores, seals, strict=True)
            ],
            **said,
        ),
        corpus=CorpusRecord(
            spec=first.corpus.spec,
            rows=len(samples),
            digest=digest_of_rows(samples.sample_ids, samples.labels.tolist()),
            class_names=derivation.class_names,
        ),
        views=first.views,
        fields=fields,
        dtypes={name: of for name in fields if (of := derivation.dtypes.get(name, dtype)) != FLOAT16},
        extraction=_extraction(manifests),
        chunk_rows=chunk_rows(np.dtype(dtype).itemsize * first.views.count * width, len(samples)),
        versions=versions_of("zarr", "numpy"),
    )


def _preprocess(manifests: Sequence[Manifest]) -> Mapping[str, Any]:
    """The first store's, where all saw the same part of every image; else none, and the views cannot be replayed."""

    def seen(record: Mapping[str, Any]) -> Any:
        if {"crop", "resize", "mode"} <= record.keys():
            return Fraction(record["crop"], record["resize"]), record["mode"]
        return dict(record)

    first, *others = (manifest.encoder.preprocess for manifest in manifests)
    return first if all(seen(other) == seen(first) for other in others) else {}


def _extraction(manifests: Sequence[Manifest]) -> ExtractionRecord:
    """How the inputs were computed: what the features are as exact as, and comparable with."""
    records = [manifest.extraction for manifest in manifests]
    known: dict[str, Any] = {}
    for name in ("precision", "machine"):
        if all(found := [getattr(record, name) for record in records]):
            known[name] = ", ".join(dict.fromkeys(found))
    if len(batches := {record.batch_size for record in records}) == 1 and None not in batches:
        known["batch_size"] = batches.pop()
    if worst := [record.cosine for record in records if record.cosine is not None]:
        known["cosine"] = min(worst)
    return ExtractionRecord(**known)


def _unit(
    derivation: Derivation, samples: _Samples, manifest: Manifest, rows: Int64[np.ndarray, " n"]
) -> dict[str, np.ndarray]:
    """Every array of these rows. One whose features `dtype` cannot hold fails."""
    views, reason, first = manifest.views.count, samples.reason[rows], samples.rows[0]
    here = np.flatnonzero(samples.ok[rows])
    arrays = {
        name: np.zeros((len(rows), views, *shape), manifest.dtype(name)) for name, shape in manifest.fields.items()
    }
    for view in range(views if len(here) else 0):
        for name, values in derivation.rows(rows[here], view).items():
            arrays[name][here, view] = rounded_to(values, manifest.dtype(name))
    for store in (each.stores[0] for each in samples.rows):
        for name in store.manifest.fields:
            store.release(name)
    for name, values in arrays.items():
        for row in np.flatnonzero(~np.isfinite(values).reshape(len(rows), -1).all(axis=1)):
            reason[row] = reason[row] or f"{name} is beyond {manifest.dtype(name)}; derive with --dtype float32"
    for values in arrays.values():
        values[reason != ""] = 0
    at = first.index[rows]
    return {
        **arrays,
        "label": samples.labels[rows],
        "sample_id": samples.sample_ids[rows],
        "content": samples.content[rows],
        "view": first.stores[0].read("view", int(at[0]), int(at[-1]) + 1)[at - at[0]],
        "reason": reason,
        STATE: np.where(reason == "", OK, FAILED).astype(np.uint8),
    }

"""The plan of an extraction: which stores are to be made, in what precision, and what work that is."""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.corpora import Corpus, kind_of, passed_over, refuse_other_kind
from featcache.disk.refusals import writing
from featcache.encoder import Encoder
from featcache.extraction.canary import canary_of, refuse_other_bits
from featcache.extraction.claims import changed_images, claim, look, nearest, refuse_small_disks, store_bytes
from featcache.extraction.job import Job
from featcache.extraction.rehearsal import FewImages, how_computed, rehearse
from featcache.extraction.samples import digest_of_corpus
from featcache.extraction.settings import ExtractSettings
from featcache.extraction.work import ExtractionWork, Pass
from featcache.specs import naming
from featcache.store import FeatureStore, StoreWriter, create_store
from featcache.store.files import Files, files_at
from featcache.store.from_arrays import checked_ids, checked_labels
from featcache.store.index import default_store_path, set_aside
from featcache.store.layout import DENSE, EMBEDDING, FLOAT16, HIDDEN, LOGITS, TOKEN_LOGITS, chunk_rows
from featcache.store.manifest import CorpusRecord, EncoderRecord, Manifest, ViewsRecord, refuse_field_name, versions_of
from featcache.store.top_k import words

OFFERED, LARGE = 64, 2**26
"""The largest logits, as many of each token, are offered in the place of fields of so many bytes."""


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What an extraction would do.

    Attributes:
        places: paths or URLs of the stores that are not finished, one a teacher.
        rows: samples in the corpus.
        done: samples that need no more work.
        samples_per_second: of reading and encoding, measured on a few images; infinite when there is nothing to do.
        bytes_to_write: of all stores; kept images are guessed.
        bytes_free: on the disk of the first.
        precisions: of each unfinished store, and why that one, in words.
        smaller: of those with large fields of every token, what could be kept in their place, in words.
    """

    places: list[str]
    rows: int
    done: int
    samples_per_second: float
    bytes_to_write: int
    bytes_free: int
    precisions: list[str]
    smaller: list[str]

    @property
    def seconds(self) -> float:
        """Expected, if no row can be taken from another store."""
        return (self.rows - self.done) / self.samples_per_second


@dataclass(frozen=True, kw_only=True)
class ExtractionPlan(Foreseen):
    """What an extraction is about to do.

    Attributes:
        stores: one a teacher, in their order.
        unfinished: those of them that are not finished: created, or opened to be resumed.
        failed: of the samples done, at most in any store: whose image could not be read.
        spans: what is to be computed, each a range of rows of whole units of every store.
        work: what computes it.
    """

    stores: list[StoreWriter]
    unfinished: list[StoreWriter]
    failed: int
    spans: list[range]
    work: ExtractionWork


@contextlib.contextmanager
def planned(
    corpus: Corpus,
    encoders: Sequence[Encoder],
    outs: Sequence[str | os.PathLike[str]] | None,
    settings: ExtractSettings,
    *,
    saves: bool = True,
) -> Iterator[ExtractionPlan]:
    """The plan, its stores made and kept from other writers within it; the arguments are those of `extract_all`."""
    manifests = [manifest_of(corpus, encoder, settings) for encoder in encoders]
    places = _one_each(outs or [default_store_path(manifest) for manifest in manifests], encoders)
    with contextlib.ExitStack() as held:
        pool = held.enter_context(ThreadPoolExecutor(settings.readers))
        claimed = _claimed(places, manifests, corpus, settings, pool, held)
        refuse_small_disks(
            [(at, made) for at, made, found in zip(places, manifests, claimed, strict=True) if not found]
        )
        trial = _Trial(FewImages(corpus, settings.recipe, pool), settings, alone=saves)
        stores, jobs = [], []
        for place, manifest, encoder, store in zip(places, manifests, encoders, claimed, strict=True):
            if store is None or not store.sealed:
                manifest = trial.of(place, store, manifest, encoder)
                store = store or _created(place, manifest, settings.overwrite)
                job = Job(encoder, store, corpus, saves=saves)
                job.forget_changed(pool)
                jobs.append(job)
            stores.append(store)
        yield _plan(stores, trial, Pass(corpus, jobs, settings), saves)


def foreseen(
    corpus: Corpus,
    encoders: Sequence[Encoder],
    outs: Sequence[str | os.PathLike[str]] | None,
    settings: ExtractSettings,
) -> Foreseen:
    """What the plan would be; refused as it would be, and nothing is written."""
    manifests = [manifest_of(corpus, encoder, settings) for encoder in encoders]
    places = _one_each(outs or [default_store_path(manifest) for manifest in manifests], encoders)
    size, paths, wanted = 0, list[str](), np.zeros(len(corpus), bool)
    with ThreadPoolExecutor(settings.readers) as pool:
        looked = [look(at.path, made, settings.overwrite) for at, made in zip(places, manifests, strict=True)]
        found = _unchanged([store for store, _ in looked], corpus, settings, pool)
        new = [(at, made) for at, made, store in zip(places, manifests, found, strict=True) if not store]
        refuse_small_disks(new)
        trial = _Trial(FewImages(corpus, settings.recipe, pool), settings, keep=False)
        for place, manifest, encoder, store, (_, pending) in zip(
            places, manifests, encoders, found, looked, strict=True
        ):
            pending = pending if store else np.ones(len(corpus), bool)
            if store is None or pending.any() or not store.sealed:
                trial.of(place, store, manifest, encoder)
                wanted |= pending
                size += store_bytes(manifest) * int(pending.sum()) // len(corpus)
                paths.append(str(place.path))
    return Foreseen(
        places=paths,
        rows=len(corpus),
        done=len(corpus) - int(wanted.sum()),
        samples_per_second=1 / trial.seconds if paths else math.inf,
        bytes_to_write=size,
        bytes_free=shutil.disk_usage(nearest(places[0].root.parent)).free,
        precisions=trial.precisions,
        smaller=trial.smaller,
    )


class _Trial:
    """What a few images say: of each store that is not finished, how its features are computed; and how fast that is.

    Attributes:
        precisions: of each, and why that one, in words.
        smaller: as `Foreseen` has it.
        canaries: of each, unless one process computes it `alone`, and did so far.
    """

    def __init__(self, images: FewImages, settings: ExtractSettings, keep: bool = True, alone: bool = True):
        self._images, self._settings, self._keep, self._alone = images, settings, keep, alone
        self.canaries = list[dict[str, str] | None]()
        self._reading = self._encoding = 0.0
        self.precisions, self.smaller = list[str](), list[str]()

    def of(self, place: Files, store: FeatureStore | None, manifest: Manifest, encoder: Encoder) -> Manifest:
        """The manifest, which now says how the features are computed; the encoder is in that precision."""
        pixels, seconds = self._images.first(encoder.preprocess)
        made, why = how_computed(place.path, store, encoder, self._images, self._settings, self._keep)
        manifest = manifest.changed(extraction=made)
        self._encoding += self._settings.recipe.count * rehearse(encoder, manifest, pixels)
        self._reading = max(self._reading, seconds)
        self.precisions.append(f"{made.precision} ({why})")
        self.smaller += smaller_fields(manifest, encoder)
        canary = canary_of(encoder, pixels, made.batch_size or 1) if made.canary or not self._alone else None
        self.canaries.append(canary)
        if canary and made.canary:
            refuse_other_bits(place.path, made.canary, canary)
        elif canary and store is None:
            manifest = manifest.changed(extraction=made.changed(canary=canary))
        return manifest

    @property
    def seconds(self) -> float:
        """Of a sample, by all encoders. A GPU encodes while the cores read; without one they do one after the other."""
        on_cpu = self._settings.processor == "cpu"
        return self._reading + self._encoding if on_cpu else max(self._reading, self._encoding)


def smaller_fields(manifest: Manifest, encoder: Encoder) -> list[str]:
    """Of a store with large fields of every token, one line: how large they are, and the largest logits that could be in their
    place. None of other stores."""
    rows, (*positions, classes) = manifest.corpus.rows, encoder.fields.get(TOKEN_LOGITS, (0,))
    whole = [name for name in (HIDDEN, TOKEN_LOGITS) if name in manifest.fields and name not in manifest.top_k]
    size = sum(manifest.field_bytes[name] * rows for name in whole)
    top = 2 * rows * manifest.views.count * math.prod(positions) * words(classes, OFFERED, FLOAT16)
    if size < LARGE or not classes > OFFERED or top > size:
        return []
    return [
        f"{' and '.join(whole)} {size / 1e6:,.1f} MB of it; with --fields {TOKEN_LOGITS} --top-k {OFFERED} in the place, "
        f"{top / 1e6:,.1f} MB"
    ]


def _plan(stores: list[StoreWriter], trial: _Trial, opened: Pass, saves: bool) -> ExtractionPlan:
    """What is left to do for what is `opened`."""
    corpus, jobs, unfinished = opened.corpus, opened.jobs, [job.store for job in opened.jobs]
    left = {span: sum(map(opened.wants, span)) for span in _spans(len(corpus), jobs)}
    return ExtractionPlan(
        stores=stores,
        unfinished=unfinished,
        places=[str(store.path) for store in unfinished],
        rows=len(corpus),
        done=len(corpus) - sum(left.values()),
        failed=max((job.failed for job in jobs), default=0),
        samples_per_second=1 / trial.seconds if jobs else math.inf,
        bytes_to_write=sum(store_bytes(s.manifest) * len(s.pending_chunks()) // s.chunks for s in unfinished),
        bytes_free=unfinished[0].bytes_free if unfinished else 0,
        precisions=trial.precisions,
        smaller=trial.smaller,
        spans=[span for span, rows in left.items() if rows],
        work=ExtractionWork(
            corpus=corpus.spec,
            teachers=[job.encoder.reload for job in jobs],
            stores=[store.path for store in unfinished],
            settings=opened.settings,
            saves=saves,
            canaries=trial.canaries,
            opened=opened,
        ),
    )


def _one_each(outs: Sequence[str | os.PathLike[str]], encoders: Sequence[Encoder]) -> list[Files]:
    """Raises ValueError unless each encoder has a place of its own."""
    places = [files_at(out) for out in outs]
    if len(places) != len(encoders) or len({place.identity for place in places}) != len(places):
        different = len({place.path for place in places})
        raise ValueError(f"{len(encoders)} teachers, {different} stores: give one store of its own for each")
    return places


def _claimed(
    places: Sequence[Files],
    manifests: Sequence[Manifest],
    corpus: Corpus,
    settings: ExtractSettings,
    pool: ThreadPoolExecutor,
    held: contextlib.ExitStack,
) -> list[StoreWriter | None]:
    """The stores that are there and can be gone on with.

    Raises:
        ValueError: another store is there, or one of images that have changed since, and they are not to be replaced.
    """
    found = [claim(place.path, made, settings.overwrite, held) for place, made in zip(places, manifests, strict=True)]
    return _unchanged(found, corpus, settings, pool)


def _unchanged(
    found: Sequence[StoreWriter | None], corpus: Corpus, settings: ExtractSettings, pool: ThreadPoolExecutor
) -> list[StoreWriter | None]:
    """Without those of images that have changed since. Raises ValueError where these are not to be replaced."""
    changed = changed_images([store for store in found if store], corpus, pool)
    if changed and not settings.overwrite:
        raise ValueError("; ".join(changed.values()))
    return [None if store and store.path in changed else store for store in found]


def _created(place: Files, manifest: Manifest, overwrite: bool) -> StoreWriter:
    with writing(place.path), set_aside(place.path, manifest) if overwrite else contextlib.nullcontext():
        return create_store(place.path, manifest, overwrite=overwrite)


def _spans(rows: int, jobs: Sequence[Job]) -> Iterator[range]:
    """Ranges of rows that hold whole units of every store, as short as can be."""
    length = min(rows, math.lcm(*(job.unit_rows for job in jobs)))
    return (range(first, min(first + length, rows)) for first in range(0, rows, length))


def manifest_of(corpus: Corpus, encoder: Encoder, settings: ExtractSettings) -> Manifest:
    """What a store of these will say of itself, but for how its features are computed.

    Raises:
        ValueError: the encoder takes other samples, has no such views, or lacks a field, or ids, labels or a field's name are
            none that a store can hold.
    """
    recipe, dtype = settings.recipe, settings.dtype
    refuse_other_kind(corpus, encoder.name, encoder.preprocess.kind)
    if recipe.augment not in encoder.preprocess.augments:
        raise ValueError(
            f"--augment {recipe.augment}: {encoder.name} takes {kind_of(corpus)}s, which have one view; leave it out"
        )
    if settings.pixels and kind_of(corpus) != "image":
        raise ValueError(f"--pixels {settings.pixels.size}: {corpus.spec} is of {kind_of(corpus)}s; leave it out")
    fields = [EMBEDDING, *sorted(set(settings.fields) - {EMBEDDING})]
    if missing := [name for name in fields if name not in encoder.fields]:
        raise ValueError(f"--fields {','.join(missing)}: {encoder.name} gives {', '.join(encoder.fields)}")
    for name in fields:
        with naming(encoder.name):
            refuse_field_name(name)
    checked_ids(corpus.spec, corpus.ids, len(corpus))
    ranked = [name for name in (LOGITS, TOKEN_LOGITS) if name in fields] if settings.top_k else []
    for name in ranked:
        if settings.top_k >= (count := encoder.fields[name][-1]):
            raise ValueError(
                f"--top-k {settings.top_k}: {encoder.name} has {count} {name.replace('_', ' ')}; leave it out"
            )
    top_k: dict[str, Any] = {"top_k": dict.fromkeys(ranked, settings.top_k)} if ranked else {}
    dtypes = {name: encoder.dtypes.get(name, dtype) for name in fields}
    named = encoder.classes and {LOGITS, DENSE} & {*fields}
    classes: dict[str, Any] = {"classes": list(encoder.classes or ())} if named else {}
    names = None if corpus.class_names is None else list(corpus.class_names)
    checked_labels(corpus.spec, [corpus.label(i) for i in range(len(corpus))], len(corpus), names)
    return Manifest(
        encoder=EncoderRecord(
            name=encoder.name,
            fingerprint=encoder.fingerprint,
            embedding_dim=encoder.embedding_dim,
            output=encoder.output,
            preprocess=encoder.preprocess.to_dict(),
            **classes,
        ),
        corpus=CorpusRecord(
            spec=corpus.spec,
            rows=len(corpus),
            digest=digest_of_corpus(corpus),
            class_names=names or None,
            passed_over=dict(passed_over(corpus)),
        ),
        views=ViewsRecord(**recipe.record, parameters=list(encoder.preprocess.parameters)),
        fields={name: list(encoder.fields[name]) for name in fields},
        dtypes={name: kept for name, kept in dtypes.items() if kept != FLOAT16},
        **top_k,
        pixels=settings.pixels,
        chunk_rows=chunk_rows(np.dtype(dtypes[EMBEDDING]).itemsize * recipe.count * encoder.embedding_dim, len(corpus)),
        versions=versions_of("torch", "timm", "zarr", "pillow", "numpy"),
    )

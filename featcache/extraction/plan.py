"""The plan of an extraction: which stores are to be made, in what precision, and what work that is."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.corpora import Corpus, passed_over
from featcache.disk.refusals import writing
from featcache.encoder import Encoder
from featcache.extraction.claims import changed_images, claim, refuse_small_disks, store_bytes
from featcache.extraction.job import Job
from featcache.extraction.rehearsal import FewImages, how_computed, rehearse
from featcache.extraction.samples import digest_of_corpus
from featcache.extraction.settings import ExtractSettings
from featcache.extraction.work import ExtractionWork, Pass
from featcache.inputs.images import PARAMETERS
from featcache.specs import naming
from featcache.store import StoreWriter, create_store
from featcache.store.files import Files, files_at
from featcache.store.from_arrays import checked_ids, checked_labels
from featcache.store.index import default_store_path, set_aside
from featcache.store.layout import EMBEDDING, FLOAT16, LOGITS, chunk_rows
from featcache.store.manifest import CorpusRecord, EncoderRecord, Manifest, ViewsRecord, refuse_field_name, versions_of


@dataclass(frozen=True, kw_only=True)
class ExtractionPlan:
    """What an extraction is about to do.

    Attributes:
        stores: one a teacher, in their order.
        unfinished: those of them that are not finished: created, or opened to be resumed.
        rows: samples in the corpus.
        done: samples that need no more work.
        failed: of those, at most in any store: whose image could not be read.
        samples_per_second: of reading and encoding, measured on a few images; infinite when there is nothing to do.
        bytes_to_write: of all stores; kept images are guessed.
        precisions: of each unfinished store, and why that one, in words.
        spans: what is to be computed, each a range of rows of whole units of every store.
        work: what computes it.
    """

    stores: list[StoreWriter]
    unfinished: list[StoreWriter]
    rows: int
    done: int
    failed: int
    samples_per_second: float
    bytes_to_write: int
    precisions: list[str]
    spans: list[range]
    work: ExtractionWork

    @property
    def bytes_free(self) -> int:
        return self.unfinished[0].bytes_free

    @property
    def seconds(self) -> float:
        """Expected, if no row can be taken from another store."""
        return (self.rows - self.done) / self.samples_per_second


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
        images = FewImages(corpus, settings.recipe, pool)
        stores, jobs, precisions, encoding, reading = [], [], [], 0.0, 0.0
        for place, manifest, encoder, store in zip(places, manifests, encoders, claimed, strict=True):
            if store is None or not store.sealed:
                pixels, seconds = images.first(encoder.preprocess)
                made, why = how_computed(place.path, store, encoder, images, settings)
                manifest = manifest.changed(extraction=made)
                encoding += settings.recipe.count * rehearse(encoder, manifest, pixels)
                reading = max(reading, seconds)
                store = store or _created(place, manifest, settings.overwrite)
                job = Job(encoder, store, corpus, saves=saves)
                job.forget_changed(pool)
                jobs.append(job)
                precisions.append(f"{made.precision} ({why})")
            stores.append(store)
        # A GPU encodes while the cores read; without one they do one after the other.
        a_sample = reading + encoding if settings.processor == "cpu" else max(reading, encoding)
        yield _plan(stores, precisions, Pass(corpus, jobs, settings), a_sample, saves)


def _plan(
    stores: list[StoreWriter], precisions: list[str], opened: Pass, a_sample: float, saves: bool
) -> ExtractionPlan:
    """What is left to do for what is `opened`, at so many seconds `a_sample`."""
    corpus, jobs, unfinished = opened.corpus, opened.jobs, [job.store for job in opened.jobs]
    left = {span: sum(map(opened.wants, span)) for span in _spans(len(corpus), jobs)}
    return ExtractionPlan(
        stores=stores,
        unfinished=unfinished,
        rows=len(corpus),
        done=len(corpus) - sum(left.values()),
        failed=max((job.failed for job in jobs), default=0),
        samples_per_second=1 / a_sample if jobs else math.inf,
        bytes_to_write=sum(store_bytes(s.manifest) * len(s.pending_chunks()) // s.chunks for s in unfinished),
        precisions=precisions,
        spans=[span for span, rows in left.items() if rows],
        work=ExtractionWork(
            corpus=corpus.spec,
            teachers=[job.encoder.reload for job in jobs],
            stores=[store.path for store in unfinished],
            settings=opened.settings,
            saves=saves,
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
        ValueError: the encoder lacks a field, or ids, labels or a field's name are none that a store can hold.
    """
    recipe, dtype = settings.recipe, settings.dtype
    fields = [EMBEDDING, *sorted(set(settings.fields) - {EMBEDDING})]
    if missing := [name for name in fields if name not in encoder.fields]:
        raise ValueError(f"--fields {','.join(missing)}: {encoder.name} gives {', '.join(encoder.fields)}")
    for name in fields:
        with naming(encoder.name):
            refuse_field_name(name)
    checked_ids(corpus.spec, corpus.ids, len(corpus))
    if settings.top_k and settings.top_k >= encoder.fields[LOGITS][0]:
        raise ValueError(
            f"--top-k {settings.top_k}: {encoder.name} has {encoder.fields[LOGITS][0]} logits; leave it out"
        )
    top_k: dict[str, Any] = {"top_k": {LOGITS: settings.top_k}} if settings.top_k else {}
    classes: dict[str, Any] = {"classes": list(encoder.classes)} if encoder.classes and LOGITS in fields else {}
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
        views=ViewsRecord(**recipe.record, parameters=list(PARAMETERS)),
        fields={name: list(encoder.fields[name]) for name in fields},
        dtypes=dict.fromkeys(fields, dtype) if dtype != FLOAT16 else {},
        **top_k,
        pixels=settings.pixels,
        chunk_rows=chunk_rows(np.dtype(dtype).itemsize * recipe.count * encoder.embedding_dim, len(corpus)),
        versions=versions_of("torch", "timm", "zarr", "pillow", "numpy"),
    )

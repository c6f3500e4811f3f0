"""Stage one: run a frozen encoder once over a corpus and keep what it saw."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from featcache.corpora import Corpus, open_corpus
from featcache.encoder import Encoder, load_encoder
from featcache.engines import Engine, Report, open_engine
from featcache.extraction.heads import head_file, write_head
from featcache.extraction.plan import ExtractionPlan, Foreseen, foreseen, planned
from featcache.extraction.sealing import finished
from featcache.extraction.settings import ExtractSettings
from featcache.inputs import CROP_AREA, Views
from featcache.inputs.images import KeptPixels
from featcache.machine import keep_freed_memory
from featcache.stop import stoppable
from featcache.store import FeatureStore
from featcache.store.layout import EMBEDDING, FLOAT16


@dataclass
class ExtractionProgress:
    """Where an extraction stands; handed to the progress callback after every batch.

    Attributes:
        rows: samples in the corpus.
        views: of each sample.
        done: samples finished, those of an earlier, interrupted run included.
        resumed: the part of `done` that an earlier run had finished.
        reused: samples found in another store by the content of their image, in this run.
        failed: samples whose image could not be read, in this run.
        wait, encode, write: seconds that workers spent waiting for pixels, in the encoder, and writing and syncing chunks.
        seconds: since the first batch began, by the clock.
    """

    rows: int
    views: int
    done: int
    resumed: int
    reused: int = 0
    failed: int = 0
    wait: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    seconds: float = 0.0
    _began: float = field(default_factory=time.perf_counter, repr=False)

    def add(self, report: Report) -> None:
        self.done, self.reused = self.done + report.rows, self.reused + report.reused
        self.failed += len(report.failures)
        self.wait, self.encode, self.write = (
            self.wait + report.wait, self.encode + report.encode, self.write + report.write,
        )  # fmt: skip
        self.seconds = time.perf_counter() - self._began

    @property
    def images_per_second(self) -> float:
        """Views of new samples, over the whole time."""
        return self.views * (self.done - self.resumed - self.reused) / max(self.seconds, 1e-9)


def extract(
    corpus: Corpus | str,
    teacher: Encoder | str,
    out: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> FeatureStore:
    """Run `teacher` over every view of every sample of `corpus` and return the sealed store.

    Args:
        corpus, settings: as in `extract_all`.
        teacher: an encoder or its spec.
        out: the store's path or URL; under $FEATCACHE_HOME, named by content, when left out.

    Raises:
        As `extract_all`.
    """
    return extract_all(corpus, [teacher], None if out is None else [out], **settings)[0]


def preview(
    corpus: Corpus | str,
    teachers: Sequence[Encoder | str],
    outs: Sequence[str | os.PathLike[str]] | None = None,
    *,
    views: int = 1,
    augment: str = "none",
    seed: int = 0,
    crop_area: float = CROP_AREA,
    fields: Iterable[str] = (EMBEDDING,),
    **settings: Any,
) -> Foreseen:
    """What `extract_all` of the same arguments is going to do, and how long that may take, by a few images. Nothing is
    written; loading a teacher may download its weights.

    Raises:
        As `extract_all`, where that would before its first batch.
    """
    asked = ExtractSettings(
        recipe=Views(count=views, augment=augment, seed=seed, crop_area=crop_area),  # type: ignore[arg-type]
        fields=tuple(fields),
        **settings,
    )
    corpus = open_corpus(corpus) if isinstance(corpus, str) else corpus
    encoders = [load_encoder(teacher) if isinstance(teacher, str) else teacher for teacher in teachers]
    return foreseen(corpus, encoders, outs, asked)


@stoppable()
def extract_all(
    corpus: Corpus | str,
    teachers: Sequence[Encoder | str],
    outs: Sequence[str | os.PathLike[str]] | None = None,
    *,
    views: int = 1,
    augment: str = "none",
    seed: int = 0,
    crop_area: float = CROP_AREA,
    fields: Iterable[str] = (EMBEDDING,),
    dtype: str = FLOAT16,
    top_k: int | None = None,
    pixels: KeptPixels | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    max_failures: int | None = None,
    overwrite: bool = False,
    engine: Engine | str = "local",
    announce: Callable[[ExtractionPlan], None] | None = None,
    progress: Callable[[ExtractionProgress], None] | None = None,
) -> list[FeatureStore]:
    """Run several teachers in one pass over the images; one sealed store each, in their order.

    Every image is read and decoded once. An interrupted run is resumed, a damaged store is repaired chunk by chunk, a
    finished one is returned at once. An image that any store already holds for the same encoder, views and fields is
    found by its content and not encoded again. A sample whose image cannot be read becomes a failed row with its reason.

    Args:
        corpus: a corpus or its spec.
        teachers: encoders or their specs.
        outs: the stores' paths or URLs; under $FEATCACHE_HOME, named by content, when left out.
        views, augment, seed, crop_area: the recipe of `featcache.inputs.Views`.
        fields: features to keep, of each teacher's `fields`; the embedding always is.
        dtype: that features are kept in, "float16" or "float32". Not what the encoder computes in: see `precision`.
        top_k: keep only so many of the largest logits, as ln p, and how much probability is left for the others together, over
            which readers spread it evenly. The manifest says how much that is.
        pixels: keep the decoded and resized images too.
        batch_size: images a forward pass; by default 16 on a CPU, 256 on a GPU.
        workers: threads that read, decode and resize; by default one a core.
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        precision: "auto" takes the encoder's on this kind of machine: measured at its first extraction, the fastest that
            is faithful, and kept for all later ones. Or a name from `featcache.store.comparable`, "fp32" say. An interrupted
            store goes on in its own.
        max_failures: stop as soon as more images than this could not be read.
        overwrite: replace a store at `out` that was made from something else. Rows of the same recipe and content are
            taken over; the old store goes when the new one is sealed.
        engine: where units are computed, or its spec. What is written does not depend on it.
        announce: called once, before the first batch, unless there is nothing to do.
        progress: called after every batch of images.

    Raises:
        ValueError: the arguments, or a store at `out` that holds something else; nothing has been written.
        OSError: the disk is too small, full or gone, or the service of a URL is; running the same command again resumes.
        RuntimeError: more than `max_failures`; likewise.
        KeyboardInterrupt: Ctrl-C; of SIGTERM and SIGHUP its subclass `featcache.stop.Stopped`. The unit in hand is saved.
    """
    settings = ExtractSettings(
        recipe=Views(count=views, augment=augment, seed=seed, crop_area=crop_area),  # type: ignore[arg-type]
        fields=tuple(fields), dtype=dtype, top_k=top_k, pixels=pixels, batch_size=batch_size, workers=workers, device=device,
        precision=precision, max_failures=max_failures, overwrite=overwrite,
    )  # fmt: skip
    engine = open_engine(engine) if isinstance(engine, str) else engine
    corpus = open_corpus(corpus) if isinstance(corpus, str) else corpus
    encoders = [load_encoder(teacher) if isinstance(teacher, str) else teacher for teacher in teachers]
    if settings.processor == "cpu":
        keep_freed_memory()
    heads = [head_file(encoder, settings.fields) for encoder in encoders]
    with planned(corpus, encoders, outs, settings, saves=engine.in_order) as plan:
        at = ExtractionProgress(rows=plan.rows, views=views, done=plan.done, resumed=plan.done)
        tails: dict[str, dict[str, bytes]] = {str(store.path): {} for store in plan.unfinished}
        if plan.unfinished:
            if announce:
                announce(plan)
            with contextlib.closing(engine.map(plan.spans, plan.work)) as reports:
                for report in reports:
                    at.add(report)
                    _refuse_failures(plan, report, at, settings.max_failures)
                    for path, written in report.tails.items():
                        tails[path] |= written
                    if progress and report.batches:
                        progress(at)
        stores: list[FeatureStore] = [finished(store, tails.get(str(store.path), {})) for store in plan.stores]
        for store, head in zip(stores, heads, strict=True):
            if head is not None:
                write_head(store, head, overwrite=overwrite)
        if plan.unfinished and progress:
            progress(at)
        return stores


def _refuse_failures(plan: ExtractionPlan, report: Report, at: ExtractionProgress, most: int | None) -> None:
    """Raises RuntimeError once more than `most` images could not be read."""
    before = plan.failed + at.failed - len(report.failures)
    if most is not None and before + len(report.failures) > most:
        raise RuntimeError(
            f"{plan.work.corpus}: {most + 1} images could not be read, more than --max-failures {most} "
            f"(last: {report.failures[max(0, most - before)]}); what is done is kept"
        )

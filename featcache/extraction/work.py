"""The work of an extraction, as engines run it: one pass over the images of some spans, for every teacher."""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featcache.corpora import Corpus, open_corpus
from featcache.disk.refusals import writing
from featcache.encoder import Encoder
from featcache.engines import Report
from featcache.extraction.canary import canary_of, refuse_other_bits
from featcache.extraction.job import Job
from featcache.extraction.rehearsal import FewImages, refuse_other_machine
from featcache.extraction.samples import Sample, bursts, digest_of_corpus, prefetch, read_sample
from featcache.extraction.settings import ExtractSettings
from featcache.machine import keep_freed_memory, machine_kind
from featcache.precision import CANDIDATES
from featcache.store import StoreWriter


@dataclass(kw_only=True)
class ExtractionWork:
    """What fills the stores of an extraction.

    In the process that planned it, it has everything open already. Pickled it is specs, paths and what else decides
    bits: elsewhere it opens corpus, encoders and stores itself, once, and refuses what is not the same there.

    Attributes:
        corpus: its spec.
        teachers: what loads each encoder again; None for one that a program made by hand.
        stores: where each of the unfinished ones is.
        settings: how they are made.
        canaries: the bits that each encoder computed there; None where units are computed by one process alone.
        saves: whether units in progress are saved and gone on with: by the only worker.
        threads: of PyTorch, within an operation.
        largest: $FEATCACHE_MAX_PIXELS, which decides what can be read.
        opened: in the process that planned it.
    """

    corpus: str
    teachers: Sequence[Callable[[], Encoder] | None]
    stores: Sequence[str | Path]
    settings: ExtractSettings
    saves: bool
    canaries: Sequence[Mapping[str, str] | None]
    threads: int = field(default_factory=torch.get_num_threads)
    largest: str = field(default_factory=lambda: os.environ.get("FEATCACHE_MAX_PIXELS", ""))
    opened: "Pass | None" = None

    def __call__(self, spans: Iterable[range]) -> Generator[Report, None, None]:
        self.opened = self.opened or self._open()
        return self.opened.run(spans)

    def __getstate__(self) -> dict[str, Any]:
        if None in self.teachers:
            raise ValueError("an encoder that was not made by `load_encoder` stays in its process: take --engine local")
        return {**self.__dict__, "opened": None}

    def _open(self) -> "Pass":
        """Raises ValueError where corpus, encoder, machine or bits are not those that the stores were begun with."""
        os.environ["FEATCACHE_MAX_PIXELS"] = self.largest
        torch.set_num_threads(self.threads)
        corpus, jobs = open_corpus(self.corpus), []
        for load, path, canary in zip(self.teachers, self.stores, self.canaries, strict=True):
            assert load is not None
            store, encoder = StoreWriter(path), load()
            made = store.manifest.extraction
            assert made.device
            assert made.precision
            if encoder.fingerprint != store.fingerprint:
                raise ValueError(f"{encoder.name}: not the encoder that {path} was begun with; bring its weights here")
            if digest_of_corpus(corpus) != store.manifest.corpus.digest:
                raise ValueError(
                    f"{corpus.spec}: not the samples and labels that {path} was begun with; bring them here"
                )
            refuse_other_machine(path, made, machine_kind(made.device))
            if made.device == "cpu":
                keep_freed_memory()
            encoder.to(made.device, CANDIDATES[made.precision])
            if canary:
                with ThreadPoolExecutor(self.settings.readers) as pool:
                    pixels, _ = FewImages(corpus, self.settings.recipe, pool).first(encoder.preprocess)
                refuse_other_bits(path, canary, canary_of(encoder, pixels, made.batch_size or 1))
            jobs.append(Job(encoder, store, corpus, saves=self.saves))
        return Pass(corpus, jobs, self.settings)


class Pass:
    """Corpus and jobs, open: every image is read and decoded once, for all the jobs that want it."""

    def __init__(self, corpus: Corpus, jobs: list[Job], settings: ExtractSettings):
        self.corpus, self.jobs, self.settings = corpus, jobs, settings

    def wants(self, row: int) -> bool:
        return any(job.wants(row) for job in self.jobs)

    def run(self, spans: Iterable[range]) -> Generator[Report, None, None]:
        """Fill the units of some spans; a report after every batch and failure. However it ends, what is in hand is saved."""
        rows = (row for span in spans for row in span if self.wants(row))
        recent = _Recent(self.jobs)
        # Samples of four forward passes, of the teacher that takes the most at a time.
        ahead = max(2 * self.settings.readers, 4 * max(job.batch for job in self.jobs) // self.settings.recipe.count)
        on_cpu = all(job.encoder.device.type == "cpu" for job in self.jobs)
        with ThreadPoolExecutor(self.settings.readers) as pool:
            samples = (bursts if on_cpu else prefetch)(self._read, rows, pool, ahead)
            try:
                while True:
                    began = time.perf_counter()
                    if (found := next(samples, None)) is None:
                        return
                    row, sample = found
                    recent.add(self.corpus.ids[row], sample, time.perf_counter() - began)
                    if sample.reason:  # before anything else is done: it may be one too many
                        yield recent.report()
                    if self._take(row, sample):
                        yield recent.report(batches=1)
            finally:
                for job in self.jobs:
                    with contextlib.suppress(OSError):
                        job.save()

    def _read(self, row: int) -> tuple[int, Sample]:
        wanted = [job.wanted if job.wants(row) else None for job in self.jobs]
        return row, read_sample(self.corpus, row, self.settings.recipe, wanted, self.settings.pixels)

    def _take(self, row: int, sample: Sample) -> bool:
        """Hand the sample to the jobs that want it; True when one of them completed a batch."""
        taken = False
        for job, seen in zip(self.jobs, sample.seen, strict=True):
            if job.wants(row):
                with writing(job.store.path):
                    taken |= job.take(row, sample, seen)
        return taken


class _Recent:
    """What has happened since the last report."""

    def __init__(self, jobs: Sequence[Job]):
        self._jobs = jobs
        self._begin()

    def _begin(self) -> None:
        self._rows, self._reused, self._wait = 0, 0, 0.0
        self._failures: list[str] = []
        self._encode, self._write = self._seconds()

    def _seconds(self) -> tuple[float, float]:
        return sum(job.encode_seconds for job in self._jobs), sum(job.write_seconds for job in self._jobs)

    def add(self, sample_id: str, sample: Sample, waited: float) -> None:
        self._rows, self._wait = self._rows + 1, self._wait + waited
        if sample.reason:
            self._failures.append(f"{sample_id}: {sample.reason}")
        else:
            self._reused += all(seen is None or bool(seen.known) for seen in sample.seen)

    def report(self, batches: int = 0) -> Report:
        encode, write = self._seconds()
        found = Report(
            rows=self._rows, batches=batches, reused=self._reused, failures=tuple(self._failures),
            wait=self._wait, encode=encode - self._encode, write=write - self._write,
            tails={str(job.store.path): tails for job in self._jobs if (tails := job.new_tails())},
        )  # fmt: skip
        self._begin()
        return found

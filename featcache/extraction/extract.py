"""Stage one: run a frozen encoder once over a corpus and keep what it saw."""

import contextlib
import errno
import hashlib
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.corpora import Corpus, open_corpus, passed_over
from featcache.disk.refusals import refuse_inside_store, refuse_mount_point, writing
from featcache.encoder import Encoder, load_encoder
from featcache.extraction.job import Job
from featcache.extraction.pins import settle
from featcache.extraction.samples import Sample, Wanted, bursts, content_hash, prefetch, read_sample
from featcache.inputs import CROP_AREA, Views
from featcache.inputs.images import PARAMETERS, KeptPixels, Preprocess
from featcache.machine import cores, keep_freed_memory, machine_kind, resolve_device
from featcache.precision import CANDIDATES, fastest_faithful, pass_seconds
from featcache.stop import stoppable
from featcache.store import FeatureStore, create_store, looks_like_store
from featcache.store.comparable import NAMES, exact_name, is_half
from featcache.store.files import Files, files_at
from featcache.store.from_arrays import checked_ids, checked_labels
from featcache.store.index import KnownRows, default_store_path, discard_replaced, register, set_aside
from featcache.store.layout import DTYPES, EMBEDDING, FLOAT16, PENDING, chunk_rows
from featcache.store.manifest import (
    CorpusRecord,
    EncoderRecord,
    ExtractionRecord,
    Manifest,
    ViewsRecord,
    refuse_field_name,
)
from featcache.store.rounding import TOLERANCE, share_lost

PROBE_IMAGES = 8
CHOOSING_IMAGES = 32
"""All over the corpus: what a precision is chosen on must be faithful to them."""
log = logging.getLogger("featcache")


@dataclass
class Progress:
    """Where an extraction stands; handed to the progress callback after every batch.

    Attributes:
        rows: samples in the corpus.
        views: of each sample.
        done: samples finished, those of an earlier, interrupted run included.
        resumed: the part of `done` that an earlier run had finished.
        reused: samples found in another store by the content of their image, in this run.
        failed: samples whose image could not be read, in this run.
        wait, encode, write: seconds that the main loop spent waiting for pixels, in the encoder, and
            writing and syncing chunks.
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

    @property
    def images_per_second(self) -> float:
        """Views of new samples, over the whole time."""
        return self.views * (self.done - self.resumed - self.reused) / max(self.wait + self.encode + self.write, 1e-9)


@dataclass(frozen=True)
class Plan:
    """What an extraction is about to do.

    Attributes:
        stores: those that are not finished: created, or opened to be resumed.
        rows: samples in the corpus.
        done: samples that need no more work.
        samples_per_second: of reading and encoding, measured on the probe batch.
        bytes_to_write: of all stores; kept images are guessed.
        precisions: of each store, and why that one, in words.
    """

    stores: list[FeatureStore]
    rows: int
    done: int
    samples_per_second: float
    bytes_to_write: int
    precisions: list[str]

    @property
    def bytes_free(self) -> int:
        return self.stores[0].bytes_free

    @property
    def seconds(self) -> float:
        """Expected, if no row can be taken from another store."""
        return (self.rows - self.done) / self.samples_per_second


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
    pixels: KeptPixels | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    max_failures: int | None = None,
    overwrite: bool = False,
    announce: Callable[[Plan], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
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
        announce: called once, before the first batch, unless there is nothing to do.
        progress: called after every batch of images.

    Raises:
        ValueError: the arguments, or a store at `out` that holds something else; nothing has been written.
        OSError: the disk is too small, full or gone, or the service of a URL is; running the same command again resumes.
        RuntimeError: more than `max_failures`; likewise.
        KeyboardInterrupt: Ctrl-C; of SIGTERM and SIGHUP its subclass `featcache.stop.Stopped`. The unit in hand is saved.
    """
    corpus = open_corpus(corpus) if isinstance(corpus, str) else corpus
    encoders = [load_encoder(teacher) if isinstance(teacher, str) else teacher for teacher in teachers]
    recipe = Views(count=views, augment=augment, seed=seed, crop_area=crop_area)  # type: ignore[arg-type]
    device = resolve_device(device)
    if precision != "auto":
        exact_name(precision)
    if device == "cpu":
        keep_freed_memory()
    manifests = [_manifest(corpus, encoder, recipe, fields, dtype, pixels) for encoder in encoders]
    places = [files_at(out) for out in outs or map(default_store_path, manifests)]
    paths = [place.path for place in places]
    if len(paths) != len(encoders) or len({place.identity for place in places}) != len(paths):
        raise ValueError(f"{len(encoders)} teachers, {len(set(paths))} stores: give one store of its own for each")

    with contextlib.ExitStack() as held:
        pool = held.enter_context(ThreadPoolExecutor(workers or cores()))
        claimed = [_claim(path, manifest, overwrite, held) for path, manifest in zip(paths, manifests, strict=True)]
        changed = _changed_images([store for store in claimed if store], corpus, pool)
        if changed and not overwrite:
            raise ValueError("; ".join(changed.values()))
        claimed = [None if store and store.path in changed else store for store in claimed]
        new = [(place, made) for place, made, store in zip(places, manifests, claimed, strict=True) if store is None]
        _refuse_small_disks(new)
        probe_of = cache(lambda preprocess: _probe(corpus, recipe, preprocess, pool))
        stores, jobs, wanted, precisions, encoding, reading = [], [], [], [], 0.0, 0.0
        for path, manifest, encoder, store in zip(paths, manifests, encoders, claimed, strict=True):
            if store is None or not store.sealed:
                probe, seconds = probe_of(encoder.preprocess)
                made, why = _settled(
                    path,
                    manifest,
                    encoder,
                    store,
                    partial(_spread_probe, corpus, recipe, encoder.preprocess, pool),
                    batch_size,
                    device,
                    precision,
                )
                manifest = manifest.changed(extraction=made)
                store, speed = _prepare(path, manifest, encoder, store, probe, overwrite)
                job = Job(encoder, store, corpus)
                saved = job.saved_content
                if list(saved.values()) != list(prefetch(partial(_content, corpus), saved, pool, ahead=256)):
                    job.discard_saved()
                jobs.append(job)
                wanted.append(Wanted(encoder.preprocess, KnownRows(store.manifest, path)))
                precisions.append(f"{made.precision} ({why})")
                encoding, reading = encoding + recipe.count / speed, max(reading, seconds)
            stores.append(store)
        if not jobs:
            for store in stores:
                _finish(store)
            return stores

        def todo() -> Iterator[int]:
            return (row for row in range(len(corpus)) if any(job.wants(row) for job in jobs))

        done = len(corpus) - sum(1 for _ in todo())
        at = Progress(rows=len(corpus), views=recipe.count, done=done, resumed=done)
        if announce:
            unfinished = [job.store for job in jobs]
            bytes_to_write = sum(_store_bytes(s.manifest) * len(s.pending_chunks()) // s.chunks for s in unfinished)
            # A GPU encodes while the cores read; without one they do one after the other.
            a_sample = reading + encoding if device == "cpu" else max(reading, encoding)
            announce(Plan(unfinished, at.rows, at.done, 1 / a_sample, bytes_to_write, precisions))
        failed_before = max(job.failed for job in jobs)

        def read(row: int) -> Sample:
            wants = [want if job.wants(row) else None for want, job in zip(wanted, jobs, strict=True)]
            return read_sample(corpus, row, recipe, wants, pixels)

        held.callback(_save_unfinished, jobs)
        # Samples of four forward passes, of the teacher that takes the most at a time.
        batch = max(job.store.manifest.extraction.batch_size or 1 for job in jobs)
        ahead = max(2 * (workers or cores()), 4 * batch // recipe.count)
        samples = (bursts if device == "cpu" else prefetch)(read, todo(), pool, ahead)
        for row in todo():
            clock = time.perf_counter()
            sample = next(samples)
            at.wait += time.perf_counter() - clock
            at.failed += bool(sample.reason)
            if max_failures is not None and failed_before + at.failed > max_failures:
                raise RuntimeError(
                    f"{corpus.spec}: {failed_before + at.failed} images could not be read, more than --max-failures "
                    f"{max_failures} (last: {corpus.ids[row]}: {sample.reason}); what is done is kept"
                )
            at.reused += not sample.reason and all(seen is None or bool(seen.known) for seen in sample.seen)
            at.done += 1
            taken = False
            for job, seen in zip(jobs, sample.seen, strict=True):
                if job.wants(row):
                    with writing(job.store.path):
                        taken |= job.take(row, sample, seen)
            if taken:
                at.encode = sum(job.encode_seconds for job in jobs)
                at.write = sum(job.write_seconds for job in jobs)
                if progress:
                    progress(at)
        for job in jobs:
            if not len(job.store.ok):
                reason = next(iter(job.store.reasons.values()))
                raise ValueError(f"{corpus.spec}: not one row has features (the first: {reason}); nothing was sealed")
            with writing(job.store.path):
                job.seal()
            _finish(job.store)
        if progress:
            progress(at)
    return stores


def _claim(path: str | Path, manifest: Manifest, overwrite: bool, held: contextlib.ExitStack) -> FeatureStore | None:
    """The store at `path`, if there is one of `manifest`: whole and sealed, or unfinished, mended and locked in `held`."""
    with writing(path):
        files = files_at(path)
        if not files.exists():
            refuse_inside_store(files.root)
        files.root.parent.mkdir(parents=True, exist_ok=True)
        store = _existing(path, manifest, overwrite)
        if store is not None and store.sealed and not store.verify():
            return store
        held.enter_context(files.only_writer())
        store = _existing(path, manifest, overwrite)  # another process may have finished it meanwhile
        if store is None:
            refuse_mount_point(files.root)
        for damage in store.mend() if store is not None else ():
            log.warning("%s: %s; mended", path, damage)
        return store


def _finish(store: FeatureStore) -> None:
    """The store is finished whether or not its rows can be put in the index."""
    try:
        register(store)
    except OSError as error:
        log.warning("%s: other stores will not find its rows, because $FEATCACHE_HOME refuses: %s", store.path, error)
    discard_replaced(store.path)


def _settled(
    path: str | Path,
    manifest: Manifest,
    encoder: Encoder,
    store: FeatureStore | None,
    images: Callable[[], torch.Tensor],
    batch_size: int | None,
    device: str,
    precision: str,
) -> tuple[ExtractionRecord, str]:
    """How the store's features are computed, as its manifest records it, and why in that precision, in words.

    An interrupted store goes on as it was begun, one that is replaced is made as it was.

    Raises:
        ValueError: the store was begun in half precision on another kind of machine.
    """
    machine = machine_kind(device)
    if store is not None:
        made = store.manifest.extraction
        if is_half(str(made.precision)) and (made.machine or machine) != machine:
            raise ValueError(
                f"{path}: was begun in {made.precision} on {made.machine}, and this is {machine}, where the bits "
                "are others; finish it there, or begin again with --overwrite"
            )
        return made, "as it was begun"
    batch = batch_size or (256 if device == "cuda" else 16)
    name, why = _of_replaced(path, manifest, machine) if precision == "auto" else None, "as the store it replaces"
    if name is None:
        name, why = settle(
            encoder.fingerprint, machine, precision, lambda: fastest_faithful(encoder, images(), batch, device)
        )
    checked: dict[str, Any] = {"cosine": None, "checked": None} if is_half(name) else {"cosine": 1.0}
    return ExtractionRecord(batch_size=batch, device=device, machine=machine, precision=name, **checked), why


def _of_replaced(path: str | Path, manifest: Manifest, machine: str) -> str | None:
    """The precision of a store of the same encoder that is there already, made on this kind of machine."""
    try:
        there = FeatureStore(path).manifest
    except ValueError:
        return None
    made = there.extraction
    same = there.encoder.fingerprint == manifest.encoder.fingerprint and made.machine == machine
    return made.precision if same and made.precision in NAMES else None


def _prepare(
    path: str | Path,
    manifest: Manifest,
    encoder: Encoder,
    store: FeatureStore | None,
    probe: torch.Tensor,
    overwrite: bool,
) -> tuple[FeatureStore, float]:
    """Put the encoder into the store's precision, and create the store if there is none; returns it and images/s."""
    made = manifest.extraction
    assert made.device
    assert made.precision
    assert made.batch_size
    encoder.to(made.device, CANDIDATES[made.precision])
    began = time.perf_counter()
    features = encoder.encode_padded(probe, made.batch_size, tuple(manifest.fields))
    seconds = time.perf_counter() - began
    if made.device == "cuda":  # whose first pass sets it up
        seconds = pass_seconds(encoder, probe, made.batch_size)
    if torch.allclose(features[EMBEDDING].norm(dim=1).cpu(), torch.ones(len(probe)), atol=1e-3):
        log.warning(
            "%s: its embeddings are L2-normalised already: lengths, which some methods use, are lost", encoder.name
        )
    _warn_of_float16(encoder, features, manifest)
    if store is None:
        with writing(path), set_aside(path, manifest) if overwrite else contextlib.nullcontext():
            store = create_store(path, manifest, overwrite=overwrite)
    return store, made.batch_size / seconds


def _warn_of_float16(encoder: Encoder, features: dict[str, torch.Tensor], manifest: Manifest) -> None:
    """Features that float16 cannot hold are not lost without a word."""
    for name, of_probe in features.items():
        rows = of_probe.flatten(1)
        finite = rows[rows.isfinite().all(1)].cpu().numpy()
        if manifest.dtype(name) == FLOAT16 and len(finite) and share_lost(finite) > TOLERANCE:
            log.warning(
                "%s: float16 loses much of what tells one %s from another; extract with --dtype float32",
                encoder.name,
                name,
            )


def _save_unfinished(jobs: list[Job]) -> None:
    """However the pass ended: an interrupt loses no more than the batch in hand."""
    for job in jobs:
        with contextlib.suppress(OSError):
            job.save()


def _probe(
    corpus: Corpus, recipe: Views, preprocess: Preprocess, pool: ThreadPoolExecutor
) -> tuple[torch.Tensor, float]:
    """Pixels of the first readable images, to choose the precision on; and how many seconds a sample took to read."""
    found: dict[int, np.ndarray] = {}
    first = ""

    def read(row: int) -> Sample:
        return read_sample(corpus, row, recipe, [Wanted(preprocess)])

    rows = iter(range(len(corpus)))
    while len(found) < PROBE_IMAGES and (some := list(islice(rows, PROBE_IMAGES - len(found)))):
        for row, sample in zip(some, pool.map(read, some), strict=True):
            if (seen := sample.seen[0]) and seen.pixels is not None:
                found[row] = seen.pixels[0]
            first = first or (f"{corpus.ids[row]}: {sample.reason}" if sample.reason else "")
    if not found:
        raise ValueError(f"{corpus.spec}: not one of {len(corpus)} images could be read (the first: {first})")
    began = time.perf_counter()
    for _ in pool.map(read, found):  # once more: the first time is not like the others
        pass
    seconds = (time.perf_counter() - began) / len(found)
    return torch.from_numpy(np.stack(list(found.values()))), seconds


def _spread_probe(corpus: Corpus, recipe: Views, preprocess: Preprocess, pool: ThreadPoolExecutor) -> torch.Tensor:
    """Pixels of images all over the corpus, those that can be read: the first ones alone may be of one class."""
    rows = sorted({i * len(corpus) // CHOOSING_IMAGES for i in range(CHOOSING_IMAGES)})
    samples = pool.map(lambda row: read_sample(corpus, row, recipe, [Wanted(preprocess)]), rows)
    found = [seen.pixels[0] for sample in samples if (seen := sample.seen[0]) and seen.pixels is not None]
    return torch.from_numpy(np.stack(found)) if found else _probe(corpus, recipe, preprocess, pool)[0]


def _manifest(
    corpus: Corpus, encoder: Encoder, recipe: Views, fields: Iterable[str], dtype: str, pixels: KeptPixels | None
) -> Manifest:
    fields = [EMBEDDING, *sorted(set(fields) - {EMBEDDING})]
    missing = [name for name in fields if name not in encoder.fields]
    if missing:
        raise ValueError(f"--fields {','.join(missing)}: {encoder.name} gives {', '.join(encoder.fields)}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: unknown; known: {', '.join(DTYPES)}")
    for name in fields:
        try:
            refuse_field_name(name)
        except ValueError as error:
            raise ValueError(f"{encoder.name}: {error}") from None
    checked_ids(corpus.spec, corpus.ids, len(corpus))
    names = None if corpus.class_names is None else list(corpus.class_names)
    checked_labels(corpus.spec, [corpus.label(i) for i in range(len(corpus))], len(corpus), names)
    rows = hashlib.blake2b(digest_size=16)
    for i, sample_id in enumerate(corpus.ids):
        rows.update(f"{sample_id}\0{corpus.label(i)}\0".encode())
    return Manifest(
        encoder=EncoderRecord(
            name=encoder.name,
            fingerprint=encoder.fingerprint,
            embedding_dim=encoder.embedding_dim,
            output=encoder.output,
            preprocess=encoder.preprocess.to_dict(),
        ),
        corpus=CorpusRecord(
            spec=corpus.spec,
            rows=len(corpus),
            digest=rows.hexdigest(),
            class_names=names or None,
            passed_over=dict(passed_over(corpus)),
        ),
        views=ViewsRecord(**recipe.record, parameters=list(PARAMETERS)),
        fields={name: list(encoder.fields[name]) for name in fields},
        dtypes=dict.fromkeys(fields, dtype) if dtype != FLOAT16 else {},
        pixels=pixels,
        chunk_rows=chunk_rows(np.dtype(dtype).itemsize * recipe.count * encoder.embedding_dim, len(corpus)),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "zarr", "pillow", "numpy")},
        },
    )


def _existing(path: str | Path, manifest: Manifest, overwrite: bool) -> FeatureStore | None:
    """The store at `path` if it is the one that `manifest` describes, finished or not; with `overwrite`, only unfinished.

    Raises:
        ValueError: another store is there, and `overwrite` is not set.
    """
    files = files_at(path)
    if not files.exists():
        return None
    if isinstance(files.path, Path) and not looks_like_store(files.path):
        raise ValueError(f"{path}: already exists and is not a store; choose another --out")
    try:
        store = FeatureStore(path)
        difference = _difference(store, manifest)
    except ValueError:
        if overwrite:
            return None
        raise
    if overwrite:
        return None if store.sealed or difference else store
    if difference:
        raise ValueError(f"{path}: was made {difference}; choose another --out, or replace it with --overwrite")
    return store


def _difference(store: FeatureStore, manifest: Manifest) -> str:
    """How the store was made, if not as `manifest` says; else ""."""
    theirs, ours = store.manifest.to_json(), manifest.to_json()
    for section, key in (
        ("encoder", "fingerprint"),
        ("corpus", "digest"),
        ("corpus", "class_names"),
        ("views", None),
        ("fields", None),
        ("dtypes", None),
        ("pixels", None),
    ):
        was, now = theirs.get(section), ours.get(section)
        was, now = (was.get(key), (now or {}).get(key)) if key and was else (was, now)
        if was != now:
            return {
                "encoder": f"by another encoder ({store.encoder_name}, fingerprint {str(was)[:8]}, not {str(now)[:8]})",
                "corpus": "from other samples or labels (images were added, removed or renamed)",
                "dtypes": f"in {' and '.join(_dtypes(store.manifest))}, not {' and '.join(_dtypes(manifest))} (--dtype)",
            }.get(section, f"with other {section} ({was}, not {now})")
    return ""


def _dtypes(manifest: Manifest) -> list[str]:
    return sorted({*manifest.field_dtypes.values()})


def _changed_images(stores: list[FeatureStore], corpus: Corpus, pool: ThreadPoolExecutor) -> dict[str | Path, str]:
    """What to say of the stores, by path, that hold rows of other image bytes than the corpus has now."""
    done = np.flatnonzero(sum(store.state != PENDING for store in stores)).tolist() if stores else []
    changed: dict[str | Path, list[int]] = {store.path: [] for store in stores}
    for row, now in zip(done, prefetch(partial(_content, corpus), done, pool, ahead=256), strict=True):
        for store in stores:
            was = store.content[row].tobytes()
            if store.state[row] != PENDING and was != now:
                changed[store.path].append(row)
    return {
        path: f"{path}: {len(rows)} images have changed since (first: {corpus.ids[rows[0]]}); "
        "choose another --out, or replace it with --overwrite: the rows of the others are taken over"
        for path, rows in changed.items()
        if rows
    }


def _content(corpus: Corpus, row: int) -> bytes:
    """Hash of an image as it is now."""
    try:
        return content_hash(corpus.read(row))
    except Exception:  # gone, or without an image: that is no change when the row had failed for it
        return bytes(16)


def _store_bytes(manifest: Manifest) -> int:
    """Size of a store, but for its ids, reasons and metadata; kept images are guessed."""
    rows = -(-manifest.corpus.rows // manifest.chunk_rows) * manifest.chunk_rows
    features = sum(manifest.field_bytes.values()) + 4 * manifest.views.count * len(PARAMETERS)
    kept = manifest.pixels.typical_bytes if manifest.pixels else 0
    return rows * (features + kept + 8 + 16 + 1)


def _refuse_small_disks(new: Sequence[tuple[Files, Manifest]]) -> None:
    """Stores that are not there yet must fit; those of one disk together."""
    disks: dict[int, list[tuple[Files, int]]] = {}
    for files, manifest in new:
        disks.setdefault(files.root.parent.stat().st_dev, []).append((files, _store_bytes(manifest)))
    for stores in disks.values():
        folder = stores[0][0].root.parent
        need, free = sum(size for _, size in stores), shutil.disk_usage(folder).free
        if need > free:
            names = ", ".join(str(files.path) for files, _ in stores)
            raise OSError(
                errno.ENOSPC,
                f"{names}: {need / 1e6:,.1f} MB to write, the disk of {folder} has {free / 1e6:,.1f} MB free; make room "
                "or choose another --out",
            )

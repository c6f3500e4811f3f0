"""Stage one: run a frozen encoder once over a corpus and keep what it saw."""

import contextlib
import errno
import hashlib
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from featcache.allocator import keep_freed_memory
from featcache.cache import KnownRows, default_store_path, register
from featcache.corpus import Corpus, open_corpus
from featcache.encoder import Encoder, load_encoder
from featcache.precision import choose_precision
from featcache.samples import Sample, content_hash, cores, prefetch, read_sample
from featcache.store import FAILED, OK, PENDING, STATE, FeatureStore, chunk_rows, create_store
from featcache.views import PARAMETERS, Views

PROBE_IMAGES = 8
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
        store: created, or opened to be resumed.
        done: samples that an earlier run finished.
        samples_per_second: of the encoder alone, measured on the probe batch.
    """

    store: FeatureStore
    done: int
    samples_per_second: float

    @property
    def bytes_to_write(self) -> int:
        return _store_bytes(self.store.manifest) * (len(self.store) - self.done) // len(self.store)

    @property
    def bytes_free(self) -> int:
        return shutil.disk_usage(self.store.path).free

    @property
    def seconds(self) -> float:
        """Expected, if the encoder is what limits."""
        return (len(self.store) - self.done) / self.samples_per_second


def extract(
    corpus: Corpus | str,
    teacher: Encoder | str,
    out: str | os.PathLike[str] | None = None,
    *,
    views: int = 1,
    augment: str = "none",
    seed: int = 0,
    fields: Iterable[str] = ("embedding",),
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    max_failures: int | None = None,
    overwrite: bool = False,
    announce: Callable[[Plan], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> FeatureStore:
    """Run `teacher` over every view of every sample of `corpus` and return the sealed store.

    An interrupted run is resumed chunk by chunk, a damaged store is repaired chunk by chunk, a finished one is
    returned at once. An image that any store already holds for the same encoder, views and fields is found by its
    content and not encoded again. A sample whose image cannot be read becomes a failed row with its reason.

    Args:
        corpus: a corpus or its spec.
        teacher: an encoder or its spec.
        out: the store's path; under $FEATCACHE_HOME, named by content, when left out.
        views, augment, seed: the recipe of `featcache.views.Views`.
        fields: features to keep, of `teacher.fields`.
        batch_size: images a forward pass; by default 16 on a CPU, 256 on a GPU.
        workers: threads that read, decode and resize; by default one a core.
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        precision: "auto" measures and takes the fastest that is faithful; or "fp32", "bf16", "fp16".
        max_failures: stop as soon as more images than this could not be read.
        overwrite: replace a store at `out` that was made from something else.
        announce: called once, before the first batch, unless there is nothing to do.
        progress: called after every batch.

    Raises:
        ValueError: the arguments, or a store at `out` that holds something else; nothing has been written.
        OSError: the disk is too small, full or gone; running the same command again resumes.
        RuntimeError: more than `max_failures`; likewise.
    """
    corpus = open_corpus(corpus) if isinstance(corpus, str) else corpus
    encoder = load_encoder(teacher) if isinstance(teacher, str) else teacher
    recipe = Views(count=views, augment=augment, seed=seed)  # type: ignore[arg-type]
    device = resolve_device(device)
    if device == "cpu":
        keep_freed_memory()
    manifest = _manifest(corpus, encoder, recipe, list(fields))
    path = Path(out) if out is not None else default_store_path(manifest)

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        pool = held.enter_context(ThreadPoolExecutor(workers or cores()))
        store = _existing(path, manifest, overwrite)
        if store is None or not store.sealed or store.verify():
            held.enter_context(_only_writer(path))
            store = _existing(path, manifest, overwrite)  # another process may have finished it meanwhile
            for damage in store.mend() if store is not None else ():
                log.warning("%s: %s; made again", path, damage)
        if store is not None:
            _refuse_changed_images(store, corpus, pool)
            if store.sealed:
                register(store)
                return store

        # The precision and batch size of an interrupted run are kept: its finished chunks were made with them.
        kept = store.manifest["extraction"] if store is not None else {}
        batch = kept.get("batch_size") or batch_size or (256 if device == "cuda" else 16)
        probe = _probe(corpus, recipe, encoder)
        chosen, speed = choose_precision(encoder, probe, kept.get("precision", precision), device, recorded=bool(kept))
        if torch.allclose(encoder.encode(probe)["embedding"].norm(dim=1), torch.ones(len(probe)).to(device), atol=1e-3):
            log.warning(
                "%s: its embeddings are L2-normalised already: lengths, which some methods use, are lost", encoder.name
            )
        if store is None:
            manifest["extraction"] = {"batch_size": batch, "device": device, **chosen}
            _refuse_small_disk(path, manifest)
            store = create_store(path, manifest, overwrite=overwrite)
        known = KnownRows(manifest, besides=path)

        pending = store.pending_chunks()
        todo = [row for chunk in pending for row in store.rows_of(chunk)]
        at = Progress(rows=len(store), views=store.views, done=len(store) - len(todo), resumed=len(store) - len(todo))

        def read(row: int) -> Sample:
            return read_sample(corpus, row, recipe, encoder.preprocess, known)

        if announce:
            announce(Plan(store, at.done, speed / recipe.count))
        samples = prefetch(read, todo, pool, ahead=4 * batch)
        per_batch = max(1, batch // recipe.count)
        for chunk in pending:
            rows = store.rows_of(chunk)
            arrays = _empty_arrays(store, corpus, rows)
            for start in range(0, len(rows), per_batch):
                here = range(start, min(start + per_batch, len(rows)))
                clock = time.perf_counter()
                read_samples = [next(samples) for _ in here]
                at.wait += -clock + (clock := time.perf_counter())
                _encode_into(arrays, here, read_samples, encoder)
                at.encode += -clock + time.perf_counter()
                at.done += len(here)
                at.reused += sum(sample.known is not None for sample in read_samples)
                at.failed += sum(bool(sample.reason) for sample in read_samples)
                if max_failures is not None and at.failed > max_failures:
                    raise RuntimeError(
                        f"{corpus.spec}: {at.failed} images could not be read, more than --max-failures {max_failures} "
                        f"(last: {next(s.reason for s in reversed(read_samples) if s.reason)}); finished chunks are kept"
                    )
                if progress:
                    progress(at)
            clock = time.perf_counter()
            store.write_chunk(chunk, arrays)
            at.write += time.perf_counter() - clock
        if not len(store.ok):
            raise ValueError(
                f"{corpus.spec}: not one image could be read ({next(iter(store.reasons.values()))}); nothing was sealed"
            )
        store.seal()
        register(store)
        if progress:
            progress(at)
    return store


def _empty_arrays(store: FeatureStore, corpus: Corpus, rows: range) -> dict[str, np.ndarray]:
    """One unit's arrays: labels and ids filled in, the rest zero."""
    count, views = len(rows), store.views
    return {
        **{name: np.zeros((count, views, width), np.float16) for name, width in store.manifest["fields"].items()},
        "label": np.array([corpus.label(row) for row in rows], np.int64),
        "sample_id": np.array([corpus.ids[row] for row in rows], dtype=object),
        "content": np.zeros((count, 16), np.uint8),
        "view": np.zeros((count, views, len(PARAMETERS)), np.float32),
        "reason": np.full(count, "", dtype=object),
        STATE: np.full(count, FAILED, np.uint8),
    }


def _encode_into(arrays: dict[str, np.ndarray], here: range, samples: list[Sample], encoder: Encoder) -> None:
    """Encode one batch of samples and put everything known of them at positions `here` of the unit's arrays."""
    for position, sample in zip(here, samples, strict=True):
        arrays["content"][position] = np.frombuffer(sample.content, np.uint8)
        arrays["view"][position] = sample.parameters
        arrays["reason"][position] = sample.reason
        if sample.known:
            arrays[STATE][position] = OK
            for name, known in sample.known.items():
                arrays[name][position] = known
    readable = [
        (position, sample.pixels) for position, sample in zip(here, samples, strict=True) if sample.pixels is not None
    ]
    if not readable:
        return
    positions = [position for position, _ in readable]
    pixels = np.concatenate([pixels for _, pixels in readable])
    encoded = encoder.encode(torch.from_numpy(pixels))
    fields = [name for name in encoded if name in arrays]
    for name in fields:
        features = encoded[name].half()
        arrays[name][positions] = features.cpu().numpy().reshape(len(positions), -1, features.shape[1])
    arrays[STATE][positions] = OK
    for position in positions:
        if not all(np.isfinite(arrays[name][position]).all() for name in fields):
            arrays[STATE][position], arrays["reason"][position] = FAILED, "features are not finite in float16"
            for name in fields:
                arrays[name][position] = 0


def _probe(corpus: Corpus, recipe: Views, encoder: Encoder) -> torch.Tensor:
    """Pixels of the first readable images, to choose the precision on."""
    found: list[np.ndarray] = []
    for row in range(min(len(corpus), 16 * PROBE_IMAGES)):
        sample = read_sample(corpus, row, recipe, encoder.preprocess)
        if sample.pixels is not None:
            found.append(sample.pixels[0])
        if len(found) == PROBE_IMAGES:
            break
    if not found:
        reason = read_sample(corpus, 0, recipe, encoder.preprocess).reason
        raise ValueError(
            f"{corpus.spec}: none of the first {min(len(corpus), 16 * PROBE_IMAGES)} images could be read ({reason})"
        )
    return torch.from_numpy(np.stack(found))


def _manifest(corpus: Corpus, encoder: Encoder, recipe: Views, fields: list[str]) -> dict[str, Any]:
    missing = [name for name in fields if name not in encoder.fields]
    if missing or "embedding" not in fields:
        raise ValueError(
            f"--fields {','.join(fields)}: {encoder.name} gives {', '.join(encoder.fields)}, and embedding is always needed"
        )
    rows = hashlib.blake2b(digest_size=16)
    for i, sample_id in enumerate(corpus.ids):
        rows.update(f"{sample_id}\0{corpus.label(i)}\0".encode())
    row_bytes = recipe.count * max(encoder.fields[name] for name in fields) * np.dtype(np.float16).itemsize
    return {
        "encoder": {
            "name": encoder.name,
            "fingerprint": encoder.fingerprint,
            "embedding_dim": encoder.embedding_dim,
            "output": encoder.output,
            "preprocess": encoder.preprocess.to_dict(),
        },
        "corpus": {
            "spec": corpus.spec,
            "rows": len(corpus),
            "digest": rows.hexdigest(),
            "class_names": list(corpus.class_names) if corpus.class_names else None,
        },
        "views": {**asdict(recipe), "parameters": list(PARAMETERS)},
        "fields": {name: encoder.fields[name] for name in fields},
        "chunk_rows": chunk_rows(row_bytes, len(corpus)),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm", "zarr", "pillow", "numpy")},
        },
    }


def _existing(path: Path, manifest: dict[str, Any], overwrite: bool) -> FeatureStore | None:
    """The store at `path` if it is the one that `manifest` describes, finished or not.

    Raises:
        ValueError: another store is there, and `overwrite` is not set.
    """
    if not path.exists() or overwrite:
        return None
    store = FeatureStore(path)
    for section, key in (("encoder", "fingerprint"), ("corpus", "digest"), ("views", None), ("fields", None)):
        was, now = store.manifest[section], manifest[section]
        was, now = (was.get(key), now[key]) if key else (was, now)
        if was != now:
            made = {
                "encoder": f"by another encoder ({store.encoder_name}, fingerprint {str(was)[:8]}, not {str(now)[:8]})",
                "corpus": "from other samples or labels (images were added, removed or renamed)",
            }.get(section, f"with other {section} ({was}, not {now})")
            raise ValueError(f"{path}: was made {made}; choose another --out, or replace it with --overwrite")
    return store


def _refuse_changed_images(store: FeatureStore, corpus: Corpus, pool: ThreadPoolExecutor) -> None:
    """Finished rows are reused only for the same image bytes."""

    def changed(row: int) -> bool:
        try:
            return content_hash(corpus.read(row)) != store.content[row].tobytes()
        except Exception:  # gone, or without an image: that is no change when the row had failed for it
            return bool(store.content[row].any())

    done = np.flatnonzero(store.state != PENDING).tolist()
    rows = [row for row, differs in zip(done, prefetch(changed, done, pool, ahead=256), strict=True) if differs]
    if rows:
        raise ValueError(
            f"{store.path}: {len(rows)} images have changed since (first: {corpus.ids[rows[0]]}); "
            "choose another --out, or replace it with --overwrite"
        )


def _store_bytes(manifest: dict[str, Any]) -> int:
    """Size of a store, but for its ids, reasons and metadata."""
    chunks = -(-manifest["corpus"]["rows"] // manifest["chunk_rows"])
    per_view = 2 * sum(manifest["fields"].values()) + 4 * len(PARAMETERS)
    return chunks * manifest["chunk_rows"] * (manifest["views"]["count"] * per_view + 8 + 16 + 1)


def _refuse_small_disk(path: Path, manifest: dict[str, Any]) -> None:
    need, free = _store_bytes(manifest), shutil.disk_usage(path.parent).free
    if need > free:
        message = f"{path}: needs {need / 1e9:,.1f} GB, its disk has {free / 1e9:,.1f} GB free; make room or choose another --out"
        raise OSError(errno.ENOSPC, message)


class _only_writer(filelock.FileLock):
    """Held while a store is written; the operating system lets go of it when the process dies."""

    def __init__(self, path: Path):
        super().__init__(f"{path}.lock", blocking=False)
        self._store = path

    def __enter__(self) -> "_only_writer":
        try:
            self.acquire()
        except filelock.Timeout:
            raise ValueError(
                f"{self._store}: another process is writing this store; wait for it, or choose another --out"
            ) from None
        return self


def resolve_device(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; known: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device

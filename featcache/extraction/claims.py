"""Claims: which store is at a place already, whether it may be gone on with, and whether a new one fits."""

import contextlib
import errno
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from featcache.corpora import Corpus, kind_of
from featcache.disk.durable import is_held
from featcache.disk.refusals import refuse_inside_store, refuse_mount_point, refuse_unmakeable, writing
from featcache.extraction.samples import content_now, prefetch
from featcache.extraction.unit import Unit
from featcache.store import FeatureStore, StoreWriter
from featcache.store.files import BUSY, Files, files_at, looks_like_store
from featcache.store.integrity import find_damage
from featcache.store.layout import PENDING
from featcache.store.manifest import Manifest

log = logging.getLogger("featcache")


def claim(path: str | Path, manifest: Manifest, overwrite: bool, held: contextlib.ExitStack) -> StoreWriter | None:
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


def look(path: str | Path, manifest: Manifest, overwrite: bool) -> tuple[StoreWriter | None, np.ndarray]:
    """The store that `claim` would give, as it is, and which of its rows are to be computed (all, where there is none);
    nothing is made, locked or mended."""
    with writing(path):
        files = files_at(path)
        if not files.exists():
            refuse_inside_store(files.root)
        refuse_unmakeable(files.root.parent)
        store = _existing(path, manifest, overwrite)
        damage = find_damage(store.files, store.manifest) if store else []
        if store and store.sealed and not damage:
            return store, np.zeros(len(store), bool)
        if is_held(Path(f"{files.root}.lock")):
            raise ValueError(BUSY.format(path))
        if store is None:
            refuse_mount_point(files.root)
            return None, np.ones(manifest.corpus.rows, bool)
    units = {*store.pending_chunks(), *(where for where, _ in damage if isinstance(where, int))}
    pending = np.isin(np.arange(len(store)) // store.manifest.chunk_rows, list(units))
    saved = Unit.load(store)
    if saved and saved.number in units:
        pending[saved.start : saved.start + saved.done] = False
    return store, pending


def _existing(path: str | Path, manifest: Manifest, overwrite: bool) -> StoreWriter | None:
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
        store = StoreWriter(path)
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
    if (was := store.manifest.derivation) and (now := manifest.derivation) and was != now:
        return f"as {was}, not {now}" if str(was) != str(now) else "from other stores, or they have changed since"
    theirs, ours = store.manifest.to_json(), manifest.to_json()
    for section, key in (
        ("encoder", "fingerprint"),
        ("corpus", "digest"),
        ("corpus", "class_names"),
        ("views", None),
        ("fields", None),
        ("dtypes", None),
        ("top_k", None),
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


def changed_images(stores: Sequence[FeatureStore], corpus: Corpus, pool: ThreadPoolExecutor) -> dict[str | Path, str]:
    """What to say of the stores, by path, that hold rows of other image bytes than the corpus has now."""
    done = np.flatnonzero(sum(store.state != PENDING for store in stores)).tolist() if stores else []
    changed: dict[str | Path, list[int]] = {store.path: [] for store in stores}
    for row, now in zip(done, prefetch(partial(content_now, corpus), done, pool, ahead=256), strict=True):
        for store in stores:
            was = store.content[row].tobytes()
            if store.state[row] != PENDING and was != now:
                changed[store.path].append(row)
    return {
        path: f"{path}: {len(rows)} {kind_of(corpus)}s have changed since (first: {corpus.ids[rows[0]]}); "
        "choose another --out, or replace it with --overwrite: the rows of the others are taken over"
        for path, rows in changed.items()
        if rows
    }


def store_bytes(manifest: Manifest) -> int:
    """Size of a store, but for its ids, reasons and metadata; kept images are guessed."""
    rows = -(-manifest.corpus.rows // manifest.chunk_rows) * manifest.chunk_rows
    features = sum(manifest.field_bytes.values()) + 4 * manifest.views.count * len(manifest.views.parameters)
    kept = manifest.pixels.typical_bytes if manifest.pixels else 0
    return rows * (features + kept + 8 + 16 + 1)


def nearest(folder: Path) -> Path:
    """The folder, or of those above it the lowest that is there."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def refuse_small_disks(new: Sequence[tuple[Files, Manifest]]) -> None:
    """Stores that are not there yet must fit; those of one disk together."""
    disks: dict[int, list[tuple[Files, int]]] = {}
    for files, manifest in new:
        disks.setdefault(nearest(files.root.parent).stat().st_dev, []).append((files, store_bytes(manifest)))
    for stores in disks.values():
        folder = stores[0][0].root.parent
        need, free = sum(size for _, size in stores), shutil.disk_usage(nearest(folder)).free
        if need > free:
            names = ", ".join(str(files.path) for files, _ in stores)
            raise OSError(
                errno.ENOSPC,
                f"{names}: {need / 1e6:,.1f} MB to write, the disk of {folder} has {free / 1e6:,.1f} MB free; make room "
                "or choose another --out",
            )

"""$FEATCACHE_HOME: stores without a name of their own, and the index by which any row is found by its content."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from featcache.disk.durable import whole_file
from featcache.disk.home import cache_home, found_under
from featcache.disk.refusals import destination
from featcache.disk.urls import is_url
from featcache.inputs import BY_ID
from featcache.store.files import files_at
from featcache.store.layout import COSINE, METADATA
from featcache.store.manifest import ExtractionRecord, Manifest
from featcache.store.read import FeatureStore

log = logging.getLogger("featcache")


def default_store_path(manifest: Manifest) -> Path:
    """A path named by what the store will hold: encoder, corpus, views, fields and kept images."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in manifest.encoder.name)[:80]
    kept = [asdict(manifest.pixels)] if manifest.pixels else []
    return cache_home() / "stores" / f"{name}-{_digest([_recipe(manifest), manifest.corpus.digest, *kept])}.zarr"


def register(store: FeatureStore) -> None:
    """Make a sealed store's rows findable by content. Called when it is sealed; doing it again is harmless.

    The index entry is a sorted array, searched from disk: finding a row costs the same however many there are.
    """
    entry = _entry(store)
    record = {"path": store.identity, "digest": store.digest}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(entry.read_text()) == record:  # written last
            return
    entry.parent.mkdir(parents=True, exist_ok=True)
    rows = store.ok
    # Unit by unit: all hashes at once would be the most memory that an extraction ever takes.
    units = (store.rows_of(chunk) for chunk in range(store.chunks))
    keys = np.concatenate([_keys(store.read("content", unit.start, unit.stop)) for unit in units])[rows]
    order = np.argsort(keys, kind="stable")
    for name, array in (("keys", keys[order]), ("rows", rows[order])):
        with whole_file(entry.with_suffix(f".{name}.npy")) as file:
            np.save(file, array)
    with whole_file(entry) as file:  # last
        file.write(json.dumps(record).encode())


def forget(store: FeatureStore) -> None:
    """Take a store out of the index; the store itself stays."""
    entry = _entry(store)
    with contextlib.suppress(OSError):  # another user's: it stands for a store that is not there, and is passed over
        for path in (entry, entry.with_suffix(".keys.npy"), entry.with_suffix(".rows.npy")):
            path.unlink(missing_ok=True)


def known_stores() -> list[str | Path]:
    """Paths of all registered stores that are still there, and of unfinished ones under $FEATCACHE_HOME; then the URLs
    of registered ones, whether they are there or not."""
    registered = {record["path"] for _, record in _entries(cache_home() / "index", "*/*.json")}
    local = {Path(path) for path in registered if not is_url(path) and os.path.exists(path)}
    return [*sorted(local | {*found_under(cache_home() / "stores", "*.zarr")}), *sorted(filter(is_url, registered))]


def recorded_extractions(fingerprint: str) -> Iterator[tuple[ExtractionRecord, int]]:
    """How the encoder's registered stores on this machine were made, and their rows."""
    for _, record in _entries(cache_home() / "index", "*/*.json"):
        try:
            group = json.loads((Path(record["path"]) / METADATA).read_bytes())
            manifest = Manifest.from_json(group["attributes"]["featcache"])
            if manifest.encoder.fingerprint == fingerprint and manifest.sealed:
                yield manifest.extraction, manifest.corpus.rows
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # gone, damaged, at a URL, or made elsewhere
            continue


@contextlib.contextmanager
def set_aside(path: str | Path, manifest: Manifest) -> Iterator[None]:
    """While a finished store on this machine is replaced by one of the same recipe: its rows can still be found.

    For the only writer, around the new store's creation; the old one is back where that fails. `discard_replaced` ends it.
    """
    moved = not is_url(str(path)) and _is_finished(path, manifest)
    if moved:
        discard_replaced(path)
        os.replace(destination(path), _replaced(path))
    try:
        yield
    except BaseException:
        if moved and not Path(path).exists():
            os.replace(_replaced(path), destination(path))
        raise


def _is_finished(path: str | Path, manifest: Manifest) -> bool:
    """Whether a sealed store of the manifest's recipe is there."""
    try:
        store = FeatureStore(path)
    except ValueError:
        return False
    return store.sealed and _recipe(store.manifest) == _recipe(manifest)


def discard_replaced(path: str | Path) -> None:
    """Delete what `set_aside` kept, once the new store is registered."""
    if not is_url(str(path)):
        shutil.rmtree(_replaced(path), ignore_errors=True)


def _replaced(path: str | Path) -> Path:
    place = destination(path)
    return place.with_name(f"{place.name}.replaced")


class KnownRows:
    """Rows that some registered store already holds for one recipe: encoder, views, fields and their dtypes; and with the
    same bits: precision, kind of machine and batch size.

    What another store holds is trusted only where its checksums hold.

    Args:
        manifest: of the store to be made.
        besides: a store that is not asked, because it is the one being made; but the one it replaces is.
    """

    def __init__(self, manifest: Manifest, besides: str | Path):
        self._fields = list(manifest.fields)
        self._by_id = manifest.views.augment in BY_ID  # then a view depends on the sample's id too
        self._stores = list(self._open(_index_folder(manifest), besides, _bits(manifest)))
        self._damaged: set[str | Path] = set()

    def __bool__(self) -> bool:
        return bool(self._stores)

    def find(self, content: bytes, sample_id: str) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
        """Features {field: (V, D)} and view parameters (V, P) of the image with this hash, or None."""
        key = _keys(np.frombuffer(content, np.uint8)[None])[0]
        for store, keys, rows in self._stores:
            if store.path in self._damaged:
                continue
            for at in range(int(np.searchsorted(keys, key)), len(keys)):
                if keys[at] != key:
                    break
                row = int(rows[at])
                try:
                    same = store.row("content", row).tobytes() == content
                    if same and not (self._by_id and str(store.sample_ids[row]) != sample_id):
                        cosine = [COSINE] if COSINE in store.layout else []
                        features = {name: store.checked_row(name, row) for name in self._fields + cosine}
                        return features, store.checked_row("view", row)
                except FileNotFoundError:  # removed since: the image is encoded
                    break
                except ValueError as error:
                    self._give_up(store, error)
                    break
        return None

    def _give_up(self, store: FeatureStore, error: ValueError) -> None:
        if store.path not in self._damaged:
            self._damaged.add(store.path)
            log.warning("%s: damaged (%s); no more of its rows are reused, their images are encoded", store.path, error)

    @staticmethod
    def _open(
        folder: Path, besides: str | Path, bits: list[Any]
    ) -> Iterator[tuple[FeatureStore, np.ndarray, np.ndarray]]:
        for entry, record in _entries(folder, "*.json"):
            place: str | Path = record["path"]
            if place == files_at(besides).identity:
                if is_url(str(place)):
                    continue
                place = _replaced(place)
            try:
                store = FeatureStore(place)
                if store.digest != record["digest"]:
                    continue  # replaced since by another one
                if _bits(store.manifest) != bits:
                    continue
                keys, rows = (np.load(entry.with_suffix(f".{name}.npy"), mmap_mode="r") for name in ("keys", "rows"))
            except (ValueError, OSError, KeyError):
                continue  # moved, removed or damaged: its rows are made again
            yield store, keys, rows


def _entries(folder: Path, pattern: str) -> Iterator[tuple[Path, dict[str, str]]]:
    for entry in found_under(folder, pattern):
        try:
            record = json.loads(entry.read_text())
            yield entry, {"path": str(record["path"]), "digest": str(record["digest"])}
        except PermissionError:
            log.warning("%s: another user's, who does not let it be read (its store's rows are not reused)", entry)
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s: damaged and ignored; delete it (its store's rows are not reused)", entry)


def _recipe(manifest: Manifest) -> list[Any]:
    wide = [manifest.dtypes] if manifest.dtypes else []
    top = [manifest.top_k] if manifest.top_k else []
    return [manifest.encoder.fingerprint, manifest.views.to_json(), manifest.fields, *wide, *top]


def _bits(manifest: Manifest) -> list[Any]:
    """What decides the bits of a feature, besides the recipe; never equal where a store says nothing of it."""
    made = manifest.extraction
    return [object() if each is None else each for each in (made.precision, made.machine, made.batch_size)]


def _index_folder(manifest: Manifest) -> Path:
    return cache_home() / "index" / _digest(_recipe(manifest))


def _entry(store: FeatureStore) -> Path:
    return _index_folder(store.manifest) / f"{_digest(store.identity)}.json"


def _keys(content: np.ndarray) -> np.ndarray:
    """(N, 16) hashes → (N,) uint64, their first half."""
    return np.ascontiguousarray(content[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def _digest(of: Any) -> str:
    return hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=6).hexdigest()

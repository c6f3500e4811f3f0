"""$FEATCACHE_HOME: stores without a name of their own, and the index by which any row is found by its content."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featcache.corpora._urls import is_url
from featcache.files import files_at
from featcache.home import cache_home
from featcache.store import FeatureStore


def default_store_path(manifest: Mapping[str, Any]) -> Path:
    """A path named by what the store will hold: encoder, corpus, views, fields and kept images."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in manifest["encoder"]["name"])[:80]
    kept = [manifest["pixels"]] if manifest.get("pixels") else []
    return cache_home() / "stores" / f"{name}-{_digest([_recipe(manifest), manifest['corpus']['digest'], *kept])}.zarr"


def register(store: FeatureStore) -> None:
    """Make a sealed store's rows findable by content. Called when it is sealed; doing it again is harmless.

    The index entry is a sorted array, searched from disk: finding a row costs the same however many there are.
    """
    entry = _entry(store)
    entry.parent.mkdir(parents=True, exist_ok=True)
    rows = store.ok
    # Unit by unit: all hashes at once would be the most memory that an extraction ever takes.
    units = (store.rows_of(chunk) for chunk in range(store.chunks))
    keys = np.concatenate([_keys(store._read("content", unit.start, unit.stop)) for unit in units])[rows]
    order = np.argsort(keys, kind="stable")
    for name, array in (("keys", keys[order]), ("rows", rows[order])):
        partial = entry.with_suffix(f".{name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.save(file, array)
        os.replace(partial, entry.with_suffix(f".{name}.npy"))
    partial = entry.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"path": store.identity, "digest": store.manifest["sealed"]["digest"]}))
    os.replace(partial, entry)


def forget(store: FeatureStore) -> None:
    """Take a store out of the index; the store itself stays."""
    entry = _entry(store)
    for path in (entry, entry.with_suffix(".keys.npy"), entry.with_suffix(".rows.npy")):
        path.unlink(missing_ok=True)


def known_stores() -> list[str | Path]:
    """Paths of all registered stores that are still there, and of unfinished ones under $FEATCACHE_HOME; then the URLs
    of registered ones, whether they are there or not."""
    registered = {json.loads(entry.read_text())["path"] for entry in (cache_home() / "index").glob("*/*.json")}
    local = {Path(path) for path in registered if not is_url(path) and Path(path).exists()}
    return [*sorted(local | set((cache_home() / "stores").glob("*.zarr"))), *sorted(filter(is_url, registered))]


class KnownRows:
    """Rows that some registered store already holds for one recipe: encoder, views and fields.

    Args:
        manifest: of the store to be made.
        besides: a store that is not asked, because it is the one being made.
    """

    def __init__(self, manifest: Mapping[str, Any], besides: str | Path):
        self._fields = list(manifest["fields"])
        self._by_id = manifest["views"]["augment"] == "rrc"  # then a view depends on the sample's id too
        self._stores = list(self._open(_index_folder(manifest), besides))

    def __bool__(self) -> bool:
        return bool(self._stores)

    def find(self, content: bytes, sample_id: str) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
        """Features {field: (V, D)} and view parameters (V, P) of the image with this hash, or None."""
        key = _keys(np.frombuffer(content, np.uint8)[None])[0]
        for store, keys, rows in self._stores:
            for at in range(int(np.searchsorted(keys, key)), len(keys)):
                if keys[at] != key:
                    break
                row = int(rows[at])
                try:
                    same = store.row("content", row).tobytes() == content
                    if same and not (self._by_id and str(store.sample_ids[row]) != sample_id):
                        return {name: store.row(name, row) for name in self._fields}, store.row("view", row)
                except FileNotFoundError:  # removed since: the image is encoded
                    break
        return None

    @staticmethod
    def _open(folder: Path, besides: str | Path) -> Iterator[tuple[FeatureStore, np.ndarray, np.ndarray]]:
        for entry in sorted(folder.glob("*.json")):
            record = json.loads(entry.read_text())
            if record["path"] == files_at(besides).identity:
                continue
            try:
                store = FeatureStore(record["path"])
                if not store.sealed or store.manifest["sealed"]["digest"] != record["digest"]:
                    continue  # replaced since by another one
                keys, rows = (np.load(entry.with_suffix(f".{name}.npy"), mmap_mode="r") for name in ("keys", "rows"))
            except (ValueError, OSError):
                continue  # moved, removed or damaged: its rows are made again
            yield store, keys, rows


def _recipe(manifest: Mapping[str, Any]) -> list[Any]:
    return [manifest["encoder"]["fingerprint"], manifest["views"], manifest["fields"]]


def _index_folder(manifest: Mapping[str, Any]) -> Path:
    return cache_home() / "index" / _digest(_recipe(manifest))


def _entry(store: FeatureStore) -> Path:
    return _index_folder(store.manifest) / f"{_digest(store.identity)}.json"


def _keys(content: np.ndarray) -> np.ndarray:
    """(N, 16) hashes → (N,) uint64, their first half."""
    return np.ascontiguousarray(content[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def _digest(of: Any) -> str:
    return hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=6).hexdigest()

"""FeatureStore: what an encoder saw of a corpus, as a Zarr v3 group of row-aligned arrays.

    STORE.zarr/
      zarr.json                 the group; attribute `featcache` is the manifest
      embedding/c/0/0/0 …       (N, V, D) float16: raw rows, then 4 bytes of crc32c
      tokens/c/0/0/0/0 …        (N, V, T, D) float16, likewise
      label, sample_id, content, view, reason …
      state/c/0 …               0 pending · 1 ok · 2 failed

The unit of work is `chunk_rows` rows: one chunk of every array but the wide ones, whose chunks are smaller, a whole
number of them in a unit. A unit's `state` chunk is written last, after every other byte of the unit is on disk: its
presence *is* the mark that the unit is done. Sealing adds row counts and a digest to the manifest; readers refuse
anything else.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np
import zarr
from jaxtyping import Int64, Shaped
from zarr.codecs import Crc32cCodec
from zarr.errors import UnstableSpecificationWarning

from featcache._mapped import map_chunks, release_pages
from featcache._sync import sync_directory, sync_file, sync_tree
from featcache.files import files_at
from featcache.layout import (
    EMBEDDING,
    FAILED,
    FORMAT,
    OK,
    PIXELS,
    STATE,
    ArrayLayout,
    array_layout,
    chunk_rows,
    wide_chunk_rows,
)
from featcache.views import PARAMETERS

METADATA, UNFINISHED = "zarr.json", "unfinished.npz"
UNSEALED = "0" * 32


def open_store(path: str | os.PathLike[str]) -> "FeatureStore":
    """Open a sealed store, at a path or a URL, for reading.

    Raises:
        ValueError: `path` is no store, or extraction has not finished; the message names the remedy.
    """
    store = FeatureStore(path)
    if not store.sealed:
        done, total = store.chunks - len(store.pending_chunks()), store.chunks
        raise ValueError(
            f"{path}: extraction has not finished ({done} of {total} chunks done); "
            "run the same `featcache extract` command again to resume it"
        )
    return store


def create_store(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], *, overwrite: bool = False
) -> "FeatureStore":
    """Create an empty, unsealed store that holds `manifest` (see `FeatureStore.manifest`) and no rows yet.

    The store appears under its name in one step, complete with its arrays' metadata.

    Raises:
        ValueError: something is already there (and, with `overwrite`, is not a store).
    """
    files = files_at(path)
    if files.taken():
        with contextlib.suppress(FileNotFoundError):
            files.open()
        is_store = _is_store(files.root)
        if not (overwrite and is_store):
            raise ValueError(f"{path}: already exists{'' if is_store else ' and is not a store'}; choose another --out")
    root, manifest = files.root, {"wide_chunk_rows": wide_chunk_rows(manifest), **manifest}
    building = root.with_name(f"{root.name}.partial")
    _write_skeleton(building, manifest)
    files.remove_all()
    os.replace(building, root)
    sync_directory(root.parent)
    files.push(*(f"{name}/{METADATA}" for name in array_layout(manifest)))
    files.push(METADATA)  # last: what has none is no store yet
    return FeatureStore(path)


def _write_skeleton(path: Path, manifest: Mapping[str, Any]) -> None:
    """The group and every array's metadata, no chunk yet; whatever a killed run left at `path` goes."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.create_group(path, attributes={"featcache": {"format": FORMAT, **manifest, "sealed": None}})
    rows = manifest["corpus"]["rows"]
    for name, (tail, dtype, per_chunk) in array_layout(manifest).items():
        shape, chunks = (rows, *tail), (per_chunk, *tail)
        with _unstable_names_allowed():
            group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, compressors=[Crc32cCodec()], filters=None)
    sync_tree(path)


class FeatureStore:
    """One store, on disk or at a URL. `open_store` and `create_store` make these.

    Attributes:
        path: where it is, a path or a URL.

    Raises:
        ValueError: `path` holds no store of this format.
        ConnectionError: the URL's service cannot be reached; so do all methods that read or write.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._files = files_at(path)
        self.path, self._root = self._files.path, self._files.root
        try:
            self._files.open()
        except FileNotFoundError:
            raise ValueError(
                f"{path}: no such store; make one with `featcache extract CORPUS --teacher SPEC --out {path}`"
            ) from None
        if not _is_store(self._root):
            raise ValueError(
                f"{path}: not a feature store; make one with `featcache extract CORPUS --teacher SPEC --out STORE`"
            )
        try:
            self._group = zarr.open_group(self._root, mode="r+", use_consolidated=False)
            self.manifest: dict[str, Any] = dict(self._group.attrs["featcache"])  # type: ignore[arg-type]
            """encoder, corpus, views, fields, extraction, chunk_rows, versions, sealed: plain JSON values."""
            found = self.manifest.get("format")
            if found == FORMAT:
                _ = len(self), self.chunks, self.sealed, self.embedding_dim, self.layout
                _ = self.fingerprint, self.encoder_name
        except Exception as error:
            raise ValueError(
                f"{path}: its zarr.json is damaged ({type(error).__name__}: {error}); restore it, or extract again with --overwrite"
            ) from None
        if found != FORMAT:
            raise ValueError(f"{path}: store format {found}, this featcache reads {FORMAT}; extract it again")

    # -- what it holds ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows, failed ones included."""
        return int(self.manifest["corpus"]["rows"])

    @property
    def sealed(self) -> bool:
        return self.manifest["sealed"] is not None

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint."""
        return str(self.manifest["encoder"]["fingerprint"])

    @property
    def encoder_name(self) -> str:
        return str(self.manifest["encoder"]["name"])

    @property
    def embedding_dim(self) -> int:
        return int(self.manifest["fields"][EMBEDDING][0])

    @property
    def views(self) -> int:
        """Views a row."""
        return int(self.manifest["views"]["count"])

    @property
    def class_names(self) -> list[str] | None:
        return self.manifest["corpus"]["class_names"]

    @cached_property
    def state(self) -> np.ndarray:
        """(N,) uint8: 0 pending, 1 ok, 2 failed."""
        return self._read(STATE)

    @cached_property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """(N,) index into `class_names`, -1 where there is none."""
        return self._read("label")

    @cached_property
    def sample_ids(self) -> np.ndarray:
        """(N,) strings."""
        return self._read("sample_id")

    @cached_property
    def content(self) -> np.ndarray:
        """(N, 16) uint8: 128-bit BLAKE2b of each encoded image."""
        return self._read("content")

    @property
    def ok(self) -> Int64[np.ndarray, " rows"]:
        """Row numbers with features."""
        return np.flatnonzero(self.state == OK)

    @property
    def failed(self) -> Int64[np.ndarray, " rows"]:
        """Row numbers whose image could not be read; `reasons` says why."""
        return np.flatnonzero(self.state == FAILED)

    @property
    def reasons(self) -> dict[str, str]:
        """Sample id → why it failed."""
        reason = self._read("reason")
        return {str(self.sample_ids[row]): str(reason[row]) for row in self.failed}

    # -- reading rows -------------------------------------------------------------------------------------

    def gather(
        self, rows: Sequence[int] | np.ndarray, field: str = "embedding", view: int | np.ndarray = 0
    ) -> np.ndarray:
        """The given rows of a feature array, in the given order.

        Args:
            rows: (B,) row numbers, any order, repeats allowed.
            field: name of a feature array.
            view: one view number for all rows, or (B,), one for each.

        Returns:
            (B, D), or (B, T, D) for tokens, in the stored dtype (float16).

        Raises:
            ValueError: no such field. IndexError: a row or view out of range.
        """
        if field not in self.manifest["fields"]:
            raise ValueError(
                f"{self.path}: no field {field!r}, only {', '.join(self.manifest['fields'])}; extract with --fields {field}"
            )
        rows = np.asarray(rows, np.int64)
        view = np.broadcast_to(np.asarray(view, np.int64), rows.shape)
        if rows.size and not (
            rows.min() >= 0 and rows.max() < len(self) and view.min() >= 0 and view.max() < self.views
        ):
            raise IndexError(f"{self.path}: row or view out of range ({len(self)} rows, {self.views} views)")
        if (whole := self._whole(field)) is not None:
            return whole.reshape(-1, *whole.shape[2:]).take(rows * self.views + view, axis=0)
        order = np.argsort(rows, kind="stable")
        chunk, offset = np.divmod(rows[order], self.layout[field].chunk_rows)
        offset = offset * self.views + view[order]
        starts = np.flatnonzero(np.r_[True, chunk[1:] != chunk[:-1]]) if rows.size else np.empty(0, np.int64)
        self._files.fetch_all(self._chunk_name(field, int(chunk[start])) for start in starts)
        gathered = np.empty((len(rows), *self.manifest["fields"][field]), np.float16)
        for start, stop in itertools.pairwise([*starts.tolist(), len(order)]):
            every_view = self._mapped(field, int(chunk[start])).reshape(-1, *gathered.shape[1:])
            gathered[order[start:stop]] = every_view.take(offset[start:stop], axis=0)
        return gathered

    def gather_portable(self, rows: Sequence[int] | np.ndarray, field: str = "embedding", view: int = 0) -> np.ndarray:
        """`gather` through zarr's own indexing, checksums verified: the reference that `gather` must equal."""
        rows = np.asarray(rows, np.int64)
        chunks = np.unique(rows // self.layout[field].chunk_rows).tolist()
        self._files.fetch_all(self._chunk_name(field, chunk) for chunk in chunks)
        return np.asarray(self._array(field).oindex[rows, view])

    def row(self, name: str, row: int) -> np.ndarray:
        """One row of any array of fixed width: "content" (16,), "view" (V, P), or a feature (V, D)."""
        if (whole := self._whole(name)) is not None:
            return whole[row]
        chunk, offset = divmod(row, self.layout[name].chunk_rows)
        return np.asarray(self._mapped(name, chunk)[offset])

    def pixels(self, row: int) -> bytes:
        """The kept image of one row, an encoded file; b"" where the image could not be read.

        Raises:
            ValueError: the store keeps no images.
        """
        if not self.manifest.get("pixels"):
            raise ValueError(f"{self.path}: keeps no images; extract with --pixels SIZE")
        chunk, item = divmod(row, self.layout[PIXELS].chunk_rows)
        start, stop = self._starts(chunk)[item : item + 2].tolist()
        return self._packed(chunk)[start + 4 : stop].tobytes()

    def _map_packed(self, chunk: int) -> np.ndarray:
        """A chunk of variable-length bytes: a count, then (length, bytes)…"""
        return np.asarray(np.memmap(self._chunk_path(PIXELS, chunk), np.uint8, mode="r"))

    def _find_starts(self, chunk: int) -> np.ndarray:
        """Where each item's length stands in `_map_packed`, and the end of the last item."""
        packed, starts = self._packed(chunk), [4]
        for _ in range(int(packed[:4].view("<u4")[0])):
            starts.append(starts[-1] + 4 + int.from_bytes(packed[starts[-1] : starts[-1] + 4].tobytes(), "little"))
        return np.array(starts)

    def _whole(self, name: str) -> np.ndarray | None:
        """All rows of an array of fixed width as one map; None where only single chunks can be mapped."""
        if name not in self._wholes and self.sealed:
            tail, dtype, per_chunk = self.layout[name]
            paths = [self._root / self._chunk_name(name, chunk) for chunk in range(-(-len(self) // per_chunk))]
            self._wholes[name] = map_chunks(paths, per_chunk, tail, dtype)
        return self._wholes.get(name)

    @cached_property
    def _wholes(self) -> dict[str, np.ndarray | None]:
        return {}

    def release(self, field: str) -> None:
        """Take what was read of a feature array out of this process's memory, for who reads a large store through.

        Mapped pages count as the process's own for as long as they are mapped.
        """
        if (whole := self._wholes.get(field)) is not None:
            release_pages(whole)
        else:
            self._mapped.cache_clear()

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[str | Path]]:
        """Pickled, for another process, as its path: never the maps."""
        return FeatureStore, (self.path,)

    def _map(self, name: str, chunk: int) -> np.ndarray:
        tail, dtype, per_chunk = self.layout[name]
        # As a plain array: every operation on the memmap class itself costs microseconds more.
        return np.asarray(np.memmap(self._chunk_path(name, chunk), dtype, mode="r", shape=(per_chunk, *tail)))

    @cached_property
    def _mapped(self) -> Any:
        """Maps are kept open, least recently used closed first, well under the usual limit of open files."""
        return lru_cache(maxsize=512)(self._map)

    @cached_property
    def _packed(self) -> Any:
        return lru_cache(maxsize=512)(self._map_packed)

    @cached_property
    def _starts(self) -> Any:
        """Of every chunk ever read, 8 bytes an image: finding them touches pages all over the chunk."""
        return lru_cache(maxsize=None)(self._find_starts)

    # -- where it is --------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """The same for every way of naming the same place."""
        return self._files.identity

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(self._files.listing().values())

    @property
    def bytes_free(self) -> int:
        """On the disk that it, or the mirror of its URL, is written to."""
        return shutil.disk_usage(self._root).free

    def remove(self) -> None:
        """Delete it."""
        self._files.remove_all()

    # -- writing units ------------------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Number of units of work."""
        return -(-len(self) // int(self.manifest["chunk_rows"]))

    def rows_of(self, chunk: int) -> range:
        per_chunk = int(self.manifest["chunk_rows"])
        return range(chunk * per_chunk, min((chunk + 1) * per_chunk, len(self)))

    def pending_chunks(self) -> list[int]:
        """Units that are not done yet."""
        done = self._files.listing(f"{STATE}/c")
        return [chunk for chunk in range(self.chunks) if self._chunk_name(STATE, chunk) not in done]

    def write_chunk(self, chunk: int, arrays: Mapping[str, Shaped[np.ndarray, "rows ..."]]) -> None:
        """Write one whole unit, durably; when this returns it survives a power cut.

        Args:
            chunk: its number.
            arrays: every array of the store, with this unit's rows; but for those that `write_rows` has written.
        """
        first = self.rows_of(chunk).start
        self._files.push(*(file for name in arrays if name != STATE for file in self._write(name, first, arrays[name])))
        self._files.push(*self._write(STATE, first, arrays[STATE]))  # last
        self._forget_cached()

    def write_rows(self, name: str, first: int, values: Shaped[np.ndarray, "rows ..."]) -> None:
        """Write whole chunks of one array, durably, from row `first` on."""
        self._files.push(*self._write(name, first, values))

    def _write(self, name: str, first: int, values: np.ndarray) -> list[str]:
        """`write_rows` to this machine's disk; returns the files."""
        assert not self.sealed
        per_chunk, stop = self.layout[name].chunk_rows, first + len(values)
        assert first % per_chunk == 0
        assert stop % per_chunk == 0 or stop == len(self)
        self._array(name)[first:stop] = values
        files = [self._chunk_name(name, chunk) for chunk in range(first // per_chunk, -(-stop // per_chunk))]
        for file in files:
            sync_file(self._root / file, root=self._root)
        return files

    @property
    def unfinished(self) -> Path:
        """Where a unit in progress is saved, on this machine."""
        return self._root / UNFINISHED

    def save_unfinished(self, write: Callable[[IO[bytes]], None]) -> None:
        """Keep, in one step, what `write` writes of a unit in progress."""
        partial = self.unfinished.with_name(f"{UNFINISHED}.partial")
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.unfinished)
        self._files.push(UNFINISHED)

    def load_unfinished(self) -> Path:
        """The file that `save_unfinished` left. Raises FileNotFoundError when there is none."""
        return self._files.fetch(UNFINISHED)

    def discard_unfinished(self) -> None:
        self._files.remove(UNFINISHED)

    def _forget_cached(self) -> None:
        for cached in ("state", "labels", "sample_ids", "content", "_mapped", "_packed", "_starts", "_wholes"):
            self.__dict__.pop(cached, None)

    def seal(self) -> None:
        """Close the store to writers: row counts and a digest of every byte go into the manifest."""
        assert not self.pending_chunks()
        self._files.remove(UNFINISHED, *(file for file in self._files.listing() if file.endswith(".partial")))
        root, partial = self._root / METADATA, self._root / f"{METADATA}.partial"
        self.manifest["sealed"] = {
            "rows": len(self),
            "ok": len(self.ok),
            "failed": len(self.failed),
            "digest": UNSEALED,
        }
        record = json.loads(root.read_bytes())
        record["attributes"]["featcache"] = self.manifest
        text = json.dumps(record, indent=2).encode()
        self.manifest["sealed"]["digest"] = self._digest(text)
        partial.write_bytes(text.replace(UNSEALED.encode(), self.manifest["sealed"]["digest"].encode()))
        os.replace(partial, root)
        sync_file(root, root=self._root)
        self._files.push(METADATA)

    # -- checking -----------------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Read every byte; one line for each thing wrong, none when the store is exactly as it was written.

        Of an unfinished store, the units that are done are checked.
        """
        return [what for _, what in self._damage()]

    def mend(self) -> list[str]:
        """Make damaged units pending again, so that extraction repairs them and only them; returns what was wrong.

        Left-over files go, and arrays' metadata is written anew.
        """
        damage = list(self._damage())
        if not damage:
            return []
        if self.sealed:
            self.manifest["sealed"] = None
            self._group.attrs["featcache"] = self.manifest
            self._files.push(METADATA)
        for where, _ in damage:
            if isinstance(where, int):
                self._files.remove(self._chunk_name(STATE, where))
            elif not where.endswith(METADATA):
                self._files.remove(where)
        skeleton = self._root.with_name(f"{self._root.name}.partial")
        _write_skeleton(skeleton, self.manifest)
        metadata = [f"{name}/{METADATA}" for name in self.layout]
        for file in metadata:
            (self._root / file).parent.mkdir(exist_ok=True)
            os.replace(skeleton / file, self._root / file)
        shutil.rmtree(skeleton)
        sync_tree(self._root)
        self._files.push(*metadata)
        self._forget_cached()
        return [what for _, what in damage]

    def _damage(self) -> Iterator[tuple[int | str, str]]:
        """(the unit's number, or the file) and what is wrong with it."""
        found = self._files.listing()
        expected, wrong = {METADATA} | (set() if self.sealed else {UNFINISHED}), False
        pending = set() if self.sealed else set(self.pending_chunks())
        for name, (_, _, per_chunk) in self.layout.items():
            metadata = f"{name}/{METADATA}"
            expected.add(metadata)
            if metadata not in found:
                wrong = True
                yield metadata, f"{metadata}: missing"
            files = {self._chunk_name(name, chunk): chunk * per_chunk for chunk in range(-(-len(self) // per_chunk))}
            expected |= files.keys()
            units = {file: first // int(self.manifest["chunk_rows"]) for file, first in files.items()}
            done = [file for file in files if units[file] not in pending]
            contents = self._files.read_afresh([file for file in [metadata, *done] if file in found])
            if metadata in found:
                next(contents)
            for file in done:
                first = files[file]
                where = f"{name} chunk {first // per_chunk} (rows {first}–{min(first + per_chunk, len(self)) - 1})"
                if file not in found:
                    wrong = True
                    yield units[file], f"{where}: missing"
                elif not _checksum_holds(next(contents)):
                    wrong = True
                    yield units[file], f"{where}: checksum does not match its bytes"
        leftovers = {file for file in found if self.sealed or not file.endswith(".partial")}
        for file in sorted(leftovers - expected):
            wrong = True
            yield file, f"{file}: not part of the store"
        if self.sealed and not wrong:
            digest = str(self.manifest["sealed"].get("digest") or "none")
            root = (self._root / METADATA).read_bytes().replace(digest.encode(), UNSEALED.encode())
            if self._digest(root) != digest:
                yield METADATA, "zarr.json, of the group or of an array: changed since the store was sealed"

    def _digest(self, root: bytes) -> str:
        """Over the group's zarr.json (with `UNSEALED` for the digest), the arrays' zarr.json, and the size and checksum
        trailer of every chunk: as good as over all bytes, without reading them."""
        digest = hashlib.blake2b(root, digest_size=16)
        sizes = {file: size for file, size in self._files.listing().items() if file != METADATA}
        tails = self._files.tails({file: size for file, size in sizes.items() if not file.endswith(METADATA)})
        for file in sorted(sizes, key=lambda file: file.split("/")):
            digest.update(f"\0{file}\0{sizes[file]}\0".encode())
            digest.update(tails[file] if file in tails else self._files.fetch(file).read_bytes())
        return digest.hexdigest()

    # -- files --------------------------------------------------------------------------------------------

    @cached_property
    def layout(self) -> dict[str, ArrayLayout]:
        return array_layout(self.manifest)

    def _array(self, name: str) -> zarr.Array:
        self._files.fetch(f"{name}/{METADATA}")
        # An absent chunk means "not done", never "zeros".
        with _unstable_names_allowed(), zarr.config.set({"array.write_empty_chunks": True}):
            array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array

    def _read(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of any array, checksums verified; zeros or "" where the unit is not done."""
        per_chunk, stop = self.layout[name].chunk_rows, len(self) if stop is None else stop
        files = [self._chunk_name(name, chunk) for chunk in range(first // per_chunk, -(-stop // per_chunk))]
        if not self.sealed:
            found = self._files.listing(f"{name}/c")
            files = [file for file in files if file in found]
        self._files.fetch_all(files)
        return np.asarray(self._array(name)[first:stop])

    def _chunk_name(self, name: str, chunk: int) -> str:
        """The file that holds a chunk, relative to the store."""
        return "/".join([name, "c", str(chunk), *["0"] * len(self.layout[name].tail)])

    def _chunk_path(self, name: str, chunk: int) -> Path:
        """The same on this machine, fetched if it is elsewhere."""
        return self._files.fetch(self._chunk_name(name, chunk))


def write_store(
    path: str | os.PathLike[str],
    embedding: Shaped[np.ndarray, "n d"] | Shaped[np.ndarray, "n v d"],
    *,
    logits: Shaped[np.ndarray, "n c"] | Shaped[np.ndarray, "n v c"] | None = None,
    labels: Sequence[int] | np.ndarray | None = None,
    sample_ids: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    failed: Mapping[int, str] | None = None,
    encoder_name: str = "arrays",
    fingerprint: str = "arrays",
    preprocess: Mapping[str, Any] | None = None,
    per_chunk: int | None = None,
) -> FeatureStore:
    """A sealed store from arrays in memory: for features that another program made.

    Args:
        path: where; must not exist.
        embedding: (N, D), or (N, V, D) with V views; stored as float16.
        logits: (N, C) or (N, V, C) of the same images, stored as float16.
        labels: (N,) index into `class_names`; -1 for none.
        sample_ids: (N,) unique strings; row numbers when left out.
        failed: row → reason, for rows without features.
        fingerprint: of the encoder that made the embeddings. Stores compare only when theirs are equal.
        per_chunk: rows a chunk, by default 8–16 MiB of them.
    """
    embedding = np.asarray(embedding)
    embedding = embedding[:, None] if embedding.ndim == 2 else embedding
    rows, views, width = embedding.shape
    features = {EMBEDDING: embedding}
    if logits is not None:
        features["logits"] = np.asarray(logits).reshape(rows, views, -1)
    labels = np.full(rows, -1) if labels is None else np.asarray(labels, np.int64)
    ids = np.asarray([str(i) for i in range(rows)] if sample_ids is None else list(sample_ids), dtype=object)
    reason = np.asarray([(failed or {}).get(i, "") for i in range(rows)], dtype=object)
    manifest = {
        "encoder": {"name": encoder_name, "fingerprint": fingerprint, "preprocess": dict(preprocess or {})},
        "corpus": {"spec": None, "rows": rows, "class_names": list(class_names) if class_names is not None else None},
        "views": {"count": views},
        "fields": {name: [values.shape[-1]] for name, values in features.items()},
        "chunk_rows": per_chunk or chunk_rows(views * width * 2, rows),
    }
    store = create_store(path, manifest)
    for chunk in range(store.chunks):
        rows_here = slice(store.rows_of(chunk).start, store.rows_of(chunk).stop)
        count = rows_here.stop - rows_here.start
        store.write_chunk(
            chunk,
            {
                **{name: values[rows_here].astype(np.float16) for name, values in features.items()},
                "label": labels[rows_here],
                "sample_id": ids[rows_here],
                "content": np.zeros((count, 16), np.uint8),
                "view": np.zeros((count, views, len(PARAMETERS)), np.float32),
                "reason": reason[rows_here],
                STATE: np.where(reason[rows_here] == "", OK, FAILED).astype(np.uint8),
            },
        )
    store.seal()
    return store


@contextlib.contextmanager
def _unstable_names_allowed() -> Iterator[None]:
    """zarr warns that its name for variable-length bytes may yet change; the bytes in the chunks (numcodecs' vlen-bytes
    since 2018) do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        yield


def _is_store(path: Path) -> bool:
    try:
        return "featcache" in json.loads((path / "zarr.json").read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksum_holds(chunk: bytes) -> bool:
    return len(chunk) > 4 and int.from_bytes(chunk[-4:], "little") == google_crc32c.value(chunk[:-4])

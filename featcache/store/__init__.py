"""FeatureStore: what an encoder saw of a corpus, as a Zarr v3 group of row-aligned arrays.

    STORE.zarr/
      zarr.json                 the group; attribute `featcache` is the manifest
      embedding/c/0/0/0 …       (N, V, D) float16 or float32: raw rows, then 4 bytes of crc32c
      tokens/c/0/0/0/0 …        (N, V, T, D), likewise
      label, sample_id, content, view, reason …
      state/c/0 …               0 pending · 1 ok · 2 failed

The unit of work is `chunk_rows` rows: one chunk of every array but the wide ones, whose chunks are smaller, a whole
number of them in a unit. A unit's `state` chunk is written last, after every other byte of the unit is on disk: its
presence *is* the mark that the unit is done. Sealing adds row counts and a digest to the manifest; readers refuse
anything else.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import zarr
from jaxtyping import Int64, Shaped
from zarr.codecs import Crc32cCodec
from zarr.errors import UnstableSpecificationWarning

from featcache.disk.durable import sync_directory, sync_file, sync_tree
from featcache.disk.refusals import refuse_inside_store, refuse_mount_point
from featcache.store.files import files_at
from featcache.store.gather import MappedRows
from featcache.store.integrity import METADATA, UNFINISHED, UNSEALED, digest_of, find_damage
from featcache.store.layout import (
    EMBEDDING,
    FAILED,
    OK,
    STATE,
    ArrayLayout,
    chunk_name,
    dimension_names,
)
from featcache.store.manifest import FORMAT, WIDE_FORMAT, Manifest, Seal, format_of


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
    path: str | os.PathLike[str], manifest: Manifest | Mapping[str, Any], *, overwrite: bool = False
) -> "FeatureStore":
    """Create an empty, unsealed store that holds `manifest` and no rows yet.

    The store appears under its name in one step, complete with its arrays' metadata.

    Raises:
        ValueError: something is already there (and, with `overwrite`, is not a store).
    """
    files = files_at(path)
    if files.taken():
        with contextlib.suppress(FileNotFoundError):
            files.open()
        is_store = looks_like_store(files.root)
        if not (overwrite and is_store):
            raise ValueError(f"{path}: already exists{'' if is_store else ' and is not a store'}; choose another --out")
    root = files.root
    if not isinstance(manifest, Manifest):  # TEMPORARY
        manifest = Manifest.from_json(manifest)
    manifest = manifest.changed(sealed=None)
    refuse_mount_point(root)
    refuse_inside_store(root)
    building = root.with_name(f"{root.name}.partial")
    _write_skeleton(building, manifest)
    files.remove_all()
    os.replace(building, root)
    sync_directory(root.parent)
    files.push(*(f"{name}/{METADATA}" for name in manifest.layout))
    files.push(METADATA)  # last: what has none is no store yet
    return FeatureStore(path)


def _write_skeleton(path: Path, manifest: Manifest) -> None:
    """The group and every array's metadata, no chunk yet; whatever a killed run left at `path` goes."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.create_group(path, attributes={"featcache": manifest.to_json()})
    rows = manifest.corpus.rows
    for name, (tail, dtype, per_chunk) in manifest.layout.items():
        shape, chunks = (rows, *tail), (per_chunk, *tail)
        with _unstable_names_allowed():
            group.create_array(
                name, shape=shape, chunks=chunks, dtype=dtype, compressors=[Crc32cCodec()], filters=None,
                dimension_names=dimension_names(name, len(shape)),
            )  # fmt: skip
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
        if not looks_like_store(self._root):
            raise ValueError(
                f"{path}: not a feature store; make one with `featcache extract CORPUS --teacher SPEC --out STORE`"
            )
        try:
            self._group = zarr.open_group(self._root, mode="r+", use_consolidated=False)
            record: dict[str, Any] = dict(self._group.attrs["featcache"])  # type: ignore[arg-type]
            found, known = record.get("format"), format_of(record)
            if found == known:
                _ = record["sealed"]  # what is damaged must not pass for unfinished
                self.manifest = Manifest.from_json(record)
        except Exception as error:
            raise ValueError(
                f"{path}: its zarr.json is damaged ({type(error).__name__}: {error}); restore it, or extract again with --overwrite"
            ) from None
        if found != known:
            raise ValueError(
                f"{path}: store format {found}, this featcache reads {FORMAT} and {WIDE_FORMAT}; extract it again"
            )

    # -- what it holds ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows, failed ones included."""
        return self.manifest.corpus.rows

    @property
    def sealed(self) -> bool:
        return self.manifest.sealed is not None

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint."""
        return self.manifest.encoder.fingerprint

    @property
    def encoder_name(self) -> str:
        return self.manifest.encoder.name

    @property
    def embedding_dim(self) -> int:
        return self.manifest.fields[EMBEDDING][0]

    @property
    def views(self) -> int:
        """Views a row."""
        return self.manifest.views.count

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.manifest.corpus.class_names

    @cached_property
    def state(self) -> np.ndarray:
        """(N,) uint8: 0 pending, 1 ok, 2 failed."""
        return self._read(STATE)

    @cached_property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """(N,) index into `class_names`, -1 where there is none.

        Raises:
            ValueError: one is beyond them.
        """
        labels, names = self._read("label"), self.class_names
        wrong = (labels < -1) | (labels >= len(names) if names else False)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{self.path}: label {labels[row]} of row {row}, of {len(names) if names else 'unnamed'} classes; the store "
                "is damaged or was written with wrong labels: make it again"
            )
        return labels

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
            (B, D), or (B, T, D) for tokens, in the stored dtype (float16 or float32).

        Raises:
            ValueError: no such field, or a chunk is gone or cut short. IndexError: a row or view out of range.
        """
        if field not in self.manifest.fields:
            raise ValueError(
                f"{self.path}: no field {field!r}, only {', '.join(self.manifest['fields'])}; extract with --fields {field}"
            )
        rows = np.asarray(rows, np.int64)
        view = np.broadcast_to(np.asarray(view, np.int64), rows.shape)
        if rows.size and not (
            rows.min() >= 0 and rows.max() < len(self) and view.min() >= 0 and view.max() < self.views
        ):
            raise IndexError(f"{self.path}: row or view out of range ({len(self)} rows, {self.views} views)")
        try:
            return self._rows.gather(rows, field, view)
        except (FileNotFoundError, ValueError) as error:
            raise self._damaged(field, error) from None

    def gather_portable(self, rows: Sequence[int] | np.ndarray, field: str = "embedding", view: int = 0) -> np.ndarray:
        """`gather` through zarr's own indexing, checksums verified: the reference that `gather` must equal."""
        rows = np.asarray(rows, np.int64)
        chunks = np.unique(rows // self.layout[field].chunk_rows).tolist()
        self._files.fetch_all(chunk_name(self.layout, field, chunk) for chunk in chunks)
        return np.asarray(self._array(field).oindex[rows, view])

    def row(self, name: str, row: int) -> np.ndarray:
        """One row of any array of fixed width: "content" (16,), "view" (V, P), or a feature (V, D)."""
        return self._rows.row(name, row)

    def checked_row(self, name: str, row: int) -> np.ndarray:
        """`row`, its chunk's checksum verified the first time that one of its rows is asked for.

        Raises:
            ValueError: the chunk is damaged.
        """
        if not self._rows.intact(name, row):
            raise ValueError(f"a chunk of {name} in {self.path} does not match its checksum")
        return self.row(name, row)

    def pixels(self, row: int) -> bytes:
        """The kept image of one row, an encoded file; b"" where the image could not be read.

        Raises:
            ValueError: the store keeps no images.
        """
        if not self.manifest.pixels:
            raise ValueError(f"{self.path}: keeps no images; extract with --pixels SIZE")
        return self._rows.pixels(row)

    def release(self, field: str) -> None:
        """Take what was read of a feature array out of this process's memory, for who reads a large store through.

        Mapped pages count as the process's own for as long as they are mapped.
        """
        self._rows.release(field)

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[str | Path]]:
        """Pickled, for another process, as its path: never the maps."""
        return FeatureStore, (self.path,)

    @cached_property
    def _rows(self) -> MappedRows:
        return MappedRows(self._files, self.layout, len(self), sealed=self.sealed)

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
        return -(-len(self) // self.manifest.chunk_rows)

    def rows_of(self, chunk: int) -> range:
        per_chunk = self.manifest.chunk_rows
        return range(chunk * per_chunk, min((chunk + 1) * per_chunk, len(self)))

    def pending_chunks(self) -> list[int]:
        """Units that are not done yet."""
        done = self._files.listing(f"{STATE}/c")
        return [chunk for chunk in range(self.chunks) if chunk_name(self.layout, STATE, chunk) not in done]

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
        files = [chunk_name(self.layout, name, chunk) for chunk in range(first // per_chunk, -(-stop // per_chunk))]
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
        for cached in ("state", "labels", "sample_ids", "content", "_rows"):
            self.__dict__.pop(cached, None)

    def seal(self, manifest: Manifest | None = None) -> None:
        """Close the store to writers: row counts and a digest of every byte go into the manifest.

        Args:
            manifest: what the store says of itself, where more is known than when it was created.
        """
        assert not self.pending_chunks()
        self._files.remove(UNFINISHED, *(file for file in self._files.listing() if file.endswith(".partial")))
        root, partial = self._root / METADATA, self._root / f"{METADATA}.partial"
        seal = Seal(rows=len(self), ok=len(self.ok), failed=len(self.failed), digest=UNSEALED)
        manifest = (manifest or self.manifest).changed(sealed=seal)
        record = json.loads(root.read_bytes())
        record["attributes"]["featcache"] = manifest.to_json()
        # Where xarray looks first, and warns when it is missing; on one line, for the manifest is what people read.
        arrays = {
            name: json.loads(self._files.fetch(f"{name}/{METADATA}").read_bytes()) for name in sorted(self.layout)
        }
        together = json.dumps({"kind": "inline", "must_understand": False, "metadata": arrays})
        record.pop("consolidated_metadata", None)  # of a store that was mended
        rest = json.dumps(record, indent=2).removesuffix("\n}")
        text = f'{rest},\n  "consolidated_metadata": {together}\n}}'.encode()
        digest = digest_of(self._files, text)
        partial.write_bytes(text.replace(UNSEALED.encode(), digest.encode()))
        os.replace(partial, root)
        sync_file(root, root=self._root)
        self._files.push(METADATA)
        self.manifest = manifest.changed(sealed=seal.changed(digest=digest))
        self._forget_cached()

    # -- checking -----------------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Read every byte; one line for each thing wrong, none when the store is exactly as it was written.

        Of an unfinished store, the units that are done are checked.
        """
        return [what for _, what in find_damage(self._files, self.manifest)]

    def mend(self) -> list[str]:
        """Make damaged units pending again, so that extraction repairs them and only them; returns what was wrong.

        Left-over files go, and arrays' metadata is written anew.
        """
        damage = find_damage(self._files, self.manifest)
        if not damage:
            return []
        if self.sealed:
            self.manifest = self.manifest.changed(sealed=None)
            self._group.attrs["featcache"] = self.manifest.to_json()
            self._files.push(METADATA)
        for where, _ in damage:
            if isinstance(where, int):
                self._files.remove(chunk_name(self.layout, STATE, where))
            elif not where.endswith(METADATA):
                self._files.remove(where)  # left over
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

    # -- files --------------------------------------------------------------------------------------------

    @property
    def layout(self) -> dict[str, ArrayLayout]:
        return self.manifest.layout

    def _array(self, name: str) -> zarr.Array:
        self._files.fetch(f"{name}/{METADATA}")
        tail, dtype, per_chunk = self.layout[name]
        try:
            # An absent chunk means "not done", never "zeros".
            with _unstable_names_allowed(), zarr.config.set({"array.write_empty_chunks": True}):
                array = self._group[name]
            assert isinstance(array, zarr.Array)
            _refuse_array(array, (len(self), *tail), (per_chunk, *tail), dtype)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(
                f"{self.path}: its {name}/{METADATA} is damaged ({error}); restore it, or run the same `featcache "
                "extract` command again"
            ) from None
        return array

    def _read(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of any array, checksums verified; zeros or "" where the unit is not done."""
        per_chunk, stop = self.layout[name].chunk_rows, len(self) if stop is None else stop
        files = [chunk_name(self.layout, name, chunk) for chunk in range(first // per_chunk, -(-stop // per_chunk))]
        if not self.sealed:
            found = self._files.listing(f"{name}/c")
            files = [file for file in files if file in found]
        array = self._array(name)
        try:
            self._files.fetch_all(files)
            for file in files:
                (self._root / file).stat()  # zarr takes a missing chunk for zeros
            return np.asarray(array[first:stop])
        except (FileNotFoundError, ValueError) as error:
            raise self._damaged(name, error) from None

    def _damaged(self, name: str, error: Exception) -> ValueError:
        what: object = error
        if isinstance(error, FileNotFoundError) and error.filename:
            what = f"{os.path.relpath(error.filename, self._root)} is missing"
        return ValueError(
            f"{self.path}: a chunk of {name} is damaged ({what}); `featcache verify {self.path}` says which, the same `featcache "
            "extract` command repairs it"
        )


@contextlib.contextmanager
def _unstable_names_allowed() -> Iterator[None]:
    """zarr warns that its name for variable-length bytes may yet change; the bytes in the chunks (numcodecs' vlen-bytes
    since 2018) do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        yield


def _refuse_array(array: Any, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> None:
    """A Zarr array that is not the one the manifest describes.

    Raises:
        ValueError: what differs.
    """
    kinds = {"string": "T", "variable_length_bytes": "O"}
    same = array.dtype.kind == kinds[dtype] if dtype in kinds else array.dtype == np.dtype(dtype)
    written = [codec.to_dict() for codec in array.metadata.codecs]
    codecs = {str(codec["name"]) for codec in written}
    if array.shape != shape or array.chunks != chunks or not same:
        raise ValueError(f"{array.dtype} {array.shape} in chunks of {array.chunks}, not {dtype} {shape} in {chunks}")
    if codecs - {"bytes", "crc32c", "vlen-utf8", "vlen-bytes"}:
        raise ValueError(f"codecs {', '.join(sorted(codecs))}")
    if any((codec.get("configuration") or {}).get("endian", "little") != "little" for codec in written):
        raise ValueError("bytes that are not little-endian")


def looks_like_store(path: Path) -> bool:
    """Whether the folder holds one, by its zarr.json, or by its arrays where that is damaged or gone."""
    try:
        return "featcache" in json.loads((path / METADATA).read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return all((path / name / METADATA).exists() for name in (STATE, EMBEDDING, "content"))

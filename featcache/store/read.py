"""A store, read: its manifest, its rows, and whether it is as it was written."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int64
from zarr.errors import UnstableSpecificationWarning

from featcache.store.files import files_at, looks_like_store
from featcache.store.gather import MappedRows
from featcache.store.integrity import find_damage
from featcache.store.layout import EMBEDDING, FAILED, METADATA, OK, STATE, ArrayLayout, chunk_name
from featcache.store.manifest import FORMAT, WHOLE_FORMAT, Manifest, format_of
from featcache.store.top_k import unpack


def open_store(path: str | os.PathLike[str]) -> "FeatureStore":
    """Open a sealed store, at a path or a URL, for reading.

    Raises:
        ValueError: `path` is no store, or extraction has not finished; the message names the remedy.
    """
    store = FeatureStore(path)
    if not store.sealed:
        done, total = store.chunks - len(store.pending_chunks()), store.chunks
        raise ValueError(
            f"{path}: {'derivation' if store.manifest.derivation else 'extraction'} has not finished ({done} of {total} chunks "
            f"done); run the same `featcache {store.made_by}` command again to resume it"
        )
    return store


class FeatureStore:
    """One store, on disk or at a URL, to be read; `StoreWriter` writes one.

    Attributes:
        path: where it is, a path or a URL.
        files: those it consists of.
        manifest: what it says of itself.

    Raises:
        ValueError: `path` holds no store of this format.
        ConnectionError: the URL's service cannot be reached; so do all methods that read or write.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.files = files_at(path)
        self.path = self.files.path
        try:
            self.files.open()
        except FileNotFoundError:
            raise ValueError(
                f"{path}: no such store; make one with `featcache extract CORPUS --teacher SPEC --out {path}`"
            ) from None
        if not looks_like_store(self.files.root):
            raise ValueError(
                f"{path}: not a feature store; make one with `featcache extract CORPUS --teacher SPEC --out STORE`"
            )
        try:
            self._group = zarr.open_group(self.files.root, mode="r+", use_consolidated=False)
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
                f"{path}: store format {found}, this featcache reads {FORMAT} to {WHOLE_FORMAT}; extract it again"
            )

    # -- what it holds ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Rows, failed ones included."""
        return self.manifest.corpus.rows

    @property
    def sealed(self) -> bool:
        return self.manifest.sealed is not None

    @property
    def digest(self) -> str | None:
        """Over all its files; None where it is not sealed."""
        return self.manifest.sealed.digest if self.manifest.sealed else None

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint."""
        return self.manifest.encoder.fingerprint

    @property
    def encoder_name(self) -> str:
        return self.manifest.encoder.name

    @property
    def made_by(self) -> str:
        """The command that makes, resumes and repairs it: "extract" or "derive"."""
        return "derive" if self.manifest.derivation else "extract"

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
        return self.read(STATE)

    @cached_property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """(N,) index into `class_names`, -1 where there is none.

        Raises:
            ValueError: one is beyond them.
        """
        labels, names = self.read("label"), self.class_names
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
        return self.read("sample_id")

    @cached_property
    def content(self) -> np.ndarray:
        """(N, 16) uint8: 128-bit BLAKE2b of each encoded image."""
        return self.read("content")

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
        reason = self.read("reason")
        return {str(self.sample_ids[row]): str(reason[row]) for row in self.failed}

    @property
    def layout(self) -> dict[str, ArrayLayout]:
        """Every array: the shape of a row, dtype, and rows a chunk."""
        return self.manifest.layout

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
            (B, D), or (B, T, D) for tokens, in the stored dtype (float16 or float32, whole numbers in theirs); in float32 where only
            the largest values are kept, `featcache.store.top_k.unpack`ed.

        Raises:
            ValueError: no such field, or a chunk is gone or cut short. IndexError: a row or view out of range.
        """
        if field not in self.manifest.fields:
            raise ValueError(
                f"{self.path}: no field {field!r}, only {', '.join(self.manifest.fields)}; extract with --fields {field}"
            )
        rows = np.asarray(rows, np.int64)
        view = np.broadcast_to(np.asarray(view, np.int64), rows.shape)
        if rows.size and not (
            rows.min() >= 0 and rows.max() < len(self) and view.min() >= 0 and view.max() < self.views
        ):
            raise IndexError(f"{self.path}: row or view out of range ({len(self)} rows, {self.views} views)")
        try:
            return self._whole(field, self._rows.gather(rows, field, view))
        except (FileNotFoundError, ValueError) as error:
            raise self._damaged(field, error) from None

    def read(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of any array, checksums verified; zeros or "" where the unit is not done."""
        per_chunk, stop = self.layout[name].chunk_rows, len(self) if stop is None else stop
        files = [chunk_name(self.layout, name, chunk) for chunk in range(first // per_chunk, -(-stop // per_chunk))]
        if not self.sealed:
            found = self.files.listing(f"{name}/c")
            files = [file for file in files if file in found]
        array = self.array(name)
        try:
            self.files.fetch_all(files)
            for file in files:
                (self.files.root / file).stat()  # zarr takes a missing chunk for zeros
            return np.asarray(array[first:stop])
        except (FileNotFoundError, ValueError) as error:
            raise self._damaged(name, error) from None

    def gather_portable(self, rows: Sequence[int] | np.ndarray, field: str = "embedding", view: int = 0) -> np.ndarray:
        """`gather` through zarr's own indexing, checksums verified: the reference that `gather` must equal."""
        rows = np.asarray(rows, np.int64)
        chunks = np.unique(rows // self.layout[field].chunk_rows).tolist()
        self.files.fetch_all(chunk_name(self.layout, field, chunk) for chunk in chunks)
        return self._whole(field, np.asarray(self.array(field).oindex[rows, view]))

    def _whole(self, field: str, kept: np.ndarray) -> np.ndarray:
        """Rows of a feature, of what is kept of them."""
        k = self.manifest.top_k.get(field)
        return kept if k is None else unpack(kept, self.manifest.fields[field][-1], k, self.manifest.dtype(field))

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

    def forget(self) -> None:
        """Read anew, from now on, whatever may have changed on disk."""
        for cached in ("state", "labels", "sample_ids", "content", "_rows"):
            self.__dict__.pop(cached, None)

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[str | Path]]:
        """Pickled, for another process, as its path: never the maps."""
        return type(self), (self.path,)

    @cached_property
    def _rows(self) -> MappedRows:
        return MappedRows(self.files, self.layout, len(self), sealed=self.sealed)

    # -- where it is --------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """The same for every way of naming the same place."""
        return self.files.identity

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(self.files.listing().values())

    @property
    def bytes_free(self) -> int:
        """On the disk that it, or the mirror of its URL, is written to."""
        return shutil.disk_usage(self.files.root).free

    def remove(self) -> None:
        """Delete it."""
        self.files.remove_all()

    # -- its units ----------------------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Number of units of work."""
        return -(-len(self) // self.manifest.chunk_rows)

    def rows_of(self, chunk: int) -> range:
        per_chunk = self.manifest.chunk_rows
        return range(chunk * per_chunk, min((chunk + 1) * per_chunk, len(self)))

    def pending_chunks(self) -> list[int]:
        """Units that are not done yet."""
        done = self.files.listing(f"{STATE}/c")
        return [chunk for chunk in range(self.chunks) if chunk_name(self.layout, STATE, chunk) not in done]

    def verify(self) -> list[str]:
        """Read every byte; one line for each thing wrong, none when the store is exactly as it was written.

        Of an unfinished store, the units that are done are checked.
        """
        return [what for _, what in find_damage(self.files, self.manifest)]

    def array(self, name: str) -> zarr.Array:  # type: ignore[type-arg]  # in zarr 3.1.3 it takes none
        """An array as zarr has it.

        Raises:
            ValueError: it is not the one that the manifest describes.
        """
        self.files.fetch(f"{name}/{METADATA}")
        tail, dtype, per_chunk = self.layout[name]
        try:
            # An absent chunk means "not done", never "zeros".
            with unstable_names_allowed(), zarr.config.set({"array.write_empty_chunks": True}):
                array = self._group[name]
            assert isinstance(array, zarr.Array)
            _refuse_array(array, (len(self), *tail), (per_chunk, *tail), dtype)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(
                f"{self.path}: its {name}/{METADATA} is damaged ({error}); restore it, or run the same `featcache "
                f"{self.made_by}` command again"
            ) from None
        return array

    def _damaged(self, name: str, error: Exception) -> ValueError:
        what: object = error
        if isinstance(error, FileNotFoundError) and error.filename:
            what = f"{os.path.relpath(error.filename, self.files.root)} is missing"
        return ValueError(
            f"{self.path}: a chunk of {name} is damaged ({what}); `featcache verify {self.path}` says which, the same `featcache "
            f"{self.made_by}` command repairs it"
        )


@contextlib.contextmanager
def unstable_names_allowed() -> Iterator[None]:
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

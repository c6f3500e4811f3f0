"""Import and export: a store as the files that other programs read, and their files as a store.

What an export looks like, N rows, V views, D-d embeddings; with one view the V axis is left out:

    npy             a folder: embedding.npy (N, V, D), logits.npy …, label.npy, content.npy, view.npy, state.npy;
                    sample_id.txt and reason.txt, a line a row (\\\\ \\n \\r stand for backslash and line breaks)
    parquet         one file, a row a sample: embedding (view 0), embedding_1 (view 1) …, label, class_name,
                    sample_id, content, view, state, reason
    safetensors     one file: the same tensors; the strings are JSON in its metadata
    clip-retrieval  a folder: img_emb/img_emb_0000.npy …, metadata/metadata_0000.parquet … (image_path, sample_id,
                    label, class_name, content, view), in text order, as clip-retrieval and embedding-reader have it

All of them carry the store's manifest with a checksum of every array, so that coming back is exact: the store
imported from npy, parquet or safetensors has the same bytes as the store exported. clip-retrieval's layout holds one
embedding a row and nothing of failed rows, and promises unit vectors; what it cannot hold is left out and named.

Features stream; ids, labels and reasons are held in memory, as a `FeatureStore` does.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import google_crc32c
import numpy as np
from jaxtyping import Float16, Int64, Shaped

from featcache.store import (
    FORMAT,
    OK,
    STATE,
    FeatureStore,
    _sync_directory,
    _sync_tree,
    chunk_rows,
    create_store,
    open_store,
)
from featcache.views import PARAMETERS

Format = Literal["npy", "parquet", "safetensors", "clip-retrieval"]
FORMATS: tuple[str, ...] = get_args(Format)
PART_ROWS = 1_000_000
"""Rows in one .npy of a clip-retrieval folder, as clip-retrieval has by default."""
SAFETENSORS_HEADER = 100_000_000
"""Bytes of the longest header that the safetensors library opens."""
STRINGS = ("sample_id", "reason")
UNIT_LENGTH = "+l2"
"""Ends the fingerprint of embeddings that an export normalised: they compare with each other only."""
log = logging.getLogger("featcache")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: where it is.
        rows: samples in it, failed ones included where the format holds them.
        left_out: what the format could not hold, in words; empty when coming back is exact.
    """

    path: Path
    rows: int
    left_out: list[str]


def export_store(
    store: FeatureStore | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    *,
    as_is: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a sealed store as `format`; it appears at `out` whole, or not at all.

    Args:
        format: one of `FORMATS`; the module says what each holds.
        as_is: keep the embeddings as they are in a clip-retrieval folder too, where the default is unit length,
            for programs that search by inner product. The other formats always keep them.
        progress: called with rows done and rows in all, after every chunk.

    Raises:
        ValueError: `out` exists, the store is not sealed, or the format cannot hold it.
    """
    if format not in FORMATS:
        raise ValueError(f"--format {format}: unknown; known: {', '.join(FORMATS)}")
    store = store if isinstance(store, FeatureStore) else open_store(store)
    if not store.sealed:
        store = open_store(store.path)  # raises, and says how to finish it
    units = _units(store, progress)
    with _appearing(Path(out), folder=format in ("npy", "clip-retrieval")) as building:
        if format == "clip-retrieval":
            return _write_clip_retrieval(store, units, building, Path(out), as_is)
        write = {"npy": _write_npy, "parquet": _write_parquet, "safetensors": _write_safetensors}[format]
        write(store, units, building)
    return Exported(Path(out), len(store), [])


def import_store(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    encoder_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureStore:
    """Make a sealed store from an export, or from embeddings that another program made.

    `src` is known by its contents: a folder or file that `export_store` wrote; a .npy of (N, D); a folder with
    embedding.npy and, if there, label.npy and sample_id.txt; a .parquet with a column `embedding` (lists of
    floats) and, if there, `label` (numbers, or names) or `class_name`, and `sample_id` or `image_path`; a
    .safetensors with a tensor `embedding` and, if there, `label`; a folder that clip-retrieval wrote. Other columns,
    captions among them, have no place in a store. Rows without an id are numbered.

    Fingerprint: stores compare only when theirs are equal. An export keeps the one of its store. Anything else gets
    one of `encoder_name` and D, so that two imports under one name compare: give a bank and its queries the name of
    the model that made both. Without a name it is that of the embeddings themselves, and compares with no others.

    Raises:
        ValueError: `out` exists, or `src` is none of these, is damaged, pickled, of the wrong shape or dtype, holds
            NaN or infinity or a value beyond float16; nothing is left at `out`.
    """
    path = Path(src)
    with _appearing(Path(out), folder=True) as building:
        source = _open_source(path)
        if source.manifest is not None and encoder_name is not None:
            name = source.manifest["encoder"]["name"]
            raise ValueError(f"{src}: it says itself which encoder made it ({name}); leave --encoder out")
        manifest = source.manifest or _foreign_manifest(source, encoder_name)
        store, sums = create_store(building, manifest), _Checksums()
        for chunk, block in enumerate(source.blocks(manifest["chunk_rows"])):
            unit = _own(block, manifest, path) if source.manifest else _foreign(block, store.rows_of(chunk), path)
            sums.update(unit)
            store.write_chunk(chunk, unit)
            if progress:
                progress(store.rows_of(chunk).stop, len(store))
        changed = sorted(name for name, crc in source.crc32c.items() if sums.to_dict().get(name) != crc)
        if changed:
            raise ValueError(
                f"{src}: {', '.join(changed)} changed since the export; export again, or take the manifest away "
                "and import it under an --encoder name of its own"
            )
        if source.manifest is None and encoder_name is None:
            store.manifest["encoder"]["fingerprint"] = f"imported:{sums.to_dict()['embedding']}-{sums.bytes}"
        store.seal()
    return open_store(out)


@contextlib.contextmanager
def _appearing(out: Path, *, folder: bool) -> Iterator[Path]:
    """A path to write to; what is there at the end appears as `out` in one step, on disk, or nothing does."""
    if out.exists() and not (folder and out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: already exists; choose another path, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield around / out.name
        _sync_tree(around)
        os.replace(around / out.name, out)
        _sync_directory(out.parent)
    finally:
        shutil.rmtree(around, ignore_errors=True)


class _Checksums:
    """crc32c of each array's bytes, whatever blocks they come in."""

    def __init__(self) -> None:
        self._crc: dict[str, int] = {}
        self.bytes = 0

    def update(self, unit: Mapping[str, np.ndarray]) -> None:
        for name, array in unit.items():
            data = "".join(f"{text}\0" for text in array).encode() if name in STRINGS else array.tobytes()
            self._crc[name] = google_crc32c.extend(self._crc.get(name, 0), data)
            self.bytes += len(data)

    def to_dict(self) -> dict[str, str]:
        return {name: f"{crc:08x}" for name, crc in sorted(self._crc.items())}


# -- exporting --------------------------------------------------------------------------------------------


def _units(store: FeatureStore, progress: Callable[[int, int], None] | None) -> Iterator[Arrays]:
    """Every array of each chunk in turn, read with its checksum verified."""
    for chunk in range(store.chunks):
        rows = store.rows_of(chunk)
        unit = {name: np.asarray(store._array(name)[rows.start : rows.stop]) for name in store._arrays()}
        yield {name: array.astype(object) if name in STRINGS else array for name, array in unit.items()}
        if progress:
            progress(rows.stop, len(store))


def _manifest_text(manifest: Mapping[str, Any], format: str, crc32c: Mapping[str, str]) -> str:
    return json.dumps({**manifest, "export": {"format": format, "crc32c": crc32c}}, ensure_ascii=False, indent=1)


def _layout(manifest: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape of a row and dtype of every array but the strings; widest items first, so that each is aligned."""
    views = manifest["views"]["count"]
    return {
        "label": ((), np.dtype(np.int64)),
        "view": ((views, len(PARAMETERS)), np.dtype(np.float32)),
        **{name: ((views, width), np.dtype(np.float16)) for name, width in manifest["fields"].items()},
        "content": ((16,), np.dtype(np.uint8)),
        STATE: ((), np.dtype(np.uint8)),
    }


def _shape(name: str, store: FeatureStore) -> tuple[int, ...]:
    """In a file: a single view has no axis, but in `view` itself."""
    tail, _ = _layout(store.manifest)[name]
    return (len(store), *(tail[1:] if name in store.manifest["fields"] and store.views == 1 else tail))


def _write_npy(store: FeatureStore, units: Iterator[Arrays], out: Path) -> None:
    sums = _Checksums()
    out.mkdir()
    with contextlib.ExitStack() as opened:
        files = {name: opened.enter_context((out / f"{name}.npy").open("wb")) for name in _layout(store.manifest)}
        files |= {name: opened.enter_context((out / f"{name}.txt").open("wb")) for name in STRINGS}
        for name, (_, dtype) in _layout(store.manifest).items():
            _npy_header(files[name], dtype, _shape(name, store))
        for unit in units:
            sums.update(unit)
            for name, array in unit.items():
                files[name].write(_lines(array) if name in STRINGS else array.tobytes())
    (out / "manifest.json").write_text(_manifest_text(store.manifest, "npy", sums.to_dict()), encoding="utf-8")


def _npy_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)


def _lines(texts: Iterable[str]) -> bytes:
    escaped = (text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for text in texts)
    return "".join(f"{text}\n" for text in escaped).encode()


def _write_parquet(store: FeatureStore, units: Iterator[Arrays], out: Path) -> None:
    pa, pq = _pyarrow(out)
    sums, writer = _Checksums(), None
    with contextlib.ExitStack() as opened:
        for unit in units:
            sums.update(unit)
            table = _table(pa, unit, list(store.manifest["fields"]), store.class_names)
            if writer is None:
                features = [name for name in table.column_names if name.rstrip("_0123456789") in store.manifest["fields"]]
                writer = opened.enter_context(
                    pq.ParquetWriter(
                        out,
                        table.schema,
                        use_dictionary=["class_name", "reason"],
                        compression={name: "none" if name in features else "zstd" for name in table.column_names},
                    )
                )
            writer.write_table(table, row_group_size=len(table))
        assert writer is not None
        writer.add_key_value_metadata({"featcache": _manifest_text(store.manifest, "parquet", sums.to_dict())})


def _table(pa: Any, unit: Arrays, fields: Sequence[str], class_names: Sequence[str] | None) -> Any:
    """A unit as a pyarrow table; view v > 0 of NAME is the column NAME_v."""
    columns: dict[str, Any] = {}
    for name in (*fields, "view"):
        for view in range(unit["view"].shape[1]):
            flat = pa.array(np.ascontiguousarray(unit[name][:, view]).reshape(-1))
            columns[name if view == 0 else f"{name}_{view}"] = pa.FixedSizeListArray.from_arrays(
                flat, unit[name].shape[-1]
            )
    for name in STRINGS:
        columns[name] = pa.array(unit[name].tolist(), pa.string())
    names = list(class_names or [])
    described = [names[label] if 0 <= label < len(names) else None for label in unit["label"].tolist()]
    columns["label"], columns[STATE] = pa.array(unit["label"]), pa.array(unit[STATE])
    columns["class_name"] = pa.array(described, pa.string())
    columns["content"] = pa.array([row.tobytes() for row in unit["content"]], pa.binary(16))
    order = ["sample_id", "label", "class_name", STATE, "reason", "content"]
    return pa.table({name: columns[name] for name in [*order, *(name for name in columns if name not in order)]})


def _write_safetensors(store: FeatureStore, units: Iterator[Arrays], out: Path) -> None:
    reasons = {str(row): text for row, text in enumerate(np.asarray(store._array("reason")[:]).tolist()) if text}
    strings = {
        "sample_id": json.dumps(store.sample_ids.tolist(), ensure_ascii=False),
        "reason": json.dumps(reasons, ensure_ascii=False),
    }
    tensors, end = {}, 0
    codes = {"int64": "I64", "float32": "F32", "float16": "F16", "uint8": "U8"}
    for name, (_, dtype) in _layout(store.manifest).items():
        shape = _shape(name, store)
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        tensors[name] = {"dtype": codes[dtype.name], "shape": shape, "data_offsets": [begin, end]}

    def header(crc32c: Mapping[str, str]) -> bytes:
        metadata = {"featcache": _manifest_text(store.manifest, "safetensors", crc32c), **strings}
        text = json.dumps({"__metadata__": metadata, **tensors}, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    sums = _Checksums()
    placeholder = header(dict.fromkeys(sorted([*tensors, *STRINGS]), "0" * 8))
    if len(placeholder) - 8 > SAFETENSORS_HEADER:
        raise ValueError(
            f"{store.path}: its sample ids take more than the {SAFETENSORS_HEADER:,} bytes that a safetensors header "
            "may have; use --format parquet or npy"
        )
    with out.open("wb") as file, contextlib.ExitStack() as opened:
        file.write(placeholder)
        file.flush()
        places = {name: opened.enter_context(out.open("rb+")) for name in tensors}
        for name, place in places.items():
            place.seek(len(placeholder) + tensors[name]["data_offsets"][0])
        for unit in units:
            sums.update(unit)
            for name, place in places.items():
                place.write(unit[name].tobytes())
        finished = header(sums.to_dict())
        assert len(finished) == len(placeholder)
        file.seek(0)
        file.write(finished)


def _write_clip_retrieval(
    store: FeatureStore, units: Iterator[Arrays], building: Path, out: Path, as_is: bool
) -> Exported:
    pa, pq = _pyarrow(out)
    if not len(store.ok):
        raise ValueError(f"{store.path}: no row has features; use --format npy, parquet or safetensors")
    spec = store.manifest["corpus"]["spec"]
    root = f"{spec}/" if spec and Path(spec).is_dir() else ""
    for name in ("img_emb", "metadata"):
        (building / name).mkdir(parents=True)
    sums, part = _Checksums(), 0
    per_part = max(1, PART_ROWS // store.manifest["chunk_rows"])
    digits = max(4, len(str(store.chunks // per_part)))  # embedding-reader sorts names as text
    for first in range(0, store.chunks, per_part):
        chunks = range(first, min(first + per_part, store.chunks))
        ok = store.state[store.rows_of(chunks[0]).start : store.rows_of(chunks[-1]).stop] == OK
        with contextlib.ExitStack() as opened:
            writer: Any = None
            for _ in chunks:
                unit = {name: array[:] for name, array in next(units).items()}
                unit = {name: array[unit[STATE] == OK] for name, array in unit.items()}
                for name in [*store.manifest["fields"], "view"]:
                    unit[name] = unit[name][:, :1]
                if not as_is:
                    unit["embedding"] = _unit_length(unit["embedding"])
                sums.update({name: array for name, array in unit.items() if name in _CLIP_ARRAYS})
                if not ok.any():
                    continue
                table = _table(pa, unit, [], store.class_names).drop_columns([STATE, "reason"])
                table = table.add_column(0, "image_path", [[f"{root}{name}" for name in unit["sample_id"]]])
                if writer is None:
                    file = opened.enter_context((building / f"img_emb/img_emb_{part:0{digits}}.npy").open("wb"))
                    _npy_header(file, np.dtype(np.float16), (int(ok.sum()), store.embedding_dim))
                    name = building / f"metadata/metadata_{part:0{digits}}.parquet"
                    writer = opened.enter_context(pq.ParquetWriter(name, table.schema))
                    part += 1
                file.write(unit["embedding"].tobytes())
                writer.write_table(table)
    manifest = {
        **store.manifest,
        "corpus": {**store.manifest["corpus"], "rows": len(store.ok)},
        "views": {**store.manifest["views"], "count": 1},
        "fields": {"embedding": store.embedding_dim},
    }
    if len(store.failed):
        manifest["corpus"].pop("digest", None)  # it is of all samples
    if not as_is:
        fingerprint = store.fingerprint.removesuffix(UNIT_LENGTH) + UNIT_LENGTH
        manifest["encoder"] = {**store.manifest["encoder"], "fingerprint": fingerprint}
    text = _manifest_text(manifest, "clip-retrieval", sums.to_dict())
    (building / "manifest.json").write_text(text, encoding="utf-8")
    other = [name for name in store.manifest["fields"] if name != "embedding"]
    lost = {
        f"{len(store.failed):,} failed rows": len(store.failed),
        f"views 1–{store.views - 1}": store.views > 1,
        ", ".join(other): other,
        "the lengths of the embeddings": not as_is,
    }
    return Exported(out, len(store.ok), [what for what, is_lost in lost.items() if is_lost])


_CLIP_ARRAYS = ("embedding", "label", "sample_id", "content", "view")


def _unit_length(embedding: Float16[np.ndarray, "n v d"]) -> Float16[np.ndarray, "n v d"]:
    wide = embedding.astype(np.float32)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    return (wide / np.where(length == 0, 1, length)).astype(np.float16)


# -- importing: what a source holds ------------------------------------------------------------------------


@dataclass
class _Source:
    """Row-aligned arrays in some file or folder; `manifest` and `crc32c` only when `export_store` wrote it.

    `arrays` are anything with a shape and dtype that slices; or `read` gives the blocks.
    """

    path: Path
    format: str
    rows: int
    width: int
    dtype: str
    blocks: Callable[[int], Iterator[Arrays]]
    manifest: dict[str, Any] | None = None
    crc32c: Mapping[str, str] = None  # type: ignore[assignment]
    class_names: list[str] | None = None

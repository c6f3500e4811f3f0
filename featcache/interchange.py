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
import itertools
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import google_crc32c
import numpy as np
from jaxtyping import Float16, Int64

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
        progress: called with rows done and rows in all, as each chunk is read.

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
        if source.manifest is not None and source.manifest["corpus"]["rows"] != source.rows:
            said = source.manifest["corpus"]["rows"]
            raise ValueError(f"{src}: {source.rows} rows, {said} when it was exported; export again")
        manifest = source.manifest or _foreign_manifest(source, encoder_name)
        store, sums, embeddings = create_store(building, manifest), _Checksums(), hashlib.blake2b(digest_size=16)
        for chunk, block in enumerate(source.blocks(manifest["chunk_rows"])):
            rows = store.rows_of(chunk)
            unit = _own(block, rows, manifest, path) if source.manifest else _foreign(block, rows, path)
            sums.update(unit)
            embeddings.update(unit["embedding"].tobytes())
            store.write_chunk(chunk, unit)
            if progress:
                progress(rows.stop, len(store))
        changed = sorted(name for name, crc in source.crc32c.items() if sums.to_dict().get(name) != crc)
        if changed:
            raise ValueError(
                f"{src}: {', '.join(changed)} changed since the export; export again, or take the manifest away "
                "and import it under an --encoder name of its own"
            )
        if source.manifest is None and encoder_name is None:
            store.manifest["encoder"]["fingerprint"] = f"imported:{embeddings.hexdigest()}"
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

    def update(self, unit: Mapping[str, np.ndarray]) -> None:
        for name, array in unit.items():
            data = "".join(f"{text}\0" for text in array).encode() if name in STRINGS else array.tobytes()
            self._crc[name] = google_crc32c.extend(self._crc.get(name, 0), data)

    def to_dict(self) -> dict[str, str]:
        return {name: f"{crc:08x}" for name, crc in sorted(self._crc.items())}


# -- exporting --------------------------------------------------------------------------------------------


def _units(store: FeatureStore, progress: Callable[[int, int], None] | None) -> Iterator[Arrays]:
    """Every array of each chunk in turn, read with its checksum verified."""
    for chunk in range(store.chunks):
        rows = store.rows_of(chunk)
        unit = {name: np.asarray(store._array(name)[rows.start : rows.stop]) for name in store._arrays()}
        if progress:
            progress(rows.stop, len(store))
        yield {name: array.astype(object) if name in STRINGS else array for name, array in unit.items()}


def _manifest_text(manifest: Mapping[str, Any], format: str, crc32c: Mapping[str, str]) -> str:
    return json.dumps({**manifest, "export": {"format": format, "crc32c": crc32c}}, ensure_ascii=False, indent=1)


def _layout(
    manifest: Mapping[str, Any], parameters: int = len(PARAMETERS)
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape of a row and dtype of every array but the strings; widest items first, so that each is aligned."""
    views = manifest["views"]["count"]
    return {
        "label": ((), np.dtype(np.int64)),
        "view": ((views, parameters), np.dtype(np.float32)),
        **{name: ((views, width), np.dtype(np.float16)) for name, width in manifest["fields"].items()},
        "content": ((16,), np.dtype(np.uint8)),
        STATE: ((), np.dtype(np.uint8)),
    }


def _stored(store: FeatureStore) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array in a file: a single view has no axis, but in `view` itself."""
    layout = _layout(store.manifest, store._array("view").shape[2])
    squeezed = store.manifest["fields"] if store.views == 1 else {}
    return {name: ((len(store), *tail[name in squeezed :]), dtype) for name, (tail, dtype) in layout.items()}


def _write_npy(store: FeatureStore, units: Iterator[Arrays], out: Path) -> None:
    sums = _Checksums()
    out.mkdir()
    with contextlib.ExitStack() as opened:
        files = {name: opened.enter_context((out / f"{name}.npy").open("wb")) for name in _stored(store)}
        files |= {name: opened.enter_context((out / f"{name}.txt").open("wb")) for name in STRINGS}
        for name, (shape, dtype) in _stored(store).items():
            _npy_header(files[name], dtype, shape)
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
                numbers = {name for name in table.column_names if pa.types.is_fixed_size_list(table.field(name).type)}
                writer = opened.enter_context(
                    pq.ParquetWriter(
                        out,
                        table.schema,
                        use_dictionary=["class_name", "reason"],
                        compression={name: "none" if name in numbers else "zstd" for name in table.column_names},
                    )
                )
            writer.write_table(table, row_group_size=len(table))
        assert writer is not None
        writer.add_key_value_metadata({"featcache": _manifest_text(store.manifest, "parquet", sums.to_dict())})


def _table(pa: Any, unit: Arrays, fields: Sequence[str], class_names: Sequence[str] | None) -> Any:
    """A unit, or part of one, as a pyarrow table; view v > 0 of NAME is the column NAME_v."""
    columns: dict[str, Any] = {}
    for name in (*fields, "view"):
        for view in range(unit["view"].shape[1]):
            flat = pa.array(np.ascontiguousarray(unit[name][:, view]).reshape(-1))
            columns[name if view == 0 else f"{name}_{view}"] = pa.FixedSizeListArray.from_arrays(
                flat, unit[name].shape[-1]
            )
    for name in STRINGS:
        if name in unit:
            columns[name] = pa.array(unit[name].tolist(), pa.string())
    if STATE in unit:
        columns[STATE] = pa.array(unit[STATE])
    names = list(class_names or [])
    described = [names[label] if 0 <= label < len(names) else None for label in unit["label"].tolist()]
    columns |= {"label": pa.array(unit["label"]), "class_name": pa.array(described, pa.string())}
    columns["content"] = pa.array([row.tobytes() for row in unit["content"]], pa.binary(16))
    first = [name for name in ("sample_id", "label", "class_name", STATE, "reason", "content") if name in columns]
    return pa.table({name: columns[name] for name in dict.fromkeys([*first, *columns])})


def _write_safetensors(store: FeatureStore, units: Iterator[Arrays], out: Path) -> None:
    reasons = {str(row): text for row, text in enumerate(np.asarray(store._array("reason")[:]).tolist()) if text}
    strings = {
        "sample_id": json.dumps(store.sample_ids.tolist(), ensure_ascii=False),
        "reason": json.dumps(reasons, ensure_ascii=False),
    }
    tensors: dict[str, dict[str, Any]] = {}
    end = 0
    codes = {"int64": "I64", "float32": "F32", "float16": "F16", "uint8": "U8"}
    for name, (shape, dtype) in _stored(store).items():
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
    root = spec if spec and Path(spec).is_dir() else ""
    for name in ("img_emb", "metadata"):
        (building / name).mkdir(parents=True)
    sums, part = _Checksums(), 0
    per_part = max(1, PART_ROWS // store.manifest["chunk_rows"])
    digits = max(4, len(str(store.chunks // per_part)))  # embedding-reader sorts names as text
    for first in range(0, store.chunks, per_part):
        chunks = range(first, min(first + per_part, store.chunks))
        rows = slice(store.rows_of(chunks[0]).start, store.rows_of(chunks[-1]).stop)
        here = (_clip_unit(unit, as_is) for unit in itertools.islice(units, len(chunks)))
        here = (unit for unit in here if len(unit["label"]))
        head = next(here, None)
        if head is None:  # every row of this part failed
            continue
        number, part = f"{part:0{digits}}", part + 1
        schema = _clip_table(pa, head, store.class_names, root).schema
        with (
            (building / f"img_emb/img_emb_{number}.npy").open("wb") as file,
            pq.ParquetWriter(building / f"metadata/metadata_{number}.parquet", schema) as writer,
        ):
            _npy_header(file, np.dtype(np.float16), (int((store.state[rows] == OK).sum()), store.embedding_dim))
            for unit in itertools.chain([head], here):
                sums.update(unit)
                file.write(unit["embedding"].tobytes())
                writer.write_table(_clip_table(pa, unit, store.class_names, root))
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
        "all views but the first": store.views > 1,
        ", ".join(other): other,
        "the lengths of the embeddings": not as_is,
    }
    return Exported(out, len(store.ok), [what for what, is_lost in lost.items() if is_lost])


def _clip_unit(unit: Arrays, as_is: bool) -> Arrays:
    """What a clip-retrieval folder holds of a unit: view 0 of the rows with features."""
    held = ("embedding", "label", "sample_id", "content", "view")
    kept = {name: unit[name][unit[STATE] == OK] for name in held}
    kept |= {name: kept[name][:, :1] for name in ("embedding", "view")}
    return kept if as_is else kept | {"embedding": _unit_length(kept["embedding"])}


def _clip_table(pa: Any, unit: Arrays, class_names: Sequence[str] | None, root: str) -> Any:
    paths = pa.array([os.path.join(root, sample_id) for sample_id in unit["sample_id"]], pa.string())
    return _table(pa, unit, [], class_names).add_column(0, "image_path", paths)


def _unit_length(embedding: Float16[np.ndarray, "n v d"]) -> Float16[np.ndarray, "n v d"]:
    wide = embedding.astype(np.float32)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    return (wide / np.where(length == 0, 1, length)).astype(np.float16)


# -- importing --------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Source:
    """Row-aligned arrays in a file or folder.

    Attributes:
        rows, width, dtype: of the embeddings, as they are there.
        blocks: blocks(n) yields the arrays there are, n rows at a time.
        class_names: what labels stand for, where the source says.
        manifest, crc32c: of the store and of its arrays, when `export_store` wrote it.
    """

    path: Path
    rows: int
    width: int
    dtype: str
    blocks: Callable[[int], Iterator[Arrays]]
    class_names: list[str] | None = None
    manifest: dict[str, Any] | None = None
    crc32c: Mapping[str, str] = field(default_factory=dict)


def _open_source(path: Path) -> _Source:
    """What is at `path`, known by its contents."""
    if path.is_dir():
        if (path / "img_emb").is_dir():
            return _open_clip_retrieval(path)
        if (path / "embedding.npy").is_file():
            return _open_npy(path)
        if (path / "zarr.json").is_file():
            raise ValueError(f"{path}: already a Zarr group; open a store as it is")
        raise ValueError(f"{path}: holds neither embedding.npy nor img_emb/; give {_KNOWN}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; give {_KNOWN}")
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"\x93NUMPY"):
        return _open_npy(path)
    if head.startswith(b"PAR1"):
        return _open_parquet(path)
    if head[8:] == b"{":
        return _open_safetensors(path)
    if head.startswith((b"\x80", b"PK")):
        raise ValueError(f"{path}: a pickle or an archive, which is never opened; save its array with numpy.save")
    raise ValueError(f"{path}: not a file that can be imported; give {_KNOWN}")


_KNOWN = "an export, a .npy of (N, D), a .parquet or .safetensors with `embedding`, or a clip-retrieval folder"


def _open_npy(path: Path) -> _Source:
    """One file of (N, D), or a folder of files of the same rows."""
    if path.is_file():
        return _of_arrays(path, {"embedding": _load_npy(path)}, None, {})
    manifest, crc32c = _read_manifest(path)
    arrays: dict[str, Any] = {}
    for name in _layout(manifest) if manifest else ("embedding", "label"):
        if (path / f"{name}.npy").is_file():
            arrays[name] = _load_npy(path / f"{name}.npy")
    for name in STRINGS:
        if (path / f"{name}.txt").is_file():
            arrays[name] = _read_lines(path / f"{name}.txt", escaped=manifest is not None)
    return _of_arrays(path, arrays, manifest, crc32c)


def _open_safetensors(path: Path) -> _Source:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="pt")
        arrays: dict[str, Any] = {name: _Tensor(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); write it again") from None
    metadata = file.metadata() or {}
    manifest, crc32c = _parse_manifest(metadata["featcache"], path) if "featcache" in metadata else (None, {})
    if "embedding" not in arrays:
        raise ValueError(f"{path}: no tensor `embedding`, only {', '.join(arrays)}; save it under that name")
    wanted = _layout(manifest) if manifest else ("embedding", "label")
    arrays = {name: array for name, array in arrays.items() if name in wanted}
    try:
        if "sample_id" in metadata:
            arrays["sample_id"] = np.array(json.loads(metadata["sample_id"]), dtype=object)
        if manifest:
            arrays["reason"] = np.full(manifest["corpus"]["rows"], "", dtype=object)
            for row, reason in json.loads(metadata["reason"]).items():
                arrays["reason"][int(row)] = reason
    except (ValueError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{path}: its sample_id or reason metadata is damaged; export or write it again") from None
    return _of_arrays(path, arrays, manifest, crc32c)


class _Tensor:
    """A tensor in a safetensors file, read by slices; bfloat16, which numpy lacks, as float32."""

    def __init__(self, stored: Any):
        codes = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I64": "int64"}
        self._stored, self.shape = stored, tuple(stored.get_shape())
        self.dtype = codes.get(stored.get_dtype(), stored.get_dtype())

    def __getitem__(self, rows: slice) -> np.ndarray:
        tensor = self._stored[rows]
        return np.asarray((tensor.float() if self.dtype == "bfloat16" else tensor).numpy())


def _of_arrays(
    path: Path, arrays: dict[str, Any], manifest: dict[str, Any] | None, crc32c: Mapping[str, str]
) -> _Source:
    """A source of arrays that have a shape and a dtype and can be sliced."""
    shape, dtype, class_names = tuple(arrays["embedding"].shape), str(arrays["embedding"].dtype), None
    if manifest is None:
        _check_embeddings(path, shape, dtype)
        if "label" in arrays:  # at once: (N,) numbers
            arrays["label"], class_names = _labels(np.asarray(arrays["label"][0 : shape[0]]), path)
        if "sample_id" in arrays:
            _check_ids(arrays["sample_id"], path)
    return _Source(
        path=path, rows=shape[0], width=shape[-1], dtype=dtype, blocks=_slices(arrays, path),
        class_names=class_names, manifest=manifest, crc32c=crc32c,
    )  # fmt: skip


def _open_parquet(path: Path) -> _Source:
    pa, pq = _pyarrow(path)
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]}); write it again") from None
    text = (file.metadata.metadata or {}).get(b"featcache")
    if text is not None:
        manifest, crc32c = _parse_manifest(text.decode(), path)

        def own_blocks(size: int) -> Iterator[Arrays]:
            for table in _tables(pa, file, None, size, path):
                yield _from_table(pa, table, manifest, path)

        return _Source(
            path=path, rows=file.metadata.num_rows, width=manifest["fields"]["embedding"], dtype="float16",
            blocks=own_blocks, manifest=manifest, crc32c=crc32c,
        )  # fmt: skip
    names = file.schema_arrow.names
    if "embedding" not in names:
        raise ValueError(f"{path}: no column `embedding`, only {', '.join(names)}; rename the column that holds it")
    kind = file.schema_arrow.field("embedding").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ValueError(f"{path}: embedding is {kind}, not lists of floats; write it as lists")
    first = next(_tables(pa, file, ["embedding"], 1, path), None)
    width = 0 if first is None else len(first["embedding"][0].as_py() or [])
    dtype = str(kind.value_type.to_pandas_dtype().__name__) if pa.types.is_floating(kind.value_type) else str(kind)
    _check_embeddings(path, (file.metadata.num_rows, width), dtype)
    described = file.read(columns=[name for name in _DESCRIBING if name in names])
    beside, class_names = _describe(pa, described, path)

    def blocks(size: int) -> Iterator[Arrays]:
        start = 0
        for table in _tables(pa, file, ["embedding"], size, path):
            here = slice(start, start := start + len(table))
            yield {
                "embedding": _list_values(pa, table["embedding"], width, path),
                **{name: array[here] for name, array in beside.items()},
            }

    return _Source(
        path=path, rows=file.metadata.num_rows, width=width, dtype=dtype, blocks=blocks, class_names=class_names
    )


def _open_clip_retrieval(path: Path) -> _Source:
    """The parts of `img_emb` joined, and those of `metadata`, both in text order: embedding-reader's rule."""
    pa, pq = _pyarrow(path)
    own = (path / "manifest.json").is_file()
    manifest, crc32c = _read_manifest(path) if own else (None, {})
    files = sorted((path / "img_emb").glob("*.npy"), key=str)
    tables = sorted((path / "metadata").glob("*.parquet"), key=str)
    parts = [_load_npy(file) for file in files]
    if not parts or (tables and len(tables) != len(parts)):
        raise ValueError(
            f"{path}: {len(parts)} .npy in img_emb, {len(tables)} .parquet in metadata; copy it again whole"
        )
    for file, part in zip(files, parts, strict=True):
        _check_embeddings(file, part.shape, str(part.dtype))
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{file}: {part.shape[1]}-d, {files[0].name} {parts[0].shape[1]}-d; import them separately"
            )
    wanted, class_names = (*_DESCRIBING, "content", "view"), None
    beside: Arrays = {}
    if tables:
        described = []
        for table, file, part in zip(tables, files, parts, strict=True):
            try:
                opened = pq.ParquetFile(table)
                described.append(opened.read(columns=[name for name in opened.schema_arrow.names if name in wanted]))
            except pa.ArrowException as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{table}: not a whole parquet file ({reason}); copy it again") from None
            if len(described[-1]) != len(part):
                raise ValueError(f"{table}: {len(described[-1])} rows, {file.name} {len(part)}; copy both again")
        joined = pa.concat_tables(described, promote_options="permissive")
        if manifest:
            beside = _from_table(pa, joined, {**manifest, "fields": {}}, path)
        else:
            beside, class_names = _describe(pa, joined, path)
    embedding = _Joined(parts)
    arrays = {"embedding": embedding, **beside}
    return _Source(
        path=path, rows=embedding.shape[0], width=parts[0].shape[1], dtype=str(parts[0].dtype),
        blocks=_slices(arrays, path), class_names=class_names, manifest=manifest, crc32c=crc32c,
    )  # fmt: skip


class _Joined:
    """(N, D) arrays one after the other, read by slices."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts, self._starts = parts, np.cumsum([0, *map(len, parts)])
        self.shape = (int(self._starts[-1]), parts[0].shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        spans = zip(self._parts, self._starts, strict=False)
        return np.concatenate([part[max(0, rows.start - at) : max(0, rows.stop - at)] for part, at in spans])


def _slices(arrays: Mapping[str, Any], path: Path) -> Callable[[int], Iterator[Arrays]]:
    """`_Source.blocks` of arrays that have a shape and can be sliced."""
    rows = arrays["embedding"].shape[0]
    for name, array in arrays.items():
        if tuple(array.shape[:1]) != (rows,):
            raise ValueError(f"{path}: {name} has shape {tuple(array.shape)} for {rows} embeddings; give one a row")

    def blocks(size: int) -> Iterator[Arrays]:
        for start in range(0, rows, size):
            yield {name: np.asarray(array[start : min(start + size, rows)]) for name, array in arrays.items()}

    return blocks


def _load_npy(path: Path) -> np.ndarray:
    try:
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        if "object" in str(error):
            raise ValueError(
                f"{path}: holds pickled objects, which are never opened; save it again as an array of floats or numbers"
            ) from None
        raise ValueError(f"{path}: not a whole .npy with rows ({error}); save it again") from None


def _read_lines(path: Path, *, escaped: bool) -> np.ndarray:
    with path.open(encoding="utf-8", newline="\n" if escaped else None) as file:
        lines = [line.removesuffix("\n") for line in file]
    if escaped:
        plain = {r"\\": "\\", r"\n": "\n", r"\r": "\r"}
        lines = [re.sub(r"\\[\\nr]", lambda found: plain[found[0]], line) for line in lines]
    return np.array(lines, dtype=object)


# -- parquet ----------------------------------------------------------------------------------------------

_DESCRIBING = ("sample_id", "image_path", "label", "class_name")


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow: pip install 'featcache[parquet]'") from None
    return pyarrow, pyarrow.parquet


def _tables(pa: Any, file: Any, columns: list[str] | None, size: int, path: Path) -> Iterator[Any]:
    """`columns` of a parquet file, exactly `size` rows at a time, however its row groups are cut."""
    waiting: Any = None
    try:
        for batch in file.iter_batches(batch_size=size, columns=columns):
            table = pa.Table.from_batches([batch])
            waiting = table if waiting is None else pa.concat_tables([waiting, table])
            while len(waiting) >= size:
                yield waiting.slice(0, size)
                waiting = waiting.slice(size)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]}); write it again") from None
    if waiting is not None and len(waiting):
        yield waiting


def _from_table(pa: Any, table: Any, manifest: Mapping[str, Any], path: Path) -> Arrays:
    """What `_table` made a table of; only the columns there are."""
    arrays: Arrays = {}
    for name, (tail, _) in _layout(manifest).items():
        columns = [name if view == 0 else f"{name}_{view}" for view in range(tail[0] if len(tail) == 2 else 1)]
        if not set(columns) <= set(table.column_names):
            continue
        if name == "content":
            stored = table[name].to_pylist()
            arrays[name] = np.frombuffer(b"".join(stored), np.uint8).reshape(-1, 16).copy()
        elif len(tail) == 2:
            arrays[name] = np.stack([_list_values(pa, table[column], tail[1], path) for column in columns], axis=1)
        else:
            arrays[name] = table[name].to_numpy()
    return arrays | {name: _texts(table[name]) for name in STRINGS if name in table.column_names}


def _list_values(pa: Any, column: Any, width: int, path: Path) -> np.ndarray:
    """A column of lists, all of `width` numbers, as (n, width)."""
    chunks = []
    for chunk in column.chunks:
        values = chunk.flatten()
        if chunk.null_count or values.null_count:
            raise ValueError(f"{path}: an embedding is null; leave such rows out")
        lengths = (
            np.asarray(chunk.value_lengths()) if not pa.types.is_fixed_size_list(chunk.type) else np.array([width])
        )
        if (lengths != width).any() or len(values) != len(chunk) * width:
            raise ValueError(f"{path}: embeddings of different lengths ({width} and others); give every row the same")
        chunks.append(values.to_numpy(zero_copy_only=False).reshape(len(chunk), width))
    return np.concatenate(chunks)


def _texts(column: Any) -> np.ndarray:
    return np.array(column.to_pylist(), dtype=object)


def _describe(pa: Any, table: Any, path: Path) -> tuple[Arrays, list[str] | None]:
    """Labels and ids of rows that another program wrote, and what the labels stand for."""
    arrays, class_names, names = {}, None, table.column_names
    label = next((name for name in ("label", "class_name") if name in names), None)
    if label:
        numeric = pa.types.is_integer(table[label].type) or pa.types.is_floating(table[label].type)
        stored = table[label].to_numpy() if numeric else _texts(table[label])
        arrays["label"], class_names = _labels(stored, path)
    sample_id = next((name for name in ("sample_id", "image_path") if name in names), None)
    if sample_id:
        ids = np.array([None if text is None else str(text) for text in table[sample_id].to_pylist()], dtype=object)
        if sample_id == "image_path":  # keys of webdataset shards, which may come back in another shard
            seen: Counter[str] = Counter()
            for row, text in enumerate(ids):
                seen[text] += 1
                ids[row] = text if seen[text] == 1 else f"{text}#{seen[text]}"
        _check_ids(ids, path)
        arrays["sample_id"] = ids
    return arrays, class_names


# -- what another program made ----------------------------------------------------------------------------


def _labels(stored: np.ndarray, path: Path) -> tuple[Int64[np.ndarray, " n"], list[str] | None]:
    """Labels as numbers, -1 for none; names are numbered in sorted order."""
    if stored.dtype.kind in "OU":
        names = sorted({text for text in stored.tolist() if text is not None}, key=str)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: label is neither numbers nor names; write it as one of them")
        number = {name: i for i, name in enumerate(names)}
        return np.array([number.get(text, -1) for text in stored.tolist()], np.int64), names
    if stored.dtype.kind == "f":  # how pandas writes whole numbers with gaps
        stored = np.where(np.isnan(stored), -1, stored)
        if not (np.isfinite(stored).all() and (stored == np.round(stored)).all()):
            raise ValueError(f"{path}: label holds fractions; write whole numbers, or names")
    if stored.ndim != 1 or stored.dtype.kind not in "iuf":
        raise ValueError(f"{path}: label is {stored.dtype} of shape {stored.shape}; write a whole number a row")
    return stored.astype(np.int64), None


def _check_ids(ids: np.ndarray, path: Path) -> None:
    if not all(isinstance(text, str) for text in ids):
        raise ValueError(f"{path}: a sample id is missing; fill it in, or leave all out to number the rows")
    (text, times), *_ = Counter(ids.tolist()).most_common(1)
    if times > 1:
        raise ValueError(f"{path}: sample id {text!r} stands {times} times; make ids unique, or leave all out")


def _check_embeddings(path: Path, shape: Sequence[int], dtype: str) -> None:
    if dtype not in ("float16", "bfloat16", "float32", "float64", "double", ">f2", ">f4", ">f8"):
        raise ValueError(f"{path}: embeddings are {dtype}; write them as float16, float32 or float64")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{path}: embeddings have shape {tuple(shape)}; give (rows, dimensions), one row at least")


def _foreign_manifest(source: _Source, encoder_name: str | None) -> dict[str, Any]:
    """The fingerprint of an unnamed encoder follows when the embeddings have been read."""
    identity = f"{encoder_name}\0{source.width}".encode()
    fingerprint = hashlib.blake2b(identity, digest_size=16).hexdigest()
    return {
        "encoder": {
            "name": encoder_name or "imported", "fingerprint": f"imported:{fingerprint}",
            "embedding_dim": source.width, "preprocess": {},
        },
        "corpus": {"spec": None, "rows": source.rows, "class_names": source.class_names},
        "views": {"count": 1},
        "fields": {"embedding": source.width},
        "chunk_rows": chunk_rows(2 * source.width, source.rows),
        "extraction": {"imported": source.path.name, "dtype": source.dtype},
    }  # fmt: skip


def _foreign(block: Arrays, rows: range, path: Path) -> Arrays:
    """A unit of embeddings that another program made, in float16, with nothing known but labels and ids."""
    count, given = len(rows), block["embedding"]
    with np.errstate(over="ignore", under="ignore"):
        embedding = given.astype(np.float16)
    for wrong, remedy in (
        (~np.isfinite(given), "holds NaN or infinity; leave such rows out"),
        (~np.isfinite(embedding), "is beyond float16 (±65504); scale the embeddings, or divide each by its length"),
        (
            (given != 0).any(1, keepdims=True) & ~embedding.any(1, keepdims=True),
            "vanishes in float16; scale the embeddings",
        ),
    ):
        if wrong.any():
            raise ValueError(f"{path}: row {rows.start + int(np.flatnonzero(wrong.any(1))[0])} {remedy}")
    return {
        "embedding": embedding[:, None],
        "label": block.get("label", np.full(count, -1, np.int64)),
        "sample_id": block.get("sample_id", np.array([str(row) for row in rows], dtype=object)),
        "content": np.zeros((count, 16), np.uint8),
        "view": np.zeros((count, 1, len(PARAMETERS)), np.float32),
        "reason": np.full(count, "", dtype=object),
        STATE: np.full(count, OK, np.uint8),
    }


# -- what `export_store` wrote ----------------------------------------------------------------------------


def _read_manifest(folder: Path) -> tuple[dict[str, Any] | None, Mapping[str, str]]:
    path = folder / "manifest.json"
    return _parse_manifest(path.read_text(encoding="utf-8"), path) if path.is_file() else (None, {})


def _parse_manifest(text: str, path: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """A store's manifest as `create_store` wants it, and the checksums of the exported arrays."""
    try:
        manifest = json.loads(text)
        crc32c, version = dict(manifest.pop("export")["crc32c"]), manifest.pop("format")
        manifest.pop("sealed")
        sizes = [manifest["corpus"]["rows"], manifest["views"]["count"], manifest["chunk_rows"]]
        whole = all(type(size) is int and size > 0 for size in [*sizes, *manifest["fields"].values()])
        # A field becomes the name of a file.
        whole = whole and all(name.isidentifier() for name in manifest["fields"]) and "embedding" in manifest["fields"]
        whole = whole and not set(manifest["fields"]) & {*_layout({**manifest, "fields": {}}), *STRINGS}
        whole = whole and bool(manifest["encoder"]["fingerprint"]) and bool(manifest["encoder"]["name"])
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path}: the manifest of the export is damaged; export again, or take it away and give --encoder"
        )
    if version != FORMAT:
        raise ValueError(f"{path}: of store format {version}, this featcache reads {FORMAT}; export it with this one")
    return manifest, crc32c


def _own(block: Arrays, rows: range, manifest: Mapping[str, Any], path: Path) -> Arrays:
    """A unit as it was in the store: every array, its dtype and shape, or the export is not whole."""
    unit = {STATE: np.full(len(rows), OK, np.uint8), "reason": np.full(len(rows), "", dtype=object), **block}
    for name, (tail, dtype) in _layout(manifest).items():
        shape = (len(rows), *tail)
        if name not in unit or unit[name].dtype != dtype or unit[name].size != np.prod(shape):
            found = f"is {unit[name].dtype} {unit[name].shape}" if name in unit else "is missing"
            raise ValueError(f"{path}: {name} {found}, not {dtype} {shape} as this featcache has it; export again")
        unit[name] = unit[name].reshape(shape)
    if "sample_id" not in unit:
        raise ValueError(f"{path}: sample_id is missing; export again")
    return unit

"""Units as pyarrow tables, and tables as units."""

import contextlib
import importlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache.interchange._arrays import STRINGS, Arrays, Source, layout
from featcache.interchange._foreign import check_embeddings, foreign_manifest, identify
from featcache.interchange._own import parse_manifest
from featcache.store.layout import COSINE, OK, STATE
from featcache.store.manifest import Manifest


class Lazy:
    """A module that is imported when it is first used: pyarrow takes long, and is an extra."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


pa: Any = Lazy("pyarrow")
pq: Any = Lazy("pyarrow.parquet")

DESCRIBING = ("sample_id", "image_path", "label", "class_name")
"""Columns that `describe` knows."""


def require_pyarrow(path: Path) -> None:
    """Raises ValueError where there is no pyarrow."""
    try:
        importlib.import_module("pyarrow")
    except ModuleNotFoundError:
        raise ValueError(f"{path}: parquet needs pyarrow: pip install 'featcache[parquet]'") from None


def to_table(unit: Arrays, fields: Sequence[str], class_names: Sequence[str] | None) -> Any:
    """A unit, or part of one, as a pyarrow table; view v > 0 of NAME is the column NAME_v, tokens are flat, scalars plain."""
    columns: dict[str, Any] = {}
    for name in (*fields, "view"):
        for view in range(unit["view"].shape[1]):
            flat = pa.array(np.ascontiguousarray(unit[name][:, view]).reshape(-1))
            shape = unit[name].shape[2:]
            column = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape)) if shape else flat
            columns[name if view == 0 else f"{name}_{view}"] = column
    for name in STRINGS:
        if name in unit:
            columns[name] = pa.array(unit[name].tolist(), pa.string())
    columns |= {name: pa.array(unit[name]) for name in (STATE, COSINE) if name in unit}
    names = list(class_names or [])
    described = [names[label] if 0 <= label < len(names) else None for label in unit["label"].tolist()]
    columns |= {"label": pa.array(unit["label"]), "class_name": pa.array(described, pa.string())}
    columns["content"] = pa.array([row.tobytes() for row in unit["content"]], pa.binary(16))
    first = [name for name in ("sample_id", "label", "class_name", STATE, "reason", "content") if name in columns]
    return pa.table({name: columns[name] for name in dict.fromkeys([*first, *columns])})


@contextlib.contextmanager
def whole(path: Path, remedy: str = "write it again", kind: str = "parquet file") -> Iterator[None]:
    """What pyarrow, or Lance, cannot read is refused as the file that it is of."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole {kind} ({str(error).splitlines()[0]}); {remedy}") from None


def regrouped(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """Record batches as tables of exactly `size` rows, the last one shorter."""
    waiting: Any = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while len(waiting) >= size:
            yield waiting.slice(0, size)
            waiting = waiting.slice(size)
    if waiting is not None and len(waiting):
        yield waiting


Tables = Callable[[list[str] | None, int], Iterator[Any]]
"""tables(columns, n) yields the columns of these names, or all, n rows at a time."""


def of_tables(path: Path, rows: int, schema: Any, text: str | None, tables: Tables) -> Source:
    """A source of so many rows: an export that has `text` for its manifest, or what another program wrote."""
    if text is None:
        return _foreign(path, rows, schema, tables)
    manifest = parse_manifest(text, path)
    return Source(rows, manifest, lambda size: (from_table(table, manifest, path) for table in tables(None, size)))


def _foreign(path: Path, rows: int, schema: Any, tables: Tables) -> Source:
    if "embedding" not in schema.names:
        raise ValueError(
            f"{path}: no column `embedding`, only {', '.join(schema.names)}; rename the column that holds it"
        )
    kind = schema.field("embedding").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ValueError(f"{path}: embedding is {kind}, not lists of floats; write it as lists")
    first = next(tables(["embedding"], 1), None)
    width = 0 if first is None else len(first["embedding"][0].as_py() or [])
    dtype = str(kind.value_type.to_pandas_dtype().__name__) if pa.types.is_floating(kind.value_type) else str(kind)
    check_embeddings(path, (rows, width), dtype)
    if {STATE, "reason", "content"} <= set(schema.names):  # a store was exported, and its manifest is gone
        states = (np.asarray(table[STATE]) for table in tables([STATE], rows))
        if failed := sum(int((state != OK).sum()) for state in states):
            raise ValueError(
                f"{path}: {failed:,} of its rows failed when they were extracted, and hold zeros; leave out those whose "
                f"`{STATE}` is not {OK}, or export again"
            )
    known = [name for name in DESCRIBING if name in schema.names]
    beside = describe(next(tables(known, rows))) if known else {}
    class_names = identify(beside, path) or _class_label(schema)

    def blocks(size: int) -> Iterator[Arrays]:
        start = 0
        for table in tables(["embedding"], size):
            here = slice(start, start := start + len(table))
            described = {name: array[here] for name, array in beside.items()}
            yield {"embedding": list_values(table["embedding"], width, path), **described}

    return Source(rows, foreign_manifest(path, rows, width, dtype, class_names), blocks)


def _class_label(schema: Any) -> list[str] | None:
    """What the numbers in the column `label` stand for, where the package `datasets` wrote it."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def from_table(table: Any, manifest: Manifest, path: Path) -> Arrays:
    """What `to_table` made a table of; only the columns there are."""
    arrays: Arrays = {}
    for name, (tail, _) in layout(manifest).items():
        views = tail[0] if name in manifest.fields or name == "view" else 1
        columns = [name if view == 0 else f"{name}_{view}" for view in range(views)]
        if not set(columns) <= set(table.column_names):
            continue
        if name == "content":
            stored = table[name].to_pylist()
            arrays[name] = np.frombuffer(b"".join(stored), np.uint8).reshape(-1, 16).copy()
        elif len(tail) > 1:
            width = math.prod(tail[1:])
            arrays[name] = np.stack([list_values(table[column], width, path) for column in columns], axis=1)
        elif tail:
            arrays[name] = np.stack([table[column].to_numpy() for column in columns], axis=1)
        else:
            arrays[name] = table[name].to_numpy()
    return arrays | {name: _texts(table[name]) for name in STRINGS if name in table.column_names}


def list_values(column: Any, width: int, path: Path) -> np.ndarray:
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


def describe(table: Any) -> Arrays:
    """The columns that say what rows of another program are: `label`, names beside numbers (`class_name`) and `sample_id`,
    whichever there are."""
    arrays: Arrays = {}
    label = next((name for name in ("label", "class_name") if name in table.column_names), None)
    if label:
        numeric = pa.types.is_integer(table[label].type) or pa.types.is_floating(table[label].type)
        arrays["label"] = table[label].to_numpy() if numeric else _texts(table[label])
        if numeric and label == "label" and "class_name" in table.column_names:
            arrays["class_name"] = _texts(table["class_name"])
    sample_id = next((name for name in ("sample_id", "image_path") if name in table.column_names), None)
    if sample_id:
        ids = [None if text is None else str(text) for text in table[sample_id].to_pylist()]
        if sample_id == "image_path":  # keys of webdataset shards, which may come back in another shard
            seen: Counter[str | None] = Counter()
            for row, text in enumerate(ids):
                seen[text] += 1
                ids[row] = text if seen[text] == 1 else f"{text}#{seen[text]}"
        arrays["sample_id"] = np.array(ids, dtype=object)
    return arrays

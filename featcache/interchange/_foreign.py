"""What another program made: what it must be, and what a store is told of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from featcache.corpora._labels import from_values
from featcache.interchange._arrays import Arrays, Source
from featcache.store.from_arrays import (
    bare_unit,
    checked_ids,
    checked_labels,
    fitting_dtype,
    refuse_beyond,
    refuse_not_finite,
)
from featcache.store.layout import FLOAT16, chunk_rows
from featcache.store.manifest import CorpusRecord, EncoderRecord, ExtractionRecord, Manifest, ViewsRecord
from featcache.store.rounding import rounded_to


def of_arrays(path: Path, arrays: dict[str, Any], manifest: Manifest | None) -> Source:
    """A source of arrays that have a shape and a dtype and can be sliced; without a manifest, another program's."""
    shape, dtype = tuple(arrays["embedding"].shape), str(arrays["embedding"].dtype)
    if manifest is None:
        check_embeddings(path, shape, dtype)
        class_names = identify(arrays, path)
        manifest = foreign_manifest(path, shape[0], shape[1], dtype, class_names)
    rows = shape[0]
    for name, array in arrays.items():
        if tuple(array.shape[:1]) != (rows,):
            raise ValueError(f"{path}: {name} has shape {tuple(array.shape)} for {rows} embeddings; give one a row")

    def blocks(size: int) -> Iterator[Arrays]:
        for start in range(0, rows, size):
            yield {name: np.asarray(array[start : min(start + size, rows)]) for name, array in arrays.items()}

    return Source(rows, manifest, blocks)


def check_embeddings(path: Path, shape: Sequence[int], dtype: str) -> None:
    if dtype not in ("float16", "bfloat16", "float32", "float64", "double", ">f2", ">f4", ">f8"):
        raise ValueError(f"{path}: embeddings are {dtype}; write them as float16, float32 or float64")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{path}: embeddings have shape {tuple(shape)}; give (rows, dimensions), one row at least")


def identify(arrays: dict[str, Any], path: Path) -> list[str] | None:
    """Check the sample ids among `arrays`, and number the labels; returns what the numbers stand for."""
    class_names = None
    if "label" in arrays:
        label = arrays["label"]
        arrays["label"], class_names = _labels(np.asarray(label[0 : label.shape[0]]), path)
        if (named := arrays.pop("class_name", None)) is not None:
            class_names = _named(arrays["label"], named, path)
    if "sample_id" in arrays:
        arrays["sample_id"] = checked_ids(path, arrays["sample_id"], len(arrays["sample_id"]))
    return class_names


def _labels(stored: np.ndarray, path: Path) -> tuple[Int64[np.ndarray, " n"], list[str] | None]:
    """Labels as numbers, -1 for none; texts by the one rule for tables' labels."""
    if stored.dtype.kind in "OU":
        if any(isinstance(value, list | dict) for value in stored.tolist()):
            raise ValueError(f"{path}: label is neither numbers nor names; write it as one of them")
        labels, names = from_values(stored.tolist(), f"{path}, label")
        return np.array(labels, np.int64), names
    return checked_labels(path, stored, len(stored), None), None


def _named(labels: Int64[np.ndarray, " n"], named: np.ndarray, path: Path) -> list[str] | None:
    """What the numbers stand for, as the names beside them have it; a number that no row has is its own name.

    Raises:
        ValueError: a number has two names, or a name two numbers.
    """
    pairs = {(n, str(name)) for n, name in zip(labels.tolist(), named.tolist(), strict=True) if n >= 0 and name}
    names = dict(pairs)
    if not len(pairs) == len(names) == len({*names.values()}):
        raise ValueError(f"{path}: label and class_name name different classes; leave one of the columns out")
    return [names.get(number, str(number)) for number in range(int(labels.max()) + 1)] if names else None


def foreign_manifest(path: Path, rows: int, width: int, dtype: str, class_names: list[str] | None) -> Manifest:
    """A manifest but for the encoder's name and fingerprint, which follow when the embeddings have been read."""
    return Manifest(
        encoder=EncoderRecord(name="", fingerprint="", embedding_dim=width, preprocess={}),
        corpus=CorpusRecord(spec=None, rows=rows, class_names=class_names),
        views=ViewsRecord(count=1),
        fields={"embedding": [width]},
        chunk_rows=chunk_rows(2 * width, rows),
        extraction=ExtractionRecord(imported=path.name, dtype=dtype),
    )


def fitting_layout(source: Source, path: Path, dtype: str) -> dict[str, Any]:
    """What the manifest says of the embeddings' dtype, found by reading them once."""
    rows, held, (width,) = source.rows, str(source.manifest.extraction.dtype), source.manifest.fields["embedding"]
    size = source.manifest.chunk_rows
    blocks = (
        (np.asarray(block["embedding"]), np.arange(i * size, i * size + len(block["embedding"])))
        for i, block in enumerate(source.blocks(size))
    )
    kept = fitting_dtype(path, "embedding", blocks, rows, np.dtype(held).name if held[0] in "<>" else held, dtype)
    if kept == FLOAT16:
        return {}
    return {"dtypes": {"embedding": kept}, "chunk_rows": chunk_rows(np.dtype(kept).itemsize * width, rows)}


def foreign_unit(block: Arrays, rows: range, manifest: Manifest, path: Path) -> Arrays:
    """A unit of embeddings that another program made, with nothing known but labels and ids."""
    count, given, dtype = len(rows), block["embedding"], manifest.dtype("embedding")
    refuse_not_finite(path, "embedding", given, np.array(rows))  # however the file has changed since it was looked at
    refuse_beyond(path, "embedding", given, dtype, np.array(rows))
    label = block.get("label", np.full(count, -1, np.int64))
    ids = block.get("sample_id", np.array([str(row) for row in rows], dtype=object))
    return bare_unit({"embedding": rounded_to(given, dtype)[:, None]}, label, ids, np.full(count, "", dtype=object))

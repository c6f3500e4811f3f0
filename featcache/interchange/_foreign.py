"""What another program made: what it must be, and what a store is told of it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from featcache.interchange._arrays import Arrays
from featcache.layout import OK, STATE, chunk_rows
from featcache.views import PARAMETERS


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
    if "sample_id" in arrays:
        _check_ids(arrays["sample_id"], path)
    return class_names


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


def foreign_manifest(path: Path, rows: int, width: int, dtype: str, class_names: list[str] | None) -> dict[str, Any]:
    """A manifest but for the encoder's name and fingerprint, which follow when the embeddings have been read."""
    return {
        "encoder": {"name": "", "fingerprint": "", "embedding_dim": width, "preprocess": {}},
        "corpus": {"spec": None, "rows": rows, "class_names": class_names},
        "views": {"count": 1},
        "fields": {"embedding": [width]},
        "chunk_rows": chunk_rows(2 * width, rows),
        "extraction": {"imported": path.name, "dtype": dtype},
    }


def foreign_unit(block: Arrays, rows: range, path: Path) -> Arrays:
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

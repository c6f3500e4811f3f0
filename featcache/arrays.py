"""A store from arrays in memory: for features that another program made."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from featcache.layout import EMBEDDING, FAILED, OK, STATE, chunk_rows
from featcache.store import FeatureStore, create_store
from featcache.views import PARAMETERS


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

    Raises:
        ValueError: there are no rows, views or dimensions.
    """
    embedding = np.asarray(embedding)
    if not embedding.size:
        raise ValueError(f"{path}: an embedding of shape {embedding.shape} has no rows to write; give at least one")
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

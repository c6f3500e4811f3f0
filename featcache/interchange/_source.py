"""Arrays in memory or mapped, as what an import reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from featcache.interchange._arrays import Arrays, Source
from featcache.interchange._foreign import check_embeddings, foreign_manifest, identify
from featcache.store.manifest import Manifest


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

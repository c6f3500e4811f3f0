"""Where an import reads from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.interchange._arrays import Arrays
from featcache.interchange._foreign import check_embeddings, foreign_manifest, identify
from featcache.store.manifest import Manifest


@dataclass
class Source:
    """Row-aligned arrays in a file or folder.

    Attributes:
        rows: embeddings there are.
        manifest: of the store to be; with `export` among what is `other` in it when `export_store` wrote it.
        blocks: blocks(n) yields the arrays there are, n rows at a time.
    """

    rows: int
    manifest: Manifest
    blocks: Callable[[int], Iterator[Arrays]]


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

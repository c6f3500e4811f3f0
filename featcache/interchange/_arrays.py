"""The arrays of a store, or of a few of its rows, by name; and where an import reads them from."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import google_crc32c
import numpy as np

from featcache.store import FeatureStore
from featcache.store.layout import COSINE, INTEGERS, STATE
from featcache.store.manifest import Manifest

STRINGS = ("sample_id", "reason")
Arrays = dict[str, np.ndarray]


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


def layout(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape of a row and dtype of every array but strings and kept images; widest items first, so that each is aligned."""
    every = manifest.layout
    names = ["label", "view", *manifest.fields, COSINE, "content", STATE]
    found = {name: (every[name].tail, np.dtype(every[name].dtype)) for name in names if name in every}
    if {*manifest.dtypes.values()} & {*INTEGERS}:
        return dict(sorted(found.items(), key=lambda each: -each[1][1].itemsize))
    return found  # as exports of such stores have always had them


def stored(store: FeatureStore) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array in a file: a single view has no axis, but in `view` itself."""
    tails = layout(store.manifest)
    squeezed = store.manifest.fields if store.views == 1 else {}
    return {name: ((len(store), *tail[name in squeezed :]), dtype) for name, (tail, dtype) in tails.items()}


class Checksums:
    """crc32c of each array's bytes, whatever blocks they come in."""

    def __init__(self) -> None:
        self._crc: dict[str, int] = {}

    def update(self, unit: Mapping[str, np.ndarray]) -> None:
        for name, array in unit.items():
            data = "".join(f"{text}\0" for text in array).encode() if name in STRINGS else array.tobytes()
            self._crc[name] = google_crc32c.extend(self._crc.get(name, 0), data)

    def to_dict(self) -> dict[str, str]:
        return {name: f"{crc:08x}" for name, crc in sorted(self._crc.items())}

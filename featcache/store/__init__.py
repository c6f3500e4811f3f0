"""The store: what an encoder saw of a corpus, as a Zarr v3 group of row-aligned arrays.

    STORE.zarr/
      zarr.json                 the group; attribute `featcache` is the manifest
      embedding/c/0/0/0 …       (N, V, D) float16 or float32: raw rows, then 4 bytes of crc32c
      tokens/c/0/0/0/0 …        (N, V, T, D), likewise
      label, sample_id, content, view, reason …
      state/c/0 …               0 pending · 1 ok · 2 failed

The unit of work is `chunk_rows` rows: one chunk of every array but the wide ones, whose chunks are smaller, a whole
number of them in a unit. A unit's `state` chunk is written last, after every other byte of the unit is on disk: its
presence *is* the mark that the unit is done. Sealing adds row counts and a digest to the manifest; readers refuse
anything else.

The names below are imported when they are first used: what needs the layout or the manifest alone does without Zarr.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.store.read import FeatureStore, open_store
    from featcache.store.write import StoreWriter, create_store

_MODULE_OF = {"FeatureStore": "read", "StoreWriter": "write", "create_store": "write", "open_store": "read"}
__all__ = ["FeatureStore", "StoreWriter", "create_store", "open_store"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value

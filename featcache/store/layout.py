"""Which arrays a store has, and how each is cut into chunks. `docs/store.md` says it in words."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from featcache.inputs.kept import KeptPixels
from featcache.inputs.views import PARAMETERS

FORMAT, WIDE_FORMAT = 2, 3
"""Of a store of float16 features, and of one where some are wider: what knows only the first must not read the second."""
FLOAT16 = "float16"
DTYPES = (FLOAT16, "float32")
"""That a field may have. The manifest's `dtypes` names those that are not float16, and is missing where all are."""
PENDING, OK, FAILED = 0, 1, 2
CHUNK_BYTES = 16 * 2**20
"""No feature chunk is larger; its rows are the largest power of two that fits, so none is under half of it."""
EMBEDDING, PIXELS = "embedding", "pixels"
COSINE = "cosine"
"""Of stores in half precision: of some rows' embedding to that in fp32, NaN where it was not computed."""
STATE = "state"


def store_format(manifest: Mapping[str, Any]) -> int:
    return WIDE_FORMAT if manifest.get("dtypes") else FORMAT


def field_dtype(manifest: Mapping[str, Any], field: str) -> str:
    """Of a feature array: one of `DTYPES`."""
    return manifest.get("dtypes", {}).get(field, FLOAT16)


def field_dtypes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Of every feature array."""
    return {name: field_dtype(manifest, name) for name in manifest["fields"]}


def field_bytes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a row of each feature array, all views."""
    views = manifest["views"]["count"]
    return {
        name: np.dtype(field_dtype(manifest, name)).itemsize * views * math.prod(shape)
        for name, shape in manifest["fields"].items()
    }


def chunk_rows(row_bytes: int, rows: int) -> int:
    """Rows a chunk, so that it is 8–16 MiB (all of them when there are fewer rows)."""
    fitting = max(1, CHUNK_BYTES // row_bytes)
    return min(rows, 1 << (fitting.bit_length() - 1))


class ArrayLayout(NamedTuple):
    """Of one array: the shape of a row, the dtype, and how many rows a chunk holds."""

    tail: tuple[int, ...]
    dtype: str
    chunk_rows: int


def array_layout(manifest: Mapping[str, Any]) -> dict[str, ArrayLayout]:
    """Every array of the store that `manifest` describes; `STATE` is the last."""
    unit, views = int(manifest["chunk_rows"]), int(manifest["views"]["count"])
    parameters = len(manifest["views"].get("parameters", PARAMETERS))
    narrow = {
        "label": ((), "int64"),
        "sample_id": ((), "string"),
        "content": ((16,), "uint8"),
        "view": ((views, parameters), "float32"),
        "reason": ((), "string"),
        **({COSINE: ((), "float32")} if "checked" in manifest.get("extraction", {}) else {}),
        STATE: ((), "uint8"),
    }
    wide = manifest["wide_chunk_rows"]
    arrays = {
        name: ArrayLayout((views, *shape), field_dtype(manifest, name), wide[name])
        for name, shape in manifest["fields"].items()
    }
    if manifest.get("pixels"):
        arrays |= {PIXELS: ArrayLayout((), "variable_length_bytes", wide[PIXELS])}
        arrays |= {"image_size": ArrayLayout((2,), "int32", unit)}
    return arrays | {name: ArrayLayout(tail, dtype, unit) for name, (tail, dtype) in narrow.items()}


def dimension_names(name: str, count: int) -> list[str]:
    """Of an array's axes, for readers such as xarray: those of one name are of one length in the whole store."""
    own = {"content": ["bytes"], "view": ["views", "parameters"], "image_size": ["sides"]}
    axes = own.get(name, ["views", *(f"{name}_axis{i}" for i in range(1, count - 1))])
    return ["rows", *axes][:count]


def wide_arrays(manifest: Mapping[str, Any]) -> list[str]:
    """The arrays that may have smaller chunks than the unit: features, and images that are kept."""
    return [*manifest["fields"], *([PIXELS] if manifest.get("pixels") else [])]


def wide_chunk_rows(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Rows in a chunk of each wide array: those of the unit, or fewer, so that no chunk is over 16 MiB."""
    unit, rows, row_bytes = manifest["chunk_rows"], manifest["corpus"]["rows"], field_bytes(manifest)
    if manifest.get("pixels"):
        row_bytes[PIXELS] = KeptPixels(**manifest["pixels"]).typical_bytes
    return {name: min(unit, chunk_rows(width, rows)) for name, width in row_bytes.items()}


def chunk_name(layout: Mapping[str, ArrayLayout], name: str, chunk: int) -> str:
    """The file that holds a chunk of an array, relative to the store."""
    return "/".join([name, "c", str(chunk), *["0"] * len(layout[name].tail)])

"""Which arrays a store has, and how each is cut into chunks. `docs/store.md` says it in words."""

from collections.abc import Mapping
from typing import NamedTuple

METADATA, UNFINISHED = "zarr.json", "unfinished.npz"
"""Files of a store beside its chunks: of the group and of every array; and a unit in progress."""
CHECKSUM_BYTES = 4
"""Of crc32c, at the end of every chunk file."""
FLOAT16 = "float16"
DTYPES = (FLOAT16, "float32")
"""That a field of numbers may have. The manifest's `dtypes` names those that are not float16, and is missing where all are."""
INTEGERS = ("uint8", "int16", "int32", "int64")
"""That a field of whole numbers may have, which are kept as they are."""
PENDING, OK, FAILED = 0, 1, 2
CHUNK_BYTES = 16 * 2**20
"""No feature chunk is larger; its rows are the largest power of two that fits, so none is under half of it."""
EMBEDDING, LOGITS, PIXELS = "embedding", "logits", "pixels"
HIDDEN, LENGTH, TOKEN_LOGITS = "hidden", "length", "token_logits"
"""Of sequences, (T, D), () and (T, C): `length` positions of the others are filled, the rest are zeros and mean nothing."""
DENSE = "dense"
"""Logits (C, h, w): a map of the image a class."""
COSINE = "cosine"
"""Of stores in half precision: of some rows' embedding to that in fp32, NaN where it was not computed."""
STATE = "state"


def chunk_rows(row_bytes: int, rows: int) -> int:
    """Rows a chunk, so that it is 8–16 MiB (all of them when there are fewer rows)."""
    fitting = max(1, CHUNK_BYTES // row_bytes)
    return min(rows, 1 << (fitting.bit_length() - 1))


class ArrayLayout(NamedTuple):
    """Of one array: the shape of a row, the dtype, and how many rows a chunk holds."""

    tail: tuple[int, ...]
    dtype: str
    chunk_rows: int


def dimension_names(name: str, count: int) -> list[str]:
    """Of an array's axes, for readers such as xarray: those of one name are of one length in the whole store."""
    own = {"content": ["bytes"], "view": ["views", "parameters"], "image_size": ["sides"]}
    axes = own.get(name, ["views", *(f"{name}_axis{i}" for i in range(1, count - 1))])
    return ["rows", *axes][:count]


def chunk_name(layout: Mapping[str, ArrayLayout], name: str, chunk: int) -> str:
    """The file that holds a chunk of an array, relative to the store."""
    return "/".join([name, "c", str(chunk), *["0"] * len(layout[name].tail)])

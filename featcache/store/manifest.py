"""What a manifest must be before anything in it becomes a file's name or a size in memory. A store may be a stranger's."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from featcache.inputs.kept import KeptPixels
from featcache.store.layout import COSINE, DTYPES, EMBEDDING, PIXELS, STATE, field_bytes, wide_arrays

_NAME = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # files that Windows does not make
_TAKEN = {"label", "sample_id", "content", "view", "reason", STATE, PIXELS, "image_size", COSINE} | {
    "zarr.json", "unfinished.npz", "manifest", "class_name", "image_path", "__metadata__", "c", "rows", "views",
}  # fmt: skip
"""Names, in lower case, that mean something else in a store or in an export."""
MOST_ROWS, MOST_UNITS, MOST_ROW_BYTES = 10**11, 2**22, 2**31


def refuse_field_name(name: str) -> None:
    """A field's name becomes a folder of the store, and a file, column or tensor of an export.

    Raises:
        ValueError: it is no plain name, or means something else there.
    """
    if not (isinstance(name, str) and len(name) <= 80 and _NAME.fullmatch(name)):
        raise ValueError(f"a field is named {name!r}; its name may have letters, digits, _, and . or - between them")
    if name.lower() in _TAKEN or _DEVICE.fullmatch(name.lower()):
        raise ValueError(f"a field is named {name!r}, which means something else in a store; give it another name")


def refuse_manifest(manifest: Mapping[str, Any]) -> None:
    """Whatever is no manifest of a store.

    Raises:
        ValueError: what is wrong, without the store's path.
        KeyError, TypeError, AttributeError: something is missing, or of another kind altogether.
    """
    fields, rows, unit = manifest["fields"], manifest["corpus"]["rows"], manifest["chunk_rows"]
    for name in fields:
        refuse_field_name(name)
    if len({name.lower() for name in fields}) != len(fields):
        raise ValueError(f"fields that differ in upper and lower case alone: {', '.join(fields)}")
    if EMBEDDING not in fields or len(fields[EMBEDDING]) != 1:
        raise ValueError("no field `embedding` that is a vector")
    sides = [side for shape in fields.values() for side in shape]
    sizes = [rows, unit, manifest["views"]["count"], *sides, *manifest["wide_chunk_rows"].values()]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError("a size that is no whole number above 0")
    if unknown := {*manifest.get("dtypes", {}).values()} - {*DTYPES} or {*manifest.get("dtypes", {})} - {*fields}:
        raise ValueError(f"dtypes name {unknown.pop()!r}")
    if manifest.get("pixels"):
        KeptPixels(**manifest["pixels"])
    if missing := {*wide_arrays(manifest)} - {*manifest["wide_chunk_rows"]}:
        raise ValueError(f"no chunk length of {missing.pop()}")
    for name in wide_arrays(manifest):
        if (per_chunk := manifest["wide_chunk_rows"][name]) > unit or (unit % per_chunk and unit < rows):
            raise ValueError(f"chunks of {per_chunk} rows of {name}, units of {unit}")
    if rows > MOST_ROWS or rows / unit > MOST_UNITS or max(field_bytes(manifest).values()) > MOST_ROW_BYTES:
        raise ValueError(f"sizes that no store has ({rows:,} rows in units of {unit:,}, fields {fields})")
    names = manifest["corpus"]["class_names"]
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise ValueError("class names that are no list of text")
    for key in ("name", "fingerprint"):
        if not isinstance(manifest["encoder"][key], str):
            raise ValueError(f"an encoder's {key} that is no text")
    made, passed = manifest.get("extraction") or {}, manifest["corpus"].get("passed_over") or {}
    for what, record in (("extraction", made), ("preprocess", manifest["encoder"].get("preprocess") or {})):
        if not isinstance(record, dict):
            raise ValueError(f"{what} that is no record")
    if not isinstance(made.get("precision", ""), str):
        raise ValueError("a precision that is no text")
    if not (isinstance(passed, dict) and all(type(count) is int for count in passed.values())):
        raise ValueError("files passed over that are no counts")
    if not all(isinstance(parameter, str) for parameter in manifest["views"].get("parameters", [])):
        raise ValueError("parameters of views that are no text")
    if (sealed := manifest.get("sealed")) is not None and not isinstance(sealed["digest"], str):
        raise ValueError("a seal without a digest")


def refuse_array(array: Any, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> None:
    """A Zarr array that is not the one the manifest describes.

    Raises:
        ValueError: what differs.
    """
    kinds = {"string": "T", "variable_length_bytes": "O"}
    same = array.dtype.kind == kinds[dtype] if dtype in kinds else array.dtype == np.dtype(dtype)
    written = [codec.to_dict() for codec in array.metadata.codecs]
    codecs = {str(codec["name"]) for codec in written}
    if array.shape != shape or array.chunks != chunks or not same:
        raise ValueError(f"{array.dtype} {array.shape} in chunks of {array.chunks}, not {dtype} {shape} in {chunks}")
    if codecs - {"bytes", "crc32c", "vlen-utf8", "vlen-bytes"}:
        raise ValueError(f"codecs {', '.join(sorted(codecs))}")
    if any((codec.get("configuration") or {}).get("endian", "little") != "little" for codec in written):
        raise ValueError("bytes that are not little-endian")

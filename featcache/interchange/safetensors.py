"""safetensors: one file, a tensor an array; the strings are in its metadata."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from featcache.interchange import Format
from featcache.interchange._arrays import STRINGS, Arrays, Checksums, Source, layout, stored
from featcache.interchange._foreign import of_arrays
from featcache.interchange._own import manifest_text, parse_manifest
from featcache.store import FeatureStore

SAFETENSORS_HEADER = 100_000_000
"""Bytes of the longest header that the safetensors library opens."""


class Safetensors(Format):
    reads = "a .safetensors with `embedding`"

    def recognises(self, path: Path, head: bytes) -> bool:
        return head[8:] == b"{"

    def write(self, store: FeatureStore, units: Iterator[Arrays], out: Path, *, as_is: bool) -> None:
        reasons = {str(row): text for row, text in enumerate(store.read("reason").tolist()) if text}
        strings = {
            "sample_id": json.dumps(store.sample_ids.tolist(), ensure_ascii=False),
            "reason": json.dumps(reasons, ensure_ascii=False),
        }
        tensors: dict[str, dict[str, Any]] = {}
        end = 0
        codes = {
            "int64": "I64", "int32": "I32", "int16": "I16", "uint8": "U8", "float32": "F32", "float16": "F16",
        }  # fmt: skip
        for name, (shape, dtype) in stored(store).items():
            begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
            tensors[name] = {"dtype": codes[dtype.name], "shape": shape, "data_offsets": [begin, end]}

        def header(crc32c: Mapping[str, str]) -> bytes:
            metadata = {"featcache": manifest_text(store.manifest, "safetensors", crc32c), **strings}
            text = json.dumps({"__metadata__": metadata, **tensors}, ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            return len(text).to_bytes(8, "little") + text

        placeholder = header(dict.fromkeys(sorted([*tensors, *STRINGS]), "0" * 8))
        if len(placeholder) - 8 > SAFETENSORS_HEADER:
            raise ValueError(
                f"{store.path}: its sample ids take more than the {SAFETENSORS_HEADER:,} bytes that a safetensors header "
                "may have; use --format parquet or npy"
            )
        sums = Checksums()
        with out.open("wb") as file, contextlib.ExitStack() as opened:
            file.write(placeholder)
            file.flush()
            places = {name: opened.enter_context(out.open("rb+")) for name in tensors}
            for name, place in places.items():
                place.seek(len(placeholder) + tensors[name]["data_offsets"][0])
            for unit in units:
                sums.update(unit)
                for name, place in places.items():
                    place.write(unit[name].tobytes())
            finished = header(sums.to_dict())
            assert len(finished) == len(placeholder)
            file.seek(0)
            file.write(finished)

    def read(self, path: Path) -> Source:
        try:
            file: Any = safe_open(path, framework="pt")
            arrays: dict[str, Any] = {name: _Tensor(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); write it again") from None
        metadata = file.metadata() or {}
        manifest = parse_manifest(metadata["featcache"], path) if "featcache" in metadata else None
        if "embedding" not in arrays:
            raise ValueError(f"{path}: no tensor `embedding`, only {', '.join(arrays)}; save it under that name")
        wanted = layout(manifest) if manifest else ("embedding", "label")
        arrays = {name: array for name, array in arrays.items() if name in wanted}
        try:
            if "sample_id" in metadata:
                arrays["sample_id"] = np.array(json.loads(metadata["sample_id"]), dtype=object)
            if manifest:
                arrays["reason"] = np.full(manifest.corpus.rows, "", dtype=object)
                for row, reason in json.loads(metadata["reason"]).items():
                    arrays["reason"][int(row)] = reason
        except (ValueError, KeyError, IndexError, AttributeError):
            raise ValueError(f"{path}: its sample_id or reason metadata is damaged; export or write it again") from None
        return of_arrays(path, arrays, manifest)


class _Tensor:
    """A tensor in a safetensors file, read by slices; bfloat16, which numpy lacks, as float32."""

    def __init__(self, stored: Any):
        codes = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I64": "int64"}
        self._stored, self.shape = stored, tuple(stored.get_shape())
        self.dtype = codes.get(stored.get_dtype(), stored.get_dtype())

    def __getitem__(self, rows: slice) -> np.ndarray:
        tensor = self._stored[rows]
        return np.asarray((tensor.float() if self.dtype == "bfloat16" else tensor).numpy())

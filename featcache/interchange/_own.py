"""What `export_store` wrote: the manifest that it carries, and its units."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featcache.interchange._arrays import STRINGS, Arrays, layout
from featcache.layout import FORMAT, OK, STATE, WIDE_FORMAT, store_format


def manifest_text(manifest: Mapping[str, Any], format: str, crc32c: Mapping[str, str]) -> str:
    return json.dumps({**manifest, "export": {"format": format, "crc32c": crc32c}}, ensure_ascii=False, indent=1)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    return parse_manifest(path.read_text(encoding="utf-8"), path) if path.is_file() else None


def parse_manifest(text: str, path: Path) -> dict[str, Any]:
    """A store's manifest as `create_store` wants it; under `export`, the checksums of the exported arrays."""
    try:
        manifest = json.loads(text)
        version, _ = manifest.pop("format"), manifest.pop("sealed")
        if manifest.get("pixels"):
            manifest["pixels"] = None  # no export holds them
        sizes = [manifest["corpus"]["rows"], manifest["views"]["count"], manifest["chunk_rows"]]
        sides = [side for shape in manifest["fields"].values() for side in shape]
        whole = all(type(size) is int and size > 0 for size in [*sizes, *sides, *manifest["wide_chunk_rows"].values()])
        # A field becomes the name of a file.
        whole = whole and all(name.isidentifier() for name in manifest["fields"]) and "embedding" in manifest["fields"]
        whole = whole and not set(manifest["fields"]) & {*layout({**manifest, "fields": {}}), *STRINGS}
        whole = whole and set(manifest["fields"]) <= set(manifest["wide_chunk_rows"])
        whole = whole and isinstance(manifest["export"]["crc32c"], dict)
        whole = whole and bool(manifest["encoder"]["fingerprint"]) and bool(manifest["encoder"]["name"])
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path}: the manifest of the export is damaged; export again, or take it away and give --encoder"
        )
    if version != store_format(manifest):
        raise ValueError(
            f"{path}: of store format {version}, this featcache reads {FORMAT} and {WIDE_FORMAT}; export it with this one"
        )
    return manifest


def own_unit(block: Arrays, rows: range, manifest: Mapping[str, Any], path: Path) -> Arrays:
    """A unit as it was in the store: every array, its dtype and shape, or the export is not whole."""
    unit = {STATE: np.full(len(rows), OK, np.uint8), "reason": np.full(len(rows), "", dtype=object), **block}
    for name, (tail, dtype) in layout(manifest).items():
        shape = (len(rows), *tail)
        if name not in unit or unit[name].dtype != dtype or unit[name].size != np.prod(shape):
            found = f"is {unit[name].dtype} {unit[name].shape}" if name in unit else "is missing"
            raise ValueError(f"{path}: {name} {found}, not {dtype} {shape} as this featcache has it; export again")
        unit[name] = unit[name].reshape(shape)
    if "sample_id" not in unit:
        raise ValueError(f"{path}: sample_id is missing; export again")
    return unit

"""What `export_store` wrote: the manifest that it carries, and its units."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from featcache.interchange._arrays import Arrays, layout
from featcache.store.from_arrays import checked_labels, refuse_not_finite
from featcache.store.layout import FAILED, OK, STATE
from featcache.store.manifest import FORMAT, WHOLE_FORMAT, Manifest


def manifest_text(manifest: Manifest, format: str, crc32c: Mapping[str, str]) -> str:
    return json.dumps(
        {**manifest.to_json(), "export": {"format": format, "crc32c": crc32c}}, ensure_ascii=False, indent=1
    )


def read_manifest(folder: Path) -> Manifest | None:
    path = folder / "manifest.json"
    return parse_manifest(path.read_text(encoding="utf-8"), path) if path.is_file() else None


def parse_manifest(text: str, path: Path) -> Manifest:
    """The manifest of the store that was exported, and under `export` in `other`, the checksums of the arrays."""
    try:
        record = json.loads(text)
        version = record["format"]
        if record.get("pixels"):
            record["pixels"] = None  # no export holds them
        manifest = Manifest.from_json(record)
        whole = isinstance(manifest.other["export"]["crc32c"], dict) and manifest.sealed is not None
        whole = whole and bool(manifest.encoder.fingerprint) and bool(manifest.encoder.name)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path}: the manifest of the export is damaged; export again, or take it away and give --encoder"
        )
    if version != manifest.format:
        raise ValueError(
            f"{path}: of store format {version}, this featcache reads {FORMAT} to {WHOLE_FORMAT}; export it with this one"
        )
    return manifest


def own_unit(block: Arrays, rows: range, manifest: Manifest, path: Path) -> Arrays:
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


def refuse_unit(unit: Arrays, rows: range, manifest: Manifest, path: Path) -> None:
    """What no store would hold, though the checksums are right.

    Raises:
        ValueError: it does.
    """
    checked_labels(path, unit["label"], len(rows), manifest.corpus.class_names)
    if not np.isin(unit[STATE], (OK, FAILED)).all():
        raise ValueError(f"{path}: state holds other numbers than {OK} and {FAILED}; export again")
    for name in manifest.fields:
        flat = unit[name].reshape(len(rows), -1)
        refuse_not_finite(path, name, flat[unit[STATE] == OK], np.flatnonzero(unit[STATE] == OK) + rows.start)

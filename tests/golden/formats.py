"""Of what `record.py` makes, the part that is the same on every machine: ids, labels, views, kept images, layouts,
manifests, flags, the keys of results, names of files. Features and weights are not: they are a processor's own bits.

    python tests/golden/formats.py    # writes expected.json anew: after a change of format that is meant
"""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
OF_THE_MACHINE = ("versions", "extraction", "fingerprint", "encoder_fingerprint", "teacher", "store_digest")
"""Keys of manifests, configurations and records: how and by what it was computed here, and digests of weights."""
EXACT = ("label", "sample_id", "content", "reason", "state", "image_size", "pixels")
"""Arrays whose bytes are the same everywhere; pixels where they are not JPEG."""
CHECKSUM = 4  # bytes at the end of a chunk


def without(value: Any) -> Any:
    """JSON values without what is the machine's."""
    if isinstance(value, dict):
        kept = {key: without(each) for key, each in value.items() if key not in OF_THE_MACHINE}
        if "sealed" in kept:
            kept["sealed"].pop("digest", None)  # over the features too
        return kept
    return [without(each) for each in value] if isinstance(value, list) else value


def keys(value: Any) -> Any:
    """JSON values as their keys and types."""
    if isinstance(value, dict):
        return {key: keys(each) for key, each in value.items() if key not in OF_THE_MACHINE}
    return [keys(value[0])] if isinstance(value, list) and value else type(value).__name__


def of_store(folder: Path, digests: dict[str, str]) -> dict[str, Any]:
    group = json.loads((folder / "zarr.json").read_text())
    manifest = without(group["attributes"]["featcache"])
    arrays, raw = {}, (manifest.get("pixels") or {}).get("format") != "jpeg"
    for metadata in sorted(folder.glob("*/zarr.json")):
        name, array = metadata.parent.name, json.loads(metadata.read_text())
        codecs = [codec["name"] for codec in array["codecs"]]
        grid = array["chunk_grid"]["configuration"]["chunk_shape"]
        chunks = {}
        for path in sorted(metadata.parent.glob("c/**/*")):
            if not path.is_file():
                continue
            relative = path.relative_to(folder).as_posix()
            exact = name in EXACT and (raw or name != "pixels")
            chunks[relative] = digests[relative] if exact else "" if name == "pixels" else path.stat().st_size
        arrays[name] = {
            "shape": array["shape"],
            "type": array["data_type"],
            "chunk": grid,
            "codecs": codecs,
            "dimensions": array.get("dimension_names"),
            "chunks": chunks,
        }
        if name == "view":
            data = b"".join((folder / chunk).read_bytes()[:-CHECKSUM] for chunk in chunks)
            # In whole px: the last bit of a crop's box is that of the machine's logarithm.
            arrays[name]["values"] = [round(value) for value in struct.unpack(f"<{len(data) // 4}f", data)]
    return {"manifest": manifest, "arrays": arrays}


def of_safetensors(path: Path) -> dict[str, Any]:
    """Names, types and shapes; of the notes, their keys."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    notes = sorted(header.pop("__metadata__", {}))
    return {"tensors": {name: [each["dtype"], each["shape"]] for name, each in header.items()}, "notes": notes}


def of_file(path: Path, said: Any) -> Any:
    """Of a file and what `record.py` read in it."""
    if path.suffix == ".safetensors":
        return of_safetensors(path)
    if path.suffix == ".toml" or path.name in ("student.json", "manifest.json"):
        return without(said)
    if path.suffix in (".json", ".jsonl"):
        return keys(said)
    if path.suffix == ".md":
        return [line for line in said if line.startswith("#")]
    return None


def artefacts(record: dict[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    for name, relative in record[""].items():
        path, made = folder / relative, record[name]
        if (path / "zarr.json").exists():
            yield name, of_store(path, made["files"])
        elif path.is_dir():
            yield name, {file: of_file(path / file, made["content"].get(file)) for file in made["files"]}
        else:
            yield name, of_file(path, made.get("content", {}).get(path.name))
    for name, made in record.items():
        if name.startswith("help/"):
            text = "\n".join(made["content"][""]["out"])
            yield name, sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)))
        elif name.endswith("(said)"):
            yield name, made["content"][""].get("code", made["content"][""])


def formats(folder: Path) -> dict[str, Any]:
    """Make it all in an empty folder, in a process of its own, and look at it."""
    out = folder / "record.json"
    (folder / "made").mkdir()
    command = [sys.executable, str(HERE / "record.py"), str(out), "--folder", str(folder / "made"), "--suite"]
    environ = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL, env=environ)
    return dict(artefacts(json.loads(out.read_text()), folder / "made"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = formats(Path(folder))
    EXPECTED.write_text(json.dumps(found, separators=(",", ":"), ensure_ascii=False).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()

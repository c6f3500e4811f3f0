"""npy: a folder with a file an array."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from featcache.interchange import Format
from featcache.interchange._arrays import STRINGS, Arrays, Checksums, Source, layout, stored
from featcache.interchange._foreign import of_arrays
from featcache.interchange._own import manifest_text, read_manifest
from featcache.store import FeatureStore


class Npy(Format):
    folder = True
    reads = "a .npy of (N, D), a folder with embedding.npy"

    def recognises(self, path: Path, head: bytes) -> bool:
        return head.startswith(b"\x93NUMPY") or (path / "embedding.npy").is_file()

    def write(self, store: FeatureStore, units: Iterator[Arrays], out: Path, *, as_is: bool) -> None:
        out.mkdir()
        sums = Checksums()
        with contextlib.ExitStack() as opened:
            files = {name: opened.enter_context((out / f"{name}.npy").open("wb")) for name in stored(store)}
            files |= {name: opened.enter_context((out / f"{name}.txt").open("wb")) for name in STRINGS}
            for name, (shape, dtype) in stored(store).items():
                write_header(files[name], dtype, shape)
            for unit in units:
                sums.update(unit)
                for name, array in unit.items():
                    files[name].write(_lines(array) if name in STRINGS else array.tobytes())
        (out / "manifest.json").write_text(manifest_text(store.manifest, "npy", sums.to_dict()), encoding="utf-8")

    def read(self, path: Path) -> Source:
        """One file of (N, D), or a folder of files of the same rows."""
        if path.is_file():
            return of_arrays(path, {"embedding": load(path)}, None)
        manifest = read_manifest(path)
        arrays: dict[str, Any] = {}
        for name in layout(manifest) if manifest else ("embedding", "label"):
            if (path / f"{name}.npy").is_file():
                arrays[name] = load(path / f"{name}.npy")
        for name in STRINGS:
            if (path / f"{name}.txt").is_file():
                arrays[name] = _read_lines(path / f"{name}.txt", escaped=manifest is not None)
        return of_arrays(path, arrays, manifest)


def write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)


def _lines(texts: Iterable[str]) -> bytes:
    escaped = (text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for text in texts)
    return "".join(f"{text}\n" for text in escaped).encode()


def load(path: Path) -> np.ndarray:
    try:
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        if "object" in str(error):
            raise ValueError(
                f"{path}: holds pickled objects, which are never opened; save it again as an array of floats or numbers"
            ) from None
        raise ValueError(f"{path}: not a whole .npy with rows ({error}); save it again") from None


def _read_lines(path: Path, *, escaped: bool) -> np.ndarray:
    try:
        with path.open(encoding="utf-8", newline="\n" if escaped else None) as file:
            lines = [line.removesuffix("\n") for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text ({error.reason}); write it again as UTF-8") from None
    if escaped:
        plain = {r"\\": "\\", r"\n": "\n", r"\r": "\r"}
        lines = [re.sub(r"\\[\\nr]", lambda found: plain[found[0]], line) for line in lines]
    return np.array(lines, dtype=object)

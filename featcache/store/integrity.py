"""Whether a store is as it was written: a checksum in every chunk file, and one digest over the whole store."""

import hashlib
from collections.abc import Mapping

import google_crc32c

from featcache.store.files import Files
from featcache.store.layout import METADATA, STATE, UNFINISHED, chunk_name
from featcache.store.manifest import Manifest

UNSEALED = "0" * 32
"""Stands for the digest in the text that the digest is over."""


def find_damage(files: Files, manifest: Manifest) -> list[tuple[int | str, str]]:
    """(the unit's number, or the file) and what is wrong with it. Of a unit that is pending, nothing is."""
    found, layout, sealed = files.listing(), manifest.layout, manifest.sealed is not None
    rows, unit_rows = manifest.corpus.rows, manifest.chunk_rows
    units = range(-(-rows // unit_rows))
    pending = {unit for unit in units if not sealed and chunk_name(layout, STATE, unit) not in found}
    expected = {METADATA} | (set() if sealed else {UNFINISHED})
    damage: list[tuple[int | str, str]] = []
    for name, (_, _, per_chunk) in layout.items():
        metadata = f"{name}/{METADATA}"
        expected.add(metadata)
        if metadata not in found:
            damage.append((metadata, f"{metadata}: missing"))
        chunks = {chunk_name(layout, name, chunk): chunk * per_chunk for chunk in range(-(-rows // per_chunk))}
        expected |= chunks.keys()
        done = [file for file, first in chunks.items() if first // unit_rows not in pending]
        contents = files.read_afresh([file for file in [metadata, *done] if file in found])
        if metadata in found:
            next(contents)
        for file in done:
            first = chunks[file]
            where = f"{name} chunk {first // per_chunk} (rows {first}–{min(first + per_chunk, rows) - 1})"
            if file not in found:
                damage.append((first // unit_rows, f"{where}: missing"))
            elif not checksum_holds(next(contents)):
                damage.append((first // unit_rows, f"{where}: checksum does not match its bytes"))
    leftovers = {file for file in found if sealed or not file.endswith(".partial")}
    damage += [(file, f"{file}: not part of the store") for file in sorted(leftovers - expected)]
    if manifest.sealed and not damage:
        digest = manifest.sealed.digest or "none"
        root = (files.root / METADATA).read_bytes().replace(digest.encode(), UNSEALED.encode())
        if digest_of(files, root, {}) != digest:
            damage.append((METADATA, "zarr.json, of the group or of an array: changed since the store was sealed"))
    return damage


def digest_of(files: Files, root: bytes, known: Mapping[str, bytes]) -> str:
    """Over the group's zarr.json (with `UNSEALED` for the digest), the arrays' zarr.json, and the size and checksum
    trailer of every chunk: as good as over all bytes, without reading them. `known`: the trailers of some chunks; the others are read."""
    digest = hashlib.blake2b(root, digest_size=16)
    sizes = {file: size for file, size in files.listing().items() if file != METADATA}
    chunks = {file: size for file, size in sizes.items() if not file.endswith(METADATA)}
    tails = {**known, **files.tails({file: size for file, size in chunks.items() if file not in known})}
    for file in sorted(sizes, key=lambda file: file.split("/")):
        digest.update(f"\0{file}\0{sizes[file]}\0".encode())
        digest.update(tails[file] if file in tails else files.fetch(file).read_bytes())
    return digest.hexdigest()


def checksum_holds(chunk: bytes) -> bool:
    """Whether a chunk file's bytes are those that were written."""
    return len(chunk) > 4 and int.from_bytes(chunk[-4:], "little") == google_crc32c.value(chunk[:-4])

"""A store, written: created empty, filled unit by unit, sealed, and mended."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from featcache.disk.durable import appearing, sync_file, sync_folders, whole_file
from featcache.store.files import files_at, looks_like_store
from featcache.store.integrity import UNSEALED, digest_of, find_damage
from featcache.store.layout import METADATA, STATE, UNFINISHED, chunk_name, dimension_names
from featcache.store.manifest import Manifest, Seal
from featcache.store.read import FeatureStore, unstable_names_allowed
from featcache.store.remote import checksum_in


def create_store(path: str | os.PathLike[str], manifest: Manifest, *, overwrite: bool = False) -> "StoreWriter":
    """Create an empty, unsealed store that holds `manifest` and no rows yet.

    The store appears under its name in one step, complete with its arrays' metadata.

    Raises:
        ValueError: something is already there (and, with `overwrite`, is not a store).
    """
    files = files_at(path)
    if files.taken():
        with contextlib.suppress(FileNotFoundError):
            files.open()
        is_store = looks_like_store(files.root)
        if not (overwrite and is_store):
            raise ValueError(f"{path}: already exists{'' if is_store else ' and is not a store'}; choose another --out")
    metadata = empty_store(manifest.changed(sealed=None))
    with appearing(files.root, folder=True, making_room=files.remove_all) as building:
        for file, text in metadata.items():
            (building / file).parent.mkdir(parents=True, exist_ok=True)
            (building / file).write_bytes(text)
    files.push(*(file for file in metadata if file != METADATA))
    files.push(METADATA)  # last: what has none is no store yet
    return StoreWriter(path)


def empty_store(manifest: Manifest) -> dict[str, bytes]:
    """What the files of a store hold that has no chunk yet: the zarr.json of the group and of every array."""
    held: dict[str, zarr.core.buffer.Buffer] = {}
    group = zarr.create_group(MemoryStore(held), attributes={"featcache": manifest.to_json()})
    for name, (tail, dtype, per_chunk) in manifest.layout.items():
        shape, chunks = (manifest.corpus.rows, *tail), (per_chunk, *tail)
        with unstable_names_allowed():
            group.create_array(
                name, shape=shape, chunks=chunks, dtype=dtype, compressors=[Crc32cCodec()], filters=None,
                dimension_names=dimension_names(name, len(shape)),
            )  # fmt: skip
    return {file: buffer.to_bytes() for file, buffer in held.items()}


class StoreWriter(FeatureStore):
    """A store that this process writes, and reads. There is one writer at a time: see `files.only_writer`."""

    # -- units --------------------------------------------------------------------------------------------

    def write_chunk(self, chunk: int, arrays: Mapping[str, Shaped[np.ndarray, "rows ..."]]) -> dict[str, bytes]:
        """Write one whole unit, durably; when this returns it survives a power cut.

        Args:
            chunk: its number.
            arrays: every array of the store, with this unit's rows; but for those that `write_rows` has written.

        Returns:
            For `seal`: the checksum, 4 bytes of crc32c, that each file ends with.
        """
        first = self.rows_of(chunk).start
        tails: dict[str, bytes] = {}
        for name in arrays:
            tails |= self._write(name, first, arrays[name]) if name != STATE else {}
        self.files.push(*tails)
        return tails | self.write_rows(STATE, first, arrays[STATE])  # last

    def write_rows(self, name: str, first: int, values: Shaped[np.ndarray, "rows ..."]) -> dict[str, bytes]:
        """Write whole chunks of one array, durably, from row `first` on. Returns as `write_chunk`."""
        tails = self._write(name, first, values)
        self.files.push(*tails)
        self.forget()
        return tails

    def _write(self, name: str, first: int, values: np.ndarray) -> dict[str, bytes]:
        """`write_rows` to this machine's disk."""
        assert not self.sealed
        per_chunk, stop = self.layout[name].chunk_rows, first + len(values)
        assert first % per_chunk == 0
        assert stop % per_chunk == 0 or stop == len(self)
        self.array(name)[first:stop] = values
        files = [chunk_name(self.layout, name, chunk) for chunk in range(first // per_chunk, -(-stop // per_chunk))]
        for file in files:
            sync_file(self.files.root / file)
            sync_folders(self.files.root / file, root=self.files.root)
        return {file: checksum_in(self.files.root / file) for file in files}

    # -- a unit in progress -------------------------------------------------------------------------------

    def save_unfinished(self, write: Callable[[IO[bytes]], None]) -> None:
        """Keep, in one step, what `write` writes of a unit in progress."""
        with whole_file(self.files.root / UNFINISHED, alone=True) as file:
            write(file)
        self.files.push(UNFINISHED)

    def load_unfinished(self) -> Path:
        """The file that `save_unfinished` left. Raises FileNotFoundError when there is none."""
        return self.files.fetch(UNFINISHED)

    def discard_unfinished(self) -> None:
        self.files.remove(UNFINISHED)

    # -- the whole ----------------------------------------------------------------------------------------

    def seal(self, manifest: Manifest | None = None, *, tails: Mapping[str, bytes] | None = None) -> None:
        """Close the store to writers: row counts and a digest of every byte go into the manifest.

        Args:
            manifest: what the store says of itself, where more is known than when it was created.
            tails: checksums that `write_chunk` and `write_rows` returned; those of other files are read.
        """
        assert not self.pending_chunks()
        self.files.remove(UNFINISHED, *(file for file in self.files.listing() if file.endswith(".partial")))
        seal = Seal(rows=len(self), ok=len(self.ok), failed=len(self.failed), digest=UNSEALED)
        manifest = (manifest or self.manifest).changed(sealed=seal)
        text = self._group_text(manifest)
        # Where xarray looks first, and warns when it is missing; on one line, for the manifest is what people read.
        arrays = {name: json.loads(self.files.fetch(f"{name}/{METADATA}").read_bytes()) for name in sorted(self.layout)}
        together = json.dumps({"kind": "inline", "must_understand": False, "metadata": arrays})
        group = text.removesuffix("\n}")
        whole = f'{group},\n  "consolidated_metadata": {together}\n}}'.encode()
        digest = digest_of(self.files, whole, tails or {})
        self._write_group(whole.replace(UNSEALED.encode(), digest.encode()))
        self.manifest = manifest.changed(sealed=seal.changed(digest=digest))
        self.forget()

    def mend(self) -> list[str]:
        """Make damaged units pending again, so that extraction repairs them and only them; returns what was wrong.

        Left-over files go, and arrays' metadata is written anew.
        """
        damage = find_damage(self.files, self.manifest)
        if not damage:
            return []
        if self.sealed:
            self.manifest = self.manifest.changed(sealed=None)
            self._write_group(self._group_text(self.manifest).encode())
        for where, _ in damage:
            if isinstance(where, int):
                self.files.remove(chunk_name(self.layout, STATE, where))
            elif not where.endswith(METADATA):
                self.files.remove(where)  # left over
        metadata = {file: text for file, text in empty_store(self.manifest).items() if file != METADATA}
        for file, text in metadata.items():
            place = self.files.root / file
            place.parent.mkdir(exist_ok=True)
            with whole_file(place, alone=True) as opened:
                opened.write(text)
            sync_folders(place, root=self.files.root)
        self.files.push(*metadata)
        self.forget()
        return [what for _, what in damage]

    def _group_text(self, manifest: Manifest) -> str:
        """The group's zarr.json, of a store that is not sealed."""
        record = json.loads((self.files.root / METADATA).read_bytes())
        record["attributes"]["featcache"] = manifest.to_json()
        record.pop("consolidated_metadata", None)
        return json.dumps(record, indent=2)

    def _write_group(self, text: bytes) -> None:
        with whole_file(self.files.root / METADATA, alone=True) as file:
            file.write(text)
        self.files.push(METADATA)

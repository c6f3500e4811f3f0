"""clip-retrieval: a folder of embeddings in parts, and what they are of beside them."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from featcache.geometry import unit
from featcache.interchange import Format
from featcache.interchange._arrays import Arrays, Checksums, Source
from featcache.interchange._arrow import DESCRIBING, describe, from_table, pa, pq, require_pyarrow, to_table, whole
from featcache.interchange._foreign import check_embeddings, of_arrays
from featcache.interchange._own import manifest_text, read_manifest
from featcache.interchange.npy import load, write_header
from featcache.store import FeatureStore
from featcache.store.layout import FLOAT16, OK, STATE
from featcache.store.manifest import Manifest

PART_ROWS = 1_000_000
"""Rows in one .npy of a clip-retrieval folder, as clip-retrieval has by default."""
UNIT_LENGTH = "+l2"
"""Ends the fingerprint of embeddings that an export normalised: they compare with each other only."""


class ClipRetrieval(Format):
    folder = True
    reads = "a clip-retrieval folder"

    def recognises(self, path: Path, head: bytes) -> bool:
        return (path / "img_emb").is_dir()

    def require(self, path: Path) -> None:
        require_pyarrow(path)

    def rows(self, store: FeatureStore) -> int:
        return len(store.ok)

    def write(self, store: FeatureStore, units: Iterator[Arrays], out: Path, *, as_is: bool) -> None:
        if not len(store.ok):
            raise ValueError(f"{store.path}: no row has features; use --format npy, parquet or safetensors")
        spec = store.manifest.corpus.spec
        root = spec if spec and Path(spec).is_dir() else ""
        for name in ("img_emb", "metadata"):
            (out / name).mkdir(parents=True)
        sums, part = Checksums(), 0
        per_part = max(1, PART_ROWS // store.manifest.chunk_rows)
        digits = max(4, len(str(store.chunks // per_part)))  # embedding-reader sorts names as text
        for first in range(0, store.chunks, per_part):
            chunks = range(first, min(first + per_part, store.chunks))
            rows = slice(store.rows_of(chunks[0]).start, store.rows_of(chunks[-1]).stop)
            here = (_held(unit, as_is) for unit in itertools.islice(units, len(chunks)))
            here = (unit for unit in here if len(unit["label"]))
            head = next(here, None)
            if head is None:  # every row of this part failed
                continue
            number, part = f"{part:0{digits}}", part + 1
            schema = _metadata(head, store.class_names, root).schema
            with (
                (out / f"img_emb/img_emb_{number}.npy").open("wb") as file,
                pq.ParquetWriter(out / f"metadata/metadata_{number}.parquet", schema) as writer,
            ):
                write_header(file, head["embedding"].dtype, (int((store.state[rows] == OK).sum()), store.embedding_dim))
                for unit in itertools.chain([head], here):
                    sums.update(unit)
                    file.write(unit["embedding"].tobytes())
                    writer.write_table(_metadata(unit, store.class_names, root))
        text = manifest_text(_held_manifest(store, as_is), "clip-retrieval", sums.to_dict())
        (out / "manifest.json").write_text(text, encoding="utf-8")

    def left_out(self, store: FeatureStore, *, as_is: bool) -> list[str]:
        other = [name for name in store.manifest.fields if name != "embedding"]
        lost = {
            f"{len(store.failed):,} failed rows": len(store.failed),
            "all views but the first": store.views > 1,
            ", ".join(other): other,
            "the lengths of the embeddings": not as_is,
            "the kept images": store.manifest.pixels,
        }
        return [what for what, is_lost in lost.items() if is_lost]

    def read(self, path: Path) -> Source:
        """The parts of `img_emb` joined, and those of `metadata`, both in text order: embedding-reader's rule."""
        manifest = read_manifest(path)
        files = sorted((path / "img_emb").glob("*.npy"), key=str)
        tables = sorted((path / "metadata").glob("*.parquet"), key=str)
        parts = [load(file) for file in files]
        if not parts or (tables and len(tables) != len(parts)):
            raise ValueError(
                f"{path}: {len(parts)} .npy in img_emb, {len(tables)} .parquet in metadata; copy it again whole"
            )
        for file, part in zip(files, parts, strict=True):
            check_embeddings(file, part.shape, str(part.dtype))
            if part.shape[1:] != parts[0].shape[1:]:
                raise ValueError(
                    f"{file}: {part.shape[1]}-d, {files[0].name} {parts[0].shape[1]}-d; import them separately"
                )
        arrays: dict[str, Any] = {"embedding": _Joined(parts)}
        if tables:
            described = []
            for table, file, part in zip(tables, files, parts, strict=True):
                with whole(table, "copy it again"):
                    opened = pq.ParquetFile(table)
                    wanted = {*DESCRIBING, "content", "view"} & set(opened.schema_arrow.names)
                    described.append(opened.read(columns=sorted(wanted)))
                if len(described[-1]) != len(part):
                    raise ValueError(f"{table}: {len(described[-1])} rows, {file.name} {len(part)}; copy both again")
            joined = pa.concat_tables(described, promote_options="permissive")
            arrays |= from_table(joined, manifest, path) if manifest else describe(joined)
        return of_arrays(path, arrays, manifest)


def _held_manifest(store: FeatureStore, as_is: bool) -> Manifest:
    """What a clip-retrieval folder says of itself."""
    whole, dtype = store.manifest, store.manifest.dtype("embedding")
    corpus, encoder, extraction = whole.corpus.changed(rows=len(store.ok)), whole.encoder, whole.extraction
    if not as_is:
        encoder = encoder.changed(fingerprint=store.fingerprint.removesuffix(UNIT_LENGTH) + UNIT_LENGTH)
    return whole.changed(
        encoder=encoder,
        corpus=corpus.without("digest") if len(store.failed) else corpus,  # it is of all samples
        views=whole.views.changed(count=1),
        fields={"embedding": [store.embedding_dim]},
        wide_chunk_rows={"embedding": whole.wide_chunk_rows["embedding"]},
        dtypes={"embedding": dtype} if dtype != FLOAT16 else {},
        **({"pixels": None} if whole.pixels else {}),
        **(
            {"extraction": extraction.without("checked")} if extraction.spot_checked else {}
        ),  # no column of single rows
    )


def _held(unit: Arrays, as_is: bool) -> Arrays:
    """What a clip-retrieval folder holds of a unit: view 0 of the rows with features."""
    held = ("embedding", "label", "sample_id", "content", "view")
    kept = {name: unit[name][unit[STATE] == OK] for name in held}
    kept |= {name: kept[name][:, :1] for name in ("embedding", "view")}
    return kept if as_is else kept | {"embedding": _unit_length(kept["embedding"])}


def _metadata(unit: Arrays, class_names: Sequence[str] | None, root: str) -> Any:
    paths = pa.array([os.path.join(root, sample_id) for sample_id in unit["sample_id"]], pa.string())
    return to_table(unit, [], class_names).add_column(0, "image_path", paths)


def _unit_length(embedding: Float[np.ndarray, "n v d"]) -> Float[np.ndarray, "n v d"]:
    return unit(embedding.astype(np.float64 if embedding.dtype == np.float32 else np.float32)).astype(embedding.dtype)


class _Joined:
    """(N, D) arrays one after the other, read by slices."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts, self._starts = parts, np.cumsum([0, *map(len, parts)])
        self.shape, self.dtype = (int(self._starts[-1]), parts[0].shape[1]), parts[0].dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        spans = zip(self._parts, self._starts, strict=False)
        return np.concatenate([part[max(0, rows.start - at) : max(0, rows.stop - at)] for part, at in spans])

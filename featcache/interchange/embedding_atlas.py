"""embedding-atlas: one parquet file that Apple's Embedding Atlas opens, with a map, neighbours and small images."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from featcache.geometry import unit_rows
from featcache.interchange import Format
from featcache.interchange._arrays import Arrays
from featcache.interchange._arrow import pa, pq, require_pyarrow
from featcache.interchange._pictures import Pictures
from featcache.store import FeatureStore
from featcache.store.layout import OK, STATE

NEIGHBOURS = 15
MOST = 100_000
"""Rows of which neighbours are sought: every one is compared with every other."""
SIDE = 160
"""px of the longer side of an image."""
_ROWS = 1000  # of a row group
_PAIRS = 2**24  # similarities held at once


class EmbeddingAtlas(Format):
    """A row with features a row: sample_id, image (JPEG, small), label, class_name, projection_x and projection_y (the principal
    plane of unit embeddings), neighbors (the nearest by cosine: "ids" of rows, "distances" 1 − cos), embedding (float32, view 0)."""

    ending = ".parquet"
    shows = "wanted"

    def require(self, path: Path) -> None:
        require_pyarrow(path)

    def rows(self, store: FeatureStore) -> int:
        return len(store.ok)

    def write(self, store: FeatureStore, units: Iterator[Arrays], out: Path, *, as_is: bool) -> None:
        if not len(store.ok):
            raise ValueError(f"{store.path}: no row has features; there is nothing to look at")
        kept = [_held(each) for each in units]
        held = {name: np.concatenate([each[name] for each in kept]) for name in kept[0]}
        directions = unit_rows(held["embedding"])
        held["projection"] = principal_plane(directions)
        if len(directions) <= MOST:
            held["ids"], held["distances"] = nearest(directions, NEIGHBOURS)
        names, writer = list(store.class_names or []), None
        try:
            for start in range(0, len(directions), _ROWS):
                rows = slice(start, start + _ROWS)
                table = _table({name: array[rows] for name, array in held.items()}, names)
                if self.pictures:
                    images = _images(self.pictures, store.ok[rows], held["sample_id"][rows])
                    table = table.add_column(1, "image", images)
                writer = writer or pq.ParquetWriter(out, table.schema, compression="zstd")
                writer.write_table(table, row_group_size=len(table))
        finally:
            if writer:
                writer.close()

    def left_out(self, store: FeatureStore, *, as_is: bool) -> list[str]:
        lost = {
            "the images": not self.pictures,
            f"neighbours (of more than {MOST:,} rows)": len(store.ok) > MOST,
        }
        return [*beside_embeddings(store), *(what for what, is_lost in lost.items() if is_lost)]

    def opened_by(self, store: FeatureStore, out: Path) -> str:
        options = ["--x projection_x --y projection_y"]
        options += ["--neighbors neighbors"] if len(store.ok) <= MOST else []
        options += [f"--text {'class_name' if store.class_names else 'sample_id'}"]
        options += ["--image image"] if self.pictures else []
        return f"embedding-atlas {shlex.quote(str(out))} {' '.join(options)}"


def beside_embeddings(store: FeatureStore) -> list[str]:
    """What there is in a store but view 0 of the embeddings of rows that have some, in words."""
    other = [name for name in store.manifest.fields if name != "embedding"]
    lost = {
        f"{len(store.failed):,} failed rows": len(store.failed),
        "all views but the first": store.views > 1,
        ", ".join(other): other,
    }
    return [what for what, is_lost in lost.items() if is_lost]


def principal_plane(rows: Float32[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Rows on the two directions in which they vary most; each has its largest coordinate positive. 0 where there is none."""
    centred = rows - rows.mean(axis=0)
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    axes = axes[:, ::-1][:, :2]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    found = np.zeros((len(rows), 2))
    found[:, : axes.shape[1]] = centred @ axes
    return found


def nearest(rows: Float32[np.ndarray, "n d"], most: int) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """The other rows nearest to each of these unit rows, and how far they are, 1 − cos; of equally near ones the first."""
    count = min(most, len(rows) - 1)
    ids, apart = np.empty((len(rows), count), np.int64), np.empty((len(rows), count), np.float32)
    step = max(1, _PAIRS // len(rows))
    for start in range(0, len(rows) if count else 0, step):
        cosine = rows[start : start + step] @ rows.T
        here = np.arange(len(cosine))
        cosine[here, start + here] = -np.inf
        found = np.sort(np.argpartition(-cosine, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(cosine, found, 1), axis=1, kind="stable")
        ids[start : start + step] = np.take_along_axis(found, order, 1)
        apart[start : start + step] = 1 - np.take_along_axis(cosine, ids[start : start + step], 1)
    return ids, np.clip(apart, 0, None)


def _held(unit: Arrays) -> Arrays:
    ok = unit[STATE] == OK
    held = {name: unit[name][ok] for name in ("sample_id", "label")}
    return held | {"embedding": unit["embedding"][ok, 0].astype(np.float32)}


def _table(held: Arrays, names: list[str]) -> Any:
    """What is to be seen comes first, as the program shows columns."""
    labels = held["label"].tolist()
    columns = {
        "sample_id": pa.array(held["sample_id"].tolist(), pa.string()),
        "label": held["label"],
        "class_name": pa.array([names[each] if 0 <= each < len(names) else None for each in labels], pa.string()),
        "projection_x": held["projection"][:, 0],
        "projection_y": held["projection"][:, 1],
    }
    if "ids" in held:
        near = [_lists(held[name]) for name in ("ids", "distances")]
        columns["neighbors"] = pa.StructArray.from_arrays(near, ["ids", "distances"])
    return pa.table({**columns, "embedding": _lists(held["embedding"])})


def _lists(rows: np.ndarray) -> Any:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(rows).reshape(-1)))


def _images(pictures: Pictures, rows: Int64[np.ndarray, " n"], ids: np.ndarray) -> Any:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # as Hugging Face's datasets have images
    made = [
        {"bytes": pictures.thumbnail(row, SIDE), "path": name} for row, name in zip(rows.tolist(), ids, strict=True)
    ]
    return pa.array(made, kind)

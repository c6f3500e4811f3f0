"""What a deployed detector says of images, row by row, and the tables it is written as."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from featcache.disk.durable import whole_file
from featcache.disk.refusals import destination, require_writable

FORMATS = (".csv", ".json", ".parquet")


@dataclass(frozen=True)
class Scored:
    """Scores of images, in their order; **higher = more OOD**.

    `reason` says why a row has no score, "" where it has one: then `score` is NaN, `is_ood` False, and its neighbours -1.
    `nearest` are positions in `bank_ids`, nearest first, `similarity` their cosines.
    """

    ids: list[str]
    score: Float[np.ndarray, " n"]
    is_ood: Bool[np.ndarray, " n"]
    nearest: Int[np.ndarray, "n k"]
    similarity: Float[np.ndarray, "n k"]
    reason: list[str]
    bank_ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def failed(self) -> Bool[np.ndarray, " n"]:
        """Which rows have no score."""
        return np.array([bool(reason) for reason in self.reason], bool)

    def records(self) -> Iterator[dict[str, Any]]:
        """A row each: `id`, `score`, `is_ood`, `nearest` (a list of `id` and `similarity`) and `reason`; None for what a failed
        row has not."""
        for i, (sample_id, reason) in enumerate(zip(self.ids, self.reason, strict=True)):
            near = [
                {"id": self.bank_ids[row], "similarity": float(cosine)}
                for row, cosine in zip(self.nearest[i], self.similarity[i], strict=True)
                if row >= 0
            ]
            score, is_ood = (None, None) if reason else (float(self.score[i]), bool(self.is_ood[i]))
            yield {"id": sample_id, "score": score, "is_ood": is_ood, "nearest": near, "reason": reason}

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """As the name's suffix says: `.json`, a list of `records`; `.csv` or `.parquet`, with columns `nearest_1`,
        `similarity_1`, … for the neighbours.

        Raises `ValueError` for another suffix, where a file is that is not to be overwritten, and without pyarrow.
        """
        target = refuse_table(path, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(destination(target)) as file:
            if target.suffix == ".json":
                file.write((json.dumps(list(self.records()), indent=1, ensure_ascii=False) + "\n").encode())
            elif target.suffix == ".csv":
                text = io.StringIO(newline="")
                writer = csv.DictWriter(text, self._columns())  # CR LF: ids with either are quoted
                writer.writeheader()
                writer.writerows(map(self._flat, self.records()))
                file.write(text.getvalue().encode())
            else:
                pa, pq = _pyarrow()
                flat = list(map(self._flat, self.records()))
                kinds = {"score": pa.float64(), "is_ood": pa.bool_()} | {
                    name: pa.float64() for name in self._columns() if name.startswith("similarity_")
                }
                schema = pa.schema([(name, kinds.get(name, pa.string())) for name in self._columns()])
                pq.write_table(pa.Table.from_pylist(flat, schema=schema), file)
        return target

    def _columns(self) -> list[str]:
        near = [f"{what}_{i + 1}" for i in range(self.nearest.shape[1]) for what in ("nearest", "similarity")]
        return ["id", "score", "is_ood", *near, "reason"]

    def _flat(self, record: dict[str, Any]) -> dict[str, Any]:
        near = record.pop("nearest")
        for i, each in enumerate(near):
            record |= {f"nearest_{i + 1}": each["id"], f"similarity_{i + 1}": each["similarity"]}
        return record


def refuse_table(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Before any work: the path, once a table can be written there. Raises `ValueError` as `Scored.write` does."""
    target = Path(path)
    if target.suffix not in FORMATS:
        raise ValueError(f"{path}: the suffix says how a table is written; give one of {', '.join(FORMATS)}")
    if target.exists() and not overwrite:
        raise ValueError(f"{path}: already exists; choose another path, or replace it with --overwrite")
    if target.suffix == ".parquet":
        _pyarrow()
    require_writable(target, "--out path")
    return target


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            "writing parquet needs pyarrow: pip install 'featcache[parquet]'; or write .csv or .json"
        ) from None
    return pa, pq


def quantiles(scores: Float[np.ndarray, " n"]) -> dict[str, float] | None:
    """The least, the median and the largest of the scores that are there."""
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        return None
    found = {"least": float(finite.min()), "median": float(np.median(finite)), "largest": float(finite.max())}
    return found if all(map(math.isfinite, found.values())) else None

"""The stores that a result names, read again where they still are what was measured."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped, UInt64

from evalsuite.result import content_of

if TYPE_CHECKING:
    from featcache.rows import Rows
else:  # a result is read without it
    Rows = Any


class Recorded:
    """Stores by what results say of them (their path, encoder, rows): local ones only, each opened once.

    Attributes:
        left_out: why those that could not be taken were not, a line each, by path.
    """

    def __init__(self, read: bool = True) -> None:
        self._read = read
        self._open: dict[tuple[str, str], Rows | None] = {}
        # Each beside the ids whose address is in its key.
        self._measured: dict[tuple[str, int], tuple[Any, Rows | None]] = {}
        self.left_out: dict[str, str] = {}

    @classmethod
    def none(cls) -> Recorded:
        """None may be read."""
        return cls(read=False)

    @property
    def opened(self) -> list[Rows]:
        """Those that could be read, in the order of asking."""
        return [rows for rows in self._open.values() if rows is not None]

    def rows(self, record: Any) -> Rows | None:
        """The usable rows of the store of this record (an entry of `Result.inputs`); None where it may not be read, is not
        there, or is another encoder's by now."""
        if not (self._read and isinstance(record, Mapping) and isinstance(record.get("path"), str)):
            return None
        path, fingerprint = record["path"], str(record.get("fingerprint"))
        if (path, fingerprint) not in self._open:
            self._open[path, fingerprint] = self._found(path, fingerprint)
        return self._open[path, fingerprint]

    def measured(self, record: Any, ids: Shaped[np.ndarray, " n"], content: UInt64[np.ndarray, " n"]) -> Rows | None:
        """Of that store the rows of these samples, in this order; None also where it lacks one, or has another image of it."""
        rows = self.rows(record)
        if rows is None:
            return None
        key = rows.name, id(ids)
        if key not in self._measured:
            self._measured[key] = ids, self._matched(rows, ids, content)
        return self._measured[key][1]

    def _matched(self, rows: Rows, ids: Shaped[np.ndarray, " n"], content: UInt64[np.ndarray, " n"]) -> Rows | None:
        place = {str(sample): number for number, sample in enumerate(rows.sample_ids)}
        found = np.array([place.get(str(sample), -1) for sample in ids], np.int64)
        differs = (content != 0) & (content_of(rows)[found] != content)
        if len(place) < len(rows) or (found < 0).any() or differs.any():
            self.left_out[rows.name] = "it no longer holds the samples that were measured, or repeats an id"
            return None
        return rows.pick(found)

    @contextmanager
    def trying(self, record: Any) -> Iterator[None]:
        """What a store of this record is refused for inside ends nothing else: it is left out, and why."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.left_out[str(record["path"])] = str(error)

    def _found(self, path: str, fingerprint: str) -> Rows | None:
        from featcache.rows import Rows

        if not os.path.isdir(path):
            self.left_out[path] = "it is not there (or not on this machine)"
            return None
        try:
            with warnings.catch_warnings():  # the result's command gave them
                warnings.simplefilter("ignore")
                rows = Rows.of(path)
        except (ValueError, OSError) as error:
            self.left_out[path] = str(error).removeprefix(f"{path}: ")
            return None
        if rows.stores[0].fingerprint != fingerprint:
            self.left_out[path] = f"it is of another encoder by now ({rows.stores[0].encoder_name})"
            return None
        return rows

"""Unit: one unit of a store while it is being filled, kept across kills."""

import json
import time
import zipfile
from typing import Any

import numpy as np

from featcache.corpora import Corpus
from featcache.extraction.samples import Sample, Seen
from featcache.extraction.spot_check import SpotCheck
from featcache.store import StoreWriter
from featcache.store.layout import COSINE, FAILED, OK, PIXELS, STATE


class Unit:
    """One unit of a store while it is being filled.

    The wide arrays go to disk as soon as one of their chunks is full; the rest at the end, `STATE` last.

    Attributes:
        done: rows put, of `rows`.
        saved: when it was last saved.
        tails: of the chunks written since it was made or loaded, for sealing.
    """

    def __init__(self, store: StoreWriter, number: int):
        rows = store.rows_of(number)
        self.number, self.start, self.rows, self.done = number, rows.start, len(rows), 0
        self.saved = time.perf_counter()
        self._store, self._wide = store, store.manifest.wide_arrays
        self._layout = store.layout
        narrow = set(self._layout) - set(self._wide) - {"label", "sample_id"}
        self._narrow = {name: self._empty(name, self.rows) for name in narrow}
        self._narrow[STATE][:] = FAILED
        self.check = SpotCheck(self.rows, store.views) if COSINE in self._narrow else None
        if self.check:
            self._narrow[COSINE][:] = np.nan
        self._filling: dict[str, np.ndarray] = {}
        self.tails: dict[str, bytes] = {}

    def _empty(self, name: str, rows: int) -> np.ndarray:
        tail, dtype, _ = self._layout[name]
        text = {"string": "", "variable_length_bytes": b""}
        return np.full(rows, text[dtype], object) if dtype in text else np.zeros((rows, *tail), dtype)

    def put(
        self, position: int, sample: Sample, seen: Seen | None, features: dict[str, np.ndarray] | None, lost: str
    ) -> None:
        """All that is known of the row at `position`, which is the next one; why its features are `lost`, or ""."""
        assert position == self.done
        reason = sample.reason
        if lost:
            features, reason = None, lost
            self.cosine(position, 0.0)
        elif features and (reason := _not_finite(features)):
            features = None
        if seen and seen.known:
            features = seen.known
            self.cosine(position, float(features.get(COSINE, np.nan)))
        self._narrow["content"][position] = np.frombuffer(sample.content, np.uint8)
        self._narrow["reason"][position] = reason
        if seen:
            self._narrow["view"][position] = seen.parameters
        if features:
            self._narrow[STATE][position] = OK
        if "image_size" in self._narrow:
            self._narrow["image_size"][position] = sample.size
        for name in self._wide:
            per_chunk = self._layout[name].chunk_rows
            inside = position % per_chunk
            if inside == 0:
                self._filling[name] = self._empty(name, min(per_chunk, self.rows - position))
            filling = self._filling[name]
            if name == PIXELS:
                filling[inside] = sample.kept
            elif features:
                filling[inside] = features[name]
            if inside == len(filling) - 1:
                self.tails |= self._store.write_rows(name, self.start + position - inside, filling)
        self.done += 1

    def cosine(self, position: int, value: float) -> None:
        """Of a row's embedding to that in fp32; 0 where only the latter is finite."""
        if COSINE in self._narrow:
            self._narrow[COSINE][position] = value

    @property
    def failed(self) -> int:
        """Rows so far without features."""
        return int((self._narrow[STATE][: self.done] == FAILED).sum())

    def content(self, position: int) -> bytes:
        return self._narrow["content"][position].tobytes()

    def finish(self, corpus: Corpus) -> None:
        rows = self._store.rows_of(self.number)
        labels = np.array([corpus.label(row) for row in rows], np.int64)
        ids = np.array([corpus.ids[row] for row in rows], dtype=object)
        self.tails |= self._store.write_chunk(self.number, {"label": labels, "sample_id": ids, **self._narrow})

    def save(self) -> None:
        """Keep what there is of the unit beside the arrays, in one step, for `load` to find after a kill."""
        arrays: dict[str, np.ndarray] = {**self._narrow, **self._filling}
        arrays["reason"] = np.array(json.dumps(self._narrow["reason"].tolist()))
        if PIXELS in arrays:
            kept = arrays.pop(PIXELS).tolist()
            arrays |= {
                "lengths": np.array([len(item) for item in kept]),
                "bytes": np.frombuffer(b"".join(kept), np.uint8),
            }
        checked = self.check.arrays() if self.check else {}
        whole: dict[str, Any] = {"number": self.number, "done": self.done, **arrays, **checked}
        self._store.save_unfinished(lambda file: np.savez(file, **whole))
        self.saved = time.perf_counter()

    @classmethod
    def load(cls, store: StoreWriter) -> "Unit | None":
        """The unit that a killed run was filling; None when none was saved, or it is damaged."""
        try:
            with store.load_unfinished().open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                saved: dict[str, Any] = dict(arrays)
            unit = cls(store, int(saved["number"]))
            unit.done = int(saved["done"])
            for name, array in unit._narrow.items():
                array[:] = json.loads(str(saved["reason"])) if name == "reason" else saved[name]
            for name in unit._wide:
                if name == PIXELS:
                    ends = np.cumsum(saved["lengths"])
                    parts = np.split(saved["bytes"], ends[:-1])
                    unit._filling[name] = np.array([part.tobytes() for part in parts], dtype=object)
                else:
                    unit._filling[name] = saved[name]
            if unit.check:
                unit.check.load(saved)
            return unit
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
            return None


def _not_finite(features: dict[str, np.ndarray]) -> str:
    """Why such features cannot be kept, and what to do; "" where they can."""
    for name, values in features.items():
        if not np.isfinite(values).all():
            if values.dtype == np.float16 and not np.isnan(values).any():
                return f"its {name} is beyond float16 (±65504); extract with --dtype float32"
            return f"its {name} is not finite"
    return ""

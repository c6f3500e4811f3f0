"""Job: one teacher's part of a pass over the images, unit by unit into its store."""

import json
import time
import zipfile
from typing import Any

import numpy as np
import torch

from featcache.corpus import Corpus
from featcache.encoder import Encoder
from featcache.layout import FAILED, OK, PIXELS, STATE, wide_arrays
from featcache.samples import Sample, Seen
from featcache.store import FeatureStore

SAVE_SECONDS = 60.0
"""A unit in progress is saved this often: more than that is never computed again after a kill."""


class Job:
    """Encodes samples in batches and writes them to `store`; takes them one by one, in row order.

    Batches are cut by position in the unit alone, so a resumed run encodes exactly what an unbroken one does.

    Args:
        encoder: on its device.
        store: created, not sealed.
        corpus: labels and ids come from here.
        batch: samples a forward pass.

    Attributes:
        encode_seconds, write_seconds: spent so far.
    """

    def __init__(self, encoder: Encoder, store: FeatureStore, corpus: Corpus, batch: int):
        self.encoder, self.store, self._corpus, self._batch = encoder, store, corpus, batch
        self.encode_seconds = self.write_seconds = 0.0
        self._unit_rows = int(store.manifest["chunk_rows"])
        self._pending = np.zeros(store.chunks, bool)
        self._pending[store.pending_chunks()] = True
        self._waiting: list[tuple[int, Sample, Seen | None]] = []
        self._unit: _Unit | None = None
        self._saved = _Unit.load(store)
        if self._saved and not self._pending[self._saved.number]:
            self._saved = None
        self._saved_rows = range(self._saved.start, self._saved.start + self._saved.done) if self._saved else range(0)

    @property
    def saved_content(self) -> dict[int, bytes]:
        """Row → hash of its image, of the rows that an earlier run had saved of a unit in progress."""
        return {row: self._saved.content(row - self._saved.start) for row in self._saved_rows} if self._saved else {}

    @property
    def failed(self) -> int:
        """Rows without features, of finished units and of the one that was saved."""
        return len(self.store.failed) + (self._saved.failed if self._saved else 0)

    def discard_saved(self) -> None:
        """Make the whole unit in progress again. Before the first `take`."""
        self._saved, self._saved_rows = None, range(0)

    def wants(self, row: int) -> bool:
        return bool(self._pending[row // self._unit_rows]) and row not in self._saved_rows

    def take(self, row: int, sample: Sample, seen: Seen | None) -> bool:
        """The next row that this job wants; True when it completed a batch."""
        number = row // self._unit_rows
        if self._unit is None:
            saved = self._saved
            self._unit = saved if saved and saved.number == number else _Unit(self.store, number)
        self._waiting.append((row - self._unit.start, sample, seen))
        finished = row == self._unit.start + self._unit.rows - 1
        if len(self._waiting) < self._batch and not finished:
            return False
        began = time.perf_counter()
        features = self._encode()
        encoded = time.perf_counter()
        for position, sample, seen in self._waiting:
            self._unit.put(position, sample, seen, features.get(position))
        self._waiting.clear()
        if finished:
            self._unit.finish(self._corpus)
            self._unit = None
        elif encoded - self._unit.saved > SAVE_SECONDS:
            self._unit.save()
        self.encode_seconds += encoded - began
        self.write_seconds += time.perf_counter() - encoded
        return True

    def save(self) -> None:
        """Keep the unit in progress, if it stands between two batches."""
        if self._unit and 0 < self._unit.done < self._unit.rows and self._unit.done % self._batch == 0:
            self._unit.save()

    def _encode(self) -> dict[int, dict[str, np.ndarray]]:
        """Features by position, of the waiting samples that have pixels."""
        readable = [(position, seen.pixels) for position, _, seen in self._waiting if seen and seen.pixels is not None]
        if not readable:
            return {}
        pixels = torch.from_numpy(np.concatenate([pixels for _, pixels in readable]))
        if self.encoder.device.type == "cuda":
            pixels = pixels.pin_memory()
        encoded = self.encoder.encode(pixels, fields=tuple(self.store.manifest["fields"]))
        stored = {
            name: features.to(getattr(torch, self.store.layout[name].dtype)).cpu().numpy()
            for name, features in encoded.items()
        }
        by_sample = {name: each.reshape(len(readable), -1, *each.shape[1:]) for name, each in stored.items()}
        return {
            position: {name: features[i] for name, features in by_sample.items()}
            for i, (position, _) in enumerate(readable)
        }


class _Unit:
    """One unit of a store while it is being filled.

    The wide arrays go to disk as soon as one of their chunks is full; the rest at the end, `STATE` last.
    """

    def __init__(self, store: FeatureStore, number: int):
        rows = store.rows_of(number)
        self.number, self.start, self.rows, self.done = number, rows.start, len(rows), 0
        self.saved = time.perf_counter()
        self._store, self._wide = store, wide_arrays(store.manifest)
        self._layout = store.layout
        narrow = set(self._layout) - set(self._wide) - {"label", "sample_id"}
        self._narrow = {name: self._empty(name, self.rows) for name in narrow}
        self._narrow[STATE][:] = FAILED
        self._filling: dict[str, np.ndarray] = {}

    def _empty(self, name: str, rows: int) -> np.ndarray:
        tail, dtype, _ = self._layout[name]
        text = {"string": "", "variable_length_bytes": b""}
        return np.full(rows, text[dtype], object) if dtype in text else np.zeros((rows, *tail), dtype)

    def put(self, position: int, sample: Sample, seen: Seen | None, features: dict[str, np.ndarray] | None) -> None:
        """All that is known of the row at `position`, which is the next one."""
        assert position == self.done
        reason = sample.reason
        if features and (lost := _not_finite(features)):
            features, reason = None, lost
        features = features or (seen.known if seen else None)
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
                self._store.write_rows(name, self.start + position - inside, filling)
        self.done += 1

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
        self._store.write_chunk(self.number, {"label": labels, "sample_id": ids, **self._narrow})
        self._store.discard_unfinished()

    def save(self) -> None:
        """Keep what there is of the unit beside the arrays, in one step, for `load` to find after a kill."""
        arrays: dict[str, np.ndarray] = {**self._narrow, **self._filling}
        arrays["reason"] = np.array(json.dumps(self._narrow["reason"].tolist()))
        if PIXELS in arrays:
            kept = arrays.pop(PIXELS).tolist()
            arrays |= {"lengths": np.array([len(item) for item in kept]), "bytes": _joined(kept)}
        whole: dict[str, Any] = {"number": self.number, "done": self.done, **arrays}
        self._store.save_unfinished(lambda file: np.savez(file, **whole))
        self.saved = time.perf_counter()

    @classmethod
    def load(cls, store: FeatureStore) -> "_Unit | None":
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


def _joined(items: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(items), np.uint8)

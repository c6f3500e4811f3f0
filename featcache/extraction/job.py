"""Job: one teacher's part of a pass over the images, unit by unit into its store."""

import json
import logging
import time
import zipfile
from typing import Any

import numpy as np
import torch

from featcache.corpora import Corpus
from featcache.encoder import Encoder
from featcache.extraction.samples import Sample, Seen
from featcache.extraction.spot_check import SpotCheck, in_fp32
from featcache.store import FeatureStore
from featcache.store.comparable import FAITHFUL
from featcache.store.layout import COSINE, EMBEDDING, FAILED, OK, PIXELS, STATE

log = logging.getLogger("featcache")

SAVE_SECONDS = 60.0
"""A unit in progress is saved this often: more than that is never computed again after a kill."""
WAITING = 8
"""Forward passes' worth of samples, known ones among them, that wait at most until one pass is full."""


class Job:
    """Encodes samples in batches and writes them to `store`; takes them one by one, in row order.

    Every forward pass is over the same number of images, whatever failed or was known already, and a sample's place in
    it is its place in the unit modulo the batch: so its bits depend on nothing else, and a resumed run makes the same.

    Args:
        encoder: on its device, in its precision.
        store: created, not sealed; its manifest says how many images a forward pass has.
        corpus: labels and ids come from here.

    Attributes:
        encode_seconds, write_seconds: spent so far.
    """

    def __init__(self, encoder: Encoder, store: FeatureStore, corpus: Corpus):
        self.encoder, self.store, self._corpus = encoder, store, corpus
        batch = store.manifest.extraction.batch_size
        assert batch is not None
        self._batch, self._views = batch, store.views
        self._places = max(1, self._batch // self._views)  # for samples, in a forward pass
        self._warned = False
        self.encode_seconds = self.write_seconds = 0.0
        self._unit_rows = store.manifest.chunk_rows
        self._pending = np.zeros(store.chunks, bool)
        self._pending[store.pending_chunks()] = True
        self._waiting: list[tuple[int, Sample, Seen | None]] = []
        self._taken: set[int] = set()  # places in the forward pass to come
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
        position = row - self._unit.start
        place = position % self._places if seen and seen.pixels is not None else None
        passed = place in self._taken and self._pass()
        self._waiting.append((position, sample, seen))
        self._taken |= set() if place is None else {place}
        finished = position == self._unit.rows - 1
        # A pass that few places of are taken waits for more samples to be computed; for so many known ones at most.
        ends = (position + 1) % self._places == 0 and not 0 < 2 * len(self._taken) < self._places
        if finished or ends or len(self._waiting) >= WAITING * self._places:
            passed = self._pass()
        if finished:
            began = time.perf_counter()
            self._check(self._unit)
            checked = time.perf_counter()
            self._unit.finish(self._corpus)
            self._unit = None
            self.encode_seconds += checked - began
            self.write_seconds += time.perf_counter() - checked
        elif passed and time.perf_counter() - self._unit.saved > SAVE_SECONDS:
            self.save()
        return passed

    def save(self) -> None:
        """Keep the unit in progress, as far as its forward passes have come."""
        if self._unit and 0 < self._unit.done < self._unit.rows:
            began = time.perf_counter()
            self._unit.save()
            self.write_seconds += time.perf_counter() - began

    def _pass(self) -> bool:
        """Encode what is waiting, in one forward pass, and put all of it into the unit."""
        assert self._unit is not None
        began = time.perf_counter()
        features, lost = self._encode(self._unit)
        encoded = time.perf_counter()
        for position, sample, seen in self._waiting:
            self._unit.put(position, sample, seen, features.get(position), lost.get(position, ""))
        self._waiting.clear()
        self._taken.clear()
        self.encode_seconds += encoded - began
        self.write_seconds += time.perf_counter() - encoded
        return True

    def _encode(self, unit: "_Unit") -> tuple[dict[int, dict[str, np.ndarray]], dict[int, str]]:
        """Features by position, of the waiting samples that have pixels; and why those of a position are lost."""
        waiting = {position: seen.pixels for position, _, seen in self._waiting if seen and seen.pixels is not None}
        if not waiting:
            return {}, {}
        some = next(iter(waiting.values()))[:1]
        passes = -(-self._places * self._views // self._batch)  # more than one for very many views
        pixels = np.repeat(some, passes * self._batch, axis=0)
        places = {position: position % self._places * self._views for position in waiting}
        for position, place in places.items():
            pixels[place : place + self._views] = waiting[position]
        images = torch.from_numpy(pixels)
        if self.encoder.device.type == "cuda":
            images = images.pin_memory()
        fields = tuple(self.store.manifest.fields)
        encoded = self.encoder.encode_padded(images, self._batch, fields)
        embedding = encoded[EMBEDDING].cpu().numpy()
        finite = torch.stack([values.flatten(1).isfinite().all(1) for values in encoded.values()]).all(0).cpu()
        stored = {
            name: values.to(getattr(torch, self.store.layout[name].dtype)).cpu().numpy()
            for name, values in encoded.items()
        }
        features, lost = {}, {}
        for position, place in places.items():
            mine = slice(place, place + self._views)
            features[position] = {name: values[mine] for name, values in stored.items()}
            if unit.check and not finite[mine].all():
                if all(values.isfinite().all() for values in in_fp32(self.encoder, waiting[position], fields).values()):
                    lost[position] = f"not finite in {self.encoder.precision.name}; extract again with --precision fp32"
                    self._warn(unit.start + position, "they are not finite, and in fp32 they are")
            elif unit.check and unit.check.wants(position):
                unit.check.add(position, waiting[position], embedding[mine])
        return features, lost

    def _check(self, unit: "_Unit") -> None:
        """Compare some rows of a whole unit with fp32."""
        cosines = unit.check.cosines(self.encoder) if unit.check else {}
        for position, cosine in cosines.items():
            unit.cosine(position, cosine)
        if cosines and (worst := min(cosines.values())) < FAITHFUL:
            position = min(cosines, key=lambda each: cosines[each])
            self._warn(unit.start + position, f"the cosine to fp32 is {worst:.5f}, less than {FAITHFUL}")

    def _warn(self, row: int, what: str) -> None:
        """Once: the run goes on, and the manifest will say how bad it is at worst."""
        if not self._warned:
            log.warning(
                "%s: features of %s in %s: %s; the run goes on, for better ones extract again with --precision fp32 --overwrite",
                self.store.path,
                self._corpus.ids[row],
                self.encoder.precision.name,
                what,
            )
        self._warned = True

    def seal(self) -> None:
        """Seal the store, once every unit is done; the manifest says how far its features are from fp32 at worst."""
        if COSINE in self.store.layout:
            units = (self.store.rows_of(unit) for unit in range(self.store.chunks))
            cosines = np.concatenate([self.store._read(COSINE, rows.start, rows.stop) for rows in units])
            known = cosines[~np.isnan(cosines)]
            worst = round(float(known.min()), 6) if len(known) else None
            manifest = self.store.manifest
            extraction = manifest.extraction.changed(cosine=worst, checked=len(known))
            self.store.seal(manifest.changed(extraction=extraction))
        else:
            self.store.seal()


class _Unit:
    """One unit of a store while it is being filled.

    The wide arrays go to disk as soon as one of their chunks is full; the rest at the end, `STATE` last.
    """

    def __init__(self, store: FeatureStore, number: int):
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
                self._store.write_rows(name, self.start + position - inside, filling)
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
        self._store.write_chunk(self.number, {"label": labels, "sample_id": ids, **self._narrow})
        self._store.discard_unfinished()

    def save(self) -> None:
        """Keep what there is of the unit beside the arrays, in one step, for `load` to find after a kill."""
        arrays: dict[str, np.ndarray] = {**self._narrow, **self._filling}
        arrays["reason"] = np.array(json.dumps(self._narrow["reason"].tolist()))
        if PIXELS in arrays:
            kept = arrays.pop(PIXELS).tolist()
            arrays |= {"lengths": np.array([len(item) for item in kept]), "bytes": _joined(kept)}
        checked = self.check.arrays() if self.check else {}
        whole: dict[str, Any] = {"number": self.number, "done": self.done, **arrays, **checked}
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


def _joined(items: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(items), np.uint8)

"""Job: one teacher's part of a pass over the samples, unit by unit into its store."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from featcache.corpora import Corpus
from featcache.encoder import Encoder
from featcache.extraction.passes import by_place, by_width, window_of
from featcache.extraction.samples import Sample, Seen, Wanted, content_now, prefetch
from featcache.extraction.spot_check import in_fp32
from featcache.extraction.unit import Unit
from featcache.store import StoreWriter
from featcache.store.comparable import FAITHFUL
from featcache.store.index import KnownRows
from featcache.store.layout import EMBEDDING
from featcache.store.top_k import pack

log = logging.getLogger("featcache")

SAVE_SECONDS = 60.0
"""A unit in progress is saved this often: more than that is never computed again after a kill."""
WAITING = 8
"""Forward passes' worth of samples, known ones among them, that wait at most until one pass is full."""


class Job:
    """Encodes samples in batches and writes them to `store`; takes them one by one, in row order.

    Every forward pass is over the same number of samples, whatever failed or was known already, and an image's place in it
    is its place in the unit modulo the batch: so its bits depend on nothing else, and a resumed run makes the same. Texts
    are sorted by width first, some passes' worth at a time.

    Args:
        encoder: on its device, in its precision.
        store: created, not sealed; its manifest says how many images a forward pass has.
        corpus: labels and ids come from here.
        saves: whether a unit in progress is saved, and one that was saved gone on with.

    Attributes:
        wanted: what it wants of a sample.
        batch: samples a forward pass.
        unit_rows: rows of a unit.
        encode_seconds, write_seconds: spent so far.
    """

    def __init__(self, encoder: Encoder, store: StoreWriter, corpus: Corpus, *, saves: bool = True):
        self.encoder, self.store, self._corpus, self._saves = encoder, store, corpus, saves
        self.wanted = Wanted(encoder.preprocess, KnownRows(store.manifest, store.path))
        batch = store.manifest.extraction.batch_size
        assert batch is not None
        self.batch, self._views = batch, store.views
        self._places = max(1, self.batch // self._views)  # for samples, in a forward pass
        self._window = 0 if encoder.preprocess.alike else window_of(store.manifest, batch)
        self._warned = False
        self.encode_seconds = self.write_seconds = 0.0
        self.unit_rows = store.manifest.chunk_rows
        self._pending = np.zeros(store.chunks, bool)
        self._pending[store.pending_chunks()] = True
        self._waiting: list[tuple[int, Sample, Seen | None]] = []
        self._taken: set[int] = set()  # places in the forward pass to come
        self._unit: Unit | None = None
        self._tails: dict[str, bytes] = {}
        self._saved = Unit.load(store) if saves else None
        if self._saved and not self._pending[self._saved.number]:
            self._saved = None
        self._saved_rows = range(self._saved.start, self._saved.start + self._saved.done) if self._saved else range(0)

    @property
    def failed(self) -> int:
        """Rows without features, of finished units and of the one that was saved."""
        return len(self.store.failed) + (self._saved.failed if self._saved else 0)

    def forget_changed(self, pool: ThreadPoolExecutor) -> None:
        """Make the whole saved unit again if an image of it has changed since. Before the first `take`."""
        was = [self._saved.content(row - self._saved.start) for row in self._saved_rows] if self._saved else []
        if was != list(prefetch(partial(content_now, self._corpus), self._saved_rows, pool, ahead=256)):
            self._saved, self._saved_rows = None, range(0)

    def wants(self, row: int) -> bool:
        return bool(self._pending[row // self.unit_rows]) and row not in self._saved_rows

    def take(self, row: int, sample: Sample, seen: Seen | None) -> bool:
        """The next row that this job wants; True when it completed a batch."""
        number = row // self.unit_rows
        if self._unit is None:
            saved = self._saved
            self._unit = saved if saved and saved.number == number else Unit(self.store, number)
        position = row - self._unit.start
        place = position % self._places if seen and seen.pixels is not None and not self._window else None
        passed = place in self._taken and self._pass()
        self._waiting.append((position, sample, seen))
        self._taken |= set() if place is None else {place}
        finished = position == self._unit.rows - 1
        if finished or self._ends(position):
            passed = self._pass()
        if finished:
            began = time.perf_counter()
            self._check(self._unit)
            checked = time.perf_counter()
            self._unit.finish(self._corpus)
            self._tails |= self._unit.tails
            if self._saves:
                self.store.discard_unfinished()
            self._unit = None
            self.encode_seconds += checked - began
            self.write_seconds += time.perf_counter() - checked
        elif passed and time.perf_counter() - self._unit.saved > SAVE_SECONDS:
            self.save()
        return passed

    def _ends(self, position: int) -> bool:
        """Whether what is waiting is encoded now that the row at `position` is there."""
        if self._window:
            return (position + 1) % self._window == 0
        # A pass that few places of are taken waits for more samples to be computed; for so many known ones at most.
        whole = (position + 1) % self._places == 0 and not 0 < 2 * len(self._taken) < self._places
        return whole or len(self._waiting) >= WAITING * self._places

    def new_tails(self) -> dict[str, bytes]:
        """Of the units finished since this was last asked for."""
        tails, self._tails = self._tails, {}
        return tails

    def save(self) -> None:
        """Keep the unit in progress, as far as its forward passes have come."""
        if self._saves and self._unit and 0 < self._unit.done < self._unit.rows:
            began = time.perf_counter()
            self._unit.save()
            self.write_seconds += time.perf_counter() - began

    def _pass(self) -> bool:
        """Encode what is waiting, and put all of it into the unit."""
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

    def _encode(self, unit: Unit) -> tuple[dict[int, dict[str, np.ndarray]], dict[int, str]]:
        """Features by position, of the waiting samples that have pixels; and why those of a position are lost."""
        waiting = {position: seen.pixels for position, _, seen in self._waiting if seen and seen.pixels is not None}
        features: dict[int, dict[str, np.ndarray]] = {}
        lost: dict[int, str] = {}
        if not waiting:
            return features, lost
        pinned = self.encoder.device.type == "cuda"
        if self._window:
            seen_ones = [(position, seen) for position, _, seen in self._waiting if seen]
            passes = by_width(seen_ones, self.encoder.preprocess, self.batch, pinned)
        else:
            passes = by_place(waiting, self._places, self._views, self.batch, pinned)
        for images, places in passes:
            self._encode_pass(unit, images, places, waiting, features, lost)
        return features, lost

    def _encode_pass(
        self,
        unit: Unit,
        images: torch.Tensor,
        places: dict[int, int],
        waiting: dict[int, np.ndarray],
        features: dict[int, dict[str, np.ndarray]],
        lost: dict[int, str],
    ) -> None:
        """One pass of `_encode`, whose results it adds to `features` and `lost`."""
        fields = tuple(self.store.manifest.fields)
        encoded = self.encoder.encode_padded(images, self.batch, fields)
        embedding = encoded[EMBEDDING].cpu().numpy()
        finite = torch.stack([v.reshape(len(v), -1).isfinite().all(1) for v in encoded.values()]).all(0).cpu()
        manifest = self.store.manifest
        stored = {
            name: pack(values, manifest.top_k[name], manifest.dtype(name))
            if name in manifest.top_k
            else values.to(getattr(torch, manifest.dtype(name))).cpu().numpy()
            for name, values in encoded.items()
        }
        for position, place in places.items():
            mine = slice(place, place + self._views)
            features[position] = {name: values[mine] for name, values in stored.items()}
            if unit.check and not finite[mine].all():
                if all(values.isfinite().all() for values in in_fp32(self.encoder, waiting[position], fields).values()):
                    lost[position] = f"not finite in {self.encoder.precision.name}; extract again with --precision fp32"
                    self._warn(unit.start + position, "they are not finite, and in fp32 they are")
            elif not finite[mine].all() and manifest.top_k:  # of packed words `Unit` cannot tell
                lost[position] = "its features are not finite"
            elif unit.check and unit.check.wants(position):
                unit.check.add(position, waiting[position], embedding[mine])

    def _check(self, unit: Unit) -> None:
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

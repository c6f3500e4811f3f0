"""A deployed detector: its folder, checked, and what it says of images and of stores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from evalsuite.deployed.encoder import Encode, open_graph, open_weights
from evalsuite.deployed.scored import Scored
from evalsuite.neighbours.exact import search
from featcache.corpora import Corpus, open_corpus
from featcache.extraction.samples import of_the_machine, prefetch
from featcache.inputs.images import Preprocess
from featcache.machine import cores
from featcache.models.onnx import open_session
from featcache.rows import Rows, Store
from featcache.store.comparable import require_comparable, require_kept_alike
from featcache.store.manifest import Manifest

FORMAT = 1
RECORD, ENCODER, WEIGHTS, SCORE, BANK, BANK_IDS, README = (
    "detector.json", "encoder.onnx", "encoder.safetensors", "detector.onnx", "bank.npy", "bank.json", "README.md",
)  # fmt: skip
_BLOCK = 4096  # rows of a store scored at once
_TOGETHER = 256  # images, encoded one by one as they differ in size, whose features are scored at once

Progress = Callable[[int, int], None]


class DeployedDetector:
    """A folder that `fit_detector` made, opened and checked.

    Attributes:
        path: the folder.
        record: `detector.json`: which detector, of which store and encoder, the threshold and how it was found.

    Raises `ValueError` when it is no such folder, or a file in it is gone or not as it was written.
    """

    def __init__(self, path: str | os.PathLike[str], *, trust_code: bool = False) -> None:
        self.path, self._trust_code = Path(path), trust_code
        self.record = _read_record(self.path)
        for name, digest in self.record["files"].items():
            if not (self.path / name).is_file() or digest_of(self.path / name) != digest:
                gone = "is damaged" if (self.path / name).exists() else "is gone"
                raise ValueError(f"{self.path / name}: {gone}; copy the folder anew, or fit the detector again")

    @property
    def threshold(self) -> float:
        """A row whose score is above it is said to be OOD."""
        return float(self.record["threshold"]["value"])

    @property
    def keep(self) -> float:
        """The share of ID images that the threshold is to keep."""
        return float(self.record["keep"])

    @cached_property
    def manifest(self) -> Manifest:
        """Of the store that it was fitted to."""
        return Manifest.from_json(self.record["store"])

    @cached_property
    def _score(self) -> Any:
        return open_session(self.path / SCORE)

    @cached_property
    def _encode(self) -> Encode:
        self._require_encoder()
        if ENCODER in self.record["files"]:
            return open_graph(self.path / ENCODER)
        said, of = self.record["encoder"], self.manifest.encoder
        return open_weights(self.path / WEIGHTS, said["name"], of.fingerprint, said["kept_as"], self._trust_code)

    def _require_encoder(self) -> None:
        if not {ENCODER, WEIGHTS} & self.record["files"].keys():
            raise ValueError(
                f"{self.path}: holds no encoder, it scores stores alone; fit it again with --encoder SPEC to score images"
            )

    @cached_property
    def _bank(self) -> Float32[np.ndarray, "b d"]:
        return np.load(self.path / BANK, allow_pickle=False)

    @cached_property
    def bank_ids(self) -> list[str]:
        """Of the bank images that neighbours are sought among."""
        return list(json.loads((self.path / BANK_IDS).read_text(encoding="utf-8")))

    def score(
        self,
        images: Corpus | str | os.PathLike[str] | None = None,
        *,
        store: Store | None = None,
        any_precision: bool = False,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Scored:
        """Scores of `images`, a corpus or its spec (a folder, say), through the folder's own encoder; or of a `store` that the
        same encoder made. Images that cannot be read, and failed rows, are rows with their reason.

        Args:
            any_precision: take a store in whatever precision it was made.
            workers: threads that read and decode images; by default one a core.
            progress: called with how many are done, of how many.

        Raises:
            ValueError: neither or both are given, there are no such images, the store is of another encoder or precision, or
                the folder holds no encoder.
        """
        given = self.look(images, store=store, any_precision=any_precision)
        if isinstance(given, Rows):
            return self._of_store(given, progress)
        return self._of_images(given, workers or cores(), progress)

    def look(
        self,
        images: Corpus | str | os.PathLike[str] | None = None,
        *,
        store: Store | None = None,
        any_precision: bool = False,
    ) -> Corpus | Rows:
        """What `score` would score, opened, for `score` to take; refused as it would be, before anything is scored."""
        if (images is None) == (store is None):
            raise ValueError("give images (--images FOLDER) or a store (--store STORE), one of the two")
        if store is not None:
            rows = Rows.of(store)
            self._require_like(rows, any_precision)
            return rows
        self._require_encoder()
        return images if isinstance(images, Corpus) else open_corpus(os.fspath(images))  # type: ignore[arg-type]

    def score_features(self, features: Mapping[str, Float[np.ndarray, "n _"]]) -> Float[np.ndarray, " n"]:
        """Scores of rows by field, float32: `embedding`, or what else the detector takes."""
        taken = [each.name for each in self._score.get_inputs()]
        return self._score.run(None, {name: features[name] for name in taken})[0]

    @property
    def _fields(self) -> list[str]:
        return list(dict.fromkeys(["embedding", *self.record["fields"]]))

    def _of_images(self, corpus: Corpus, workers: int, progress: Progress | None) -> Scored:
        found, encode = _Found(self, len(corpus)), self._encode
        waiting: dict[int, dict[str, np.ndarray]] = {}
        with ThreadPoolExecutor(workers) as pool:
            for row, (image, reason) in enumerate(
                prefetch(partial(_pixels, corpus), range(len(corpus)), pool, 2 * workers)
            ):
                if image is None:
                    found.fail(row, reason)
                else:
                    waiting[row] = encode(image)
                if len(waiting) == _TOGETHER or row + 1 == len(corpus):
                    found.put_each(waiting)
                    waiting.clear()
                if progress:
                    progress(row + 1, len(corpus))
        return found.scored(ids_of(corpus))

    def _of_store(self, rows: Rows, progress: Progress | None) -> Scored:
        found = _Found(self, rows.total)
        for start in range(0, len(rows), _BLOCK):
            positions = np.arange(start, min(start + _BLOCK, len(rows)))
            with np.errstate(over="ignore"):
                features = {name: rows.gather(positions, name).astype(np.float32) for name in self._fields}
            found.put(rows.place[positions], features)
            if progress:
                progress(int(positions[-1]) + 1, len(rows))
        place = 0
        for store in rows.stores:
            reasons = store.reasons if len(store.failed) else {}
            for row in np.asarray(store.failed).tolist():
                found.fail(place + row, reasons.get(str(store.sample_ids[row])) or "failed when it was extracted")
            place += len(store)
        return found.scored(ids_of(rows))

    def _require_like(self, rows: Rows, any_precision: bool) -> None:
        """Raises `ValueError` unless the rows are of the encoder, fields and precision that the detector was fitted to."""
        mine, first = self.manifest, rows.stores[0]
        if (first.fingerprint, first.embedding_dim) != (mine.encoder.fingerprint, mine.fields["embedding"][0]):
            raise ValueError(
                f"{rows.name} was made by encoder {first.encoder_name} ({first.fingerprint}, {first.embedding_dim} "
                f"dimensions), {self.path} was fitted to {mine.encoder.name} ({mine.encoder.fingerprint}, "
                f"{mine.fields['embedding'][0]}); extract the store with that encoder, or fit a detector to this one"
            )
        for name in self._fields:
            rows.require_field(name)
            if list(rows.shape_of(name)) != list(mine.fields[name]):
                raise ValueError(
                    f"{rows.name} has {name} of {list(rows.shape_of(name))}, {self.path} takes {mine.fields[name]}"
                )
        for store in rows.stores if not any_precision else ():
            pair = (str(self.path), mine), (str(store.path), store.manifest)
            require_comparable(*pair)
            require_kept_alike(*pair)


class _Found:
    """Rows while they are filled in."""

    def __init__(self, detector: DeployedDetector, rows: int) -> None:
        self._detector, k = detector, int(detector.record["nearest"])
        self._score = np.full(rows, np.nan)
        self._nearest, self._similarity = np.full((rows, k), -1), np.full((rows, k), np.nan)
        self._reason = [""] * rows

    def fail(self, row: int, reason: str) -> None:
        self._reason[row] = reason

    def put(self, rows: np.ndarray, features: Mapping[str, Float[np.ndarray, "n _"]]) -> None:
        finite = np.all([np.isfinite(values).all(axis=1) for values in features.values()], axis=0)
        for row in rows[~finite].tolist():
            self.fail(row, "its features are not finite")
        rows, features = rows[finite], {name: values[finite] for name, values in features.items()}
        if not len(rows):
            return
        self._score[rows] = self._detector.score_features(features)
        for row in rows[~np.isfinite(self._score[rows])].tolist():
            self.fail(row, "its score is not finite")
        if k := self._nearest.shape[1]:
            self._similarity[rows], self._nearest[rows] = search([self._detector._bank], features["embedding"], k)

    def put_each(self, features: Mapping[int, Mapping[str, Float[np.ndarray, "1 _"]]]) -> None:
        """Features by row."""
        if features:
            names = next(iter(features.values()))
            self.put(
                np.array(list(features)),
                {name: np.concatenate([each[name] for each in features.values()]) for name in names},
            )

    def scored(self, ids: list[str]) -> Scored:
        failed = np.array([bool(reason) for reason in self._reason], bool)
        score = np.where(failed, np.nan, self._score)
        detector, k = self._detector, self._nearest.shape[1]
        return Scored(
            ids, score, score > detector.threshold, np.where(failed[:, None], -1, self._nearest), self._similarity,
            self._reason, detector.bank_ids if k else [],
        )  # fmt: skip


def ids_of(given: Corpus | Rows) -> list[str]:
    """Of all images of a corpus, and of all rows of stores, the failed ones too: those of `score`."""
    if isinstance(given, Rows):
        return [str(sample_id) for store in given.stores for sample_id in store.sample_ids]
    return list(given.ids)


def _pixels(corpus: Corpus, row: int) -> tuple[np.ndarray | None, str]:
    """RGB pixels of one image, or why there are none. What is wrong with the machine is raised."""
    try:
        return np.asarray(Preprocess.decode(corpus.read(row))), ""
    except Exception as error:
        if of_the_machine(error):
            raise
        return None, f"{type(error).__name__}: {error}"


def digest_of(file: Path) -> str:
    """128-bit BLAKE2b, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a digest of all that it says."""
    said = {name: value for name, value in record.items() if name != "seal"}
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return said | {"seal": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}


def _read_record(path: Path) -> dict[str, Any]:
    remedy = "fit a detector with `evalsuite detector fit STORE --out FOLDER`"
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: holds no detector ({RECORD}); {remedy}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path / RECORD}: cannot be read ({type(error).__name__}); {remedy}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise ValueError(f"{path / RECORD}: format {found}, this featcache reads {FORMAT}; {remedy}")
    if sealed(record) != record:
        raise ValueError(f"{path / RECORD}: is not as it was written; copy the folder anew, or fit the detector again")
    return record


def load_detector(path: str | os.PathLike[str], *, trust_code: bool = False) -> DeployedDetector:
    """The deployed detector in a folder. With `trust_code`, one whose encoder is weights alone may import the MODULE:CALLABLE
    that a run names. Raises as `DeployedDetector`."""
    return DeployedDetector(path, trust_code=trust_code)

"""From a store to a folder that says of new images whether they are OOD."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from evalsuite import detectors as registry
from evalsuite.deployed import encoder as encoders
from evalsuite.deployed.card import write_card
from evalsuite.deployed.detector import (
    BANK,
    BANK_IDS,
    ENCODER,
    FORMAT,
    README,
    RECORD,
    SCORE,
    WEIGHTS,
    DeployedDetector,
    digest_of,
    sealed,
)
from evalsuite.intervals import Estimate, share
from evalsuite.intervals.order import least_rows, threshold
from evalsuite.neighbours.index import evenly_spread
from evalsuite.overlap import overlap
from evalsuite.result import versions
from evalsuite.scores import build_all
from evalsuite.sets import opened
from evalsuite.traced import Untraceable, score_graph
from featcache.disk.durable import appearing
from featcache.geometry import unit_rows
from featcache.head import Head
from featcache.models.onnx import open_session
from featcache.rows import Rows, Store
from featcache.store.comparable import is_half

FORMATS = ("onnx", "safetensors")
LARGEST = 3 * 2**29
"""Bytes of a graph, below what an ONNX file may have."""
_TRACED_ROWS = 3  # of the bank, that the score is followed with; not the number of anything else
_SAME_SCORE = 1e-6  # largest difference between the graph's scores and the detector's, in their standard deviations
_FAR_FROM = 0.05  # the same, between scores of images and of their rows, above which it is said


@dataclass
class _Fit:
    """A fit while it is made: what it is of, and the lines to know before believing it."""

    bank: Rows
    held_out: Rows
    ood: dict[str, Rows]
    head: Head | None
    spec: str
    detector: registry.Detector
    remarks: list[str] = field(default_factory=list)

    @property
    def fields(self) -> list[str]:
        """Of stores, that the graph of the score takes: with a head, logits are made inside."""
        needs = dict.fromkeys("embedding" if self.head and each == "logits" else each for each in self.detector.needs)
        return list(needs)

    def score_of(self, *fields: np.ndarray) -> np.ndarray:
        """The detector's own score of these fields."""
        given = dict(zip(self.fields, fields, strict=True))
        if self.head and "logits" in self.detector.needs:
            given["logits"] = self.head.logits(given["embedding"]).astype(np.float32)
        return self.detector.score(*(given[each] for each in self.detector.needs))

    def scores(self, rows: Rows, score: Callable[..., np.ndarray]) -> Float[np.ndarray, " n"]:
        """Of all rows, by a function of `fields`."""
        found = [score(*(block[name] for name in self.fields)) for block in rows.blocks_of(self.fields)]
        scores = np.concatenate(found).astype(np.float64)
        if wrong := int((~np.isfinite(scores)).sum()):
            raise ValueError(f"{wrong:,} scores of {rows.name} are NaN or infinite; use another detector for such rows")
        return scores


def fit_detector(
    store: Store,
    out: str | os.PathLike[str],
    *,
    detector: str = "knn",
    k: int | None = None,
    head: str | os.PathLike[str] | None = None,
    keep: float = 0.95,
    id: Store | None = None,
    hold_out: float = 0.2,
    seed: int = 0,
    ood: Mapping[str, Store] | None = None,
    encoder: str | None = None,
    format: str = "onnx",
    nearest: int = 3,
    bank_rows: int = 20_000,
    any_precision: bool = False,
    trust_code: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda what: None,
) -> DeployedDetector:
    """Fit a detector to the ID rows of `store`, find its threshold on held-out ID rows, and write both with the encoder to
    the folder `out`, which appears whole or not at all and loads without this project.

    A row is said to be OOD where its score is above the threshold: of n held-out scores the ⌈(n + 1) keep⌉-th smallest
    (`evalsuite.intervals.order`), so that of further ID images at least the share `keep` is kept, on average over such
    fits. The detector is not fitted to held-out rows.

    Args:
        detector: its spec, as `evalsuite ood` takes it; one whose score can be a graph.
        k: neighbours, for a detector that uses them and whose spec does not say.
        head: a classifier that `evalsuite probe` saved, for detectors that need one.
        keep: the share of ID images to keep, above 0 and below 1.
        id: ID rows to hold out instead of a part of `store`. Those whose image `store` has too are left out.
        hold_out: the share of the images of `store` that are held out, drawn with `seed`; all rows of one image together.
        ood: OOD sets by name: how much of each the threshold finds, with an interval.
        encoder: its spec, where that of the store no longer leads to it; "none": none goes into the folder.
        format: of the encoder: "onnx", a graph of its own; "safetensors", its weights alone, which need featcache, for one that
            cannot be a graph.
        nearest: bank images that are named beside every score; 0 for none.
        bank_rows: the most that these are sought among, evenly spread.
        any_precision: compare stores in whatever precision they were made, and believe in a half-precision one whose images
            are not there to see what the graph, which is fp32, makes of them.
        trust_code: MODULE:CALLABLE that a run names may be imported.
        overwrite: replace a detector's folder at `out`.
        say: told what is being done.

    Raises:
        ValueError: an argument, a store that does not suit (another encoder, a set that is ID and OOD, too few rows), a
            detector that cannot be a graph, or `out` exists; nothing has been written.
        RuntimeError: what was written does not give what the encoder or the detector gives; nothing was kept.
    """
    out = Path(out)
    least_rows(keep)  # refuses what is no share
    _refuse_arguments(hold_out, format, nearest, bank_rows)
    _refuse_place(out, overwrite)
    say("reading")
    fit = _opened(store, detector, k, head, keep, id, hold_out, seed, ood, any_precision)
    _refuse_missing(fit)
    say("fitting")
    fit.detector.fit(fit.bank)
    room = (lambda: shutil.rmtree(os.path.realpath(out))) if overwrite and os.path.exists(out) else None
    with appearing(out, folder=True, making_room=room) as part:
        part.mkdir()
        say("the score as a graph")
        by_graph = _write_score(part / SCORE, fit)  # to the last bit what the folder will say
        scores = by_graph(fit.held_out)
        found = threshold(scores, keep)
        of_ood = {name: share(by_graph(rows) > found.value, name) for name, rows in fit.ood.items()}
        _write_bank(part, fit, nearest, bank_rows)
        of_encoder = None
        if encoder != "none":
            say("the encoder as a graph" if format == "onnx" else "the encoder's weights")
            spec = encoder or fit.bank.stores[0].encoder_name
            of_encoder, encode = _write_encoder(part, fit, spec, format, trust_code)
            of_encoder["checked"] = _checked(encode, fit, scores, found.value, any_precision)
        how = {"by": "store"} if id is not None else {"by": "split", "share": hold_out, "seed": seed}
        said = {
            "keep": keep,
            "threshold": asdict(found),
            "held_out": fit.held_out.record() | how,
            "encoder": of_encoder,
        }
        record = _record(fit, said | {"nearest": min(nearest, len(fit.bank))}, of_ood, part)
        (part / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_card(part / README, record)
    return DeployedDetector(out, trust_code=trust_code)


def _record(fit: _Fit, said: Mapping[str, Any], ood: Mapping[str, Estimate], folder: Path) -> dict[str, Any]:
    """What `detector.json` holds: plain values, with digests of the files that are in the folder by now, and of itself."""
    sets = {
        name: {**fit.ood[name].record(), "found": each.value, "ci95": each.ci95, "no_ci95": each.none}
        for name, each in ood.items()
    }
    record = {
        "format": FORMAT,
        "detector": fit.spec,
        "arguments": registry.parameters(fit.detector),
        "fields": fit.fields,
        **said,
        "bank": fit.bank.record(),
        "ood": sets,
        "head": None if fit.head is None else {"name": fit.head.name, "digest": fit.head.digest},
        "store": fit.bank.stores[0].manifest.to_json(),
        "remarks": fit.remarks,
        "versions": versions("onnx", "onnxruntime", "torch", "timm", "open_clip_torch"),
        "files": {file.name: digest_of(file) for file in sorted(folder.iterdir())},
    }
    return sealed(json.loads(json.dumps(record, ensure_ascii=False, allow_nan=False)))


def _refuse_arguments(hold_out: float, format: str, nearest: int, bank_rows: int) -> None:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r} of the encoder; known: {', '.join(FORMATS)}")
    if not 0 < hold_out < 1:
        raise ValueError(f"hold_out={hold_out!r} must be above 0 and below 1: it is the share of the store's images")
    if nearest < 0 or bank_rows < max(1, nearest):
        raise ValueError(
            f"nearest={nearest}, bank_rows={bank_rows}: give 0 or more neighbours, and as many rows for them at least"
        )


def _refuse_place(out: Path, overwrite: bool) -> None:
    there = out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))
    if there and not overwrite:
        raise ValueError(f"{out}: already exists; choose another --out, or replace a detector with --overwrite")
    if there and not (out / RECORD).is_file():
        raise ValueError(f"{out}: is no detector's folder, and is not replaced; choose another --out")


def preview(
    store: Store,
    out: str | os.PathLike[str],
    *,
    detector: str = "knn",
    k: int | None = None,
    head: str | os.PathLike[str] | None = None,
    keep: float = 0.95,
    id: Store | None = None,
    hold_out: float = 0.2,
    seed: int = 0,
    ood: Mapping[str, Store] | None = None,
    format: str = "onnx",
    nearest: int = 3,
    bank_rows: int = 20_000,
    any_precision: bool = False,
    overwrite: bool = False,
    **of_encoder: Any,
) -> dict[str, int]:
    """How many rows `fit_detector` would take of each set: "bank", "held_out", and OOD sets by name. Refused as it would be before
    anything is fitted; the encoder is not looked for, and nothing is written."""
    least_rows(keep)
    _refuse_arguments(hold_out, format, nearest, bank_rows)
    _refuse_place(Path(out), overwrite)
    fit = _opened(store, detector, k, head, keep, id, hold_out, seed, ood, any_precision)
    _refuse_missing(fit)
    return {"bank": len(fit.bank), "held_out": len(fit.held_out), **{name: len(rows) for name, rows in fit.ood.items()}}


def _refuse_missing(fit: _Fit) -> None:
    """Raises ValueError where stores lack what the detector reads."""
    for rows in (fit.bank, fit.held_out, *fit.ood.values()):
        for name in fit.detector.needs:
            rows.require_field(name)
    _refuse_top_k(fit)


def _opened(
    store: Store, detector: str, k: int | None, head: Any, keep: float, id: Store | None, hold_out: float, seed: int,
    ood: Mapping[str, Store] | None, any_precision: bool,
) -> _Fit:  # fmt: skip
    """The rows that each set consists of, and the detector, not fitted yet."""
    built = build_all(detector, k)
    ((spec, made),) = built.items()
    for name in ood or {}:
        if not name or "/" in name:
            raise ValueError(f"{name!r} cannot name an OOD set; use a name without '/'")
    given = {**({} if id is None else {"id": id}), **{f"ood/{name}": each for name, each in (ood or {}).items()}}
    bank, others = opened("the store", store, given, head, any_precision)
    remarks = [line for each in (bank, *others.values()) if each.failed for line in [_failed(each)]]
    if id is None:
        whole, (bank, held_out) = bank, split(bank, hold_out, seed)
        of_id = [whole]
    else:
        same = overlap(others["id"], [bank])
        held_out = same.without(others.pop("id"), bank.name, "other ID images as --id")
        remarks += [
            line.replace("detectors were fitted to them: ", "")
            for line in same.remarks("rows of --id", "of the store", "", True)
        ]
        of_id = [bank, held_out]
    if len(held_out) < least_rows(keep):
        raise ValueError(
            f"{held_out.name}: {len(held_out):,} held-out ID rows are too few for a threshold that keeps {keep:g} of them; "
            f"hold out {least_rows(keep):,} or more (--hold-out SHARE, --id STORE), or --keep less"
        )
    sets = {}
    for key, rows in others.items():
        same = overlap(rows, of_id)
        sets[key.removeprefix("ood/")] = same.without(rows, "ID rows", f"other images as {key}")
        remarks += same.remarks(f"rows of {key}", "of an ID set", "", True)
    return _Fit(bank, held_out, sets, bank.head, spec, made, remarks)


def _failed(rows: Rows) -> str:
    return f"{rows.name}: {rows.failed:,} of {rows.total:,} rows failed when it was extracted, and are left out"


def split(rows: Rows, hold_out: float, seed: int) -> tuple[Rows, Rows]:
    """The rows to fit to, and those held out: a share of the images, drawn at random, all rows of one image together."""
    images = rows.images()
    different = np.unique(images)
    drawn = np.random.default_rng(seed).permutation(different)[: round(hold_out * len(different))]
    held = np.isin(images, drawn)
    if held.all() or not held.any():
        raise ValueError(
            f"{rows.name}: has {len(different):,} different images, too few to hold out {hold_out:g} of them; give --id STORE"
        )
    return rows.pick(np.flatnonzero(~held)), rows.pick(np.flatnonzero(held))


def _refuse_top_k(fit: _Fit) -> None:
    for name in fit.fields:
        if any(name in store.manifest.top_k for store in fit.bank.stores):
            raise ValueError(
                f"{fit.bank.name} keeps the largest {name} alone, and an encoder gives all of them; extract it without --top-k"
            )


def _write_score(file: Path, fit: _Fit) -> Callable[[Rows], Float[np.ndarray, " n"]]:
    """Write the graph of the score, once it gives what the detector gives of all held-out rows; returns its scores of rows."""
    scores = fit.scores(fit.held_out, fit.score_of)
    some = fit.bank.pick(np.arange(len(fit.bank))[:_TRACED_ROWS] if len(fit.bank) >= _TRACED_ROWS else np.zeros(3, int))
    fields = {name: some.take(np.arange(_TRACED_ROWS), name) for name in fit.fields}
    try:
        model = score_graph(fit.score_of, fields, {"detector": fit.spec, "output": "score: higher = more OOD"})
        size = sum(len(each.raw_data) for each in model.graph.initializer)
        if size > LARGEST:
            raise ValueError(
                f"detector {fit.spec}: takes {size / 2**30:.1f} GiB of {fit.bank.name} with it, more than an ONNX file may hold; "
                "fit it to fewer rows, or choose another detector"
            )
        file.write_bytes(model.SerializeToString())
        graph = open_session(file)

        def by_graph(rows: Rows) -> Float[np.ndarray, " n"]:
            return fit.scores(rows, lambda *of: graph.run(None, dict(zip(fit.fields, of, strict=True)))[0])

        found = by_graph(fit.held_out)
        worst = np.abs(found - scores).max() if found.shape == scores.shape else np.inf
        if not worst <= _SAME_SCORE * (float(scores.std()) + 1e-6 * float(np.abs(scores).max())):
            raise Untraceable(f"a graph whose scores differ by {worst:.1e}")
        return by_graph
    except ImportError as error:
        raise ValueError(f"a detector to deploy needs {error.name}; pip install 'featcache[onnx]'") from None
    except Exception as error:
        of_ours = isinstance(error, ValueError) and not isinstance(error, Untraceable)
        if of_ours or isinstance(error, OSError | MemoryError):
            raise
        reason = str(error) if isinstance(error, Untraceable) else "it depends on the number of rows"
        raise ValueError(
            f"detector {fit.spec} cannot be a graph of its own ({reason}); those that can: {', '.join(deployable())}"
        ) from None


def _write_bank(folder: Path, fit: _Fit, nearest: int, most: int) -> None:
    """Unit rows of some bank images, and their ids."""
    kept = fit.bank.pick(evenly_spread(len(fit.bank), most) if nearest else np.arange(0))
    if nearest and len(kept) < len(fit.bank):
        fit.remarks.append(
            f"nearest bank images are sought among {len(kept):,} of {len(fit.bank):,}; --bank-rows takes more"
        )
    if nearest:
        np.save(folder / BANK, unit_rows(kept.take(np.arange(len(kept)))), allow_pickle=False)
        ids = [str(sample_id) for sample_id in kept.sample_ids]
        (folder / BANK_IDS).write_text(json.dumps(ids, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_encoder(
    folder: Path, fit: _Fit, spec: str, format: str, trust_code: bool
) -> tuple[dict[str, Any], encoders.Encode]:
    """Write the encoder; what a record says of it, and what was written, opened."""
    store = fit.bank.stores[0]
    dtypes = {name: store.manifest.dtype(name) for name in dict.fromkeys(["embedding", *fit.fields])}
    encoder = encoders.open_encoder(spec, fit.bank, dtypes, trust_code)
    said: dict[str, Any] = {
        "name": encoder.name, "preprocess": encoder.preprocess.to_dict(), "output": encoder.output, "kept_as": dtypes,
    }  # fmt: skip
    if format == "onnx":
        said["difference"] = encoders.write_encoder(folder / ENCODER, encoder, dtypes)
        return said, encoders.open_graph(folder / ENCODER)
    encoders.write_weights(folder / WEIGHTS, encoder)
    return said, encoders.open_weights(folder / WEIGHTS, encoder.name, store.fingerprint, dtypes, trust_code)


def _checked(
    encode: encoders.Encode, fit: _Fit, scores: Float[np.ndarray, " n"], limit: float, any_precision: bool
) -> dict[str, Any]:
    """What the folder's encoder makes of some held-out images, beside their rows' scores."""
    images, precision = encoders.images_again(fit.held_out), str(fit.bank.extraction.precision or "")
    if precision and is_half(precision) and not images and not any_precision:
        raise ValueError(
            f"{fit.bank.name} is in {precision}, a deployed encoder computes in fp32, and no held-out image is there to "
            "see what that changes; extract the store with --precision fp32, or allow it with --any-precision"
        )
    if not images:
        fit.remarks.append(f"no held-out image of {fit.held_out.name} was there to be scored by the folder's encoder")
        return {"images": 0}
    made = encoders.require_faithful(encode, fit.held_out, images)
    at = np.array(list(made))
    again = fit.score_of(*(np.concatenate([each[name] for each in made.values()]) for name in fit.fields))
    apart = float(np.abs(again - scores[at]).max() / max(float(scores.std()), 1e-300))
    if apart > _FAR_FROM:
        fit.remarks.append(
            f"of {len(made)} held-out images, scored again by the folder's encoder (fp32), one's score moves by {apart:.2g} "
            f"standard deviations from its row's in {fit.held_out.name} ({precision or 'of unknown precision'})"
        )
    same = int(((again > limit) == (scores[at] > limit)).sum())
    return {"images": len(made), "largest_score_difference": apart, "same_decision": same}


def deployable() -> list[str]:
    """The registered detectors whose score can be a graph, found by trying: each fitted to a few rows made up."""
    rng = np.random.default_rng(0)
    x = np.abs(np.concatenate([centre + 0.5 * rng.normal(size=(40, 8)) for centre in 4 * np.eye(4, 8)])).astype(
        np.float32
    )
    head = Head(3 * np.eye(4, 8), np.full(4, -0.1), np.arange(4))
    bank, found = Rows.from_arrays(x, np.repeat(np.arange(4), 40), head=head), []
    for name in registry.names():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                fit = _Fit(bank, bank, {}, head, name, registry.build(name).fit(bank))
                model = score_graph(fit.score_of, {each: x[:_TRACED_ROWS] for each in fit.fields}, {})
                graph = open_session(Path("score"), model.SerializeToString())
                again = graph.run(None, dict.fromkeys(fit.fields, x))[0]
            except Exception:  # whatever each does that no graph can have, or asks for
                continue
        if np.allclose(again, fit.score_of(*[x for _ in fit.fields]), rtol=1e-6):
            found.append(name)
    return found

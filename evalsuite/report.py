"""Results as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.metadata
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from evalsuite.result import Result, refuse_inputs, whole_file
from featcache.disk.refusals import require_writable

_PARTS = Path(__file__).with_name("_page")
_SCRIPTS = ("elements", "numbers", "plot", "parts", "summary", "fidelity", "ood", "robustness", "map", "rest", "start")
"""In this order they make the page's one script."""
_EVALUATED = ("student", "encoder", "query", "test", "id_test", "id_train", "train", "bank", "store")
"""Which input is the encoder that a result is about, the first that is there."""

_BINS = 48  # of a histogram
_BEYOND = 0.005  # share of the pooled scores that may lie beyond each end of a histogram's axis
_CURVE_POINTS, _LEAST_CURVE_POINTS = 160, 16  # of a ROC curve
_MAP_POINTS, _LEAST_MAP_POINTS = 2000, 50  # of each set on a map
_ALL_CURVE_POINTS = 40_000  # of all curves of a page, some 16 bytes each
_ALL_MAP_POINTS = 80_000  # of all maps of a page, some 10 bytes each
_MOST_BYTES = 3_000_000  # of a page; a larger one is slow to open and to send
_MAP_STEPS = 4095  # the places of a map are whole numbers from 0 to this
_SHOWN_NOTICES = 12


def report(
    results: Sequence[Result | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
    title: str = "Evaluation report",
) -> Path:
    """Write one HTML page about `results` (in memory, or files that evaluators wrote) and return its path.

    The page loads nothing from anywhere and holds the numbers it draws: a summary with a row an encoder, score
    histograms and ROC curves of each OOD detector, accuracy against fidelity, accuracy under corruption, a map of
    the embeddings, and every metric, input and parameter. Parts without data are left out: histograms, curves and
    maps need the samples that evaluators write beside their JSON.

    Results of one encoder (one fingerprint) share a row. `names` gives encoders the names they are shown under, by
    fingerprint, by encoder name or by a result's path as given in `results`; results of one encoder under two
    names are two rows. Teachers are the encoders that fidelity results name as such and the one shown as
    "teacher". Where two results of one row have different values for one metric, the later one counts, the page
    says so and shows both, and a `RuntimeWarning` tells; so it does of a result without metrics.

    Histograms have 48 equal bins from the 0.5th to the 99.5th percentile of a detector's pooled scores; what lies
    beyond is in the outermost bins. Curves keep at most 161 of their corners and maps at most 2,000 places a set,
    evenly spread over its rows; fewer each where there are many, to keep the page under 3 MB. A larger one warns.

    Raises `ValueError` when there is no result, a file is not one, one name is given to two encoders, or no page can
    be written to `out`: it is a folder, or one of `results`.
    """
    if not results:
        raise ValueError("no result was given; write one with `evalsuite COMMAND … --json RESULT.json`")
    refuse_inputs(out, [each for each in results if not isinstance(each, Result)])
    require_writable(out, "path for the page")
    rows, sources = _grouped([_Source.of(each, number) for number, each in enumerate(results, 1)], names or {})
    notices = [f"{source.file} has no metrics" for source in sources if not source.result.metrics]
    notices += _conflicts(rows, sources)
    for notice in notices:
        warnings.warn(notice, RuntimeWarning, stacklevel=2)
    remarked: dict[str, list[str]] = {}
    for source in sources:
        for remark in source.result.remarks:
            remarked.setdefault(remark, []).append(source.file)
    notices += [f"{remark} ({', '.join(files)})" for remark, files in remarked.items()]
    if len(notices) > _SHOWN_NOTICES:
        rest = len(notices) - _SHOWN_NOTICES
        notices[_SHOWN_NOTICES:] = [
            f"… and {rest} more: the sources below have each result's remarks, and where a metric has two values, the "
            "table of metrics shows both."
        ]
    data = {
        "title": title,
        "version": importlib.metadata.version("featcache"),
        "notices": notices,
        "encoders": [row.record(rows) for row in rows],
        "results": [source.record() for source in sources],
        "histograms": [drawn for source in sources for drawn in _histograms(source)],
        "rocs": _all_rocs(sources),
        "maps": _all_maps(sources),
        "robustness": [drawn for source in sources for drawn in _robustness(source)],
    }
    target, page = Path(out), _page(title, data).encode()
    if len(page) > _MOST_BYTES:
        warnings.warn(
            f"{target} has {len(page) / 1e6:.1f} MB, a lot to open or send; report fewer results at once",
            RuntimeWarning,
            stacklevel=2,
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        file.write(page)
    return target


@dataclass
class _Source:
    """One result and where it came from; `row` is the number of its encoder's row, -1 where it is about several."""

    result: Result
    file: str
    row: int = -1

    @classmethod
    def of(cls, given: Result | str | os.PathLike[str], number: int) -> _Source:
        if isinstance(given, Result):
            return cls(given, f"result {number}")
        return cls(Result.read(given), os.fspath(given))

    @property
    def encoder(self) -> tuple[str, str] | None:
        """Fingerprint and name of the encoder that the result is about; None for a comparison of several."""
        if self.result.command == "compare":
            return None
        return next((found for key in _EVALUATED if (found := _encoder(self.result.inputs, key))), None)

    @property
    def teacher(self) -> tuple[str, str] | None:
        return _encoder(self.result.inputs, "teacher")

    def record(self) -> dict[str, Any]:
        result = self.result
        return {
            "file": self.file,
            "command": result.command,
            "encoder": None if self.row < 0 else self.row,
            "inputs": result.inputs,
            "parameters": result.parameters,
            "versions": result.versions,
            "remarks": result.remarks,
            "metrics": {name: [each.value, *(each.ci95 or ())] for name, each in result.metrics.items()},
        }


@dataclass
class _Row:
    """What the page shows as one encoder."""

    fingerprint: str
    encoder: str
    given: str | None
    shown: str = ""
    teacher: bool = False
    taught_by: int | None = None

    def record(self, rows: list[_Row]) -> dict[str, Any]:
        return {
            "name": self.shown,
            "encoder": self.encoder,
            "fingerprint": self.fingerprint,
            "teacher": self.teacher,
            "taught_by": self.taught_by,
        }


def _encoder(inputs: Mapping[str, Any], key: str) -> tuple[str, str] | None:
    """Fingerprint and name in an input's record, as far as it has them."""
    record = inputs.get(key)
    if isinstance(record, str):  # a spec; its fingerprint may stand beside it
        record = {"encoder": record, "fingerprint": inputs.get("fingerprint")}
    if not isinstance(record, Mapping):
        return None
    name = record.get("encoder") or record.get("name") or record.get("path") or record.get("fingerprint")
    return (str(record.get("fingerprint") or f"of {name}"), str(name)) if name else None


def _grouped(sources: list[_Source], names: Mapping[str, str]) -> tuple[list[_Row], list[_Source]]:
    """The rows, teachers first, and the sources with their row's number."""
    by_file = {os.fspath(key): name for key, name in names.items()}
    of_encoder: dict[str, list[str]] = {}  # fingerprint → the names given to its results
    chosen: list[str | None] = []
    for source in sources:
        encoder = source.encoder
        keys = [source.file, *(encoder or ())]
        name = next((by_file[key] for key in keys if key in by_file), None)
        chosen.append(name)
        if encoder and name is not None and name not in of_encoder.setdefault(encoder[0], []):
            of_encoder[encoder[0]].append(name)

    rows: list[_Row] = []
    row_of: list[_Row | None] = []
    for source, name in zip(sources, chosen, strict=True):
        encoder = source.encoder
        if encoder is None:
            row_of.append(None)
            continue
        fingerprint, spec = encoder
        if name is None and len(of_encoder.get(fingerprint, ())) == 1:
            name = of_encoder[fingerprint][0]
        other = next((row for row in rows if name is not None and row.given == name), None)
        if other is not None and other.fingerprint != fingerprint:
            raise ValueError(
                f"{name} names two encoders, {other.encoder} and {spec} (of {source.file}); give each its own name"
            )
        row = next((row for row in rows if (row.fingerprint, row.given) == (fingerprint, name)), None)
        if row is None:
            rows.append(row := _Row(fingerprint, spec, name))
        row_of.append(row)

    taught: dict[str, str] = {}  # fingerprint of a student → its teacher's
    for source in sources:
        student, teacher = source.encoder, source.teacher
        if student and teacher and student[0] != teacher[0]:
            taught[student[0]] = teacher[0]
    for row in rows:
        row.teacher = (row.fingerprint in taught.values() and row.fingerprint not in taught) or row.given == "teacher"
    rows.sort(key=lambda row: not row.teacher)
    teachers = [number for number, row in enumerate(rows) if row.teacher]
    for row in rows:
        fits = [n for n, other in enumerate(rows) if other.fingerprint == taught.get(row.fingerprint)]
        if not row.teacher:
            row.taught_by = fits[0] if fits else teachers[0] if len(teachers) == 1 else None
    for row in rows:
        row.shown = row.given or _short(row.encoder)
    for shown, count in Counter(row.shown for row in rows).items():
        if count > 1:
            for row in rows:
                if row.shown == shown and row.given is None:
                    row.shown = f"{row.encoder} ({row.fingerprint[:8]})"
    for source, row in zip(sources, row_of, strict=True):
        source.row = next((n for n, other in enumerate(rows) if other is row), -1)
    return rows, sources


def _short(encoder: str) -> str:
    """A student's run folder without what leads there; other encoders' names as they are."""
    return encoder.rstrip("/").rpartition("/")[2] if encoder.startswith("run:") else encoder


def _conflicts(rows: list[_Row], sources: list[_Source]) -> Iterator[str]:
    """One line for each metric that a row's results disagree on."""
    held: dict[tuple[int, str], tuple[float, str]] = {}
    for source in sources:
        if source.row < 0:
            continue
        for name, metric in source.result.metrics.items():
            value, file = held.get((source.row, name), (metric.value, source.file))
            if value != metric.value:
                yield (
                    f"{rows[source.row].shown} has two values for {name}: {value:.6g} in {file} and "
                    f"{metric.value:.6g} in {source.file}; the latter counts"
                )
            held[source.row, name] = metric.value, source.file


# -- figures ----------------------------------------------------------------------------------------------


def _sets(source: _Source, kind: str) -> dict[str, np.ndarray]:
    """What samples hold for each set, under `kind/`: `id_test` first, then csid, near, far."""
    found = {
        name.removeprefix(f"{kind}/"): values
        for name, values in source.result.samples.items()
        if name.startswith(f"{kind}/") and len(values) and values.dtype.kind in "fiu"
    }
    order = ("id_test", "csid", "near", "far")
    known = {name: values for name, values in found.items() if name.partition("/")[0] in order}
    return dict(sorted(known.items(), key=lambda each: order.index(each[0].partition("/")[0])))


def _detectors(source: _Source) -> Iterator[tuple[str, dict[str, Float[np.ndarray, " n"]]]]:
    """Each detector with its scores by set, not-a-number left out."""
    ending = "/id_test"
    for name in source.result.samples:
        if name.startswith("score/") and name.endswith(ending):
            detector = name.removeprefix("score/").removesuffix(ending)
            scores = {
                key: values[~np.isnan(values)].astype(np.float64)
                for key, values in _sets(source, f"score/{detector}").items()
            }
            yield detector, {key: values for key, values in scores.items() if len(values)}


def _named(key: str) -> dict[str, str]:
    group, _, name = key.partition("/")
    return {"group": "id", "name": "test"} if key == "id_test" else {"group": group, "name": name}


def _histograms(source: _Source) -> Iterator[dict[str, Any]]:
    if source.row < 0:
        return
    for detector, scores in _detectors(source):
        pooled = np.concatenate(list(scores.values()))
        finite = pooled[np.isfinite(pooled)]
        if not finite.size:
            continue
        low, high = (float(x) for x in np.quantile(finite, [_BEYOND, 1 - _BEYOND]))
        if not high > low:  # half a unit around the one value, and wider where that would be lost in rounding
            margin = max(0.5, abs(low) * 1e-6)
            low, high = low - margin, high + margin
        yield {
            "encoder": source.row,
            "detector": detector,
            "low": low,
            "high": high,
            "sets": [
                _named(key)
                | {
                    "rows": len(values),
                    "counts": np.histogram(np.clip(values, low, high), _BINS, (low, high))[0].tolist(),
                }
                for key, values in scores.items()
            ],
        }


def _all_rocs(sources: Sequence[_Source]) -> list[dict[str, Any]]:
    curves = sum(
        name.startswith("score/") and ("/near/" in name or "/far/" in name)
        for source in sources
        for name in source.result.samples
    )
    points = int(np.clip(_ALL_CURVE_POINTS // max(1, curves), _LEAST_CURVE_POINTS, _CURVE_POINTS))
    return [drawn for source in sources for drawn in _rocs(source, points)]


def _rocs(source: _Source, points: int) -> Iterator[dict[str, Any]]:
    if source.row < 0:
        return
    for detector, scores in _detectors(source):
        for key, values in scores.items():
            if key.startswith(("near/", "far/")) and "id_test" in scores:
                fpr, tpr = _curve(scores["id_test"], values)
                keep = _spread_over(fpr + tpr, points)
                yield (
                    {"encoder": source.row, "detector": detector}
                    | _named(key)
                    | {
                        "auroc": float(np.diff(fpr) @ (tpr[1:] + tpr[:-1]) / 2),
                        "fpr": np.round(fpr[keep], 5).tolist(),
                        "tpr": np.round(tpr[keep], 5).tolist(),
                    }
                )


def _curve(
    id_scores: Float[np.ndarray, " n"], ood_scores: Float[np.ndarray, " m"]
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """Shares of ID and of OOD that score at least each threshold, from (0, 0) to (1, 1); rows tied move together."""
    thresholds = np.unique(np.concatenate([id_scores, ood_scores]))[::-1]
    shares = [1 - np.searchsorted(np.sort(each), thresholds) / len(each) for each in (id_scores, ood_scores)]
    fpr, tpr = (np.concatenate([[0.0], share]) for share in shares)
    return fpr, tpr


def _spread_over(position: Float[np.ndarray, " t"], points: int) -> np.ndarray:
    """The numbers of at most `points` + 1 entries of a rising array, evenly spread over its range, both ends among them."""
    wanted = np.linspace(position[0], position[-1], points)
    return np.unique(np.append(np.searchsorted(position, wanted).clip(max=len(position) - 1), [0, len(position) - 1]))


def _all_maps(sources: Sequence[_Source]) -> list[dict[str, Any]]:
    sets = sum(name.startswith("map/") for source in sources for name in source.result.samples)
    points = int(np.clip(_ALL_MAP_POINTS // max(1, sets), _LEAST_MAP_POINTS, _MAP_POINTS))
    return [drawn for source in sources for drawn in _maps(source, points)]


def _maps(source: _Source, points: int) -> Iterator[dict[str, Any]]:
    places = {
        key: values[np.linspace(0, len(values) - 1, min(len(values), points)).round().astype(np.int64)]
        for key, values in _sets(source, "map").items()
        if values.ndim == 2 and values.shape[1] == 2 and np.isfinite(values).all()
    }
    if source.row < 0 or not places:
        return
    pooled = np.concatenate(list(places.values())).astype(np.float64)
    low, high = pooled.min(axis=0), pooled.max(axis=0)
    width = np.where(high > low, high - low, 1.0)
    yield {
        "encoder": source.row,
        "low": low.tolist(),
        "high": (low + width).tolist(),
        "steps": _MAP_STEPS,
        "sets": [
            _named(key)
            | {"rows": len(source.result.samples[f"map/{key}"])}
            | dict(zip("xy", np.rint((values - low) / width * _MAP_STEPS).astype(int).T.tolist(), strict=True))
            for key, values in places.items()
        ],
    }


def _robustness(source: _Source) -> Iterator[dict[str, Any]]:
    """For each metric by corruption and severity its values, and their mean over the corruptions at each severity."""
    if source.row < 0:
        return
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name, metric in source.result.metrics.items():
        parts = re.fullmatch(r"(?!pgd/|autoattack/)([^/]+)/(\d+)/(.+)", name)  # an attack is no corruption
        if source.result.command == "robustness" and parts:
            corruption, severity, what = parts.groups()
            line = found.setdefault(what, {}).setdefault(corruption, {})
            line[int(severity)] = [metric.value, *(metric.ci95 or ())]
    for what, lines in found.items():
        clean = source.result.metrics.get(f"clean/{what}")
        measured = {
            severity: [line[severity][0] for line in lines.values() if severity in line]
            for severity in sorted({severity for line in lines.values() for severity in line})
        }
        yield {
            "encoder": source.row,
            "metric": what,
            "clean": None if clean is None else [clean.value, *(clean.ci95 or ())],
            "lines": {
                name: sorted([severity, *value] for severity, value in line.items()) for name, line in lines.items()
            },
            "mean": [[severity, float(np.mean(values))] for severity, values in measured.items()],
        }


# -- the page ---------------------------------------------------------------------------------------------


def _page(title: str, data: dict[str, Any]) -> str:
    style = _part("page.css")
    script = "\n".join(_part(f"{name}.js") for name in _SCRIPTS)
    fillings = {
        "policy": "; ".join(
            (
                "default-src 'none'",
                f"script-src {_hash(script)}",
                f"style-src {_hash(style)}",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": _json_in_html(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: fillings[place[1]], _part("page.html"))


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json_in_html(data: Any) -> str:
    """ASCII JSON that no HTML parser takes for anything but text."""
    text = json.dumps(_plain(data), separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _plain(value: Any) -> Any:
    """The same in what JSON has: text for what is not a finite number, a list, a mapping or a truth value."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)

"""What the page shows of OOD detection: every detector, score histograms, ROC curves, a map of the embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from evalsuite.charts import (
    Axis,
    Chart,
    Dots,
    Headline,
    Histogram,
    Lines,
    Named,
    Section,
    Series,
    knn_first,
    repeated_means,
    rows_said,
)
from evalsuite.evaluators import _ood_edges, _ood_maps
from evalsuite.evaluators._ood_sets import detectors, sets, threshold, title, tones
from evalsuite.result import Result

_CURVE_POINTS, _LEAST_CURVE_POINTS = 160, 16  # of a ROC curve
_ALL_CURVE_POINTS = 30_000  # of all curves, some 16 bytes each


def headlines(results: Sequence[Named]) -> list[Headline]:
    """AUROC and FPR95_id of near and of far OOD, of one detector at a time."""
    found = _metrics(results)
    return [
        Headline(
            metric=found[detector, group, "mean", what],
            axis=Axis.of(what),
            note=f"{group}, {detector}",
            rows=_rows_of(results, group, "mean"),
            where={"OOD detector": detector},
        )
        for detector in knn_first(detector for detector, *_ in found)
        for what in ("auroc", "fpr95_id")
        for group in ("near", "far")
        if (detector, group, "mean", what) in found
    ]


def charts(results: Sequence[Named]) -> list[Section]:
    found = {(each.encoder, spec): of for each in results for spec, of in _scores(each.result).items() if of}
    scores = {key: of for spec in knn_first(spec for _, spec in found) for key, of in found.items() if key[1] == spec}
    return [
        Section(
            "ood",
            "Detectors",
            "Out-of-distribution detection",
            "How well each detector tells ID images from others. Lines through a point are 95 % intervals; the axis shows the "
            "range of the values, and a dashed line where chance is.",
            _detectors(results),
        ),
        Section(
            "scores",
            "Scores",
            "Scores",
            "How a detector's scores spread over each set: the less ID and OOD overlap, the better they can be told apart. "
            "Scores of different encoders have different scales. Axes leave out far scores; below each figure stands how many.",
            _histograms(scores),
        ),
        Section(
            "roc",
            "ROC",
            "ROC curves",
            "What share of OOD a threshold finds, against what share of ID it takes for OOD. Towards the upper left is better; "
            "the dashed diagonal is chance.",
            _rocs(scores),
        ),
        *_ood_edges.sections(results),
        _ood_maps.section(results),
    ]


def _metrics(results: Iterable[Named]) -> dict[tuple[str, str, str, str], str]:
    """Names by (detector, group, set, metric)."""
    return {
        (found[1], found[2], found[3], found[4]): name
        for each in results
        for name in each.result.metrics
        if (found := re.fullmatch(r"(.+)/((?:near|far)(?:_fs)?)/([^/]+)/([^/]+)", name))
    }


def _detectors(results: Sequence[Named]) -> list[Chart]:
    """A chart a metric and set; without means of one set."""
    once = repeated_means({name: each for of in results for name, each in of.result.metrics.items()})
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for (detector, group, of_set, what), name in _metrics(results).items():
        if name not in once:
            rows.setdefault((what, group, of_set), {})[detector] = name
    order, first = ("near", "far", "near_fs", "far_fs"), list(dict.fromkeys(what for what, *_ in rows))
    return [
        Dots(
            title="Detectors",
            where={"Metric": Axis.of(what).name, "OOD set": _set_title(group, name)},
            axis=Axis.of(what),
            label="detector",
            rows=rows[what, group, name],
            note=_rows_of(results, group, name),
            wide=True,
        )
        for what, group, name in sorted(
            rows, key=lambda key: (first.index(key[0]), order.index(key[1]), key[2] != "mean")
        )
    ]


def _set_title(group: str, name: str) -> str:
    title = f"{group.removesuffix('_fs')}-OOD{', full spectrum' if group.endswith('_fs') else ''}"
    return f"{title}, mean of sets" if name == "mean" else f"{title}: {name}"


def _rows_of(results: Sequence[Named], group: str, name: str) -> str:
    """Of how many rows a set's metrics are: ID rows, with shifted ones for the full spectrum, and OOD rows."""

    def rows(result: Result, group: str, name: str) -> int:
        sets = result.inputs.get(group) or {}
        return sum(of.get("rows", 0) for key, of in sets.items() if name in ("mean", key))

    of_ood = [rows(each.result, group.removesuffix("_fs"), name) for each in results]
    shifted = [rows(each.result, "csid", "mean") if group.endswith("_fs") else 0 for each in results]
    of_id = [
        n + (each.result.inputs.get("id_test") or {}).get("rows", 0) for each, n in zip(results, shifted, strict=True)
    ]
    return f"{rows_said(of_id, 'ID')} and {rows_said(of_ood, 'OOD rows')}" if min(of_ood) else ""


def _scores(result: Result) -> dict[str, dict[str, Float[np.ndarray, " _"]]]:
    """Each detector's scores by set, not-a-number left out."""
    return {
        detector: {
            key: kept
            for key, values in sets(result, f"score/{detector}").items()
            if len(kept := values[~np.isnan(values)].astype(np.float64))
        }
        for detector in detectors(result)
    }


def _histograms(scores: Mapping[tuple[str, str], Mapping[str, Float[np.ndarray, " _"]]]) -> list[Chart]:
    return [
        _histogram(encoder, detector, found)
        for (encoder, detector), found in scores.items()
        if any(np.isfinite(values).any() for values in found.values())
    ]


def _histogram(encoder: str, detector: str, found: Mapping[str, Float[np.ndarray, " _"]]) -> Histogram:
    """With the threshold that keeps 95 % of ID, where there are ID rows; where it is beyond the axis, in words alone."""
    of_all = {title(key): values for key, values in found.items()}
    axis, drawn = Axis(name="score (higher: more OOD)", column="score"), tones(found)
    histogram = Histogram.of(of_all, drawn, title=encoder, where={"Detector": detector}, axis=axis)
    if "id_test" not in found:
        return histogram
    limit = threshold(found["id_test"])
    shown = histogram.low <= limit <= histogram.high
    beyond = [
        f"{title(key)} {100 * (values > limit).mean():.1f} %"
        for key, values in found.items()
        if not key.startswith("id_test")
    ]
    said = f"Dashed: the threshold {limit:.4g}" if shown else f"The threshold {limit:.4g}, beyond the axis,"
    note = (
        f"{said} keeps 95 % of ID test. Above it: {', '.join(beyond)}." if beyond else f"{said} keeps 95 % of ID test."
    )
    return replace(histogram, axis=replace(axis, line=limit if shown else None), note=note)


def _rocs(scores: Mapping[tuple[str, str], Mapping[str, Float[np.ndarray, " _"]]]) -> list[Chart]:
    """A chart a detector and OOD set, a curve an encoder; coarser where there are many."""
    lines: dict[tuple[str, str], list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for (encoder, detector), found in scores.items():
        for key, values in found.items():
            if key.startswith(("near/", "far/")) and "id_test" in found:
                lines.setdefault((detector, key), []).append((encoder, found["id_test"], values))
    points = _ALL_CURVE_POINTS // max(1, sum(map(len, lines.values())))
    points = int(np.clip(points, _LEAST_CURVE_POINTS, _CURVE_POINTS))
    return [
        Lines(
            title="OOD found against ID rejected",
            where={"Detector": detector, "OOD set": _set_title(*key.split("/", 1))},
            x=Axis(name="ID taken for OOD", share=True, least=0.0, most=1.0, column="id_flagged"),
            y=Axis(name="OOD found", share=True, least=0.0, most=1.0, column="ood_flagged"),
            series=[_roc(encoder, of_id, of_ood, points) for encoder, of_id, of_ood in of_set],
            diagonal=True,
            note=" and ".join(
                (
                    rows_said([len(each[1]) for each in of_set], "ID"),
                    rows_said([len(each[2]) for each in of_set], "OOD rows"),
                )
            ),
            wide=True,
        )
        for (detector, key), of_set in lines.items()
    ]


def _roc(encoder: str, of_id: Float[np.ndarray, " n"], of_ood: Float[np.ndarray, " m"], points: int) -> Series:
    fpr, tpr = _curve(of_id, of_ood)
    keep = _spread_over(fpr + tpr, points)
    auroc = float(np.diff(fpr) @ (tpr[1:] + tpr[:-1]) / 2)
    return Series(
        name=encoder,
        x=np.round(fpr[keep], 5).tolist(),
        y=np.round(tpr[keep], 5).tolist(),
        note=f"AUROC {auroc:.3f}",
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

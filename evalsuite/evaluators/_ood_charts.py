"""What the page shows of OOD detection: every detector, score histograms, ROC curves, a map of the embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from evalsuite.charts import (
    Axis,
    Chart,
    Cloud,
    Dots,
    Headline,
    Histogram,
    Lines,
    Named,
    Section,
    Series,
    Tone,
    knn_first,
    repeated_means,
    rows_said,
)
from evalsuite.result import Result

_GROUPS: tuple[Tone, ...] = ("id", "csid", "near", "far")
_CURVE_POINTS, _LEAST_CURVE_POINTS = 160, 16  # of a ROC curve
_ALL_CURVE_POINTS = 30_000  # of all curves, some 16 bytes each
_MAP_POINTS, _LEAST_MAP_POINTS = 2000, 50  # of each set on a map
_ALL_MAP_POINTS = 80_000  # of all maps, some 10 bytes each


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
        Section(
            "map",
            "Map",
            "Map of embeddings",
            "Unit embeddings on the two principal directions of the ID training rows, one scale for both axes, and each "
            "encoder has its own; at most 2,000 rows a set, evenly spread over it. Two directions show little of a space: sets "
            "that overlap here may be far apart in it.",
            _maps({each.encoder: of for each in results if (of := _places(each.result))}),
        ),
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


def _title(key: str) -> str:
    group, _, name = key.partition("/")
    return {"id_test": "ID test", "csid": f"ID, shifted: {name}"}.get(group) or f"{group}-OOD: {name}"


def _tones(keys: Iterable[str]) -> dict[str, Tone]:
    return {_title(key): next(group for group in _GROUPS if key.startswith(group)) for key in keys}


def _sets(result: Result, kind: str) -> dict[str, np.ndarray]:
    """What samples hold for each set, under `kind/`: `id_test` first, then csid, near, far."""
    found = {
        name.removeprefix(f"{kind}/"): values
        for name, values in result.samples.items()
        if name.startswith(f"{kind}/") and len(values) and values.dtype.kind in "fiu"
    }
    order = ("id_test", *_GROUPS[1:])
    known = {name: values for name, values in found.items() if name.partition("/")[0] in order}
    return dict(sorted(known.items(), key=lambda each: order.index(each[0].partition("/")[0])))


def _scores(result: Result) -> dict[str, dict[str, Float[np.ndarray, " _"]]]:
    """Each detector's scores by set, not-a-number left out."""
    ending = "/id_test"
    detectors = [
        name.removeprefix("score/").removesuffix(ending)
        for name in result.samples
        if name.startswith("score/") and name.endswith(ending)
    ]
    return {
        detector: {
            key: kept
            for key, values in _sets(result, f"score/{detector}").items()
            if len(kept := values[~np.isnan(values)].astype(np.float64))
        }
        for detector in detectors
    }


def _histograms(scores: Mapping[tuple[str, str], Mapping[str, Float[np.ndarray, " _"]]]) -> list[Chart]:
    return [
        Histogram.of(
            {_title(key): values for key, values in found.items()},
            _tones(found),
            title=encoder,
            where={"Detector": detector},
            axis=Axis(name="score (higher: more OOD)", column="score"),
        )
        for (encoder, detector), found in scores.items()
        if any(np.isfinite(values).any() for values in found.values())
    ]


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


def _places(result: Result) -> dict[str, np.ndarray]:
    return {
        key: values
        for key, values in _sets(result, "map").items()
        if values.ndim == 2 and values.shape[1] == 2 and np.isfinite(values).all()
    }


def _maps(maps: Mapping[str, Mapping[str, np.ndarray]]) -> list[Chart]:
    points = _ALL_MAP_POINTS // max(1, sum(map(len, maps.values())))
    points = int(np.clip(points, _LEAST_MAP_POINTS, _MAP_POINTS))
    return [
        Cloud.of(
            {_title(key): values for key, values in found.items()},
            _tones(found),
            points,
            title=encoder,
            x=Axis(name="1st direction", column="x"),
            y=Axis(name="2nd direction", column="y"),
        )
        for encoder, found in maps.items()
    ]

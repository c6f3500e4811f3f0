"""What the page shows of classify results: calibration, risk against coverage, and a table of classes for each encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from evalsuite import probabilities
from evalsuite.charts import Axis, Gallery, Headline, Lines, Named, Samples, Section, Series, Strip, Table, rows_of
from evalsuite.evaluators._confused import Wrong
from evalsuite.intervals import risk_coverage, share
from featcache.head import Head

_POINTS = 200  # of a risk-coverage curve
_CONFUSED = 3  # classes named beside each
_SHARE: dict[str, Any] = {"share": True, "range": (0.0, 1.0)}


def headlines(results: Sequence[Named]) -> list[Headline]:
    rows = rows_of(results, "test", "rows")
    names = {"top1": "Classifier top‑1", "nll": "NLL", "ece": "ECE"}
    return [
        Headline(metric=f"classify/{what}", axis=Axis.of(f"classify/{what}", name), rows=rows)
        for what, name in names.items()
    ]


def charts(results: Sequence[Named]) -> list[Section]:
    reliable = [line for each in results for line in _reliability(each)]
    drawn = [
        Lines(
            title="Reliability",
            x=Axis(name="mean top probability", **_SHARE),
            y=Axis(name="accuracy", **_SHARE),
            series=reliable,
            marked=True,
            diagonal=True,
            note="bins with 10 rows or more; below the diagonal the classifier is surer than it is right",
        ),
        Lines(
            title="Risk and coverage",
            x=Axis(name="coverage, the surest rows", **_SHARE),
            y=Axis(name="errors among them", share=True, better="lower"),
            series=[line for each in results for line in _risk(each)],
            note=rows_of(results, "test", "rows"),
        ),
    ]
    about = (
        "Whether a classifier is right as often as it says, how many errors are left where it may decline the rows that it is "
        "least sure of, and which classes it takes for which."
    )
    curves = drawn if reliable else []
    about_confused = (
        "Pairs of classes that a classifier takes for each other most often: the surest of its wrong answers."
    )
    galleries = []
    for each in results:
        with each.stores.trying(each.result.inputs.get("test")):
            galleries.append(Gallery(title=each.encoder, strips=_confused(each), wide=True))
    return [
        Section("classify", "Classes", "Classification", about, [*curves, *map(_classes, results)]),
        Section("misclassified", "Confused", "Classes that a classifier confuses", about_confused, galleries),
    ]


def _reliability(each: Named) -> list[Series]:
    """A line of the plain probabilities, and one of the calibrated ones, where the result has its samples."""
    found, samples, bins = [], each.result.samples, each.result.parameters["bins"]
    for name, said in (("classify/ece", ""), ("classify/calibrated/ece", ", calibrated")):
        if name not in samples:
            continue
        confidence, right = samples[name], samples["classify/top1"]
        of_bin = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        full = [members for b in range(bins) if len(members := np.flatnonzero(of_bin == b)) >= 10]
        points = [share(right[members]) for members in full]
        ends = [point.ci95 or (None, None) for point in points]
        found.append(
            Series(
                name=f"{each.encoder}{said}",
                x=[float(confidence[members].mean()) for members in full],
                y=[point.value for point in points],
                low=[low for low, _ in ends],
                high=[high for _, high in ends],
            )
        )
    return found


def _risk(each: Named) -> list[Series]:
    samples = each.result.samples
    if "classify/ece" not in samples:
        return []
    risk = risk_coverage(samples["classify/ece"], samples["classify/top1"])
    n = len(risk)
    at = np.unique(np.linspace(math.ceil(n / 100) - 1, n - 1, min(n, _POINTS)).astype(np.int64))
    area = each.result.metrics["classify/aurc"].value
    return [Series(name=each.encoder, x=((at + 1) / n).tolist(), y=risk[at].tolist(), note=f"area {area:.4f}")]


def _confused(each: Named) -> list[Strip]:
    """Where the test store may be read. Raises `ValueError` where it, or the head, is another by now."""
    result, samples = each.result, Samples.of(each.result)
    if samples is None:
        return []
    found = each.stores.measured(result.inputs.get("test"), samples.ids, samples.content)
    if found is None:
        return []
    rows = found.pick(np.arange(len(found)))
    rows.head = None if result.parameters["head"] is None else Head.read(result.parameters["head"])
    classifier = probabilities.Classifier(rows)
    answers = probabilities.said(rows, classifier.columns(rows)[0])[0]
    wrong = answers.predicted != answers.truth
    if (wrong == result.samples["classify/top1"].astype(bool)).any():
        raise ValueError("its classifier gives other answers by now")
    truth, predicted, confidence = (of[wrong] for of in (answers.truth, answers.predicted, answers.confidence))
    numbers, counts = np.unique(answers.truth, return_counts=True)
    rows_by_class = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    pairs = Wrong(samples.picked(wrong), truth, predicted, confidence)
    return pairs.strips(classifier.classes.distinct_name, rows_by_class, "sure")


def _classes(each: Named) -> Table:
    """A row a true class: its rows, the accuracy within it, and what its other rows are taken for."""
    confusion = each.result.parameters["confusion"]
    rows = []
    for name, predicted in confusion.items():
        others = [f"{other} {count:,}" for other, count in predicted.items() if other != name]
        more = f", and {len(others) - _CONFUSED} more" if len(others) > _CONFUSED else ""
        accuracy = each.result.metrics[f"per_class/{name}/classify/top1"]
        rows.append([name, sum(predicted.values()), accuracy, ", ".join(others[:_CONFUSED]) + more])
    columns = ["true class", "rows", "accuracy", "taken for"]
    return Table(title=each.encoder, columns=columns, rows=rows, note="the whole matrix is in the JSON", wide=True)

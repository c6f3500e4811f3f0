"""What the page shows of robustness results: each metric by corruption and severity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from evalsuite.charts import Axis, Chart, Headline, Lines, Named, Section, Series, at_k, rows_of
from evalsuite.result import Metric, Result

_Lines = dict[str, dict[int, Metric]]
"""By corruption, and for their mean, by severity; 0: the clean images."""


def headlines(results: Sequence[Named]) -> list[Headline]:
    """The mean over corruptions of the accuracy, and what it is the mean of."""
    rows = rows_of(results, "clean", "images")
    return [
        *(
            Headline(
                metric=each.metric, axis=each.axis, note=f"mean, {each.note}", about=_over(each, results), rows=rows
            )
            for each in at_k(results, "mean/top1", "Corrupted top‑1", rows)
        ),
        Headline(metric="mce", axis=Axis.of("mce", "mCE"), rows=rows),
    ]


def _over(mean: Headline, results: Sequence[Named]) -> str:
    found = [lines for each in results if (lines := _lines(each.result).get(mean.metric.removeprefix("mean/")))]
    said = dict.fromkeys(
        f"{len(lines) - 1} corruptions at severities {', '.join(str(n) for n in sorted(lines['mean']) if n)}"
        for lines in found
    )
    return f"mean over {'; or '.join(said)}" if said else ""


def charts(results: Sequence[Named]) -> list[Section]:
    found: dict[str, dict[str, _Lines]] = {}  # by metric and encoder
    for each in results:
        for what, lines in _lines(each.result).items():
            found.setdefault(what, {})[each.encoder] = lines
    about = (
        "How the encoder does as images get worse. Pale lines are single corruptions, named where they are pointed at, the "
        "strong one is their mean; axes show the range of the values."
    )
    order = sorted(found, key=lambda what: not what.startswith("top1"))
    drawn = [chart for what in order for chart in _charts(what, found[what], rows_of(results, "clean", "images"))]
    return [Section("robustness", "Robustness", "Robustness", about, drawn)]


def _lines(result: Result) -> dict[str, _Lines]:
    """By metric; an attack is no corruption."""
    found: dict[str, _Lines] = {}
    for name, metric in result.metrics.items():
        if parts := re.fullmatch(r"(?!pgd/|autoattack/)([^/]+)/(\d+)/(.+)", name):
            found.setdefault(parts[3], {}).setdefault(parts[1], {})[int(parts[2])] = metric
    for what, lines in found.items():
        levels = {n for line in lines.values() for n in line}
        means = {n: float(np.mean([line[n].value for line in lines.values() if n in line])) for n in levels}
        lines["mean"] = {n: Metric(mean) for n, mean in means.items()}
        if clean := result.metrics.get(f"clean/{what}"):
            for line in lines.values():
                line[0] = clean
    return found


def _charts(what: str, found: dict[str, _Lines], rows: str) -> list[Chart]:
    """The means over corruptions, a line an encoder, and for each encoder its corruptions; all on one scale."""
    every = [line for lines in found.values() for line in lines.values()]
    levels = sorted({n for line in every for n in line})
    given: dict[str, Any] = {
        "where": {"Metric": what},
        "x": Axis(name="severity" if levels[0] else "severity (0: clean)", column="severity"),
        "y": Axis.of(what, what).over(metric for line in every for metric in line.values()),
        "ticks": levels,
    }
    means = [Series.of(encoder, lines["mean"]) for encoder, lines in found.items()]
    return [
        Lines(title=f"{what}, mean over corruptions", series=means, marked=True, note=rows, wide=True, **given),
        *(
            Lines(
                title=encoder,
                by="corruption",
                series=[Series.of(name, line, "strong" if name == "mean" else "quiet") for name, line in lines.items()],
                **given,
            )
            for encoder, lines in found.items()
        ),
    ]

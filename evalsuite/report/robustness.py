"""What the page shows of robustness results: each metric by corruption and severity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evalsuite.charts import Axis, Chart, Headline, Lines, Named, Section, Series, Tone, rows_said
from evalsuite.report.accuracy import at_k
from evalsuite.result import Metric, Result

_Levels = dict[int, Metric]
"""By severity."""


def headlines(results: Sequence[Named]) -> list[Headline]:
    """The mean over corruptions of the accuracy, and what it is the mean of."""
    found: list[Headline] = []
    for each in at_k(results, "mean/top1", "Corrupted top‑1", ""):
        spans = [
            of_metric
            for of in results
            if (of_metric := by_corruption(of.result).get(each.metric.removeprefix("mean/")))
        ]
        means = dict.fromkeys(
            f"{len(lines)} corruption{'s' * (len(lines) != 1)} at severities "
            + ", ".join(map(str, sorted({level for line in lines.values() for level in line})))
            for lines in spans
        )
        said = f"mean over {'; or '.join(means)}" if means else "mean"
        found.append(
            Headline(metric=each.metric, axis=each.axis, note=f"mean, {each.note}", about=said, rows=_images(results))
        )
    return [*found, Headline(metric="mce", axis=Axis.of("mce", "mCE"), rows=_images(results))]


def by_corruption(result: Result) -> dict[str, dict[str, _Levels]]:
    """Each metric by corruption and severity; an attack is no corruption."""
    found: dict[str, dict[str, _Levels]] = {}
    for name, metric in result.metrics.items():
        if parts := re.fullmatch(r"(?!pgd/|autoattack/)([^/]+)/(\d+)/(.+)", name):
            corruption, severity, what = parts.groups()
            found.setdefault(what, {}).setdefault(corruption, {})[int(severity)] = metric
    return found


def charts(results: Sequence[Named]) -> list[Section]:
    lines = {each.encoder: by_corruption(each.result) for each in results}
    clean = {each.encoder: each.result.metrics for each in results}
    metrics = dict.fromkeys(what for found in lines.values() for what in found)
    return [
        Section(
            key="robustness",
            short="Robustness",
            title="Robustness",
            about="How the encoder does as images get worse. Pale lines are single corruptions, named where they are "
            "pointed at, the strong one is their mean; axes show the range of the values.",
            charts=[
                chart
                for what in sorted(metrics, key=lambda each: not each.startswith("top1"))
                for chart in _charts(
                    what,
                    {encoder: found[what] for encoder, found in lines.items() if what in found},
                    {encoder: found[f"clean/{what}"] for encoder, found in clean.items() if f"clean/{what}" in found},
                    _images(results),
                )
            ],
        )
    ]


def _charts(what: str, lines: dict[str, dict[str, _Levels]], clean: dict[str, Metric], rows: str) -> list[Chart]:
    """The means over corruptions, a line an encoder, and for each encoder its corruptions; all on one scale."""
    levels = sorted({level for found in lines.values() for line in found.values() for level in line})
    axis, every = (
        Axis.of(what),
        [*clean.values(), *(m for f in lines.values() for line in f.values() for m in line.values())],
    )
    ends = [end for metric in every for end in (metric.value, *(metric.ci95 or ()))]
    ends += [] if axis.line is None else [axis.line]
    margin = (max(ends) - min(ends) or 0.1) * 0.06
    low, high = min(ends) - margin, max(ends) + margin
    if axis.share:
        low, high = max(0.0, low), min(1.0, high)
    axis = replace(axis, name=what, range=(low, high), column="value")
    given: dict[str, Any] = {
        "where": {"Metric": what},
        "x": Axis(name="severity (0: clean)" if clean else "severity", column="severity"),
        "y": axis,
        "ticks": [0, *levels] if clean else levels,
    }

    def series(name: str, line: _Levels, encoder: str, tone: Tone) -> Series:
        found = ({0: clean[encoder]} if encoder in clean else {}) | dict(sorted(line.items()))
        bounds = [metric.ci95 or (None, None) for metric in found.values()]
        return Series(
            name=name,
            x=list(found),
            y=[metric.value for metric in found.values()],
            low=[low for low, _ in bounds],
            high=[high for _, high in bounds],
            tone=tone,
        )

    means = {encoder: _mean(found) for encoder, found in lines.items()}
    return [
        Lines(
            title=f"{what}, mean over corruptions",
            series=[series(encoder, mean, encoder, "") for encoder, mean in means.items()],
            marked=True,
            note=rows,
            wide=True,
            **given,
        ),
        *(
            Lines(
                title=encoder,
                by="corruption",
                series=[
                    *(series(name, line, encoder, "quiet") for name, line in found.items()),
                    series("mean", means[encoder], encoder, "strong"),
                ],
                **given,
            )
            for encoder, found in lines.items()
        ),
    ]


def _mean(lines: dict[str, _Levels]) -> _Levels:
    levels = sorted({level for line in lines.values() for level in line})
    return {n: Metric(float(np.mean([line[n].value for line in lines.values() if n in line]))) for n in levels}


def _images(results: Sequence[Named]) -> str:
    records = [each.result.inputs.get("clean") for each in results]
    return rows_said([of["rows"] for of in records if isinstance(of, dict) and "rows" in of], "images")

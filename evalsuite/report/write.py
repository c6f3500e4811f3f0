"""What the page holds: of each evaluator its columns of the summary and its sections, and every number."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evalsuite import evaluators
from evalsuite.charts import Axis, Chart, Headline, Named, Scatter, Section, repeated_means
from evalsuite.recorded import Recorded
from evalsuite.report import comparisons
from evalsuite.report.encoders import ResultFile, Row, conflicts, group, held
from evalsuite.report.pictures import Pictures, Progress, illustrated, opened
from evalsuite.report.render import render
from evalsuite.result import Metric, Result, refuse_inputs, whole_file
from featcache.corpora import Corpus
from featcache.disk.refusals import require_writable

_MOST_BYTES = 3_000_000  # of a page; a larger one is slow to open and to send
_MOST_OF_PICTURES = 1_700_000  # bytes of it
_SHOWN_NOTICES = 12
_NO_SAMPLES = "images: none is shown: no result here says of which samples it is (the .samples.npz beside it does)"


def write(
    results: Sequence[Result | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    names: Mapping[str, str],
    title: str,
    images: str | Sequence[str | Corpus],
    stores: bool,
    progress: Progress,
) -> Path:
    """What `evalsuite.report` does."""
    if not results:
        raise ValueError("no result was given; write one with `evalsuite COMMAND … --json RESULT.json`")
    refuse_inputs(out, [each for each in results if not isinstance(each, Result)])
    require_writable(out, "path for the page")
    sources = [ResultFile.of(each, number) for number, each in enumerate(results, 1)]
    rows = group(sources, names)
    of_rows = held(sources, len(rows))
    recorded, given = Recorded(read=stores), opened([images] if isinstance(images, str) else images, [])
    headlines, sections = _shown(rows, sources, recorded)
    data = {
        "title": title,
        "version": importlib.metadata.version("featcache"),
        "notices": _notices(rows, sources),
        "encoders": [row.record() for row in rows],
        "results": [source.record() for source in sources],
        "headlines": headlines,
        "best": [best(each, rows, of_rows) for each in headlines],
        "repeated": sorted({name for found in of_rows for name in repeated_means(found)}),
        "unread": [f"{path}: {why}" for path, why in recorded.left_out.items()],
    }
    corpora = [*given, *opened([], recorded.opened)]
    data |= _pictured(sections, Pictures(corpora, _room(title, data, sections)), progress)
    for remark in data["unpictured"] if given else ():
        warnings.warn(f"images: {remark}", RuntimeWarning, stacklevel=3)
    if given and not (data["pictures"] or any(source.result.samples for source in sources)):
        warnings.warn(_NO_SAMPLES, RuntimeWarning, stacklevel=3)
    target, page = Path(out), render(title, data).encode()
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


def _room(title: str, data: Mapping[str, Any], sections: Sequence[Section]) -> int:
    """Bytes that pictures may take of the page."""
    bare = len(render(title, {**data, "sections": illustrated(sections, Pictures([], 0))}))
    return min(_MOST_OF_PICTURES, int(0.97 * _MOST_BYTES) - bare)


def _pictured(sections: Sequence[Section], pictures: Pictures, progress: Progress) -> dict[str, Any]:
    """The sections with their pictures, and what to know of these."""
    shown = illustrated(sections, pictures, progress)
    remarks = pictures.remarks() if pictures.corpora else []
    return {"sections": [each for each in shown if each.charts], "pictures": pictures.shown, "unpictured": remarks}


def _notices(rows: Sequence[Row], sources: Sequence[ResultFile]) -> list[str]:
    """What to know before believing the page, a line each; warns of what the results' commands did not print."""
    notices = [f"{source.file} has no metrics" for source in sources if not source.result.metrics]
    notices += conflicts(rows, sources)
    for notice in notices:
        warnings.warn(notice, RuntimeWarning, stacklevel=3)
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
    return notices


def _shown(
    rows: Sequence[Row], sources: Sequence[ResultFile], stores: Recorded
) -> tuple[list[Headline], list[Section]]:
    """The summary's columns that any encoder has, and the sections of all."""
    headlines: list[Headline] = []
    sections: list[Section] = []
    commands = {each.result.command for each in sources} & set(evaluators.names())
    for command in evaluators.in_order(commands):
        evaluator = evaluators.load(command)
        of_command = [
            Named(row.name, each.result, stores)
            for number, row in enumerate(rows)
            for each in sources
            if each.row == number and each.result.command == command
        ]
        if evaluator.several:
            alone = [each for each in sources if each.row < 0 and each.result.command == command]
            of_command += [Named(os.path.basename(each.file), each.result, stores) for each in alone]
        if of_command:
            present = {name for each in of_command for name in each.result.metrics}
            headlines += [each for each in evaluator.headlines(of_command) if each.metric in present]
            sections += evaluator.charts(of_command)
    first: dict[str, str] = {}
    for each in headlines:
        first = dict(each.where) | first
    quality = {each.metric: each.axis for each in headlines if all(first[key] == of for key, of in each.where.items())}
    sections = [
        replace(each, charts=[found for chart in each.charts if (found := _against(chart, quality))])
        for each in sections
    ]
    compared = {each.file: each.result for each in sources if each.result.command == "compare"}
    sections.append(comparisons.section(compared, list(rows)))
    return headlines, sections


def _against(chart: Chart, quality: Mapping[str, Axis]) -> Chart | None:
    """The chart, a scatter with all headlines where it names none; None where there is nothing to show."""
    if not isinstance(chart, Scatter) or chart.y:
        return chart
    y = {metric: axis for metric, axis in quality.items() if metric not in chart.x}
    return replace(chart, y=y) if y else None


def best(headline: Headline, rows: Sequence[Row], of_rows: Sequence[Mapping[str, Metric]]) -> int | None:
    """The number of the student (where there are no teachers, encoder) whose interval is beyond every other's."""
    found = {
        number: of[headline.metric]
        for number, (row, of) in enumerate(zip(rows, of_rows, strict=True))
        if headline.metric in of and not row.teacher
    }
    sign = -1 if headline.axis.better == "lower" else 1
    if len(found) < 2 or not headline.axis.better or any(each.ci95 is None for each in found.values()):
        return None
    ends = {n: sorted(sign * end for end in each.ci95 or ()) for n, each in found.items()}
    first = max(ends, key=lambda n: ends[n][0])
    return first if all(ends[n][1] < ends[first][0] for n in ends if n != first) else None

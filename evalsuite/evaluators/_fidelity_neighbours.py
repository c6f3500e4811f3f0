"""Neighbours under teacher and student side by side, as the page shows them of fidelity results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evalsuite.agreement import neighbours, shared
from evalsuite.charts import Gallery, Named, Picture, Samples, Section, Strip, evenly
from evalsuite.pairs import joined
from featcache.classes import Classes
from featcache.rows import Rows

_QUERIES = 200  # rows whose neighbours are looked for
_SHOWN = 8  # of them
_PICTURES = 5  # neighbours a side


def section(results: Sequence[Named]) -> Section:
    """Of each student whose store and whose teacher's may be read."""
    about = (
        f"Images, and their nearest ones to the teacher and to the student, nearest first. Of at most {_QUERIES} images, evenly "
        "spread over the rows compared, those shown are evenly spread from the fewest neighbours in common to the most. Framed: "
        "among the nearest on both sides."
    )
    galleries = []
    for each in results:
        with each.stores.trying(each.result.inputs.get("student")):
            galleries.append(Gallery(title=each.encoder, strips=_strips(each), wide=True))
    return Section("neighbours", "Neighbours", "Neighbours side by side", about, galleries)


def _strips(each: Named) -> list[Strip]:
    pair = _pair(each)
    if pair is None:
        return []
    k = min(int(each.result.parameters["k"]), len(pair[0]) - 1)
    drawn = evenly(len(pair[0]), _QUERIES)
    near = [neighbours(rows, rows, k, drawn, drawn)[1] for rows in pair]
    common = np.rint(shared(*near) * k).astype(int)
    chosen = np.argsort(common, kind="stable")[evenly(len(drawn), _SHOWN)]
    samples, labels = Samples.of_rows(pair[0]), pair[0].labels
    named = Classes.of(pair[0])

    def words(row: int) -> str:
        return named.distinct_name(int(labels[row])) if labels[row] >= 0 else ""

    strips = []
    for at in chosen.tolist():
        groups = {}
        for side, (own, other) in {"teacher": near, "student": near[::-1]}.items():
            rows = own[at][:_PICTURES].tolist()
            groups[side] = [
                Picture(picture=sample, words=words(row), mark="shared" if row in other[at] else "")
                for row, sample in zip(rows, samples.at(rows), strict=True)
            ]
        row = int(drawn[at])
        (sample,) = samples.at([row])
        said = f"{common[at]} of {k} nearest in common"
        strips.append(Strip(name=words(row) or sample.id, groups=groups, head=Picture(picture=sample), note=said))
    return strips


def _pair(each: Named) -> tuple[Rows, Rows] | None:
    """The rows that were compared; None where a store may not be read. Raises `ValueError` where it has others by now."""
    inputs = each.result.inputs
    teacher, student = (each.stores.rows(inputs.get(role)) for role in ("teacher", "student"))
    if teacher is None or student is None:
        return None
    counts = (inputs["teacher"].get("rows"), inputs["student"].get("rows"))
    if counts != (len(teacher), len(student)):
        raise ValueError(f"it, or {teacher.name}, has other rows by now")
    return joined(teacher, student)

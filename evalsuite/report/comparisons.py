"""What the page shows of comparisons: a table each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from evalsuite.charts import Section, Table, repeated_means
from evalsuite.report.encoders import Row, encoder_of, short
from evalsuite.result import Result


def section(results: Mapping[str, Result], rows: list[Row]) -> Section:
    """Of comparisons by file; encoders have the names of the page's other results."""
    names = {row.fingerprint: row.name for row in rows}
    about = (
        "Two results on the same samples. Positive differences mean that B's value is higher; an interval that leaves out 0 "
        "tells the two apart. Nothing is corrected for the number of metrics. Means of one set, which repeat it, are left out."
    )
    tables = [_table(file, result, names) for file, result in results.items()]
    return Section("comparisons", "Comparisons", "Comparisons", about, tables)


def _table(file: str, result: Result, names: Mapping[str, str]) -> Table:
    given = result.parameters
    a, b, verdicts = (given.get(key, {}) for key in ("a", "b", "verdicts"))
    once = repeated_means(result.metrics)
    sides = {side: _side(result.inputs.get(side) or {}, side, names) for side in "ab"}
    paired = {key: of["paired"] for key, of in given.get("samples", {}).items()}
    notes = [
        ", ".join(f"{'' if key == 'all' else f'{key}: '}{n:,} samples" for key, n in paired.items()),
        f"A and B differ in: {'; '.join(given['differing'])}." if given.get("differing") else "",
        f"Not compared: {', '.join(given['not_compared'])}." if given.get("not_compared") else "",
        *(f"{side.upper()}: {path}" for side in "ab" if (path := (result.inputs.get(side) or {}).get("path"))),
        file,
    ]
    return Table(
        title=f"A: {sides['a']}\nB: {sides['b']}",
        columns=["metric", "A", "B", "B − A", "verdict"],
        rows=[
            [name, a.get(name), b.get(name), metric, verdicts.get(name, "")]
            for name, metric in result.metrics.items()
            if name not in once
        ],
        note="\n".join(filter(None, notes)),
        wide=True,
    )


def _side(inputs: Mapping[str, Any], side: str, names: Mapping[str, str]) -> str:
    """The encoder, and the store of the rows that were evaluated."""
    fingerprint, encoder = encoder_of(inputs) or ("", "")
    name = names.get(fingerprint) or short(encoder) or side.upper()
    store: Mapping[str, Any] = next(
        (inputs[key] for key in ("query", "test", "id_test") if isinstance(inputs.get(key), Mapping)), {}
    )
    corpus = inputs.get("corpus")
    where = corpus.get("spec") if isinstance(corpus, Mapping) else PurePath(str(store.get("path", ""))).stem
    return f"{name} on {where}" if where else name

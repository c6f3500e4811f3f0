"""What the page shows of kNN and probe results."""

from __future__ import annotations

from collections.abc import Sequence

from evalsuite.charts import Axis, Headline, Named, at_k, rows_said


def knn_headlines(results: Sequence[Named]) -> list[Headline]:
    return at_k(results, "top1", "kNN top‑1", _rows(results, "query", "queries"))


def probe_headlines(results: Sequence[Named]) -> list[Headline]:
    axis = Axis.of("probe/top1", "Probe top‑1")
    return [Headline(metric="probe/top1", axis=axis, note="linear", rows=_rows(results, "test", "rows"))]


def _rows(results: Sequence[Named], key: str, noun: str) -> str:
    records = [each.result.inputs.get(key) for each in results]
    return rows_said([of["rows"] for of in records if isinstance(of, dict) and "rows" in of], noun)

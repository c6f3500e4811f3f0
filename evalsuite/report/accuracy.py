"""What the page shows of kNN and probe results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from evalsuite.charts import Axis, Headline, Named, rows_said


def knn_headlines(results: Sequence[Named]) -> list[Headline]:
    return at_k(results, "top1", "kNN top‑1", _rows(results, "query", "queries"))


def probe_headlines(results: Sequence[Named]) -> list[Headline]:
    axis = Axis.of("probe/top1", "Probe top‑1")
    return [Headline(metric="probe/top1", axis=axis, note="linear", rows=_rows(results, "test", "rows"))]


def _rows(results: Sequence[Named], key: str, noun: str) -> str:
    records = [each.result.inputs.get(key) for each in results]
    return rows_said([of["rows"] for of in records if isinstance(of, dict) and "rows" in of], noun)


def at_k(results: Sequence[Named], stem: str, name: str, rows: str) -> list[Headline]:
    """Of the metrics STEM@K the one that most encoders have, then K = 20, then the lowest K."""
    found = most_held((name for each in results for name in each.result.metrics), stem)
    return [
        Headline(metric=f"{stem}@{k}", axis=Axis.of(f"{stem}@{k}", name), note=f"k = {k}", rows=rows) for k in found
    ]


def most_held(names: Iterable[str], stem: str) -> list[int]:
    """The K of the one of STEM@K that is most often among the names, or else 20, or else the lowest; [] for none."""
    counts = Counter(int(match[1]) for name in names if (match := re.fullmatch(rf"{re.escape(stem)}@(\d+)", name)))
    return sorted(counts, key=lambda k: (-counts[k], k != 20, k))[:1]

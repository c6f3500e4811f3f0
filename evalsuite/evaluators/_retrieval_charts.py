"""What the page shows of retrieval results: measures over cut-offs, and how nDCG spreads over the queries."""

from __future__ import annotations

from collections.abc import Sequence

from evalsuite.charts import Axis, Chart, Dots, Headline, Histogram, Named, Section, at_k, most_held, rows_of

_MEASURES = {"ndcg": "nDCG", "recall": "Recall", "precision": "Precision", "hit": "Hit", "mrr": "MRR", "map": "MAP"}


def headlines(results: Sequence[Named]) -> list[Headline]:
    rows = rows_of(results, "query", "queries")
    whole = [Headline(metric="map", axis=Axis.of("map", "MAP"), rows=rows)]
    return [*at_k(results, "ndcg", "nDCG", rows), *at_k(results, "recall", "Recall", rows), *whole]


def charts(results: Sequence[Named]) -> list[Section]:
    about = (
        "Documents ranked for every query, judged by qrels or by classes. Points are means over the queries with 95 % intervals "
        "over them; the histogram shows single queries."
    )
    names = list(dict.fromkeys(name for each in results for name in each.result.metrics))
    drawn: list[Chart] = []
    for measure, said in _MEASURES.items():
        rows = {f"{said}@{name.partition('@')[2]}": name for name in names if name.startswith(f"{measure}@")}
        drawn.append(
            Dots(title=said, axis=Axis(name=said, better="higher", least=0.0, most=1.0), rows=rows, label="cut-off")
        )
    for k in most_held(names, "ndcg"):
        spread = {
            each.encoder: found for each in results if (found := each.result.samples.get(f"ndcg@{k}")) is not None
        }
        if spread:
            axis = Axis(name=f"nDCG@{k} of a query", least=0.0, most=1.0)
            drawn.append(Histogram.of(spread, {}, title="Queries", axis=axis, wide=True))
    return [Section("retrieval", "Retrieval", "Retrieval", about, drawn)]

"""What the page shows of fidelity results: how much of its teacher's geometry a student kept, and how well it does."""

from __future__ import annotations

from collections.abc import Sequence

from evalsuite.charts import Axis, Headline, Named, Scatter, Section, at_k, most_held, rows_said

_BEFORE = ("gram_pearson", "gram_pearson_centred", "cka_debiased", "cka_debiased_unit")
_AFTER = ("agreement/top1", "agreement/kappa", "cosine_mapped", "procrustes")


def headlines(results: Sequence[Named]) -> list[Headline]:
    rows = _rows(results)
    return [
        Headline(metric="gram_pearson", axis=Axis.of("gram_pearson"), rows=rows),
        Headline(metric="cka_debiased", axis=Axis.of("cka_debiased"), note="debiased", rows=rows),
        *at_k(results, "mutual_knn", "Mutual kNN", rows),
        Headline(metric="agreement/top1", axis=Axis.of("agreement/top1", "Agreement"), note="top-1 votes", rows=rows),
    ]


def charts(results: Sequence[Named]) -> list[Section]:
    names = [name for each in results for name in each.result.metrics]
    mutual = [f"mutual_knn@{k}" for k in most_held(names, "mutual_knn")]
    x = {name: Axis.of(name) for name in (*_BEFORE, *mutual, *_AFTER) if name in names}
    about = (
        "How well an encoder does, against how much of its teacher's geometry it kept. Lines through a point are 95 % "
        "intervals; axes show the range of the values and do not start at zero."
    )
    drawn = [Scatter(title="Quality against fidelity", x=x, note=_rows(results), wide=True)] if x else []
    return [Section("tradeoff", "Fidelity", "Accuracy and fidelity", about, drawn)]


def _rows(results: Sequence[Named]) -> str:
    joined = [each.result.inputs.get("joined") for each in results]
    return rows_said([n for n in joined if isinstance(n, int)], "rows compared")

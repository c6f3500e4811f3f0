"""What the page shows of fidelity results: how much of its teacher's geometry a student kept, and how well it does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from evalsuite.charts import (
    Axis,
    Dots,
    Headline,
    Named,
    Scatter,
    Section,
    Table,
    at_k,
    knn_first,
    most_held,
    rows_said,
)
from evalsuite.evaluators import _fidelity_neighbours
from evalsuite.result import Metric

_BEFORE = ("gram_pearson", "gram_pearson_centred", "cka_debiased", "cka_debiased_unit")
_AFTER = ("agreement/top1", "agreement/kappa", "cosine_mapped", "procrustes")


def headlines(results: Sequence[Named]) -> list[Headline]:
    rows = _rows(results)
    return [
        Headline(metric="gram_pearson", axis=Axis.of("gram_pearson"), rows=rows),
        Headline(metric="cka_debiased", axis=Axis.of("cka_debiased"), note="debiased", rows=rows),
        *at_k(results, "mutual_knn", "Mutual kNN", rows),
        Headline(metric="agreement/top1", axis=Axis.of("agreement/top1", "Agreement"), note="top-1 votes", rows=rows),
        *(
            Headline(
                metric=metric,
                axis=Axis.of(metric, "OOD scores"),
                note=f"rank correlation, {detector}",
                where={"OOD detector": detector},
            )
            for detector, metric in _over_all(results).items()
        ),
    ]


def charts(results: Sequence[Named]) -> list[Section]:
    names = [name for each in results for name in each.result.metrics]
    mutual = [f"mutual_knn@{k}" for k in most_held(names, "mutual_knn")]
    x = {name: Axis.of(name) for name in (*_BEFORE, *mutual, *_AFTER) if name in names}
    x |= {name: Axis.of(name, f"rank correlation of {of} scores") for of, name in _over_all(results).items()}
    about = (
        "How well an encoder does, against how much of its teacher's geometry it kept. Lines through a point are 95 % "
        "intervals; axes show the range of the values and do not start at zero."
    )
    drawn = [Scatter(title="Quality against fidelity", x=x, note=_rows(results), wide=True)] if x else []
    followed = [
        Dots(
            title="Scores beside the teacher's",
            where={"Measure": Axis.of(what).name, "Rows": {"id": "ID", "all": "ID and OOD"}.get(name, name)},
            axis=Axis.of(what),
            label="detector",
            rows={of: f"scores/{of}/{name}/{what}" for of in detectors},
            wide=True,
        )
        for (what, name), detectors in _followed(names).items()
    ]
    about_scores = (
        "How far an encoder's OOD scores follow its teacher's, row by row: rank correlation, and how often both take a row for "
        "OOD at thresholds that keep 95 % of the ID rows. Lines through a point are 95 % intervals. Rank correlation over ID and "
        "OOD rows is high as soon as both tell these apart; within one set it takes the same order."
    )
    return [
        Section("tradeoff", "Fidelity", "Accuracy and fidelity", about, drawn),
        Section("followed", "Scores followed", "OOD scores beside the teacher's", about_scores, followed),
        _fidelity_neighbours.section(results),
        Section(
            "fidelity-classes",
            "Fidelity by class",
            "Fidelity by class",
            "What the rows of each class have in common in both spaces, with 95 % intervals over them.",
            [table for each in results if (table := _classes(each))],
        ),
    ]


def _classes(each: Named) -> Table | None:
    """A row a class, a column a metric."""
    rows: dict[str, dict[str, Metric]] = {}
    for name, metric in each.result.metrics.items():
        if match := re.fullmatch(r"per_class/(.+)/(mutual_knn@\d+|agreement/top1|cosine_mapped)", name, re.DOTALL):
            rows.setdefault(match[1], {})[match[2]] = metric
    columns = list(dict.fromkeys(what for of in rows.values() for what in of))
    if not rows:
        return None
    cells = [[name, *(of.get(what) for what in columns)] for name, of in rows.items()]
    titles = [Axis.of(what).name for what in columns]
    return Table(title=each.encoder, columns=["class", *titles], rows=cells, note=_rows([each]), wide=True)


def _followed(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """The detectors of which there is this measure of these rows: rank correlation first, of all rows first."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if match := re.fullmatch(r"scores/([^/]+)/([^/]+)/(spearman|agreement|kappa)", name):
            found.setdefault((match[3], match[2]), []).append(match[1])
    order = ("spearman", "agreement", "kappa")
    return {key: knn_first(found[key]) for key in sorted(found, key=lambda key: (order.index(key[0]), key[1] != "all"))}


def _over_all(results: Sequence[Named]) -> dict[str, str]:
    """By detector the rank correlation over ID and OOD rows."""
    found = _followed(name for each in results for name in each.result.metrics)
    return {detector: f"scores/{detector}/all/spearman" for detector in found.get(("spearman", "all"), [])}


def _rows(results: Sequence[Named]) -> str:
    joined = [each.result.inputs.get("joined") for each in results]
    return rows_said([n for n in joined if isinstance(n, int)], "rows compared")

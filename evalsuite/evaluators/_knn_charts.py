"""What the page shows of knn results: accuracy, a table of classes and confused classes in pictures for each encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.charts import (
    Gallery,
    Headline,
    Named,
    Picture,
    Samples,
    Section,
    Strip,
    Table,
    at_k,
    evenly,
    most_held,
    rows_of,
)
from evalsuite.evaluators._confused import Wrong
from evalsuite.intervals import share
from evalsuite.neighbours.exact import search
from evalsuite.result import Metric
from evalsuite.votes import few_shots, positions
from featcache.classes import Classes, aligned_labels
from featcache.geometry import vote_weights, winners
from featcache.rows import Rows

_WRONG = 300  # rows whose votes are looked at
_CONFUSED = 3  # classes named beside each


def headlines(results: Sequence[Named]) -> list[Headline]:
    return at_k(results, "top1", "kNN top‑1", rows_of(results, "query", "queries"))


def charts(results: Sequence[Named]) -> list[Section]:
    """What stores that may still be read say of the classes of the queries."""
    names = [name for each in results for name in each.result.metrics]
    found: list[tuple[str, _Votes]] = []
    for each in results:
        for k in most_held(names, "top1"):
            with each.stores.trying(each.result.inputs.get("bank")):
                found += [(each.encoder, votes)] if (votes := _Votes.of(each, k)) else []
    about = "The accuracy within each class, and what its other rows are taken for; K is that of the summary. With 95 % intervals."
    about_confused = (
        "Pairs of classes that are taken for each other most often: the surest of the wrong votes, and beside them the images of "
        "the bank that spoke for the wrong class."
    )
    tables = [
        Table(title=encoder, columns=_COLUMNS, rows=each.classes(), note=each.note, wide=True)
        for encoder, each in found
    ]
    pairs = [(encoder, strips, each.note) for encoder, each in found if (strips := each.strips())]
    galleries = [Gallery(title=encoder, strips=strips, note=note, wide=True) for encoder, strips, note in pairs]
    return [
        Section("confused", "kNN confuses", "Classes that kNN confuses", about_confused, galleries),
        Section("knn-classes", "kNN by class", "kNN classification by class", about, tables),
    ]


_COLUMNS = ("true class", "rows", "accuracy", "taken for")


@dataclass(frozen=True)
class _Votes:
    """The votes on some of the `wrong` rows of the queries, and the nearest row of the bank that voted for the class that each is
    taken for. Classes are numbered as the bank's; `truth` and `right` are of all queries."""

    bank: Rows
    right: Bool[np.ndarray, " q"]
    truth: Int[np.ndarray, " q"]
    wrong: Wrong
    nearest: Int[np.ndarray, " w"]

    @classmethod
    def of(cls, each: Named, k: int) -> _Votes | None:
        """None where the result has no samples, or its stores may not be read. Raises `ValueError` where the bank is another by now."""
        result, given = each.result, each.result.parameters
        if f"top1@{k}" not in result.samples or (samples := Samples.of(result)) is None:
            return None
        query = each.stores.measured(result.inputs.get("query"), samples.ids, samples.content)
        bank = each.stores.rows(result.inputs.get("bank"))
        if query is None or bank is None or (query.labels < 0).any():
            return None
        bank = query if given.get("exclude_self") and given.get("drop_identical") else bank.labelled()
        bank = few_shots(bank, given["shots"], given["seed"]) if given.get("shots") else bank
        if len(bank) != result.inputs["bank"].get("rows"):
            raise ValueError("it has other rows by now")
        right, truth = result.samples[f"top1@{k}"].astype(bool), aligned_labels(bank, query)
        wrong = np.flatnonzero(~right)
        if not len(wrong):
            nothing = Wrong(samples.picked(wrong), wrong, wrong, np.empty(0))
            return cls(bank, right, truth, nothing, wrong)
        wrong = wrong[evenly(len(wrong), _WRONG)]
        own = positions(bank, query)[wrong] if given.get("exclude_self") else None
        cosine, near = search(bank.blocks(), query.take(wrong), k, exclude_self=own)
        predicted, sure, nearest = _vote(bank, cosine, near, given["temperature"])
        still = predicted != truth[wrong]  # of an approximate index a few may be right in an exact search
        wrong = wrong[still]
        found = Wrong(samples.picked(wrong), truth[wrong], predicted[still], sure[still])
        return cls(bank, right, truth, found, nearest[still])

    @property
    def note(self) -> str:
        wrong, looked = int((~self.right).sum()), len(self.wrong.truth)
        some = "" if looked == wrong else f"; what they are taken for is said of {looked:,} of these"
        return f"{wrong:,} of {len(self.right):,} queries are wrong{some}"

    def classes(self) -> list[list[str | int | Metric]]:
        """A row a class, as `_COLUMNS` names them."""
        name, rows = Classes.of(self.bank).distinct_name, list[list[str | int | Metric]]()
        for number in np.unique(self.truth).tolist():
            of, taken = self.truth == number, self.wrong.taken_for(number)
            others = [f"{name(other)} {count:,}" for other, count in taken[:_CONFUSED]]
            more = f", and {len(taken) - _CONFUSED} more" if len(taken) > _CONFUSED else ""
            rows.append([name(number), int(of.sum()), share(self.right[of]).metric(), ", ".join(others) + more])
        return rows

    def strips(self) -> list[Strip]:
        """Beside the wrong rows the images of the bank that spoke for the wrong class."""
        name, voters = Classes.of(self.bank).distinct_name, Samples.of_rows(self.bank)

        def beside(taken: int, at: Int[np.ndarray, " _"]) -> dict[str, list[Picture]]:
            nearest = list(dict.fromkeys(self.nearest[at].tolist()))
            return {f"{name(taken)}, of the bank": [Picture(picture=each) for each in voters.at(nearest)]}

        numbers, counts = np.unique(self.truth, return_counts=True)
        return self.wrong.strips(name, dict(zip(numbers.tolist(), counts.tolist(), strict=True)), "of the vote", beside)


def _vote(
    bank: Rows, cosine: Float[np.ndarray, "w k"], near: Int[np.ndarray, "w k"], temperature: float
) -> tuple[Int[np.ndarray, " w"], Float[np.ndarray, " w"], Int[np.ndarray, " w"]]:
    """The class that wins each vote, with what share of it, and the nearest row that voted for it."""
    classes, numbers = np.unique(bank.labels, return_inverse=True)
    weight = vote_weights(cosine, temperature)
    first = winners(weight, numbers[near], len(classes))
    speaking = numbers[near] == first[:, None]
    sure = np.where(speaking, weight, 0).sum(axis=1) / weight.sum(axis=1)
    return classes[first], sure, near[np.arange(len(near)), speaking.argmax(axis=1)]

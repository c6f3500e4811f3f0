"""What the page shows of knn results: accuracy, a table of classes and confused classes in pictures for each encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

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
from evalsuite.intervals import share
from evalsuite.neighbours.exact import search
from evalsuite.result import Metric
from evalsuite.votes import few_shots, positions
from featcache.classes import Classes, aligned_labels
from featcache.geometry import vote_weights, winners
from featcache.rows import Rows

_WRONG = 300  # rows whose votes are looked at
_PAIRS, _PICTURES = 6, 5
_CONFUSED = 3  # classes named beside each


def headlines(results: Sequence[Named]) -> list[Headline]:
    return at_k(results, "top1", "kNN top‑1", rows_of(results, "query", "queries"))


def charts(results: Sequence[Named]) -> list[Section]:
    """What stores that may still be read say of the classes of the queries."""
    names = [name for each in results for name in each.result.metrics]
    found = [(each.encoder, one) for each in results for k in most_held(names, "top1") if (one := _Votes.of(each, k))]
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
        Section("confused", "Confused", "Confused classes", about_confused, galleries),
        Section("knn-classes", "kNN by class", "kNN classification by class", about, tables),
    ]


_COLUMNS = ("true class", "rows", "accuracy", "taken for")


@dataclass(frozen=True)
class _Votes:
    """The votes on some of the wrong rows, `wrong`, of the queries: their predicted class, how sure, and the nearest row of the
    bank that voted for it. Classes are numbered as the bank's."""

    query: Rows
    bank: Rows
    right: Bool[np.ndarray, " q"]
    truth: Int[np.ndarray, " q"]
    wrong: Int[np.ndarray, " w"]
    predicted: Int[np.ndarray, " w"]
    sure: np.ndarray
    nearest: Int[np.ndarray, " w"]

    @classmethod
    def of(cls, each: Named, k: int) -> _Votes | None:
        """None where the result has no samples or its stores cannot be read or are others by now."""
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
            each.stores.left_out[bank.name] = "it has other rows by now"
            return None
        right, truth = result.samples[f"top1@{k}"].astype(bool), aligned_labels(bank, query)
        wrong = np.flatnonzero(~right)
        wrong = wrong[evenly(len(wrong), _WRONG)] if len(wrong) else wrong
        own = positions(bank, query)[wrong] if given.get("exclude_self") else None
        return cls._voted(query, bank, right, truth, wrong, own, k, given["temperature"])

    @classmethod
    def _voted(
        cls,
        query: Rows,
        bank: Rows,
        right: Bool[np.ndarray, " q"],
        truth: Int[np.ndarray, " q"],
        wrong: Int[np.ndarray, " w"],
        own: Int[np.ndarray, " w"] | None,
        k: int,
        temperature: float,
    ) -> _Votes:
        if not len(wrong):
            return cls(query, bank, right, truth, wrong, wrong, wrong, wrong)
        cosine, near = search(bank.blocks(), query.take(wrong), k, exclude_self=own)
        classes, numbers = np.unique(bank.labels, return_inverse=True)
        weight = vote_weights(cosine, temperature)
        first = winners(weight, numbers[near], len(classes))
        speaking = numbers[near] == first[:, None]
        sure = np.where(speaking, weight, 0).sum(axis=1) / weight.sum(axis=1)
        nearest = near[np.arange(len(near)), speaking.argmax(axis=1)]
        still = classes[first] != truth[wrong]  # of an approximate index a few may be right in an exact search
        return cls(query, bank, right, truth, wrong[still], classes[first][still], sure[still], nearest[still])

    @property
    def note(self) -> str:
        wrong = int((~self.right).sum())
        looked = (
            "" if len(self.wrong) == wrong else f"; what they are taken for is said of {len(self.wrong):,} of these"
        )
        return f"{wrong:,} of {len(self.right):,} queries are wrong{looked}"

    def classes(self) -> list[list[str | int | Metric]]:
        """A row a class, as `_COLUMNS` names them."""
        named = Classes.of(self.bank)
        rows: list[list[str | int | Metric]] = []
        for number in np.unique(self.truth).tolist():
            of = self.truth == number
            taken = Counter(self.predicted[self.truth[self.wrong] == number].tolist()).most_common()
            others = [f"{named.distinct_name(other)} {count:,}" for other, count in taken[:_CONFUSED]]
            more = f", and {len(taken) - _CONFUSED} more" if len(taken) > _CONFUSED else ""
            name, accuracy = named.distinct_name(number), share(self.right[of]).metric()
            rows.append([name, int(of.sum()), accuracy, ", ".join(others) + more])
        return rows

    def strips(self) -> list[Strip]:
        named, pairs = (
            Classes.of(self.bank),
            Counter(zip(self.truth[self.wrong].tolist(), self.predicted.tolist(), strict=True)),
        )
        queries, voters, strips = Samples.of_rows(self.query), Samples.of_rows(self.bank), []
        for (true, taken), count in pairs.most_common(_PAIRS):
            at = np.flatnonzero((self.truth[self.wrong] == true) & (self.predicted == taken))
            at = at[np.argsort(-self.sure[at], kind="stable")][:_PICTURES]
            nearest = list(dict.fromkeys(self.nearest[at].tolist()))
            shown = [
                Picture(picture=sample, words=f"{100 * sure:.0f} % of the vote", mark="wrong")
                for sample, sure in zip(queries.at(self.wrong[at]), self.sure[at], strict=True)
            ]
            groups = {
                f"{named.distinct_name(true)}, taken for {named.distinct_name(taken)}": shown,
                f"{named.distinct_name(taken)}, of the bank": [Picture(picture=each) for each in voters.at(nearest)],
            }
            rows = int((self.truth == true).sum())
            strips.append(
                Strip(
                    name=f"{named.distinct_name(true)} → {named.distinct_name(taken)}",
                    groups=groups,
                    note=f"{count:,} of {rows:,} rows",
                )
            )
        return strips

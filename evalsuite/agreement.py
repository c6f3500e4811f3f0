"""Whether two spaces agree about the rows they share: on neighbours, and on the class that these vote for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from evalsuite.intervals import cosine_mean, kappa, share
from evalsuite.neighbours.exact import search
from evalsuite.result import Metric
from featcache.classes import Classes
from featcache.geometry import vote_weights, winners
from featcache.rows import Rows

Neighbours = tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]
Both = tuple[Rows, Rows]

TEMPERATURE = 0.07
"""Of the votes: DINOv2's and CosPress's."""

_QUERY_FLOATS = 2**24  # query embeddings held during one pass over the bank


@dataclass(frozen=True)
class Votes:
    """The classes that the first and the second space vote for, of the rows at `rows`, and how often votes for as many rows
    of each of the `classes` classes, dealt out at random, would agree."""

    rows: Int[np.ndarray, " q"]
    a: Int[np.ndarray, " q"]
    b: Int[np.ndarray, " q"]
    classes: int

    @property
    def by_chance(self) -> float:
        of_a, of_b = (np.bincount(votes, minlength=self.classes) for votes in (self.a, self.b))
        return float(of_a @ of_b) / len(self.a) ** 2


def over_rows(
    pair: Both,
    banks: Both | None,
    labelled: Rows,
    drawn: Int[np.ndarray, " q"],
    k: int,
    cosines: tuple[Float[np.ndarray, " n"], float] | None,
) -> tuple[dict[str, Metric], dict[str, float]]:
    """Metrics that are means over rows, in all and of each class, and their chance levels: of the rows at `drawn` shared
    neighbours and votes (see `votes`), of all rows `cosines`, which come with their chance level. `labelled` is the one
    of the pair whose labels count."""
    n, labels = len(labelled), labelled.labels
    near = [neighbours(rows, rows, k, drawn, drawn) for rows in pair]
    of_rows = {f"mutual_knn@{k}": (drawn, shared(near[0][1], near[1][1]))}  # metric → positions of rows, values
    chance = {f"mutual_knn@{k}": k / (n - 1)}
    voted = votes(pair, banks, labels, drawn, near, k)
    if voted is not None:
        of_rows["agreement/top1"] = voted.rows, (voted.a == voted.b).astype(np.float64)
    if cosines is not None:
        of_rows["cosine_mapped"], chance["cosine_mapped"] = (np.arange(n), cosines[0]), cosines[1]

    def mean(name: str, values: Float[np.ndarray, " _"]) -> Metric:
        return (cosine_mean if name == "cosine_mapped" else share)(values).metric()

    metrics: dict[str, Metric] = {}
    for name, (_, measured) in of_rows.items():
        metrics[name] = mean(name, measured)
        if name == "agreement/top1" and voted is not None:
            chance[name] = voted.by_chance
            if voted.by_chance < 1:
                metrics["agreement/kappa"] = kappa(voted.a, voted.b, voted.classes).metric()
                chance["agreement/kappa"] = 0.0
    classes = Classes.of(labelled)
    for name, (rows, measured) in of_rows.items():
        for label in np.unique(labels[rows][labels[rows] >= 0]):
            shown = classes.distinct_name(int(label))
            metrics[f"per_class/{shown}/{name}"] = mean(name, measured[labels[rows] == label])
    return metrics, chance


def votes(
    pair: Both,
    banks: Both | None,
    labels: Int[np.ndarray, " n"],
    drawn: Int[np.ndarray, " q"],
    near: Sequence[Neighbours],
    k: int,
) -> Votes | None:
    """Votes on the rows of the pair at `drawn`, whose neighbours among each other are `near`: of the banks' rows, or without
    banks of the pair's own labelled rows. None where no row has a label.

    Raises `ValueError` when k exceeds the voters.
    """
    x, y = pair
    voted, voter_labels = drawn, labels
    if banks is not None:
        voter_labels = banks[0].labels
        _check_voters(k, len(voter_labels), f"{banks[0].name} and {banks[1].name} share")
        near = [neighbours(bank, rows, k, drawn) for bank, rows in zip(banks, pair, strict=True)]
    elif (labels < 0).any():
        known = np.flatnonzero(labels >= 0)
        voted, voter_labels = drawn[labels[drawn] >= 0], labels[known]
        if not len(voted):
            return None
        _check_voters(k, len(known) - 1, f"{x.name} and {y.name} share beside each")
        own = np.searchsorted(known, voted)
        near = [neighbours(rows.pick(known), rows, k, voted, own) for rows in pair]
    classes, numbers = np.unique(voter_labels, return_inverse=True)
    a, b = (winners(vote_weights(cosine, TEMPERATURE), numbers[row], len(classes)) for cosine, row in near)
    return Votes(voted, a, b, len(classes))


def neighbours(
    bank: Rows, rows: Rows, k: int, positions: Int[np.ndarray, " q"], own: Int[np.ndarray, " q"] | None = None
) -> Neighbours:
    """Similarities and positions in `bank` of the k rows nearest to `rows` at `positions`, of which `own` are the
    same rows in `bank`."""
    step = max(1, _QUERY_FLOATS // rows.embedding_dim)
    found: list[Neighbours] = []
    for start in range(0, len(positions), step):
        part = slice(start, start + step)
        query = rows.take(positions[part])
        try:
            found.append(search(bank.blocks(), query, k, exclude_self=None if own is None else own[part]))
        except ValueError as error:
            raise ValueError(f"cannot search {bank.name}: {error}") from error
    return np.concatenate([cosine for cosine, _ in found]), np.concatenate([row for _, row in found])


def shared(a: Int[np.ndarray, "q k"], b: Int[np.ndarray, "q k"]) -> Float[np.ndarray, " q"]:
    """Share of each row of `a` that the same row of `b` has too; a row repeats no number."""
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)
    return (both[:, 1:] == both[:, :-1]).sum(axis=1) / a.shape[1]


def _check_voters(k: int, voters: int, whose: str) -> None:
    if k > voters:
        raise ValueError(f"k={k} exceeds the {voters} labelled rows that {whose}; use a smaller k or more labels")

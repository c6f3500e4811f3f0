"""What a mapping kept of the teacher: one table of numbers for any of them."""

import numpy as np
import torch
from jaxtyping import Float, Int

from distill.mappings import FeatureMapping, orthogonality
from distill.objectives import cosines, relation_kl
from featcache.geometry import unit, vote_weights, winners
from featcache.rows import Rows
from featcache.store import FeatureStore

_SNE_ROWS = 512  # the loss is of a distribution over pairs, so it depends on the count: always the same one
_MUTUAL, _VOTERS, _DISTANT = 10, 20, (1, 50)
_VOTE_TEMPERATURE = 0.07
_BLOCK = 2048


def report(
    mapping: FeatureMapping,
    rows: Rows | FeatureStore,
    *,
    id_test: Rows | FeatureStore | None = None,
    ood: Rows | FeatureStore | None = None,
    sample: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """How much of the teacher's geometry a fitted mapping keeps; all from view 0, cosines throughout.

    Args:
        rows: what the mapping was fitted to; the bank of neighbours.
        id_test: held-out rows of the same distribution; without them the first three groups below are measured on
            `rows`, and the others are left out.
        ood: rows of another distribution.
        sample: rows of each that are looked at, at most; drawn from `seed`.

    Returns:
        - singular_min, singular_max, deviation: see `orthogonality`.
        - sne: the paper's loss at its ten temperatures, of at most 512 rows.
        - gram_pearson: correlation of the off-diagonal cosines before and after. mutual_knn@10: share of a row's
          ten nearest other rows that stay so.
        - top1@20: accuracy of a vote of the 20 nearest rows of the bank, each weighing exp(cosine / 0.07); where
          both have labels. teacher/top1@20: before the mapping.
        - auroc@1, auroc@50: how well 1 − cosine to the k-th nearest row of the bank tells `ood` from `id_test`.
          teacher/auroc@1, teacher/auroc@50: before the mapping.

    Memory O(sample² + sample · block), however many rows.

    Raises:
        ValueError: there are fewer than 12 rows to compare or 50 in the bank, `ood` comes without `id_test`, or
            classes are not named alike.
    """
    bank = Rows.of(rows)
    held = bank if id_test is None else Rows.of(id_test)
    if ood is not None and id_test is None:
        raise ValueError("the OOD numbers compare `ood` with held-out rows; give `id_test` as well")
    if len(held) < _MUTUAL + 2:
        raise ValueError(f"{held.name}: {len(held)} rows with features; a report needs {_MUTUAL + 2} or more")
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(held))[:sample]
    teacher = held.take(drawn)
    kept = _kept(teacher, mapping.transform(teacher))
    found = {**orthogonality(mapping.weight_), **kept}
    if id_test is None:
        return found

    labelled = (bank.labels >= 0).any() and (held.labels[drawn] >= 0).any()
    if labelled and bank.class_names != held.class_names:
        raise ValueError(f"{held.name} and {bank.name} do not name their classes alike; leave out one's labels")
    if labelled and not np.intersect1d(bank.labels[bank.labels >= 0], held.labels[drawn]).size:
        raise ValueError(f"{held.name} and {bank.name} have no class in common; leave out one's labels")
    if len(bank) < max(_DISTANT):
        raise ValueError(f"{bank.name}: {len(bank)} rows with features; its neighbours need {max(_DISTANT)} or more")
    outside = teacher[:0]
    if ood is not None:
        strangers = Rows.of(ood)
        outside = strangers.take(rng.permutation(len(strangers))[:sample])
    nearest = _nearest(mapping, bank, np.concatenate([teacher, outside]))
    for prefix, (cosine, neighbour) in zip(("teacher/", ""), nearest, strict=True):
        if labelled:
            found[f"{prefix}top1@{_VOTERS}"] = _accuracy(
                cosine[: len(drawn), :_VOTERS], bank.labels[neighbour[: len(drawn), :_VOTERS]], held.labels[drawn]
            )
        if ood is not None:
            for k in _DISTANT:
                score = 1 - cosine[:, k - 1]
                found[f"{prefix}auroc@{k}"] = _auroc(score[: len(drawn)], score[len(drawn) :])
    return found


def _kept(teacher: Float[np.ndarray, "n d"], mapped: Float[np.ndarray, "n dim"]) -> dict[str, float]:
    sides = unit(teacher), unit(mapped)
    before, after = (rows @ rows.T for rows in sides)
    few = (torch.from_numpy(rows[:_SNE_ROWS]) for rows in sides)
    apart = ~np.eye(len(before), dtype=bool)
    neighbours = []
    for gram in (before, after):
        masked = np.where(apart, gram, -np.inf)
        neighbours.append(np.argpartition(-masked, _MUTUAL, axis=1)[:, :_MUTUAL])
    both = [len(np.intersect1d(*pair)) for pair in zip(*neighbours, strict=True)]
    return {
        "sne": relation_kl(*(cosines(rows, rows) for rows in few)).item(),
        "gram_pearson": float(np.corrcoef(before[apart].astype(np.float64), after[apart])[0, 1]),
        f"mutual_knn@{_MUTUAL}": float(np.mean(both)) / _MUTUAL,
    }


def _nearest(
    mapping: FeatureMapping, bank: Rows, query: Float[np.ndarray, "q d"]
) -> list[tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]]:
    """Cosines and numbers of each query's nearest rows of the bank, nearest first: before the mapping, then after.

    One pass over the bank.
    """
    queries = [torch.from_numpy(unit(x)) for x in (query, mapping.transform(query))]
    best = [(torch.empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)) for _ in queries]
    start = 0
    for block in bank.blocks(size=_BLOCK):
        for side, rows in enumerate((block, mapping.transform(block))):
            cosine = torch.cat([best[side][0], queries[side] @ torch.from_numpy(unit(rows)).T], dim=1)
            number = torch.arange(start, start + len(block)).expand(len(query), -1)
            top, place = cosine.topk(min(max(_DISTANT), cosine.shape[1]), dim=1)
            best[side] = top, torch.cat([best[side][1], number], dim=1).gather(1, place)
        start += len(block)
    return [(cosine.numpy(), number.numpy()) for cosine, number in best]


def _accuracy(cosine: Float[np.ndarray, "q k"], label: Int[np.ndarray, "q k"], truth: Int[np.ndarray, " q"]) -> float:
    """Of the vote, over the queries that have a label; neighbours without one have no vote."""
    weight = np.where(label >= 0, vote_weights(cosine, _VOTE_TEMPERATURE), 0)
    won = winners(weight, label.clip(0), int(max(label.max(), truth.max())) + 1)
    return float((won == truth)[truth >= 0].mean())


def _auroc(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> float:
    """Probability that a score from outside is the higher one; ties count one half."""
    ordered = np.sort(inside)
    lower = np.searchsorted(ordered, outside, "left") + np.searchsorted(ordered, outside, "right")
    return float(lower.mean() / 2 / len(inside))

"""Accuracies of a classification, and what guessing would reach."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from evalsuite.intervals import macro_share, share
from evalsuite.result import Metric


def accuracies(
    place: Int[np.ndarray, " q"],
    truth: Int[np.ndarray, " q"],
    known: Int[np.ndarray, " c"],
    name: str,
    most: int = 5,
) -> tuple[dict[str, Metric], dict[str, np.ndarray], dict[str, float]]:
    """Metrics, samples and chance levels of `top1`, `top5` and `macro_top1` (mean over classes of the accuracy within each),
    put into `name` ("probe/{}"), where the true class has this `place` (0: first) among the `known` ones; their number
    or more where it has none. An answer names no more than `most` classes."""
    top1, top5 = place == 0, (place < 5) & (place < len(known))
    metrics = {"top1": share(top1), "top5": share(top5), "macro_top1": macro_share(top1, truth)}
    chance = {
        "top1": guessing(truth, known),
        "top5": guessing(truth, known, most),
        "macro_top1": macro_guessing(truth, known),
    }
    return (
        {name.format(what): of.metric() for what, of in metrics.items()},
        {name.format("top1"): top1, name.format("top5"): top5},
        {name.format(what): of for what, of in chance.items()},
    )


def guessing(truth: Int[np.ndarray, " q"], known: Int[np.ndarray, " _"], names: int = 1) -> float:
    """What answering every row with the same `names` classes reaches at most, in [0, 1]: the share of the rows that have
    one of the most frequent of the `known` classes. For balanced classes it is a guess at random; where one class has
    95 % of the rows it is 0.95."""
    rows = np.unique(truth[np.isin(truth, known)], return_counts=True)[1]
    return float(np.sort(rows)[::-1][:names].sum() / len(truth))


def macro_guessing(truth: Int[np.ndarray, " q"], known: Int[np.ndarray, " _"]) -> float:
    """The same of the mean over classes of the accuracy within each: one class right and the others wrong, 1/K of K."""
    labels = np.unique(truth)
    return float(np.isin(labels, known).any() / len(labels))

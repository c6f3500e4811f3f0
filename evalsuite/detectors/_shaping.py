"""What the detectors that reshape activations have in common."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from featcache.rows import Rows


def require_activations(bank: Rows, detector: str, pruned: float) -> None:
    """Raise `ValueError` when the pruned share leaves no activation of the bank's rows, or one is negative."""
    d = bank.embedding_dim
    if np.round(d * pruned) >= d:
        raise ValueError(f"{detector}:pruned={pruned!r} leaves none of the {d} dimensions of {bank.name}; prune fewer")
    for block in bank.blocks_of(("embedding",)):
        if (block["embedding"] < 0).any():
            raise ValueError(
                f"{bank.name} has negative features, {detector} is made for those after a ReLU; "
                "use energy or react on this encoder"
            )


def largest(x: Float[np.ndarray, "n d"], pruned: float) -> Bool[np.ndarray, "n d"]:
    """Where the largest (1 − pruned) d values of each row are."""
    count = x.shape[1] - int(np.round(x.shape[1] * pruned))
    kept = np.zeros(x.shape, bool)
    if count:
        np.put_along_axis(kept, np.argpartition(x, -count, axis=1)[:, -count:], True, axis=1)
    return kept


def ratio(part: Float[np.ndarray, " n"], whole: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """whole / part, 1 where part is zero or less (a row of zeros)."""
    return np.divide(whole, part, out=np.ones_like(whole), where=part > 0)

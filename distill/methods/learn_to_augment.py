"""Learning to Augment (Feng et al. 2021, arXiv 2101.08106): which samples of a pool a student learns from, learned from how it does."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from distill.methods import Batch, Features, Preparing
from distill.methods._options import refuse_not_positive
from distill.methods.kd import KD
from featcache.geometry import softmax, unit
from featcache.rows import Rows
from featcache.store.layout import LOGITS

SELECTORS = ("learned", "random", "similarity", "all")
REWARDS = ("nll", "top1")
BLOCK = 1024
"""Samples whose likeness to the target is looked for at a time."""
MEMORY = 0.8
"""Of the running means that a reward is compared with."""


class LearnToAugment(KD):
    """KD on few labelled samples and on those of a pool that a selector keeps (Learning to Augment, arXiv 2101.08106).

    The labelled rows of the first store are the target task's; all others, of further stores too, are the pool, whose labels
    are not read. Terms, as in `kd`: "kl", of target and pool; "ce", of the target's labels.

    The pool is embedded once, and the selector sees what was cached: the first principal components of the pool's embeddings,
    each sample's highest cosine to a labelled one, and the entropy of what the teacher says of it, each of mean 0 and standard
    deviation 1. "learned": each sample is kept with probability σ(w·f + c), independently, c such that `keep` are kept on average;
    what is kept is drawn anew after every evaluation, and w is learned from evaluations on held-out rows of the target by
    REINFORCE: with r how much better the student did than at the evaluation before, r̄ and ν the running means of r and of
    (r − r̄)²,

        w ← w + selector_lr (r − r̄) / √ν · Σ (kept − π)(f − f̄) / √(Σ π (1 − π)),    f̄ the mean of f weighted by π (1 − π)

    so that a kept set that came before more progress than usual becomes likelier, with a step of a size that depends neither on
    the pool's nor on the reward's. The paper's generator of samples, its selector's state, its reward and its loss on hidden states
    are not known to us: these are ours. Selectors to compare with: "similarity" keeps the `keep` samples of the highest cosine to
    a labelled one, "random" as many at random, both once; "all" the whole pool.

    Only the target's labelled rows are held out: `holdout` is a share of them.

    Options:
        selector: "learned", "random", "similarity" or "all".
        keep: samples of the pool that are kept; no more than there are.
        target_share: share of the samples of an epoch that are of the target, drawn with replacement; the rest is of what is kept.
        reward: what an evaluation is judged by: "nll", the cross-entropy, or "top1", the accuracy of the student's classifier.
        components: principal components that the selector sees.
        selector_lr: see above; 0.1 moves w by about 0.1 at an evaluation.
        alpha: α of `kd`, the teacher's share.
        temperature: T of `kd`.
    """

    labelled = True

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        selector: str = "learned",
        keep: int = 2000,
        target_share: float = 0.5,
        reward: str = "nll",
        components: int = 8,
        selector_lr: float = 0.1,
        alpha: float = 0.5,
        temperature: float = 2.0,
    ):
        super().__init__(teacher_dim, student_dim, alpha=alpha, temperature=temperature)
        for name, value, known in (("selector", selector, SELECTORS), ("reward", reward, REWARDS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        refuse_not_positive(keep=keep, components=components, selector_lr=selector_lr)
        if not 0 < target_share < 1:
            raise ValueError(f"target_share must be between 0 and 1, got {target_share}")
        if alpha == 1:
            raise ValueError("alpha 1 leaves the labels out; give less, such as 0.5")
        self._selector, self._keep, self._target_share = selector, keep, target_share
        self._reward, self._components, self._lr = reward, components, selector_lr
        self.judged = selector == "learned"
        self.pool: Tensor
        self.seen: Tensor
        self.chosen: Tensor
        self.policy: Tensor
        self.history: Tensor
        self.drawn: Tensor
        self.register_buffer("pool", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("seen", torch.zeros(0, components + 2))
        self.register_buffer("chosen", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("policy", torch.zeros(components + 2, dtype=torch.float64))
        self.register_buffer("history", torch.zeros(3, dtype=torch.float64))  # the last judgement, r̄, ν
        self.register_buffer("drawn", torch.zeros(2, dtype=torch.int64))  # the seed, and evaluations heard of

    def may_be_held_out(self, rows: Rows) -> Bool[np.ndarray, " rows"]:
        return ~in_pool(rows)

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Part the rows into target and pool, and see what the selector goes by.

        Returns:
            "target", "pool", "kept": how many rows each is of; "kept" on average.

        Raises:
            ValueError: there is no target, no pool, or nothing in it to select.
        """
        pool = in_pool(rows)
        if pool.all() or not pool.any():
            missing = "labelled rows in the first store" if pool.all() else "rows of a pool"
            raise ValueError(
                f"{rows.name}: no {missing}; method learn_to_augment takes the store of the target first, with labels, and those "
                "of a pool after it: give each with --store"
            )
        kept = min(self._keep, int(pool.sum()))
        if self._selector == "learned" and kept == pool.sum():
            raise ValueError(
                f"{rows.name}: keep {self._keep:,} is all of the pool's {kept:,} samples, so there is nothing to select; lower keep, "
                "or set selector=all"
            )
        self.pool, self.drawn = torch.from_numpy(pool), torch.tensor([given["seed"], 0])
        chosen = np.zeros(int(pool.sum()), bool)
        if self._selector == "learned":
            self.seen = torch.from_numpy(features(rows, pool, self._components)).float()
        elif self._selector == "all":
            chosen[:] = True
        elif self._selector == "random":
            chosen[np.random.default_rng([given["seed"], 1]).permutation(len(chosen))[:kept]] = True
        else:
            chosen[np.argsort(-likeness(rows, pool), kind="stable")[:kept]] = True
        self.chosen = torch.from_numpy(chosen)
        count = len(chosen) if self._selector == "all" else kept
        return {"target": float((~pool).sum()), "pool": float(pool.sum()), "kept": float(count)}

    def weights(self, epoch: int) -> Float64[np.ndarray, " rows"]:
        """Of the target's rows and of those kept, each alike, so that `target_share` of what is drawn is of the target."""
        pool, kept = self.pool.cpu().numpy(), self._kept()
        found = np.full(len(pool), self._target_share / (~pool).sum())
        found[pool] = kept * (1 - self._target_share) / max(1, kept.sum())
        return found

    def _kept(self) -> Bool[np.ndarray, " pool"]:
        if self._selector != "learned":
            return self.chosen.cpu().numpy()
        drawn = np.random.default_rng([*self.drawn.tolist(), 2]).random(len(self.seen))
        return drawn < self._probabilities()

    def _probabilities(self) -> Float64[np.ndarray, " pool"]:
        return kept_on_average(self.seen.cpu().double().numpy() @ self.policy.cpu().numpy(), self._keep)

    def learn(self, epoch: int, held_out: Mapping[str, float]) -> None:
        """Move the selector towards what was kept where that brought more than usual, and away where less."""
        if self._selector != "learned":
            return
        name = f"holdout/{self._reward}"
        if name not in held_out:
            raise ValueError(
                f"the selector learns from {name}, which this evaluation has not; hold out more labelled rows"
            )
        before, mean, spread = self.history.tolist()
        heard, now = int(self.drawn[1]), -held_out[name] if self._reward == "nll" else held_out[name]
        apart = now - before - mean
        if heard > 1:
            spread = apart**2 if heard == 2 else MEMORY * spread + (1 - MEMORY) * apart**2
            if spread > 0:
                step = self._lr * apart / math.sqrt(spread) * self._direction()
                self.policy += torch.from_numpy(step).to(self.policy.device)
        if heard > 0:
            mean += apart if heard == 1 else (1 - MEMORY) * apart
        self.history = self.history.new_tensor([now, mean, spread])
        self.drawn[1] += 1

    def _direction(self) -> Float64[np.ndarray, " f"]:
        """The gradient of the log-probability of what is kept by w, c following it, over √(Σ π (1 − π))."""
        seen, share = self.seen.cpu().double().numpy(), self._probabilities()
        variance = share * (1 - share)
        if not variance.sum() > 0:  # all are kept
            return np.zeros(seen.shape[1])
        centre = variance @ seen / variance.sum()
        found: Float64[np.ndarray, " f"] = (self._kept() - share) @ (seen - centre) / np.sqrt(variance.sum())
        return found

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        pooled = self.pool[batch.row] & (batch.row >= 0)
        return super().loss(student, replace(batch, label=batch.label.masked_fill(pooled, -1)))


def in_pool(rows: Rows) -> Bool[np.ndarray, " rows"]:
    """All rows but the labelled ones of the first store."""
    pool = np.ones(len(rows), bool)
    pool[rows.of_store(0)] = rows.labels[rows.of_store(0)] < 0
    return pool


def likeness(rows: Rows, pool: Bool[np.ndarray, " rows"]) -> Float[np.ndarray, " pool"]:
    """Of each of the pool, the highest cosine to one of the target."""
    target = unit(rows.take(np.flatnonzero(~pool)))
    of_pool = rows.pick(np.flatnonzero(pool))
    return np.concatenate([(unit(block) @ target.T).max(axis=1) for block in of_pool.blocks(BLOCK)])


def features(rows: Rows, pool: Bool[np.ndarray, " rows"], components: int) -> Float64[np.ndarray, "pool f"]:
    """What the selector sees of each of the pool: principal components, likeness to the target and entropy; of mean 0 and
    standard deviation 1, or 0 where one is constant or there are fewer components."""
    places = np.flatnonzero(pool)
    embedding = rows.take(places).astype(np.float64)
    centred = embedding - embedding.mean(axis=0)
    values, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    found = np.zeros((len(places), components + 2))
    first = directions[:, ::-1][:, :components] * (values[::-1][:components] > 1e-12 * values[-1])
    found[:, : first.shape[1]] = centred @ first
    told = softmax(rows.take(places, LOGITS).astype(np.float64))
    found[:, -2] = likeness(rows, pool)
    found[:, -1] = -(told * np.log(np.maximum(told, 1e-300))).sum(axis=1)
    found -= found.mean(axis=0)
    spread = found.std(axis=0)
    return found / np.where(spread > 1e-9, spread, np.inf)


def kept_on_average(score: Float64[np.ndarray, " n"], keep: int) -> Float64[np.ndarray, " n"]:
    """σ(score + c), of sum `keep`; all 1 where that is n or more."""
    if keep >= len(score):
        return np.ones(len(score))
    most = float(np.abs(score).max()) + 40
    found: Float64[np.ndarray, " n"] = expit(score + brentq(lambda c: expit(score + c).sum() - keep, -most, most))
    return found

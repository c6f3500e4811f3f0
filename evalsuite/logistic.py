"""Multinomial logistic regression by L-BFGS in float64, and the choice of its C."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from featcache.head import Head
from featcache.rows import Rows

_HELD_OUT = 0.1  # share of each class's training rows that C is chosen on
_MOST_STEPS = 1000
_GRADIENT = 1e-8  # of the mean loss; the last fit is finished when no component is larger
_CHOICE_GRADIENT = 1e-5  # of the fits that choose C: their accuracies have long settled by then
_BLOCK_FLOATS = 2**23  # features and logits in float64 at once
_WIDE_FLOATS = 2**26  # fewer features than this are kept in float64, and not brought there again in every step


@dataclass(frozen=True)
class Fitted:
    """A classifier, and how it came about: the C taken, the steps of the last fit, how many rows were held out for the choice
    of C, accuracy and cross-entropy on them by candidate, the C whose fits did not finish."""

    head: Head
    c: float
    steps: int
    held_out: int
    tried: list[tuple[float, float]]
    unfinished: list[float]

    def warn(self, candidates: Sequence[float]) -> None:
        """Of fits that stopped at their limit of steps, and of a C that is the smallest or largest of three or more."""
        if self.unfinished:
            warnings.warn(
                f"the fit with C = {', '.join(f'{each:g}' for each in self.unfinished)} stopped at its limit of "
                f"{_MOST_STEPS} steps, short of its tolerance; give a smaller c",
                RuntimeWarning,
                stacklevel=4,
            )
        if len(candidates) > 2 and self.c in (candidates[0], candidates[-1]):
            end, beyond = ("smallest", "smaller") if self.c == candidates[0] else ("largest", "larger")
            warnings.warn(
                f"C = {self.c:g} is the {end} of those tried, a {beyond} one may be better; give {beyond} ones too",
                RuntimeWarning,
                stacklevel=4,
            )


def fit(
    rows: Rows, candidates: Sequence[float], seed: int, device: str, progress: Callable[[int, int], None]
) -> Fitted:
    """Fitted to labelled rows, with the C of `candidates`, in rising order, that is right most often (then: of the lowest
    cross-entropy) on a tenth of each class, drawn by `seed`, when fitted to the others. `progress` is told (fits done, of how
    many).

    Raises `ValueError` when there is one class, or no class has a row to spare for the choice.
    """
    labels, target = np.unique(rows.labels, return_inverse=True)
    if len(labels) < 2:
        raise ValueError(f"{rows.name} has one class; a classifier needs at least two")
    several = len(candidates) > 1
    held = held_out(target, seed) if several else np.zeros(len(target), bool)
    if several and not held.any():
        raise ValueError(f"no class of {rows.name} has two rows to choose C with; give one C")
    order, kept = np.argsort(held, kind="stable"), int((~held).sum())  # rows to choose C with come last
    x = np.concatenate([block["embedding"] for block in rows.pick(order).blocks_of(["embedding"])])
    task = LogisticRegression(x, target[order], len(labels), device)
    fits = len(candidates) + several
    tried: list[tuple[float, float]] = []
    unfinished: list[float] = []
    found = at = task.zeros()
    best = candidates[0]
    for candidate in candidates if several else ():
        # From where the last one ended: that is near.
        at, _, done = task.fit(slice(kept), candidate, at, _CHOICE_GRADIENT)
        unfinished += [] if done else [candidate]
        correct, cross_entropy = task.judge(slice(kept, len(x)), at)
        if not tried or (correct, -cross_entropy) > max((a, -e) for a, e in tried):
            found, best = at, candidate
        tried.append((correct, cross_entropy))
        progress(len(tried), fits)
    found, steps, done = task.fit(slice(len(x)), best, found)
    if not done and best not in unfinished:
        unfinished.append(best)
    progress(fits, fits)
    named = None if rows.class_names is None else [rows.class_names[label] for label in labels.tolist()]
    fingerprint = rows.record()["fingerprint"]
    head = Head(*task.on_rows(found), labels, fingerprint=fingerprint, class_names=named)
    return Fitted(head, best, steps, len(x) - kept, tried, unfinished)


class LogisticRegression:
    """The rows to fit, and scikit-learn's objective ½‖W‖² + C Σ cross-entropy, with the bias not penalised. A head is (C, D + 1): weights of centred and scaled rows, then the bias."""

    def __init__(self, x: Float[np.ndarray, "n d"], target: Int[np.ndarray, " n"], n_classes: int, device: str) -> None:
        import torch

        from featcache.machine import resolve_device

        device = resolve_device(device)
        self._mean = x.mean(axis=0, dtype=np.float64)
        squares = float(np.einsum("nd,nd->", x, x, dtype=np.float64)) / len(x)
        # The length of rows that are all alike is rounding error: 0 would divide.
        self._length = float(np.sqrt(max(squares - self._mean @ self._mean, 0.0))) or 1.0
        self._x = torch.from_numpy(x).to(device, torch.float64 if x.size < _WIDE_FLOATS else torch.float32)
        self._target = torch.from_numpy(target).to(device)
        self._centre = torch.from_numpy(self._mean).to(device)
        self._n_classes = n_classes
        self._step = max(1, _BLOCK_FLOATS // (x.shape[1] + n_classes))

    def zeros(self) -> Float[np.ndarray, "c d1"]:
        return np.zeros((self._n_classes, self._x.shape[1] + 1))

    def on_rows(self, head: Float[np.ndarray, "c d1"]) -> tuple[Float[np.ndarray, "c d"], Float[np.ndarray, " c"]]:
        """Weight and bias for rows as they are stored."""
        weight = head[:, :-1] / self._length
        return weight, head[:, -1] - weight @ self._mean

    def fit(
        self, rows: slice, c: float, start: Float[np.ndarray, "c d1"], gradient: float = _GRADIENT
    ) -> tuple[Float[np.ndarray, "c d1"], int, bool]:
        """The minimum of ½‖W‖² / (C m) + mean cross-entropy of m rows, sought from `start`, the steps it took, and
        whether these were enough."""
        import torch

        m = len(self._target[rows])
        head = torch.tensor(start, device=self._x.device)
        optimizer = torch.optim.LBFGS(
            [head], max_iter=_MOST_STEPS, max_eval=2 * _MOST_STEPS, tolerance_grad=gradient, tolerance_change=1e-14,
            history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> torch.Tensor:
            penalised = head[:, :-1]
            loss = penalised.square().sum() / (2 * c * m)
            head.grad = torch.zeros_like(head)
            for x, target, logits in self._blocks(rows, head):
                log_p = logits.log_softmax(dim=1)
                loss = loss - log_p.gather(1, target[:, None]).sum() / m
                wrong = log_p.exp().scatter_add_(1, target[:, None], -torch.ones_like(logits[:, :1])) / m
                total = wrong.sum(dim=0)
                head.grad[:, :-1] += (wrong.T @ x - total[:, None] * self._centre) / self._length
                head.grad[:, -1] += total
            head.grad[:, :-1] += penalised / (c * m)
            return loss

        with torch.no_grad():
            optimizer.step(closure)
            closure()  # the gradient where the search ended; its own last one may be of a point it went back from
        state = optimizer.state[head]
        limited = state["n_iter"] >= _MOST_STEPS or state["func_evals"] >= 2 * _MOST_STEPS
        assert head.grad is not None
        done = not limited or float(head.grad.abs().max()) <= gradient
        return head.cpu().numpy(), int(state["n_iter"]), done

    def judge(self, rows: slice, head: Float[np.ndarray, "c d1"]) -> tuple[float, float]:
        """Accuracy and mean cross-entropy."""
        import torch

        correct, cross_entropy = 0.0, 0.0
        for _, target, logits in self._blocks(rows, torch.from_numpy(head).to(self._x.device)):
            correct += float((logits.argmax(dim=1) == target).sum())
            cross_entropy += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        m = len(self._target[rows])
        return correct / m, cross_entropy / m

    def _blocks(self, rows: slice, head: Any) -> Iterator[tuple[Any, Any, Any]]:
        """Rows in float64, their classes and logits. The rows stay as they are; the head is brought to them."""
        weight = head[:, :-1] / self._length
        bias = head[:, -1] - weight @ self._centre
        for x, target in zip(self._x[rows].split(self._step), self._target[rows].split(self._step), strict=True):
            x = x.double()
            yield x, target, x @ weight.T + bias


def held_out(target: Int[np.ndarray, " n"], seed: int) -> Bool[np.ndarray, " n"]:
    """A tenth of every class, at least one row of each that has two."""
    held_out = np.zeros(len(target), bool)
    rng = np.random.default_rng(seed)
    for label in range(target.max() + 1):
        rows = rng.permutation(np.flatnonzero(target == label))
        held_out[rows[: min(len(rows) - 1, max(1, round(_HELD_OUT * len(rows))))]] = True
    return held_out


def place(head: Head, rows: Rows, truth: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many classes come before each row's true one, whose label is `truth`, of a head whose labels rise; all where it
    does not know that. Equal logits go to the lower class."""
    true_class = np.searchsorted(head.labels, truth).clip(max=len(head.labels) - 1)
    found, start = np.empty(len(rows), np.int64), 0
    for block in rows.blocks_of(["embedding"]):
        logits = head.logits(block["embedding"])
        part = slice(start, start + len(logits))
        true = true_class[part][:, None]
        own = np.take_along_axis(logits, true, axis=1)
        found[part] = ((logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < true))).sum(axis=1)
        start += len(logits)
    return np.where(np.isin(truth, head.labels), found, len(head.labels))

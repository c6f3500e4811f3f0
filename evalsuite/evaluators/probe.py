"""Linear probe: logistic regression on cached features."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from evalsuite.classes import aligned_labels, guessing, macro_guessing, unreachable_remarks
from evalsuite.collapse import collapse_remarks
from evalsuite.intervals import macro_share, share
from evalsuite.overlap import overlap
from evalsuite.result import Result, content_of, versions, whole_file
from featcache.disk.refusals import require_writable
from featcache.head import Head
from featcache.rows import Rows, Store, left_out_remarks

CANDIDATES = tuple(10.0**e for e in range(-3, 6))
"""The C that are tried where none is given."""

_HELD_OUT = 0.1  # share of each class's training rows that C is chosen on
_MOST_STEPS = 1000
_GRADIENT = 1e-8  # of the mean loss; the last fit is finished when no component is larger
_CHOICE_GRADIENT = 1e-5  # of the fits that choose C: their accuracies have long settled by then
_BLOCK_FLOATS = 2**23  # features and logits in float64 at once
_WIDE_FLOATS = 2**26  # fewer features than this are kept in float64, and not brought there again in every step


def probe(
    train: Store,
    test: Store,
    *,
    c: float | Sequence[float] = CANDIDATES,
    seed: int = 0,
    save: str | os.PathLike[str] | None = None,
    drop_identical: bool = False,
    any_precision: bool = False,
    resamples: int = 1000,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """How well a linear classifier fitted to `train`'s embeddings labels `test`'s rows.

    Multinomial logistic regression with scikit-learn's objective, ½‖W‖² + C Σ cross-entropy (bias not
    penalised), by L-BFGS in float64. Embeddings are centred and divided by one number, the root mean square of
    their length, so that C means the same for every encoder. Of several `c` the one is taken that is right
    most often (then: of the lowest cross-entropy) on a tenth of each class of *train*, drawn by `seed`; then
    all of *train* is fitted. `test` takes no part in it.

    Reports `probe/top1`, `probe/top5` and `probe/macro_top1` (mean over classes of the accuracy within each), in
    [0, 1] with 95 % intervals (`evalsuite.intervals`) over the test rows, the classifier taken as it is; `parameters`
    says the chosen C and how each did on the held-out rows. Labels are matched, rows left out remarked on and chance levels taken as in `evalsuite.knn`; test
    rows of a class without training rows are wrong, and counted as `unreachable`. The training rows are held in memory,
    many of them as float32.

    A test row whose image `train` has too is counted, as `inputs["test"]["identical"]`, and remarked on; `drop_identical`
    leaves such rows out. Images are known as in `evalsuite.knn`.

    A warning says when a fit stopped at its limit of steps, short of its tolerance (`parameters["unfinished"]` has its
    C), and when the C taken is the smallest or largest of three or more.

    `save` writes the classifier: `weight` (C, D) and `bias` (C,) in float64 with logits = embedding · weightᵀ +
    bias for embeddings as they are stored, and as metadata `class_names` and `labels` (JSON lists, one entry a
    row of `weight`), `fingerprint`, `encoder` and `c`. `progress` is called with (fits done, of how many).

    `resamples` has no effect: intervals are no longer drawn at random.

    Raises `ValueError` when the stores come from different encoders, are of different precisions (without
    `any_precision`) or are one, one has no labels or a value that is not finite, their classes cannot be matched or have
    none in common, `train` has one class, no C is positive, no class has a row to spare for choosing C, or `save` cannot
    be written.

    Objective and choice of C: Oquab et al. 2023, arXiv 2304.07193 (`log_regression.py`).
    """
    candidates = sorted({float(each) for each in np.atleast_1d(np.asarray(c, np.float64))})
    if not candidates or not (np.isfinite(candidates).all() and candidates[0] > 0):
        raise ValueError(f"c must hold positive numbers, got {c}")
    all_train, all_test = Rows.of(train), Rows.of(test)
    all_train.require_same_encoder(all_test, any_precision)
    if os.path.realpath(all_train.name) == os.path.realpath(all_test.name):
        raise ValueError(f"{all_test.name} is both train and test; pass held-out images as test")
    train_rows, test_rows = all_train.labelled(), all_test.labelled()
    same = overlap(test_rows, [train_rows])
    if drop_identical:
        if same.rows.all():
            raise ValueError(f"every row of {all_test.name} is in {all_train.name} too; give other images as test")
        test_rows = test_rows.pick(np.flatnonzero(~same.rows))
    truth = aligned_labels(train_rows, test_rows)
    labels, target = np.unique(train_rows.labels, return_inverse=True)
    if len(labels) < 2:
        raise ValueError(f"{train_rows.name} has one class; a classifier needs at least two")
    held_out = _held_out(target, seed) if len(candidates) > 1 else np.zeros(len(target), bool)
    if len(candidates) > 1 and not held_out.any():
        raise ValueError(f"no class of {train_rows.name} has two rows to choose C with; give one C")

    if save is not None:
        require_writable(save, "file for the head")

    order = np.argsort(held_out, kind="stable")  # rows to choose C with come last
    x = np.concatenate([block["embedding"] for block in train_rows.pick(order).blocks_of(["embedding"])])
    task = _Task(x, target[order], len(labels), device)
    everything, kept, held = slice(len(x)), slice(int((~held_out).sum())), slice(int((~held_out).sum()), len(x))
    fits = len(candidates) + 1 if len(candidates) > 1 else 1
    tried: list[tuple[float, float]] = []  # accuracy and cross-entropy on the held-out rows
    unfinished: list[float] = []
    head, best = task.zeros(), candidates[0]
    if len(candidates) > 1:
        at = head
        for candidate in candidates:
            at, _, done = task.fit(kept, candidate, at, _CHOICE_GRADIENT)  # from where the last one ended: that is near
            if not done:
                unfinished.append(candidate)
            correct, cross_entropy = task.judge(held, at)
            if not tried or (correct, -cross_entropy) > max((a, -e) for a, e in tried):
                head, best = at, candidate
            tried.append((correct, cross_entropy))
            if progress:
                progress(len(tried), fits)
    head, steps, done = task.fit(everything, best, head)
    if not done and best not in unfinished:
        unfinished.append(best)
    names, record = train_rows.class_names, train_rows.record()
    of_labels = None if names is None else [names[label] for label in labels.tolist()]
    classifier = Head(*task.on_rows(head), labels, fingerprint=record["fingerprint"], class_names=of_labels)
    if unfinished:
        warnings.warn(
            f"the fit with C = {', '.join(f'{each:g}' for each in unfinished)} stopped at its limit of {_MOST_STEPS} "
            "steps, short of its tolerance; give a smaller c",
            RuntimeWarning,
            stacklevel=2,
        )
    if len(candidates) > 2 and best in (candidates[0], candidates[-1]):
        end, beyond = ("smallest", "smaller") if best == candidates[0] else ("largest", "larger")
        warnings.warn(
            f"C = {best:g} is the {end} of those tried, a {beyond} one may be better; give {beyond} ones too",
            RuntimeWarning,
            stacklevel=2,
        )
    if progress:
        progress(fits, fits)

    reachable = np.isin(truth, labels)
    true_class = np.searchsorted(labels, truth).clip(max=len(labels) - 1)
    place = np.empty(len(test_rows), np.int64)
    start = 0
    for block in test_rows.blocks_of(["embedding"]):
        logits = classifier.logits(block["embedding"])
        part = slice(start, start + len(logits))
        place[part] = np.where(reachable[part], _place(logits, true_class[part]), len(labels))
        start += len(logits)
    top1, top5 = place == 0, (place < 5) & (place < len(labels))
    metrics = {
        "probe/top1": share(top1).metric(),
        "probe/top5": share(top5).metric(),
        "probe/macro_top1": macro_share(top1, truth).metric(),
    }
    chance = {
        "probe/top1": guessing(truth, labels),
        "probe/top5": guessing(truth, labels, 5),
        "probe/macro_top1": macro_guessing(truth, labels),
    }
    if save is not None:
        file_of_head = Path(save)
        file_of_head.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file_of_head) as file:
            file.write(classifier.to_bytes(encoder=record["encoder"], c=repr(best)))
    return Result(
        "probe",
        {
            "train": train_rows.record() | {"unlabelled": len(all_train) - len(train_rows)},
            "test": test_rows.record()
            | {
                "unlabelled": len(all_test) - len(all_test.labelled()),
                "unreachable": int((~reachable).sum()),
                "identical": same.count,
            },
        },
        {
            "c": best,
            "candidates": candidates,
            "held_out_rows": int(held_out.sum()),
            "held_out_top1": [accuracy for accuracy, _ in tried],
            "held_out_cross_entropy": [cross_entropy for _, cross_entropy in tried],
            "normalisation": "centred, divided by the root mean square length",
            "steps": steps,
            "unfinished": unfinished,
            "head": None if save is None else os.fspath(save),
            "drop_identical": drop_identical,
            "any_precision": any_precision,
            "identical_by": same.by,
            "seed": seed,
            "chance": chance,
        },
        metrics,
        versions("torch"),
        {
            "sample_id": test_rows.sample_ids.astype(np.str_),
            "content": content_of(test_rows),
            "probe/top1": top1,
            "probe/top5": top5,
        },
        remarks=[
            *same.remarks("test rows", "of train", "the classifier was fitted to them", drop_identical),
            *collapse_remarks("train", train_rows),
            *left_out_remarks("train", all_train, len(all_train) - len(train_rows)),
            *left_out_remarks("test", all_test, len(all_test) - len(all_test.labelled())),
            *unreachable_remarks(train_rows, test_rows, truth, "test"),
        ],
    )


class _Task:
    """The rows to fit, and the objective. A head is (C, D + 1): weights of centred and scaled rows, then the bias."""

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


def _held_out(target: Int[np.ndarray, " n"], seed: int) -> Bool[np.ndarray, " n"]:
    """A tenth of every class, at least one row of each that has two."""
    held_out = np.zeros(len(target), bool)
    rng = np.random.default_rng(seed)
    for label in range(target.max() + 1):
        rows = rng.permutation(np.flatnonzero(target == label))
        held_out[rows[: min(len(rows) - 1, max(1, round(_HELD_OUT * len(rows))))]] = True
    return held_out


def _place(logits: Float[np.ndarray, "n c"], true_class: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many classes come before the true one; equal logits go to the lower class."""
    own = np.take_along_axis(logits, true_class[:, None], axis=1)
    lower = np.arange(logits.shape[1]) < true_class[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(axis=1)

"""AKD (Maroto, Ortiz-Jiménez & Frossard 2022, arXiv 2203.07159): adversarial training towards labels and teacher together."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from distill.methods import Batch, Features, Method, Preparing
from distill.objectives import ce
from featcache.inputs.images import Preprocess
from featcache.pgd import STRIDE, Box, ascend, refuse_epsilon
from featcache.rows import Rows
from featcache.store.layout import EMBEDDING, LOGITS

MEASURED = 10_000
"""Rows, at most, that the targets' entropy is taken over."""


class AKD(Method):
    """Adversarial training on a mixture of labels and a teacher's probabilities (AKD, arXiv 2203.07159).

    x* = argmax over |x' − x| ≤ ε of CE(ỹ, s(x')) and L = CE(ỹ, s(x*)), with s the student's logits, t the teacher's and
    ỹ = (1 − λ) y + λ softmax(t(x) / T). Term: "ce", in nats, mean over the rows. A row without a label has the teacher
    alone, and with λ = 0 counts for nothing. λ = 0 is adversarial training (Madry et al. 2018, arXiv 1706.06083).

    x* is found by projected gradient ascent on the student as it is at this step, in the pixels at its input, from a random
    point of the ball. The teacher speaks of the clean x, as it is in the store: whether the paper's sees x or x* is not
    known to us, nor are its λ and T. Robust teachers, early-stopped ones and ensembles of them (`featcache derive mean`)
    are what it recommends.

    Reported (λ > 0): "target_entropy", mean entropy of ỹ in nats, and "equal_smoothing", the label smoothing of that entropy,
    for the baseline `lam=0` with `smoothing` as large.

    Options:
        lam: λ, the teacher's share of the target, 0 to 1.
        epsilon: ε, largest change of a pixel, in 1/255ths of its range.
        steps: of the ascent.
        step_size: of each, in 1/255ths; 2.5 ε / `steps` when left out.
        random_start: begin at a uniformly random point of the ball instead of at x.
        norms: batch norms, dropout and the like during the attack: "eval", as the student will be used (as in TRADES, Zhang et
            al. 2019, arXiv 1901.08573), or "train", as it is trained; then its running statistics see attacked images of all
            steps too.
        temperature: T, of the teacher's probabilities.
        smoothing: share of y that is spread evenly over all classes.
    """

    student_fields = (EMBEDDING, LOGITS)
    classifier = True
    kinds = ("image",)

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        lam: float = 0.5,
        epsilon: float = 8.0,
        steps: int = 3,
        step_size: float | None = None,
        random_start: bool = True,
        norms: str = "eval",
        temperature: float = 1.0,
        smoothing: float = 0.0,
    ):
        super().__init__()
        refuse_epsilon(epsilon)
        if epsilon == 0:
            raise ValueError(
                "ε 0 of the attack attacks nothing; give epsilon in 1/255ths of the pixel range, such as 8, or choose method kd"
            )
        for name, value, fits, range_ in (
            ("lam", lam, 0 <= lam <= 1, "from 0 to 1"),
            ("steps", steps, steps >= 1, "1 or more"),
            ("step_size", step_size, step_size is None or step_size > 0, "greater than 0"),
            ("norms", norms, norms in ("eval", "train"), "eval or train"),
            ("temperature", temperature, temperature > 0, "greater than 0"),
            ("smoothing", smoothing, 0 <= smoothing < 1, "from 0 up to less than 1"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {range_}, got {value}")
        self.fields = (EMBEDDING, LOGITS) if lam else (EMBEDDING,)
        self.labelled = lam < 1
        self._lam, self._temperature, self._smoothing = lam, temperature, smoothing
        self._epsilon, self._steps, self._step = epsilon, steps, step_size or STRIDE * epsilon / steps
        self._random_start, self._norms = random_start, norms
        self.passes = 1 + steps

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Measure how soft the targets are."""
        if not self._lam:
            return {}
        some = np.unique(np.linspace(0, len(rows) - 1, MEASURED, dtype=np.int64))
        logits = torch.from_numpy(rows.gather(some, LOGITS).astype(np.float64))
        target = self.mixture(torch.from_numpy(rows.labels[some]), logits)
        entropy = float(torch.special.entr(target).sum(dim=1).mean())
        return {"target_entropy": entropy, "equal_smoothing": smoothing_of(entropy, target.shape[1])}

    def inputs(self, batch: Batch, student: nn.Module) -> Tensor:
        assert isinstance(batch.preprocess, Preprocess)
        black, white = batch.preprocess.limits(batch.inputs.device)
        unit = (white - black) / 255
        radius, start = self._epsilon * unit, batch.inputs
        if self._random_start:
            start = start + radius * (2 * torch.rand_like(start) - 1)

        def loss(images: Tensor) -> Tensor:
            logits = student(images, (LOGITS,))[LOGITS].float()
            return F.cross_entropy(logits, self._target(batch, logits), reduction="sum")

        with as_used(student) if self._norms == "eval" else nullcontext():
            ball = Box.around(batch.inputs, radius, black, white)
            return ascend(loss, start, ball, step=self._step * unit, steps=self._steps)

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        weight = batch.weight if self._lam else batch.weight * (batch.label >= 0)
        return {"ce": ce(student[LOGITS], self._target(batch, student[LOGITS]), weight)}

    def mixture(self, label: Int64[Tensor, " b"], logits: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        """ỹ of these labels (−1: none) and the teacher's logits; of λ = 0, logits of the right shape will do."""
        classes = logits.shape[1]
        own = F.one_hot(label.clamp(min=0), classes).to(logits.dtype)
        own = (1 - self._smoothing) * own + self._smoothing / classes
        if not self._lam:
            return own
        share = torch.where(label >= 0, self._lam, 1.0).to(logits.dtype)[:, None]
        return (1 - share) * own + share * (logits / self._temperature).softmax(dim=1)

    def _target(self, batch: Batch, of_student: Tensor) -> Tensor:
        return self.mixture(batch.label, batch[LOGITS] if self._lam else of_student.detach())


def smoothing_of(entropy: float, classes: int) -> float:
    """The label smoothing, 0…1, of so much entropy in nats; 1 for ln `classes` and more. By bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        target = np.full(classes, middle / classes)
        target[0] += 1 - middle
        reached = -float((target * np.log(target)).sum())
        low, high = (middle, high) if reached < entropy else (low, middle)
    return high


@contextmanager
def as_used(student: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards each part in the mode that it was in."""
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

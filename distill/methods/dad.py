"""DAD (Zhou et al. 2023, arXiv 2311.01441): the teacher's answers to images that are hard for it, beside those to clean ones."""

from typing import Unpack

import torch
from torch import Tensor

from distill.methods import Batch, Features, Method, Preparing
from distill.objectives import ce, kl
from featcache.rows import Rows
from featcache.store.layout import EMBEDDING, LOGITS


class DAD(Method):
    """Discrete adversarial distillation: clean images, and ones made hard for the teacher (DAD, arXiv 2311.01441).

    L = CE(y, s(x)) + ½ T² KL(t(x) ‖ s(x)) + ½ T² KL(t(x') ‖ s(x')), with s the student's logits, t the teacher's, and x' the
    discrete adversarial image that was made of x. x and x' are rows of two stores of one teacher, which train together: one
    of a corpus, one of `adversarial:…::` of it. They are drawn alike and apart from each other, and every term is a mean over
    its own rows in the batch, so that L holds on average (with stores of equal size in nearly every batch as written).

    Terms: "ce", over labelled clean rows; "kl", over clean rows; "kl_adversarial", over the others. The form is that of the
    loss class of the authors' code; its released script weights both kinds alike in a batch, and mixes images up, which no
    cached teacher has seen.

    An image that was made of a held-out one is not trained on.

    Options:
        temperature: T.
        weight: of T² KL, of either kind.
    """

    fields = student_fields = (EMBEDDING, LOGITS)
    classifier = True
    labelled = True
    adversarial: Tensor

    def __init__(self, teacher_dim: int, student_dim: int, *, temperature: float = 4.0, weight: float = 0.5):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {temperature}")
        if not weight > 0:
            raise ValueError(f"weight must be greater than 0 (that is method ce), got {weight}")
        self._temperature, self._weight = temperature, weight
        self.register_buffer("adversarial", torch.zeros(0, dtype=torch.bool))

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Learn which rows are which.

        Raises:
            ValueError: all are of one kind.
        """
        made = rows.adversarial
        if made.all() or not made.any():
            which = "only adversarial images" if made.all() else "no adversarial images"
            raise ValueError(
                f"{rows.name}: {which}; method dad learns from a store of a corpus and one of adversarial:TEACHER::HEAD::CORPUS "
                "of it, both of one teacher: give both with --store"
            )
        self.adversarial = torch.from_numpy(made)
        return {"adversarial_share": float(made.mean())}

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        made = self.adversarial[batch.row] & (batch.row >= 0)
        t, logits = self._temperature, student[LOGITS]
        terms = {"ce": ce(logits, batch.label.masked_fill(made, -1), batch.weight)}
        for name, kind in (("kl", ~made), ("kl_adversarial", made)):
            softened = kl(batch[LOGITS], logits, temperature=t, weight=batch.weight * kind)
            terms[name] = self._weight * t**2 * softened
        return terms

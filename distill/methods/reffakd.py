"""ReffAKD (arXiv 2404.09886): soft labels from how alike the classes are in some space, an autoencoder's say."""

from dataclasses import replace
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Float64
from scipy.optimize import brentq
from torch import Tensor

from distill.methods import Batch, Features, Method, Preparing
from distill.methods._options import refuse_not_positive
from distill.objectives import ce
from featcache.derivations.class_similarity import ClassSimilarity, entropy_share
from featcache.rows import Rows
from featcache.store.layout import EMBEDDING, LOGITS

CONTROLS = ("none", "shuffled", "even")


class ReffAKD(Method):
    """Labels, and soft labels of each class's likeness to the others in the store's space (ReffAKD, arXiv 2404.09886).

    L = (1 − α) CE(y, s) + α T² CE(q_y, softmax(s / T)), q not softened, with q_a = softmax(S_a / T_q) and S_ab the mean cosine
    between rows of class a and rows of class b, `boost` added to S_aa: the table of `featcache derive class_similarity`, made
    here of the rows that train. Any encoder's store will do; the paper's is an autoencoder's (method `autoencoder`). Terms:
    "ce" and "soft_ce", mean over the rows that have a label.

    As published (T_q = 1) q is next to uniform: with an autoencoder on CIFAR-10 its entropy is 0.9999 ln C, which is label
    smoothing. The run reports it ("entropy", a share of ln C). This is the paper's code for CIFAR-100; that for its other data
    divides the second term by the number of classes, and adds no boost.

    Options:
        alpha: α. The paper takes the best of 0.1, …, 0.9, and of T = 1, 5, 10, 20, on test accuracy; these are ours.
        temperature: T.
        table_temperature: T_q, 1 in the paper. At 0.02 to 0.05 q tells classes apart.
        per_class: rows of each class that are compared, drawn by seed; 0: all.
        boost: added to a class's similarity to itself.
        control: soft labels to compare with, of the same entropy, class by class. "shuffled": the other classes' shares change
            places, so that they mean nothing; "even": all others have the same share, label smoothing. "none": the paper's.
    """

    student_fields = (EMBEDDING, LOGITS)
    classifier = True
    labelled = True

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        alpha: float = 0.5,
        temperature: float = 5.0,
        table_temperature: float = 1.0,
        per_class: int = 40,
        boost: float = 0.0225,
        control: str = "none",
    ):
        super().__init__()
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be above 0 (that is method ce) and at most 1, got {alpha}")
        refuse_not_positive(temperature=temperature, table_temperature=table_temperature)
        if control not in CONTROLS:
            raise ValueError(f"unknown control {control!r}; known: {', '.join(CONTROLS)}")
        self._alpha, self._temperature, self._control = alpha, temperature, control
        self._similarity = ClassSimilarity(per_class=per_class, boost=boost, temperature=table_temperature)
        self.soft: Tensor
        self.register_buffer("soft", torch.zeros(0, 0))

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Make the table of soft labels.

        Raises:
            ValueError: a class has fewer than two rows.
        """
        log_q = replace(self._similarity, seed=given["seed"]).soft_labels(rows, np.arange(len(rows)))
        soft = even(log_q) if self._control == "even" else np.exp(log_q)
        self.soft = torch.from_numpy(shuffled(soft, given["seed"]) if self._control == "shuffled" else soft).float()
        return {"entropy": entropy_share(log_q)}

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        soft, known = self.soft[batch.label.clamp(min=0)], batch.weight * (batch.label >= 0)
        terms = {
            "soft_ce": self._alpha * self._temperature**2 * ce(student[LOGITS] / self._temperature, soft, known),
            "ce": (1 - self._alpha) * ce(student[LOGITS], batch.label, batch.weight),
        }
        return {name: term for name, term in terms.items() if name != "ce" or self._alpha < 1}


def shuffled(soft: Float64[np.ndarray, "c c"], seed: int) -> Float64[np.ndarray, "c c"]:
    """Every class's own share, and those of the others in another order."""
    drawn, found = np.random.default_rng(seed), soft.copy()
    for label, row in enumerate(found):
        others = np.delete(np.arange(len(row)), label)
        row[others] = row[drawn.permutation(others)]
    return found


def even(log_q: Float64[np.ndarray, "c c"]) -> Float64[np.ndarray, "c c"]:
    """Label smoothing of the same entropy, class by class: the own share at least 1 / C, the rest spread evenly."""
    classes = len(log_q)

    def entropy(own: float) -> float:
        rest = (1 - own) / (classes - 1)
        return float(-own * np.log(own) - (1 - own) * np.log(rest))

    found = np.empty_like(log_q)
    for label, row in enumerate(log_q):
        wanted = -(np.exp(row) * row).sum()
        least, most = 1 / classes, 1 - 1e-12
        inside = entropy(most) < wanted < entropy(least)
        own = brentq(lambda share, wanted=wanted: entropy(share) - wanted, least, most) if inside else least
        found[label] = (1 - own) / (classes - 1)
        found[label, label] = own
    return found

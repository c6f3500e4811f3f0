"""Soft labels from how alike classes are in a space: no teacher needs to know the classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Float64, Int64

from featcache.derivations import Derivation
from featcache.geometry import logsumexp, unit
from featcache.rows import Rows


@dataclass(kw_only=True)
class ClassSimilarity(Derivation):
    """ReffAKD's soft labels: each row's `logits` say how alike its class is to every other, beside the row's own embedding.

    S_ab is the mean cosine between embeddings (of view 0) of a row of class a and a row of class b, over all pairs of `per_class`
    rows of each, a row and itself left out; `boost` is added to S_aa. A row of class a has the logits ln q_a, of
    q_a = softmax(S_a / temperature). Any encoder's store will do; the paper's is an autoencoder's.

    As published (temperature 1, boost 0.0225, for CIFAR-100; without a boost for the others) q is next to uniform: on CIFAR-10
    its entropy is .9999 ln C, so that it is label smoothing. The command prints the entropy; below about .9 ln C, at
    temperatures of a few hundredths, it says which classes are alike.

    In float16 logits near −ln C keep three digits; `--dtype float32` keeps seven. Rows without a label, and classes with fewer than two rows, are refused: there is no similarity to give them.

    "ReffAKD", arXiv 2404.09886; 40 rows a class, seed 42, cosines, boost and temperature are those of its code
    (JEKimLab/ReffAKD), which samples augmented images.
    """

    per_class: int = field(
        default=40, metadata={"help": "Rows of each class that are compared, drawn by seed; 0: all."}
    )
    boost: float = field(default=0.0225, metadata={"help": "Added to a class's similarity to itself."})
    temperature: float = field(default=1.0, metadata={"help": "Of softmax(similarities / temperature)."})
    seed: int = field(default=42, metadata={"help": "Of the rows that are drawn."})

    def __post_init__(self) -> None:
        if self.per_class < 0 or self.per_class == 1:
            raise ValueError(
                f"per_class is {self.per_class}; give at least 2, whose pairs are compared, or 0 for all rows"
            )
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0")
        if not -np.inf < self.boost < np.inf:
            raise ValueError(f"boost is {self.boost}; give a number")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give a whole number from 0")

    def open(self, inputs: Sequence[Rows]) -> None:
        super().open(inputs)
        if len(inputs) != 1:
            raise ValueError(
                f"{len(inputs)} stores are given; classes are compared in one (join puts several side by side)"
            )
        (rows,) = inputs
        if unlabelled := rows.unlabelled:
            raise ValueError(
                f"{unlabelled:,} of {len(rows):,} rows of {rows.name} have no label, and so no class whose similarities they "
                "could have; derive from a store of labelled images only"
            )
        self.logits = self.soft_labels(rows, np.flatnonzero(np.isin(rows.index, rows.stores[0].ok)))

    def soft_labels(self, rows: Rows, usable: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, "c c"]:
        """ln q, a row a class.

        Args:
            usable: positions of the rows that have features.

        Raises:
            ValueError: a class has fewer than two of them.
        """
        scaled = self._table(rows, usable) / self.temperature
        return scaled - logsumexp(scaled)[:, None]

    def _table(self, rows: Rows, usable: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, "c c"]:
        """S with its boost."""
        rng = np.random.default_rng(self.seed)
        classes, (width,) = len(rows.classes), rows.shape_of("embedding")
        total, own, count = np.zeros((classes, width)), np.zeros(classes), np.zeros(classes)
        for label, name in enumerate(rows.classes):
            found = rng.permutation(usable[rows.labels[usable] == label])
            found = np.sort(found[: self.per_class or len(found)])
            if len(found) < 2:
                raise ValueError(
                    f"class {name} of {rows.name} has {len(found)} rows; its similarity to itself takes two"
                )
            vectors = unit(rows.gather(found, "embedding").astype(np.float64))
            total[label], own[label], count[label] = vectors.sum(axis=0), (vectors**2).sum(), len(found)
        pairs = np.outer(count, count) - np.diag(count)
        return (total @ total.T - np.diag(own)) / pairs + self.boost * np.eye(classes)

    @property
    def entropy(self) -> float:
        """Of the soft labels, as `entropy_share`."""
        return entropy_share(self.logits)

    @property
    def said(self) -> list[str]:
        return [f"entropy of the soft labels {self.entropy:.4f} ln {len(self.logits)}"]

    @property
    def classes(self) -> Sequence[str]:
        return self.inputs[0].classes

    @property
    def fields(self) -> Mapping[str, Sequence[int]]:
        return {"embedding": self.inputs[0].shape_of("embedding"), "logits": [len(self.logits)]}

    def rows(self, index: Int64[np.ndarray, " b"], view: int) -> dict[str, Float[np.ndarray, "b ..."]]:
        (rows,) = self.inputs
        return {
            "embedding": rows.gather(index, "embedding", view).astype(np.float32),
            "logits": self.logits[rows.labels[index]].astype(np.float32),
        }


def entropy_share(log_q: Float[np.ndarray, "c c"]) -> float:
    """Entropy of soft labels, the mean over classes, as a share of ln C: 1 where they say nothing."""
    return float(-(np.exp(log_q) * log_q).sum(axis=1).mean() / math.log(len(log_q)))

"""The mean of several teachers: of their embeddings, their logits, or the probabilities they give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int64

from featcache.derivations import Derivation
from featcache.geometry import softmax
from featcache.rows import Rows

OF = ("embedding", "logits", "probabilities")


@dataclass(kw_only=True)
class Mean(Derivation):
    """The (weighted) mean of one field of several stores, say of checkpoints of one teacher.

    Of logits or probabilities, the store's `embedding` is the mean too, and its `logits` are the mean logits, or the
    logarithms of the mean probabilities: softmax(logits) is then the mean of softmax(logits / temperature).
    """

    of: str = field(default="embedding", metadata={"help": "embedding, logits or probabilities."})
    temperature: float = field(default=1.0, metadata={"help": "Of the probabilities: softmax(logits / temperature)."})
    weights: tuple[float, ...] = field(
        default=(), metadata={"help": "One a store, in any scale; all alike where left out."}
    )

    def __post_init__(self) -> None:
        if self.of not in OF:
            raise ValueError(f"of is {self.of!r}; give {', '.join(OF[:-1])} or {OF[-1]}")
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0")
        if self.temperature != 1 and self.of != "probabilities":
            raise ValueError(f"temperature says nothing of {self.of}; leave it out, or give of=probabilities")
        if not all(0 < weight < np.inf for weight in self.weights):
            raise ValueError(f"weights are {list(self.weights)}; give numbers above 0")

    @property
    def read(self) -> str:
        """The field that the mean is of."""
        return "embedding" if self.of == "embedding" else "logits"

    def open(self, inputs: Sequence[Rows]) -> None:
        super().open(inputs)
        if self.weights and len(self.weights) != len(inputs):
            raise ValueError(f"{len(self.weights)} weights for {len(inputs)} stores; give one a store")
        first, *others = inputs
        for each in inputs:
            each.require_field(self.read)
        for other in others:
            if (
                self.read == "logits"
                and None not in (named := (other.logit_classes, first.logit_classes))
                and named[0] != named[1]
            ):
                raise ValueError(
                    f"{other.name} has logits of other classes, or in another order, than {first.name}: their mean would mix them; "
                    "take checkpoints of one training"
                )
            if (width := other.shape_of(self.read)) != first.shape_of(self.read):
                raise ValueError(
                    f"{other.name} has {self.read} of {width[-1]} values, {first.name} of {first.shape_of(self.read)[-1]}: "
                    "a mean needs one width; `featcache derive join` puts them side by side"
                )

    @property
    def fields(self) -> Mapping[str, Sequence[int]]:
        return dict.fromkeys(dict.fromkeys(("embedding", self.read)), self.inputs[0].shape_of(self.read))

    @property
    def classes(self) -> Sequence[str] | None:
        return self.inputs[0].logit_classes if self.read == "logits" else None

    def rows(self, index: Int64[np.ndarray, " b"], view: int) -> dict[str, Float[np.ndarray, "b ..."]]:
        weights = np.asarray(self.weights or [1.0] * len(self.inputs), np.float32)
        total = np.zeros((len(index), *self.inputs[0].shape_of(self.read)), np.float32)
        for weight, rows in zip(weights / weights.sum(dtype=np.float32), self.inputs, strict=True):
            values = rows.gather(index, self.read, view).astype(np.float32)
            if self.of == "probabilities":
                values = softmax(values / np.float32(self.temperature))
            total += weight * values
        if self.of == "probabilities":
            return {"embedding": total, "logits": np.log(np.maximum(total, np.finfo(np.float32).tiny))}
        return dict.fromkeys(self.fields, total)

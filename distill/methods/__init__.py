"""Distillation methods, one file each, named by the file. Each file has one class, `Method`."""

from collections.abc import Callable
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from featcache.store import FeatureStore


class DistillationMethod(Protocol):
    """What `distill.fit` needs of a method; every `Method` is also an `nn.Module` that holds its heads.

    Built as `Method(teacher_dim, student_dim, **options)`. Weights that train with the student require a
    gradient; a mapping on the teacher's side is a buffer, set by `prepare`.
    """

    def prepare(
        self, store: FeatureStore, *, seed: int, progress: Callable[[int, int], None] | None
    ) -> dict[str, float]:
        """Fit what is fitted before training; returns what to report of it."""

    def target(self, embedding: Float[Tensor, "batch teacher_dim"]) -> Float[Tensor, "batch target_dim"]:
        """The teacher's stored embeddings → what the loss compares with."""

    def loss(
        self, output: Float[Tensor, "batch student_dim"], target: Float[Tensor, "batch target_dim"]
    ) -> Float[Tensor, ""]:
        """Of the student's output for the same (sample, view) pairs."""

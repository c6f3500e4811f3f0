"""Proteus (Zhang et al. 2025, arXiv 2407.10366), on the pooled embedding: the usual student-side head."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from distill.objectives import match
from featcache.store import FeatureStore


class Method(nn.Module):
    """Mean squared error to the teacher, through LayerNorm + Linear on the student's side.

    Head: student side, fed by match(mse), trained with the student and left behind after training.
    """

    def __init__(self, teacher_dim: int, student_dim: int):
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(student_dim), nn.Linear(student_dim, teacher_dim))

    def prepare(
        self, store: FeatureStore, *, seed: int, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        return {}

    def target(self, embedding: Float[Tensor, "batch teacher_dim"]) -> Float[Tensor, "batch teacher_dim"]:
        return embedding

    def loss(
        self, output: Float[Tensor, "batch student_dim"], target: Float[Tensor, "batch teacher_dim"]
    ) -> Float[Tensor, ""]:
        return match(self.head(output), target, "mse")

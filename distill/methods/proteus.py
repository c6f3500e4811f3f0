"""Proteus (Zhang et al. 2025, arXiv 2407.10366), on the pooled embedding: the usual student-side head."""

from collections.abc import Callable

from torch import Tensor, nn

from distill.methods import Features
from distill.objectives import match
from distill.source import Source


class Method(nn.Module):
    """Mean squared error to the teacher, through LayerNorm + Linear on the student's side.

    Head: student side, fed by match(mse), trained with the student and left behind after training.
    """

    fields = student_fields = ("embedding",)

    def __init__(self, teacher_dim: int, student_dim: int):
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(student_dim), nn.Linear(student_dim, teacher_dim))

    def prepare(
        self, source: Source, *, seed: int, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        return {}

    def target(self, teacher: Features) -> None:
        return None

    def loss(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        return {"mse": match(self.head(student["embedding"]), teacher["embedding"], "mse")}

"""The plain baseline in angles: a head on the student's side, and the cosine to the raw teacher."""

from collections.abc import Callable

from torch import Tensor, nn

from distill.methods import Features
from distill.methods._heads import make_head
from distill.objectives import match
from distill.source import Source


class Method(nn.Module):
    """1 − cosine to the teacher through a student-side head, a plain baseline (no paper of its own).

    Head: student side, fed by match(cosine), trained with the student and left behind after training.

    Options:
        head: "linear", "layernorm_linear" or "mlp".
    """

    fields = student_fields = ("embedding",)

    def __init__(self, teacher_dim: int, student_dim: int, *, head: str = "linear"):
        super().__init__()
        self.head = make_head(head, student_dim, teacher_dim)

    def prepare(
        self, source: Source, *, seed: int, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        return {}

    def target(self, teacher: Features) -> None:
        return None

    def loss(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        return {"cosine": match(self.head(student["embedding"]), teacher["embedding"], "cosine")}

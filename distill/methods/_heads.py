"""Heads on the student's side: they train with it, and are left behind after training."""

from torch import Tensor, nn

from distill.methods import Batch, Features, Method
from distill.objectives import match

WIDTH = 2048
"""Of the hidden layer of "mlp"."""


def make_head(kind: str, student_dim: int, teacher_dim: int) -> nn.Module:
    """Student space → teacher space.

    Args:
        kind: "linear"; "layernorm_linear", as in Proteus; "mlp", Linear, LayerNorm, GELU, Linear.

    Raises:
        ValueError: another kind.
    """
    if kind == "linear":
        return nn.Linear(student_dim, teacher_dim)
    if kind == "layernorm_linear":
        return nn.Sequential(nn.LayerNorm(student_dim), nn.Linear(student_dim, teacher_dim))
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(student_dim, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, teacher_dim)
        )
    raise ValueError(f"unknown head {kind!r}; known: layernorm_linear, linear, mlp")


class StudentHead(Method):
    """What `cosine` and `mse` share: the student's embedding goes through a head and is matched with the raw teacher's.

    Args:
        head: "linear", "layernorm_linear" or "mlp".
    """

    kind: str
    """Of `distill.objectives.match`; also the term's name."""

    def __init__(self, teacher_dim: int, student_dim: int, *, head: str = "linear"):
        super().__init__()
        self.head = make_head(head, student_dim, teacher_dim)

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        return {self.kind: match(self.head(student["embedding"]), batch["embedding"], self.kind)}

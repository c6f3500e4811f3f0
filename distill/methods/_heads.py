"""Heads on the student's side: they train with it, and are left behind after training."""

from torch import nn

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

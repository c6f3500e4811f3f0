"""Proteus (Zhang et al. 2025, arXiv 2407.10366), without its masked-patch term: the usual student-side head."""

from typing import Unpack

from torch import Tensor

from distill.methods import Batch, Features, Method, Preparing
from distill.methods._heads import make_head
from distill.methods._tokens import check_tokens, class_and_patches, resize_tokens
from distill.objectives import match
from featcache.rows import Rows


class Proteus(Method):
    """Mean squared error to the teacher through a student-side LayerNorm + Linear (Proteus, arXiv 2407.10366).

    Heads: student side, fed by match(mse), trained with the student and left behind after training.

    Options:
        tokens: add the paper's feature term, the same error over class token and patch tokens together through a
            head of its own. The teacher's token grid is resampled to the student's.
    """

    def __init__(self, teacher_dim: int, student_dim: int, *, tokens: bool = False):
        super().__init__()
        self.head = make_head("layernorm_linear", student_dim, teacher_dim)
        self.fields = self.student_fields = ("embedding", "tokens") if tokens else ("embedding",)
        self.tokens_head = make_head("layernorm_linear", student_dim, teacher_dim) if tokens else None

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        if self.tokens_head:
            check_tokens(rows)
        return {}

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        terms = {"mse": match(self.head(student["embedding"]), batch["embedding"], "mse")}
        if self.tokens_head:
            output = self.tokens_head(class_and_patches(student["embedding"], student["tokens"]))
            patches = resize_tokens(batch["tokens"], student["tokens"].shape[1])
            terms["tokens"] = match(output, class_and_patches(batch["embedding"], patches), "mse")
        return terms

"""TinTeM (arXiv 2411.15239; later CosPress), on the pooled embedding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distill.mappings.sne import Sne
from distill.methods import Features
from distill.objectives import TEMPERATURES, match
from distill.source import Source


class Method(nn.Module):
    """Cosine to the mapped teacher: 1 − cos(student, W · teacher).

    Head: the mapping W, teacher side, fed by relation_kl alone, fitted from the store before training and
    frozen. The student has no head; it is used as it is trained. The paper trains W beside the student from
    the same loss; since no student term reaches W, fitting it first is the same objective.

    Options:
        temperatures, mapping_steps, mapping_batch_size, mapping_lr: of the `sne` mapping.
    """

    fields = student_fields = ("embedding",)

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        temperatures: Sequence[float] = TEMPERATURES,
        mapping_steps: int = 300,
        mapping_batch_size: int = 512,
        mapping_lr: float = 1e-3,
    ):
        super().__init__()
        self._options = {
            "temperatures": temperatures,
            "steps": mapping_steps,
            "batch_size": mapping_batch_size,
            "lr": mapping_lr,
        }
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(student_dim, teacher_dim))

    def prepare(
        self, source: Source, *, seed: int, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        mapping = Sne(len(self.weight), seed=seed, **self._options).fit(source, progress)  # type: ignore[arg-type]
        self.weight.copy_(torch.from_numpy(mapping.weight_))
        return mapping.report_

    def target(self, teacher: Features) -> Tensor:
        return teacher["embedding"] @ self.weight.T

    def loss(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        return {"cosine": match(student["embedding"], self.target(teacher), "cosine")}

"""Distillation methods, one file each, named by the file. Each file has one class, `Method`."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from distill.source import Source

Features = dict[str, Tensor]
"""What an encoder gives for a batch: "embedding" (B, D), and where asked for "tokens" (B, T, D), "prefix_tokens" (B, P, D).
Of the teacher, also `ROW` where a method asks for it."""
ROW = "row"
"""(B,) int64: which row of the source each sample is, as `prepare` got it."""
Fitted = tuple[dict[str, Tensor], dict[str, float]]
"""What an earlier `prepare` left: the tensors of `fitted_tensors`, and the report."""


class DistillationMethod(Protocol):
    """What `distill.fit` needs of a method; every `Method` is also an `nn.Module` that holds its heads.

    Built as `Method(teacher_dim, student_dim, **options)`. Weights that train with the student require a
    gradient; a mapping that is fitted before training is of buffers, made by `prepare`. So `prepare` comes before
    anything else, `load_state_dict` of a checkpoint included.

    Where there are several processes, each gets its share of the batch, and DistributedDataParallel averages the
    gradients: a term that compares samples takes them from `distill.objectives.gathered`.

    Attributes:
        fields: features of the teacher that `loss` reads; `prepare` may add some that the store has.
        student_fields: features of the student that `loss` reads.
        reads_rows: whether `loss` would like `ROW` among the teacher's features; not, where a method does not say.
    """

    fields: tuple[str, ...]
    student_fields: tuple[str, ...]

    def prepare(
        self,
        source: Source,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        fitted: Fitted | None = None,
    ) -> dict[str, float]:
        """Fit what is fitted before training, as a function of (source, seed); returns what to report of it.

        Args:
            fitted: what a `prepare` of the same (source, seed) left, to be taken instead of fitting again; a method
                may ignore it, and does where it is not its own.
        """

    def target(self, teacher: Features) -> Tensor | None:
        """(B, d): where the student's embedding should point, in the student's own space; None when a method has none."""

    def loss(self, student: Features, teacher: Features) -> dict[str, Tensor]:
        """Weighted terms by name, of the same (sample, view) pairs; their sum is minimised."""


def fitted_tensors(method: nn.Module) -> dict[str, Tensor]:
    """What `prepare` fitted, by name: the buffers of the method's state."""
    buffers = dict(method.named_buffers())
    return {name: value for name, value in method.state_dict().items() if name in buffers}

"""KD (Hinton, Vinyals & Dean 2015, arXiv 1503.02531): the teacher's class probabilities, softened."""

from torch import Tensor

from distill.methods import Batch, Features, Method
from distill.methods._options import refuse_not_positive
from distill.objectives import ce, kl
from featcache.store.layout import EMBEDDING, LOGITS


class KD(Method):
    """Hinton's distillation: what the teacher says of every class, beside the labels (arXiv 1503.02531).

    L = (1 − α) CE(y, s) + α T² KL(softmax(t / T) ‖ softmax(s / T)), with s the student's logits and t the teacher's: those
    that the stores hold, or what a head makes of their embeddings (`--set head=FILE`). Terms: "ce", mean over the rows
    that have a label; "kl", over all. With α = 1 no labels are needed.

    Checkpoint KD (arXiv 2210.06458) is this on the mean logits of checkpoints (`featcache derive mean … --set of=logits`),
    in its authors' code with α = 0.5 and T = 5.

    Options:
        alpha: α, the teacher's share. 0.9 and T = 4 are what papers since CRD (arXiv 1910.10699) compare with.
        temperature: T. The factor T² keeps the gradients of one size (section 2 of the paper).
    """

    fields = student_fields = (EMBEDDING, LOGITS)
    classifier = True

    def __init__(self, teacher_dim: int, student_dim: int, *, alpha: float = 0.9, temperature: float = 4.0):
        super().__init__()
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be above 0 (that is method ce) and at most 1, got {alpha}")
        refuse_not_positive(temperature=temperature)
        self._alpha, self._temperature, self.labelled = alpha, temperature, alpha < 1

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        t = self._temperature
        softened = kl(batch[LOGITS], student[LOGITS], temperature=t, weight=batch.weight)
        terms = {"kl": self._alpha * t**2 * softened}
        if self.labelled:
            terms["ce"] = (1 - self._alpha) * ce(student[LOGITS], batch.label, batch.weight)
        return terms

"""Labels alone, without a teacher: what every student that learns a task is compared with."""

from typing import Unpack

from torch import Tensor, nn
from torchvision.transforms import v2

from distill.methods import Batch, Features, Method, Preparing
from distill.methods._options import refuse_negative
from distill.objectives import ce, pixel_ce
from featcache.rows import Rows
from featcache.store.layout import DENSE, EMBEDDING, LOGITS


class CE(Method):
    """Cross-entropy of the student's classifier with the labels; the baseline, and how a distilled student is fine-tuned.

    Term: "ce", in nats, mean over the rows that have a label, or of a corpus with masks over their pixels, the student's dense
    logits brought to them bilinearly. The teacher is not asked: of its store come the images, their
    views and their labels.

    Mixtures are of two images of one batch, and the target is the same mixture of their two labels, which stays true of
    what the student sees. (What a teacher says of a mixture is in no store, so methods that ask it offer none.) A
    mixture's λ is one a batch and process, drawn from Beta(α, α).

    Options:
        label_smoothing: share of the target that is spread evenly over all classes.
        mixup: α of mixup (Zhang et al. 2018, arXiv 1710.09412), 0 for none.
        cutmix: α of CutMix (Yun et al. 2019, arXiv 1905.04899), 0 for none; with both, each batch gets one of them.
    """

    student_fields = (EMBEDDING, LOGITS)
    classifier = True
    labelled = True

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ):
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 up to less than 1, got {label_smoothing}")
        refuse_negative(mixup=mixup, cutmix=cutmix)
        self.kinds = ("image",) if mixup or cutmix else self.kinds
        self._smoothing, self._alphas = label_smoothing, {v2.MixUp: mixup, v2.CutMix: cutmix}
        self._mixing: v2.RandomChoice | None = None
        self._mixed: Tensor | None = None

    def learn_masks(self) -> None:
        if any(self._alphas.values()):
            raise ValueError("mixup and cutmix are of labels, not of masks; leave them out")
        self.masks, self.student_fields = True, (EMBEDDING, DENSE)

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Look for labels.

        Raises:
            ValueError: a row has none, and mixtures are asked for.
        """
        kinds = {kind: alpha for kind, alpha in self._alphas.items() if alpha}
        if kinds and rows.unlabelled:
            raise ValueError(
                f"{rows.name}: {rows.unlabelled:,} rows have no label, so mixtures with them have no target; leave mixup and "
                "cutmix out, or the rows"
            )
        if kinds:
            self._mixing = v2.RandomChoice([kind(alpha=a, num_classes=len(rows.classes)) for kind, a in kinds.items()])
        return {}

    def inputs(self, batch: Batch, student: nn.Module) -> Tensor:
        if self._mixing is None:
            return batch.inputs
        mixed, self._mixed = self._mixing(batch.inputs, batch.label)
        return mixed

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        if self.masks:
            assert batch.mask is not None
            return {"ce": pixel_ce(student[DENSE], batch.mask, batch.weight, smoothing=self._smoothing)}
        target, self._mixed = batch.label if self._mixed is None else self._mixed, None
        return {"ce": ce(student[LOGITS], target, batch.weight, smoothing=self._smoothing)}

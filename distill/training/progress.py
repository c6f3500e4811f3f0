"""What a fit tells whoever started it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

EPOCHS_A_VIEW = 4
"""Up to so many, an image seen once more was worth as much as another image."""


@dataclass(frozen=True)
class FitPlan:
    """What a fit is about to do.

    Attributes:
        samples: trained on; one epoch sees each once.
        failed: rows of the stores without features, left out.
        held_out: samples kept for evaluation.
        copies: samples of the same images as those, under other names: neither trained on nor evaluated.
        views: which views are trained on, in words.
        epochs: passes over the samples.
        view_count: of a sample, at most.
        pixels: which of their pixels are rendered once, not in every epoch, and where they are kept, in words.
        student_weights: their number.
        steps, done: in all, and of an earlier, interrupted run.
        processes: that share every batch.
        checkpoint_bytes: of one; at most three lie on the disk at once.
        snapshots, snapshot_bytes: students that are kept on the way, and the bytes of each.
        input: what the student is shown, in words.
        precision: that it is trained in, "fp32" or "bf16".
        seconds: of the steps that are left, about, by a few images (see `distill.training.rehearsal`); NaN where unknown.
        classes: names of what the student's classifier tells apart; none where it has none.
        unlabelled: samples trained on that have no label, or, where masks are learned, no mask.
    """

    samples: int
    failed: int
    held_out: int
    copies: int
    views: str
    epochs: int
    view_count: int
    pixels: str
    student_weights: int
    steps: int
    done: int
    processes: int
    checkpoint_bytes: int
    classes: Sequence[str] = ()
    unlabelled: int = 0
    snapshots: int = 0
    snapshot_bytes: int = 0
    input: str = ""
    precision: str = "fp32"
    seconds: float = math.nan

    @property
    def bytes_to_write(self) -> int:
        """At most at once, but for curves: three checkpoints, what is kept on the way, and the student."""
        return 3 * self.checkpoint_bytes + self.snapshots * self.snapshot_bytes + 4 * self.student_weights

    @property
    def expected(self) -> str:
        """What is worth spending on next, as measured (docs/results.md, "How faithfulness grows"); "" of a classifier, for which
        nothing was."""
        if self.classes:
            return ""
        seen = f"{self.samples:,} samples × {self.epochs} epochs"
        if self.epochs < EPOCHS_A_VIEW * self.view_count:
            return f"faithfulness grows with images seen, {seen} here: twice the epochs are worth twice the images"
        return f"after {seen} in {self.view_count} views, more images or views are worth more than more epochs"


@dataclass
class FitProgress:
    """Where a fit stands; handed to the progress callback after every step.

    Attributes:
        stage: "mapping" or "training".
        done, total: steps of that stage.
        loss: mean over the epoch when it was last read (every tenth step), NaN before.
        terms: the same of the method's terms, by name; the loss is their sum.
        images_per_second: over the epoch so far; views of a sample that stand in a batch together count each.
        wait: share of the epoch's time spent waiting for batches, 0…1.
    """

    stage: str
    done: int
    total: int
    loss: float = math.nan
    terms: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    wait: float = 0.0

"""What a fit tells whoever started it."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FitPlan:
    """What a fit is about to do.

    Attributes:
        samples: trained on; one epoch sees each once.
        failed: rows of the stores without features, left out.
        held_out: samples kept for evaluation.
        copies: samples of the same images as those, under other names: neither trained on nor evaluated.
        views: which views are trained on, in words.
        student_weights: their number.
        steps, done: in all, and of an earlier, interrupted run.
        processes: that share every batch.
        checkpoint_bytes: of one; at most three lie on the disk at once.
    """

    samples: int
    failed: int
    held_out: int
    copies: int
    views: str
    student_weights: int
    steps: int
    done: int
    processes: int
    checkpoint_bytes: int


@dataclass
class FitProgress:
    """Where a fit stands; handed to the progress callback after every step.

    Attributes:
        stage: "mapping" or "training".
        done, total: steps of that stage.
        loss: mean over the epoch when it was last read (every tenth step), NaN before.
        terms: the same of the method's terms, by name; the loss is their sum.
        images_per_second: over the epoch so far.
        wait: share of the epoch's time spent waiting for batches, 0…1.
    """

    stage: str
    done: int
    total: int
    loss: float = math.nan
    terms: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    wait: float = 0.0

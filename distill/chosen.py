"""Settings of a first run, chosen from the images, each with its reason.

Rules, not a search: what was measured here (docs/results.md) where something was, and what is usual elsewhere. `distill fit`
alone keeps its own defaults.
"""

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from distill.training.config import LR, LR_BATCH, FitConfig
from distill.training.held_out import MOST_HELD_OUT
from distill.training.progress import EPOCHS_A_VIEW
from featcache.corpora import Corpus

LOOKED_AT = 200
"""Images, spread over the corpus, whose size is read."""
FEWEST = 16
STEPS, MOST_EPOCHS = 100_000, 100
LARGEST_BATCH, LEAST_STEPS = LR_BATCH, 8
"""An epoch has at least so many steps."""
VIEWS = ((10_000, 8), (100_000, 4))
"""Up to so many images, so many views; of more images one."""
HELD_OUT, FEWEST_HELD_OUT = 0.05, 160
"""Of fewer images nothing is held out: `distill fit` wants four, copies of one image count once, and some may be unreadable."""
SMALL_SIDE = 96
STUDENTS = (("tiny", 0.57e6), ("timm/resnet18", 11.7e6), ("timm/resnet50", 25.6e6))
"""By the numbers that they consist of."""
LARGE_CORPUS = 200_000


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What settings are chosen from.

    Attributes:
        images: of the corpus.
        classes: that its labels name, 0 without labels.
        side: median of their shorter sides, px, of those looked at.
        unreadable: share of those that could not be read.
    """

    images: int
    classes: int
    side: int
    unreadable: float

    @property
    def readable(self) -> int:
        """About so many images can be read."""
        return round(self.images * (1 - self.unreadable))


@dataclass(frozen=True)
class Choice:
    """A setting's value, and why."""

    value: Any
    reason: str


def survey(corpus: Corpus) -> Seen:
    """Look at some images of a corpus.

    Raises:
        ValueError: it has too few, or too few of those looked at can be read.
    """
    if len(corpus) < FEWEST:
        raise ValueError(f"{corpus.spec}: too few images to train on: {len(corpus)}; give {FEWEST} or more")
    looked = sorted({i * len(corpus) // LOOKED_AT for i in range(LOOKED_AT)})
    sides, reason = [], ""
    for row in looked:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(corpus.read(row))) as image:  # its header alone
                    sides.append(min(image.size))
        except Exception as error:  # extraction makes failed rows of these, with their reasons
            reason = (
                reason or f"{corpus.ids[row]}: {'no image' if isinstance(error, UnidentifiedImageError) else error}"
            )
    if not sides:
        raise ValueError(f"{corpus.spec}: not one of {len(looked)} images could be read (the first: {reason})")
    seen = Seen(
        images=len(corpus),
        classes=len(corpus.class_names or ()),
        side=int(np.median(sides)),
        unreadable=1 - len(sides) / len(looked),
    )
    if seen.readable < FEWEST:
        raise ValueError(
            f"{corpus.spec}: too few images that can be read: about {seen.readable}; give {FEWEST} or more (the first "
            f"that cannot: {reason})"
        )
    return seen


def choose(
    seen: Seen, *, teacher_parameters: int, teacher_side: int, student: str | None = None
) -> tuple[dict[str, Choice], dict[str, Choice]]:
    """Options of `featcache.extract`, and fields of `FitConfig`.

    Args:
        teacher_parameters: numbers that the teacher consists of.
        teacher_side: px of its input.
        student: one that is asked for, instead of the one that would be chosen.
    """
    images = seen.readable
    views = _views(images)
    extracted = {"views": views, **({"augment": _AUGMENT} if views.value > 1 else {})}
    held_out = min(MOST_HELD_OUT, round(HELD_OUT * images)) if images >= FEWEST_HELD_OUT else 0
    training = images - held_out
    batch = _batch(training)
    epochs = _epochs(training, batch.value, views.value)
    made = Choice(student, "as asked for") if student else _student(seen, teacher_parameters)
    settings = {
        "student": made,
        "image_size": _image_size(seen.side, made.value, teacher_side),
        "batch_size": batch,
        "epochs": epochs,
        "lr": Choice(
            FitConfig(student="", batch_size=batch.value).lr,
            f"{LR:g} × √({batch.value} / {LR_BATCH}): with the square root of the batch, for Adam (arXiv 2205.10287)",
        ),
    }
    if held_out:
        settings["holdout"] = Choice(
            HELD_OUT, f"about {held_out:,} images that are not trained on, to see whether it works"
        )
        settings["eval_every"] = Choice(max(1, epochs.value // 10), "epochs between two looks at those: ten in all")
    return extracted, settings


_AUGMENT = Choice("rrc", "random resized crops, which the student is shown exactly as the teacher saw them")


def _views(images: int) -> Choice:
    for most, count in VIEWS:
        if images <= most:
            return Choice(
                count,
                f"{images:,} images are learnt by heart in {MOST_EPOCHS} epochs of one view; extraction takes {count} × as long",
            )
    return Choice(1, f"{images:,} images are enough to learn from; more views cost the teacher as many passes")


def _batch(training: int) -> Choice:
    """The largest power of two that leaves an epoch some steps."""
    size = 2 ** int(math.log2(max(2, min(LARGEST_BATCH, training // LEAST_STEPS))))
    why = (
        f"the largest power of two with which {training:,} images make {LEAST_STEPS} steps an epoch or more"
        if size < LARGEST_BATCH
        else "what the learning rate was measured at"
    )
    return Choice(size, why)


def _epochs(training: int, batch: int, views: int) -> Choice:
    wanted, least = round(STEPS * batch / training), EPOCHS_A_VIEW * views
    epochs = min(MOST_EPOCHS, max(least, wanted))
    steps = epochs * max(1, training // batch)
    if epochs == MOST_EPOCHS:
        why = f"the most, for {training:,} images are few"
    elif epochs == least:
        why = f"{EPOCHS_A_VIEW} for each view, up to which an epoch more is worth as much as new images"
    else:
        why = f"about {STEPS:,} steps"
    return Choice(epochs, f"{why}: {steps:,} steps")


def _student(seen: Seen, teacher_parameters: int) -> Choice:
    """The largest that suits the images and is not larger than the teacher."""
    wanted = 0 if seen.side < SMALL_SIDE else 1 if seen.readable < LARGE_CORPUS else 2
    fitting = [i for i, (_, size) in enumerate(STUDENTS) if size <= teacher_parameters]
    at = min([wanted, *fitting[-1:]]) if fitting else 0
    name, size = STUDENTS[at]
    if not fitting:
        why = f"the smallest there is, for the teacher has {teacher_parameters / 1e6:,.2g} M"
    elif at < wanted:
        why = f"no larger than the teacher's {teacher_parameters / 1e6:,.1f} M"
    elif wanted == 0:
        why = f"images of {seen.side} px on their shorter side have little for more"
    else:
        why = f"for {seen.readable:,} images of {seen.side} px"
    begins = "; trained from scratch, pretrained = true begins from its weights" if name.startswith("timm/") else ""
    return Choice(name, f"{size / 1e6:,.2f} M parameters, {why}{begins}")


def _image_size(side: int, student: str, teacher_side: int) -> Choice:
    """A multiple of 32, no more than there is to see."""
    least, most = (32, 64) if student.partition(":")[0] == "tiny" else (64, 224)
    size = max(least, min(most, teacher_side, side) // 32 * 32)
    told = f"the images have {side} px on their shorter side, the teacher sees {teacher_side}"
    return Choice(size, f"px of its input: {told}, and {student} takes {least} to {most} well")


def described(choices: Mapping[str, Choice]) -> list[tuple[str, str, str]]:
    """Name, value and reason, as text."""
    return [
        (name, f"{each.value:g}" if isinstance(each.value, float) else str(each.value), each.reason)
        for name, each in choices.items()
    ]

"""Distillation methods, one file each, registered under the file's name; other packages join through the entry-point
group `distill.methods`, each entry naming such a module. A file defines exactly one public class, a `Method`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Required, TypedDict, Unpack

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from featcache.inputs import Input
from featcache.plugins import load_plugin, only_class
from featcache.rows import Rows

Features = dict[str, Tensor]
"""What an encoder gives for a batch: "embedding" (B, D), and where asked for "tokens" (B, T, D), "prefix_tokens" (B, P, D)."""
Fitted = tuple[dict[str, Tensor], dict[str, float]]
"""What an earlier `prepare` left: the tensors of `fitted_tensors`, and the report."""


class Preparing(TypedDict, total=False):
    """What `Method.prepare` is told beside the rows.

    Attributes:
        seed: of all that is drawn; always there.
        progress: called with (steps done, steps).
        masked: which rows have a mask; there for methods that read masks.
        fitted: what a `prepare` of the same (rows, seed) left, to be taken instead of fitting again; a method may ignore it,
            and does where it is not its own.
    """

    seed: Required[int]
    progress: Callable[[int, int], None] | None
    fitted: Fitted | None
    masked: Bool[np.ndarray, " rows"]


Pairing = Literal["one", "independent", "group"]


@dataclass(frozen=True)
class Batch:
    """Samples of one step, on the device; of several processes, this one's share.

    Attributes:
        features: of the teacher, by field, float32; `batch["embedding"]` is one of them.
        inputs: what the student takes: of images, normalised (B, 3, S, S); of texts, token ids (B, L), −1 behind the end.
        row: which row of those that `prepare` got each sample is; −1 for what is none of them.
        view: which of its stored views the teacher's features are of.
        label: class of each sample; −1 where there is none.
        weight: how much each sample counts, as the stores' field `weight` says; 1 where they have none.
        preprocess: how `inputs` were made of images or texts; the student's.
        mask: class of each pixel of `inputs`; −1 where there is none, as beyond the image, and all over samples without a mask.
            None where the method reads none.
    """

    features: Features
    inputs: Tensor
    row: Int64[Tensor, " b"]
    view: Int64[Tensor, " b"]
    label: Int64[Tensor, " b"]
    weight: Float[Tensor, " b"]
    preprocess: Input[Any, Any]
    mask: Int64[Tensor, "b s s"] | None = None

    def __getitem__(self, field: str) -> Tensor:
        return self.features[field]


class Method(nn.Module):
    """What is learned of the teacher: the terms of a loss, and the heads that they need. A method is its `loss`.

    Built as `Method(teacher_dim, student_dim, **options)`, its options keyword-only with defaults. Weights that train
    with the student require a gradient; what is fitted before training is of buffers, made by `prepare`. So `prepare`
    comes before anything else, `load_state_dict` of a checkpoint included. Whatever a method learns is in its state,
    parameters and buffers: a resumed run ends in the same bits.

    Where there are several processes, each gets its share of the batch, and DistributedDataParallel averages the
    gradients: a term that compares samples takes them from `distill.objectives.gathered`.

    Attributes:
        fields: features of the teacher that `loss` reads; `prepare` may add some that the store has.
        student_fields: features of the student that `loss` reads.
        pairing: "one": the student sees the very view that the teacher's features are of; "independent": both views are
            drawn apart; "group": views of a sample stand in the batch together, sample after sample.
        group: of that pairing, how many successive views: of a store with several such groups, one is drawn every epoch.
            0: all stored views.
        points: whether `target` gives points of the student's own space, negative coordinates included. A student whose
            embedding cannot be negative then gets a linear layer behind it.
        turns: whether those of a student as wide as its teacher point elsewhere than the teacher does. Where not, and the
            teacher's are not negative either, that layer is left out.
        classifier: whether the student gets a linear classifier of the stores' classes, which stays with it: `loss` may
            read its "logits" (B, C) among `student_fields`.
        wide: whether the student's embedding is as wide as the teacher's, unless another width is asked for: to be used in its
            place, beside what the teacher has embedded.
        masks: whether `loss` reads masks, and of the student "dense" (B, C, h, w), the logits of its classifier of pixels. A method
            that can do with masks what it does with labels has it set by `learn_masks`.
        unmasked: of that, whether samples without a mask train too.
        passes: forward and backward passes of the student that a step takes, for an estimate of its time.
        kinds: of samples that it can be learned from: "image" alone where a term or `inputs` is of pixels.
        same_tokens: whether teacher and student must see a text as the same tokens.
        labelled: whether a term needs labels, so that stores without any are refused. Rows without one may be among them.
        judged: whether it learns from evaluations (`learn`), so that a fit without held-out rows is refused.
    """

    fields: tuple[str, ...] = ("embedding",)
    student_fields: tuple[str, ...] = ("embedding",)
    pairing: ClassVar[Pairing] = "one"
    group: ClassVar[int] = 0
    points: ClassVar[bool] = False
    turns: bool = True
    classifier: ClassVar[bool] = False
    wide: ClassVar[bool] = False
    same_tokens: ClassVar[bool] = False
    labelled: bool = False
    judged: bool = False
    masks: bool = False
    unmasked: ClassVar[bool] = False
    passes: int = 1
    kinds: tuple[str, ...] = ("image", "text")

    def learn_masks(self) -> None:
        """Learn the classes of pixels: the corpora have masks.

        Raises:
            ValueError: the method does not.
        """
        if not self.masks:
            raise ValueError("it tells apart classes of whole images; for masks take method ce or sslkd")

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Fit what is fitted before training, as a function of (rows, seed); returns what to report of it.

        Raises:
            ValueError: the rows do not suit the method.
        """
        return {}

    def may_be_held_out(self, rows: Rows) -> Bool[np.ndarray, " rows"] | None:
        """Which of all rows, before some are held out, evaluations may be on; None: any."""
        return None

    def target(self, batch: Batch) -> Tensor | None:
        """(B, d): where the student's embedding should point, in the student's own space; None when a method has none."""
        return None

    def inputs(self, batch: Batch, student: nn.Module) -> Tensor:
        """What the student is shown of the batch: an attack on it, say. The student's weights get no gradient here.

        Args:
            student: gives features of images by `student(images, fields)`. Of several processes, this one's own.
        """
        return batch.inputs

    def weights(self, epoch: int) -> Float[np.ndarray, " rows"] | None:
        """How often each row is drawn in this epoch, up to a factor, with replacement; None: each once.

        May depend on `epoch` and on what `prepare` and `learn` left, not on what training changes: an epoch that is
        resumed in its middle asks again.
        """
        return None

    def learn(self, epoch: int, held_out: Mapping[str, float]) -> None:
        """Hear of an evaluation after `epoch` (from 1 on): metrics by name, the same in every process."""

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms by name, of the student's features of `inputs` and the teacher's; their sum is minimised."""
        raise NotImplementedError


def load_method(name: str) -> type[Method]:
    """The class of `distill/methods/NAME.py`; a "-" in the name is a "_" there.

    Raises:
        ValueError: no such method; the message suggests near names.
    """
    return only_class(load_plugin(__name__, name.replace("-", "_")), Method)


def fitted_tensors(method: nn.Module) -> dict[str, Tensor]:
    """What `prepare` fitted, by name: the buffers of the method's state."""
    buffers = dict(method.named_buffers())
    return {name: value for name, value in method.state_dict().items() if name in buffers}

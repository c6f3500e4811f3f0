"""What decides a run's result: one record, mirrored by `config.toml`."""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, get_args

from distill.augment import AUGMENTS
from distill.methods import load_method
from featcache.plugins import suggest

METHOD = "centred"
"""Trained by default: the best of ours; `tintem` is the paper's."""
VIEWS = ("all", "plain", "student")
OPTIMIZERS = ("adamw", "lars", "sgd")
SCHEDULES = ("cosine", "step")
TRAINED = ("all", "linear")
KEPT = ("last", "best")
SAMPLINGS = ("each", "balanced", "weight")
LATER = (
    "any_precision",
    "head",
    "sampling",
    "momentum",
    "schedule",
    "milestones",
    "gamma",
    "keep_checkpoints",
    "train",
    "layer_decay",
    "tokenizer",
    "max_length",
)
"""Settings that `config.toml` leaves out where they are at their default, as it did before there were any."""
LR, LR_BATCH = 3e-3, 256
"""The peak learning rate where none is given, and the batch size that it is meant for."""
SGD_LR, SGD_LR_BATCH = 0.1, 128
"""The same for `sgd`."""
EVALUATED_SHARE = 0.05
"""Held out when evaluations are asked for and `holdout` is not given."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("a number", _is_number),
    str: ("text", lambda value: isinstance(value, str)),
    Sequence[float]: (
        "a list of numbers",
        lambda value: isinstance(value, list | tuple) and all(map(_is_number, value)),
    ),
    Mapping[str, Any]: ("a table", lambda value: isinstance(value, Mapping)),
    NoneType: ("left out", lambda value: value is None),
}


def refuse_wrong_type(name: str, value: Any, annotation: Any) -> None:
    """Raises ValueError where `value` is not what `annotation` says; one that is not among `_TYPES` takes anything."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if all(kind in _TYPES and not _TYPES[kind][1](value) for kind in kinds):
        raise ValueError(f"{name} must be {' or '.join(_TYPES[kind][0] for kind in kinds)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything that decides a run's result; `config.toml` mirrors it.

    Attributes:
        student: `tiny[:FILE]`, `timm/NAME`, `timm/NAME[.TAG]:FILE`, `timm/local-dir:FOLDER`, `timm/hf-hub:…`,
            `open_clip/NAME[:TAG][:CHECKPOINT]`, `run:FOLDER` (a finished run's student),
            `run:FOLDER@epoch=N` (one that a run kept on the way, see `keep_checkpoints`), `run:hf-hub:USER/NAME[@REVISION]`
            (one on the hub; its commit is recorded) or `MODULE:CALLABLE`; of texts also `bag/DIM`, `gru/DIM`,
            `transformers/CONFIG.json`, or with `pretrained` `transformers/FOLDER_OR_REPOSITORY`.
        method: a name from `distill/methods/`; "tintem" is the paper's.
        epochs: passes over the samples, each in one view.
        batch_size: samples a step, over all processes and all parts of an accumulated step.
        views: "all": each sample in one of its stored views, drawn anew every epoch, pixels replayed. "plain": view 0
            only. "student": view 0's features against an augmentation of the student's own.
        student_augment: with views "student": "photometric" (brightness, contrast, saturation, grey, blur) or "crops".
        optimizer: "adamw", "lars", or "sgd" (Nesterov's momentum).
        momentum: of "sgd" and "lars".
        lr: its peak. Left out, 0.003 for batches of 256, and for others in proportion to the square root of their size
            (Malladi et al. 2022, arXiv 2205.10287); with "sgd" 0.1 for batches of 128, and for others in proportion to
            their size (Goyal et al. 2017, arXiv 1706.02677).
        schedule: linear warm-up, then "cosine": half a cosine down to `min_lr`; or "step": `lr` times `gamma` at each of
            the `milestones`.
        milestones: with "step", epochs after which the learning rate falls, in order; may be fractions.
        gamma: see `schedule`.
        warmup_epochs: may be a fraction, at most `epochs`; left out, a tenth of them with "cosine", none with "step".
        min_lr: the learning rate does not fall below it; with "cosine" that of the last step.
        weight_decay: of all weights but biases, norms, and what timm's models name by `no_weight_decay()`. Left out,
            0.05; with "sgd" 0.0005, there it is added to the gradients.
        train: "all" of the student, or of one that is trained already "linear", its classifier alone: body and projection stay
            as they are, running statistics of norms too, and so do embeddings.
        layer_decay: factor of the learning rate from each layer of the student to that below; 1 trains all at the same.
        clip_norm: largest norm of all gradients together; 0 does not clip.
        accumulate: parts that a step's batch is computed in, to need less memory. Losses that compare samples of a
            batch see one part at a time.
        ema: decay of the moving average of the weights that is saved instead of them; 0 for none. Early steps use
            (1 + step) / (10 + step) where that is less.
        seed: of initial weights, order, views and mapping.
        embedding_dim: width of the student's embedding; the model's own when 0.
        image_size: px of the student's input; the model's own when 0.
        patch_size: px of a timm transformer's patches; the model's own when 0.
        drop_path: rate of stochastic depth of a timm student.
        tokenizer: of a student of texts, a `tokenizer.json`, or "bytes"; its teacher's, or its own where it comes with one, when
            left out.
        max_length: tokens of a text that it sees, those that the tokeniser puts around it included; its teacher's when 0.
        pretrained: start from the model's pretrained weights.
        precision: "fp32" or "bf16" (autocast); "auto" is bf16 on a GPU, else fp32.
        head: a classifier on the teacher's embeddings (`evalsuite probe … --save FILE`): what it makes of the cached ones are the
            teacher's logits, whether or not the stores have some of their own.
        sampling: which samples an epoch draws: "each" once; "balanced", with replacement and every class as often; "weight",
            with replacement and in proportion to the stores' field `weight`. Unlabelled samples keep their share.
        any_precision: take stores of the teacher in whatever precisions they were made.
        compile: run the student through torch.compile.
        eval_every: epochs between evaluations on the held-out rows; 0 evaluates at the end only.
        holdout: share of the samples kept out of training for that, at most 1,000 of them; 0.05 when `eval_every` is
            set and this is 0. None held out, nothing evaluated. Other samples of the same images do not train either.
        keep: which student is saved, the "last" or the "best": of the evaluations that with the highest accuracy of its
            classifier, where it has one (of masks the mean IoU), else by kNN, without labels the highest cosine to the target, else Gram
            correlation. "best" evaluates after every epoch unless `eval_every` says otherwise.
        keep_checkpoints: epochs, which may be a fraction, after each of which the student as it then is stays in the run
            folder, as `run:FOLDER@epoch=N` and `run:FOLDER@step=N`; 0 keeps none.
        method_options: keyword arguments of the method.
    """

    student: str
    method: str = METHOD
    epochs: int = 100
    batch_size: int = 256
    views: str = "all"
    student_augment: str = "photometric"
    optimizer: str = "adamw"
    momentum: float = 0.9
    lr: float | None = None
    schedule: str = "cosine"
    milestones: Sequence[float] = ()
    gamma: float = 0.1
    warmup_epochs: float | None = None
    min_lr: float = 0.0
    weight_decay: float | None = None
    train: str = "all"
    layer_decay: float = 1.0
    clip_norm: float = 0.0
    accumulate: int = 1
    ema: float = 0.0
    seed: int = 0
    embedding_dim: int = 0
    image_size: int = 0
    patch_size: int = 0
    drop_path: float = 0.0
    tokenizer: str = ""
    max_length: int = 0
    pretrained: bool = False
    precision: str = "auto"
    head: str = ""
    sampling: str = "each"
    any_precision: bool = False
    compile: bool = False
    eval_every: int = 0
    holdout: float = 0.0
    keep: str = "last"
    keep_checkpoints: float = 0.0
    method_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in fields(self):
            refuse_wrong_type(each.name, getattr(self, each.name), each.type)
        object.__setattr__(self, "method", self.method.replace("-", "_"))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", self.epochs / 10 if self.schedule == "cosine" else 0.0)
        if self.weight_decay is None:
            object.__setattr__(self, "weight_decay", 5e-4 if self.optimizer == "sgd" else 0.05)
        if self.lr is None and self.batch_size > 0:
            sgd, adaptive = SGD_LR * self.batch_size / SGD_LR_BATCH, LR * math.sqrt(self.batch_size / LR_BATCH)
            object.__setattr__(self, "lr", sgd if self.optimizer == "sgd" else adaptive)
        if self.keep == "best" and not self.eval_every:
            object.__setattr__(self, "eval_every", 1)
        if self.eval_every and not self.holdout:
            object.__setattr__(self, "holdout", EVALUATED_SHARE)
        for name in ("epochs", "batch_size", "accumulate", "lr", "gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in (
            *("weight_decay", "embedding_dim", "image_size", "warmup_epochs", "min_lr", "clip_norm", "eval_every"),
            *("ema", "holdout", "patch_size", "drop_path", "seed", "momentum", "keep_checkpoints", "max_length"),
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("ema", "holdout", "drop_path", "momentum"):
            if not getattr(self, name) < 1:
                raise ValueError(f"{name} must be less than 1, got {getattr(self, name)}")
        for name in ("warmup_epochs", "keep_checkpoints"):
            if getattr(self, name) > self.epochs:
                raise ValueError(f"{name} {getattr(self, name)} is more than the {self.epochs} epochs; lower it")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} cannot be accumulated in {self.accumulate} equal parts")
        for name, known in (
            ("precision", ("auto", "fp32", "bf16")),
            ("views", VIEWS),
            ("student_augment", AUGMENTS),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("train", TRAINED),
            ("keep", KEPT),
            ("sampling", SAMPLINGS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.schedule == "step":
            self._refuse_odd_milestones()
        options = method_options(self.method)
        for name, value in self.method_options.items():
            if name not in options:
                raise ValueError(
                    f"method {self.method} has no option {name!r}; "
                    f"{suggest(name, options) if options else 'it has none'}"
                )
            refuse_wrong_type(name, value, options[name])

    def _refuse_odd_milestones(self) -> None:
        marks = (0.0, *self.milestones, float(self.epochs))
        if not self.milestones or any(first >= then for first, then in itertools.pairwise(marks)):
            raise ValueError(
                f"schedule step needs milestones, epochs in order between 0 and {self.epochs}, got {list(self.milestones)}; "
                f"give them, such as milestones=[{self.epochs // 2}, {self.epochs * 3 // 4}], or schedule=cosine"
            )

    @property
    def ignored(self) -> list[str]:
        """A line for each setting that was given and changes nothing beside the others."""
        own = {each.name: each.default for each in fields(self)}
        stepped = self.schedule == "step"
        needs = (
            ("momentum", self.optimizer != "adamw", f"optimizer {self.optimizer}"),
            ("milestones", stepped, f"schedule {self.schedule}"),
            ("gamma", stepped, f"schedule {self.schedule}"),
            ("layer_decay", self.train == "all", f"train {self.train}"),
        )
        return [
            f"{name} {getattr(self, name)} changes nothing with {beside}; leave it out"
            for name, used, beside in needs
            if not used and getattr(self, name) != own[name]
        ]


def method_options(name: str) -> dict[str, Any]:
    """Keyword arguments of that method, and their annotations."""
    parameters = inspect.signature(load_method(name)).parameters
    return {
        option: parameter.annotation
        for option, parameter in parameters.items()
        if option not in ("teacher_dim", "student_dim")
    }

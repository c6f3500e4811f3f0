"""What a fit is given, opened and checked before anything is written."""

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int64

from distill.masks import masked, shared_classes
from distill.methods import Method, load_method
from distill.pairs import CHECKED, Pairs, teacher_input
from distill.rendered import Renderings
from distill.training.config import LATER, FitConfig
from distill.training.held_out import HeldOut, same_images, split
from distill.training.texts import refuse_other_tokenizer, refuse_other_tokens, texts_of
from featcache.classes import Classes, ordered
from featcache.corpora import Corpus, open_corpus, refuse_other_kind
from featcache.corpora.store import KeptImages
from featcache.geometry import one_sided
from featcache.head import Head
from featcache.inputs import Input
from featcache.inputs.images import Preprocess
from featcache.inputs.texts import Texts
from featcache.masks import MaskClasses
from featcache.rows import Rows
from featcache.specs import naming
from featcache.store import FeatureStore, open_store
from featcache.store.layout import DENSE, EMBEDDING, LOGITS
from featcache.student import Student, make_student

StoreGiven = FeatureStore | str | os.PathLike[str]
CorpusGiven = Corpus | str | None


@dataclass
class Inputs:
    """Everything that a fit trains with.

    Attributes:
        rows, corpora: the teacher's features and the images, of all stores.
        pairs: what is trained on.
        held: those of the rows that are kept for evaluation.
        student, preprocess, record: as `make_student` gives them.
        method: prepared by nobody yet.
        unmasked: how many rows do not train as they have no mask.
    """

    settings: FitConfig
    rows: Rows
    corpora: list[Corpus]
    pairs: Pairs
    held: np.ndarray
    student: Student
    preprocess: Input[Any, Any]
    record: dict[str, Any]
    method: Method
    unmasked: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """What `config.toml` holds: all that decides the result."""
        stores, texts = self.rows.stores, isinstance(self.preprocess, Texts)
        paths, specs = [str(store.path) for store in stores], [corpus.spec for corpus in self.corpora]
        digests = [store.digest for store in stores]
        one, settings = len(stores) == 1, asdict(self.settings)
        for name in LATER:
            if settings[name] == getattr(FitConfig, name):
                del settings[name]
        return {
            **settings,
            **({"head_digest": self.rows.head.digest} if self.rows.head else {}),
            **({"tokens": self.preprocess.to_dict()} if texts else {}),
            "store": paths[0] if one else paths,
            "store_digest": digests[0] if one else digests,
            "corpus": specs[0] if one else specs,
            "teacher": stores[0].fingerprint,
        }

    @property
    def failed(self) -> int:
        """Rows of the stores without features."""
        return sum(len(store.failed) for store in self.rows.stores)

    @property
    def copies(self) -> int:
        """Samples of images that are held out under another name, or that were made of one, which are in neither part."""
        return len(self.rows) - len(self.pairs) - len(self.held) - self.unmasked

    @property
    def student_record(self) -> dict[str, Any]:
        """What `student.json` says: what the student is built from, and how it was trained."""
        return {
            **self.record,
            "method": self.settings.method,
            "teacher": self.rows.stores[0].encoder_name,
            "trained_on": {
                "samples": len(self.pairs),
                "failed": self.failed,
                "held_out": len(self.held),
                "copies": self.copies,
                "views": self.pairs.description,
            },
        }

    def held_out(self, workers: int | None) -> HeldOut | None:
        """The evaluation on `held`, where there are any."""
        if not len(self.held):
            return None
        shared: dict[str, Any] = {
            "views": self.settings.views,
            "renderings": self.pairs.renderings,
            "masks": self.method.masks,
        }
        held = Pairs(self.rows.pick(self.held), self.corpora, self.preprocess, workers, **shared)
        return HeldOut(held, self.pairs, self.method, self.settings.seed)


def set_up(
    settings: FitConfig,
    store: StoreGiven | Sequence[StoreGiven],
    corpus: CorpusGiven | Sequence[CorpusGiven],
    accelerator: Accelerator,
    workers: int | None = None,
    trust_code: bool = False,
    renderings: Renderings | None = None,
) -> Inputs:
    """Open, make and check everything; the student's and the method's weights are drawn from the seed.

    Args:
        store, corpus, workers, trust_code, renderings: as `distill.fit` takes them.

    Raises:
        ValueError: stores, corpora and settings do not fit together.
    """
    stores, corpora = open_all(store, corpus)
    torch.manual_seed(settings.seed)
    head = Head.read(settings.head) if settings.head else None
    rows, processes = Rows.of(stores, head, any_precision=settings.any_precision), accelerator.num_processes
    made = load_method(settings.method)
    _refuse_weights(rows)
    masks, classes = shared_classes(corpora), []  # a classifier that an earlier run trained would not fit any more
    if made.classifier:
        classes = list(masks.names) if masks else [] if made.masks else _classes(settings, rows)
    teacher = _teacher(settings, stores, corpora, trust_code)
    student, preprocess, record = make_student(
        settings.student,
        teacher,
        classes=classes,
        embedding_dim=settings.embedding_dim or (rows.embedding_dim if made.wide else None),
        image_size=settings.image_size or None,
        patch_size=settings.patch_size or None,
        drop_path=settings.drop_path,
        pretrained=settings.pretrained,
        trust_code=trust_code,
    )
    method = made(rows.embedding_dim, student.embedding_dim, **settings.method_options)
    _refuse_kind(settings, method, teacher)
    if isinstance(teacher, Texts) and isinstance(preprocess, Texts):
        refuse_other_tokenizer(settings, teacher, preprocess)
        if method.same_tokens:
            refuse_other_tokens(settings, teacher_input(stores[0]), preprocess)
    if made.classifier:
        _agree_on_masks(settings, method, student, masks, corpora)
    known = masked(rows, corpora) if method.masks else None
    if known is None:
        _refuse_no_labels(settings, method, rows)
    elif not known.any():
        raise ValueError(f"{corpora[0].spec}: has a mask of none of the images of {rows.name}; give one that has")
    if method.judged and not (settings.holdout and settings.eval_every):
        raise ValueError(
            f"method {settings.method} learns from evaluations on held-out rows, and there are none: set holdout, a share of the "
            "labelled rows, and eval_every, such as 1"
        )
    if _needs_projection(student, method, rows):
        student.project()
        record = student.record(preprocess)
    if settings.train == "linear":
        _train_classifier_alone(settings, student)
    if not any(weight.requires_grad for weight in student.parameters()):
        raise ValueError(f"{settings.student}: none of the student's weights trains; leave some with requires_grad")
    if isinstance(preprocess, Preprocess):
        refuse_small_images(preprocess, corpora)
    trained, held = parted(settings, method, rows, known)
    unmasked = 0 if known is None or method.unmasked else int((~known[trained]).sum())
    trained = trained[known[trained]] if known is not None and unmasked else trained
    pairs = Pairs(
        rows.pick(trained),
        corpora,
        preprocess,
        workers,
        views=settings.views,
        student_augment=settings.student_augment,
        processes=processes,
        renderings=renderings,
        masks=method.masks,
    )
    sampling_weights(settings, pairs.rows)
    pairs.refuse_pairing(method.pairing, method.group)
    pairs.check()
    refuse_unequal_parts(settings, len(pairs), processes)
    if min(settings.batch_size, len(pairs)) == processes * settings.accumulate:
        refuse_single_images(student)
    refuse_missing_fields(method, student, rows)
    return Inputs(settings, rows, corpora, pairs, held, student, preprocess, record, method, unmasked)


def _agree_on_masks(
    settings: FitConfig, method: Method, student: Student, masks: MaskClasses | None, corpora: list[Corpus]
) -> None:
    """Whether pixels are classified, by corpora, student and method alike.

    Raises:
        ValueError: they are not of one mind.
    """
    if masks is None and (method.masks or student.model.map_width):
        raise ValueError(
            f"{corpora[0].spec}: has no masks, by which {settings.student} with method {settings.method} learns classes of pixels; give "
            "--corpus masks:FOLDER"
        )
    if masks and not student.model.map_width:
        raise ValueError(
            f"{settings.student}: gives no map, and {corpora[0].spec} has masks; choose a student that does: unet/16, "
            "fpn/NAME (timm's networks) or smp/NAME"
        )
    if masks:
        with naming(f"method {settings.method}"):
            method.learn_masks()
    if DENSE in method.fields and settings.views == "student" and settings.student_augment == "crops":
        raise ValueError(
            f"method {settings.method} learns from the teacher's maps, which are of the teacher's views, not of the student's own crops; leave "
            "student_augment out"
        )


def parted(
    settings: FitConfig, method: Method, rows: Rows, masked: Bool[np.ndarray, " rows"] | None = None
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " m"]]:
    """Which rows train and which are held out. Of rows that may be (where masks are learned, those that have one), the same are
    held out whatever others there are."""
    images = same_images(rows) if settings.holdout else np.arange(len(rows))
    derived, allowed = rows.adversarial, method.may_be_held_out(rows)
    if masked is not None:
        allowed = masked if allowed is None else allowed & masked
    some = np.arange(len(rows)) if allowed is None else np.flatnonzero(allowed)
    _, held = split(images[some], settings.holdout, settings.seed, never=None if derived.all() else derived[some])
    return np.flatnonzero(~np.isin(images, images[some[held]])), some[held]


def _teacher(
    settings: FitConfig, stores: list[FeatureStore], corpora: list[Corpus], trust_code: bool
) -> Input[Any, Any]:
    """What the teacher was shown; of texts with the tokeniser that its student takes.

    Raises:
        ValueError: a corpus is of another kind, or a setting is of images alone.
    """
    teacher = teacher_input(stores[0])
    for corpus in corpora:
        refuse_other_kind(corpus, stores[0].encoder_name, teacher.kind)
    given = [name for name in ("tokenizer", "max_length") if getattr(settings, name)]
    if not isinstance(teacher, Texts):
        if given:
            raise ValueError(f"{given[0]} is of students of texts, and {stores[0].path} is of images; leave it out")
        return teacher
    if settings.views == "student":
        raise ValueError("views=student changes images, and texts stay as they are; leave views out")
    return texts_of(settings, stores[0], teacher, trust_code)


def _refuse_kind(settings: FitConfig, method: Method, teacher: Input[Any, Any]) -> None:
    if teacher.kind not in method.kinds:
        raise ValueError(
            f"method {settings.method} as it is set here is for {' and '.join(method.kinds)}s, and its teacher was shown "
            f"{teacher.kind}s; choose another method, or other options"
        )


def _train_classifier_alone(settings: FitConfig, student: Student) -> None:
    """Freeze the rest: `train_mode` then leaves its running statistics alone too.

    Raises:
        ValueError: there is no classifier, or the rest has learned nothing yet.
    """
    if not student.classifier:
        raise ValueError(
            f"train=linear trains the student's classifier alone, and method {settings.method} gives it none; choose "
            "method=ce or kd, or leave train out"
        )
    if (
        not settings.pretrained and ":" not in settings.student
    ):  # as specs name weights, runs and code that may load some
        raise ValueError(
            f"train=linear trains the classifier alone, and the rest of student {settings.student} has random weights; give "
            "a trained one (run:FOLDER, NAME:WEIGHTS, or pretrained=true), or leave train out"
        )
    student.requires_grad_(False)
    student.classifier.requires_grad_(True)


def _needs_projection(student: Student, method: Method, rows: Rows) -> bool:
    """Whether a target may lie where the student's embedding cannot go."""
    if not method.points or not student.one_sided():
        return False
    as_seen = student.embedding_dim == rows.embedding_dim and not method.turns
    return not (as_seen and one_sided(rows.gather(range(min(CHECKED, len(rows))))))


def _classes(settings: FitConfig, rows: Rows) -> list[str]:
    """Names of what the student's classifier tells apart; the columns of the rows' head are put into their order.

    Raises:
        ValueError: there are no classes, or only one, or the head has others.
    """
    classes = rows.classes
    if len(classes) < 2:
        raise ValueError(
            f"{rows.name} has one class ({classes[0]}); method {settings.method} learns to tell classes apart, so give stores "
            "of two or more"
        )
    if rows.head:
        rows.head = ordered(rows.head, Classes(rows.name, np.arange(len(classes)), classes))
    return classes


def _refuse_weights(rows: Rows) -> None:
    """Raises ValueError where the stores' weights are none that samples can have."""
    weight = rows.weight(np.arange(len(rows)))
    if not (np.isfinite(weight).all() and (weight >= 0).all() and weight.any()):
        raise ValueError(
            f"{rows.name}: its field weight must be finite numbers, none negative and not all 0; make it again without such rows"
        )


def _refuse_no_labels(settings: FitConfig, method: Method, rows: Rows) -> None:
    if method.labelled and not (rows.labels >= 0).any():
        raise ValueError(
            f"method {settings.method} learns from labels, and {rows.name} has none that its stores agree on; extract images "
            "in class sub-folders, or choose another method"
        )


def sampling_weights(settings: FitConfig, rows: Rows) -> Float[np.ndarray, " n"] | None:
    """How often each row is drawn, up to a factor; None: each once.

    Raises:
        ValueError: the rows have no labels to be balanced by, or no weights.
    """
    if settings.sampling == "each":
        return None
    if settings.sampling == "weight":
        rows.require_field("weight")
        return rows.weight(np.arange(len(rows))).astype(np.float64)
    known = rows.labels >= 0
    if not known.any():
        raise ValueError(
            f"sampling=balanced draws every class as often, and {rows.name} has no labels; leave sampling out, or extract "
            "images in class sub-folders"
        )
    count = np.bincount(rows.labels[known])
    share = known.sum() / np.count_nonzero(count)
    return np.where(known, share / np.maximum(count, 1)[rows.labels.clip(min=0)], 1.0)


def open_all(
    store: StoreGiven | Sequence[StoreGiven], corpus: CorpusGiven | Sequence[CorpusGiven]
) -> tuple[list[FeatureStore], list[Corpus]]:
    """Opened stores and corpora, one corpus for each store.

    Args:
        store: a store or its path, or a list of them.
        corpus: a corpus or its spec, None for the images that the store keeps, or a list of these.

    Raises:
        ValueError: not as many corpora as stores, or a store is not sealed.
    """
    given: list[StoreGiven] = list(store) if isinstance(store, list | tuple) else [store]  # type: ignore[list-item]
    one: list[CorpusGiven] = [corpus] * (1 if corpus is not None else len(given))  # type: ignore[list-item]
    images = list(corpus) if isinstance(corpus, list | tuple) else one
    if not given or len(images) != len(given):
        raise ValueError(
            f"{len(given)} stores, {len(images)} corpora: give each store its corpus, in the same order, or no corpus at all"
        )
    stores = [each if isinstance(each, FeatureStore) else open_store(each) for each in given]
    for each, texts in zip(stores, images, strict=True):
        if texts is None and each.manifest.encoder.preprocess.get("input") == "texts":
            raise ValueError(f"{each.path}: is of texts, and keeps none; give them with --corpus")
        if not each.sealed:
            raise ValueError(f"{each.path}: is not sealed; finish its extraction first")
    return stores, [
        KeptImages(kept) if each is None else open_corpus(each) if isinstance(each, str) else each
        for kept, each in zip(stores, images, strict=True)
    ]


def refuse_small_images(preprocess: Preprocess, corpora: list[Corpus]) -> None:
    """Kept images were made smaller than they had been, and smaller than the student's input is.

    Raises:
        ValueError: so it is.
    """
    for corpus in corpora:
        if isinstance(corpus, KeptImages) and corpus.size < preprocess.size:
            some = range(0, len(corpus), max(1, len(corpus) // CHECKED))
            if any(min(corpus.original_size(i)) > corpus.size for i in some):
                raise ValueError(
                    f"{corpus.spec}: keeps its images at {corpus.size} px, less than the student's {preprocess.size}; give "
                    f"the images with --corpus, extract with --pixels {preprocess.size}, or set image_size={corpus.size}"
                )


def refuse_unequal_parts(settings: FitConfig, samples: int, processes: int) -> None:
    """Every process and every accumulated part gets as many samples as the others.

    Raises:
        ValueError: that is not possible.
    """
    parts = processes * settings.accumulate
    how = f"{processes} processes" + (f" × {settings.accumulate} accumulated parts" if settings.accumulate > 1 else "")
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size {settings.batch_size} cannot be shared equally by {how}; choose a multiple of {parts}"
        )
    if parts > 1 and samples < settings.batch_size:
        raise ValueError(
            f"batch_size {settings.batch_size}, shared by {how}, is more than the {samples} samples; lower it"
        )


def refuse_single_images(student: Student) -> None:
    """Batch norms need more than one value of each channel.

    Raises:
        ValueError: one image alone does not give that.
    """
    one = student.model.example(1)
    what = f"image of {student.image_size} px" if student.model.kind == "image" else "text"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(student).train()(one)
    except ValueError:
        raise ValueError(
            f"the student's batch norms cannot train on one {what} at a time; give a larger batch_size (for each process and "
            "accumulated part 2 or more)"
        ) from None


def refuse_missing_fields(method: Method, student: Student, rows: Rows) -> None:
    """Features that the method reads, of the teacher and of the student.

    Raises:
        ValueError: one of them is not there.
    """
    for name in method.fields:
        if name == LOGITS and rows.head:
            continue
        for store in rows.stores:
            if name != EMBEDDING and name not in store.manifest.fields:
                other = ", or give a classifier of its embeddings with --set head=FILE (`evalsuite probe … --save FILE` fits one)"
                raise ValueError(
                    f"{store.path}: holds no {name}, which this method needs; extract with --fields {EMBEDDING},{name}"
                    + (other if name == LOGITS else "")
                )
        if name == DENSE and student.classes and rows.shape_of(name)[0] != len(student.classes):
            raise ValueError(
                f"{rows.name}: its maps are of {rows.shape_of(name)[0]} classes, the masks of {len(student.classes)}; give maps of a "
                "teacher that was trained on these masks"
            )
        if name == LOGITS and student.classes and rows.shape_of(name)[-1] != len(student.classes):
            raise ValueError(
                f"{rows.name}: its logits are of {rows.shape_of(name)[-1]} classes, its labels of {len(student.classes)}; give a "
                "classifier of these classes with --set head=FILE (`evalsuite probe … --save FILE` fits one)"
            )
        if name in (LOGITS, DENSE) and student.classes and rows.logit_classes not in (None, student.classes):
            raise ValueError(
                f"{rows.name}: its logits are of other classes ({', '.join(rows.logit_classes[:3])}, …), or in another order, than its "
                f"labels ({', '.join(student.classes[:3])}, …); name the class folders as the teacher's were"
            )
    if set(method.student_fields) != {EMBEDDING}:
        missing = [name for name in method.student_fields if name not in student.shapes()]
        if missing:
            raise ValueError(f"this student gives no {', '.join(missing)}, which the method needs; choose another")

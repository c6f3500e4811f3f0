"""Student: a model to be trained, a projection where widths differ, and a classifier where classes are given."""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from featcache.checkpoint import read_weights
from featcache.geometry import one_sided
from featcache.inputs import Input, input_of
from featcache.inputs.images import Preprocess, image_input
from featcache.inputs.texts import Texts, text_input
from featcache.models import Features, Model, Variant, first_line
from featcache.plugins import load_plugin, plugin_names
from featcache.run_folder import RECORD, TOKENIZER, WEIGHTS, find, on_disk, split_spec
from featcache.specs import code_in, names_code, naming, refuse_code
from featcache.store.layout import DENSE, LOGITS

log = logging.getLogger("featcache")

EMBEDDING = ("embedding",)
T = TypeVar("T")


class Student(nn.Module):
    """A model to be trained and, where its width is not the wanted one, a linear projection behind it.

    Args:
        model: whose features these are.
        embedding_dim: the wanted width; the model's own when None.
        projected: with a projection even where the widths are equal.
        classes: names of what a linear classifier tells apart, of the embedding or, where the model gives a map, of its pixels;
            none when None.

    Attributes:
        body: the model's network.
        width: of its output.
    """

    def __init__(
        self,
        model: Model,
        embedding_dim: int | None = None,
        classes: Sequence[str] | None = None,
        projected: bool = False,
    ):
        super().__init__()
        self.body = model.body
        # Its weights are `body`'s: they are registered once, under the names that files hold.
        object.__setattr__(self, "model", model)
        self.width = _width(_tried(self.body, model.example(1)))
        self.embedding_dim = embedding_dim or self.width
        plain = self.embedding_dim == self.width and not projected
        self.projection = nn.Identity() if plain else nn.Linear(self.width, self.embedding_dim)
        self.classes = list(classes) if classes else None
        self.classifier = self._new_classifier()

    model: Model

    def _new_classifier(self) -> nn.Linear | nn.Conv2d | None:
        """Of embeddings, or of the pixels of maps."""
        if not self.classes:
            return None
        if self.model.map_width:
            return nn.Conv2d(self.model.map_width, len(self.classes), 1)
        return nn.Linear(self.embedding_dim, len(self.classes))

    @property
    def image_size(self) -> int:
        """px of the images that it was made for."""
        return self.model.image_size

    @property
    def remark(self) -> str:
        """A line to tell before it is trained, "" for none."""
        return self.model.remark

    @property
    def behind(self) -> list[nn.Linear]:
        """The layers behind the body: projection, classifier."""
        return [layer for layer in (self.projection, self.classifier) if isinstance(layer, nn.Linear)]

    @property
    def gives(self) -> str:
        """What `deployed` gives: "logits", "dense" or "embedding"."""
        return (DENSE if self.model.map_width else LOGITS) if self.classifier else "embedding"

    @property
    def gives_shape(self) -> tuple[int, ...]:
        return self.shapes()[self.gives]

    @property
    def deployed(self) -> nn.Module:
        """What it is made for, of images: its logits or dense logits where it has a classifier, else its embedding."""
        if self.gives == DENSE:
            return _Maps(self)
        return nn.Sequential(self, self.classifier) if self.classifier else self

    @overload
    def forward(self, images: Tensor, fields: None = None) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, fields: Sequence[str]) -> Features: ...
    def forward(self, images: Tensor, fields: Sequence[str] | None = None) -> Tensor | Features:
        """The embedding (B, D); or, given `fields`, what `features` gives, so that wrappers (DDP, compile) see it."""
        return self.features(images)["embedding"] if fields is None else self.features(images, fields)

    def features(self, images: Tensor, fields: Sequence[str] = EMBEDDING) -> Features:
        """Features by name: "embedding" (B, D), "tokens" (B, T, D) of patches or of positions of the last feature
        map, row-major, and "prefix_tokens" (B, P, D), all through the same projection; "logits" (B, C) of the embedding, or of
        a model with maps "dense" (B, C, h, w) in its place; and of a language model what `Model.own_fields` names, through none.

        Raises:
            ValueError: the student does not have one of `fields`.
        """
        if set(fields) <= {*EMBEDDING, *([LOGITS] if self.gives == LOGITS else ())}:
            embedding = self.projection(self.body(images))
            return {name: self.classifier(embedding) if name == LOGITS else embedding for name in fields}  # type: ignore[misc]
        found = self.model(images)
        maps, own = found.pop(DENSE, None), {name: found.pop(name) for name in self.model.own_fields}
        # A head that widens the pooled features (MobileNetV3) leaves tokens which no shared projection fits.
        fitting = {name: value for name, value in found.items() if value.shape[-1] == self.width}
        if self.gives == LOGITS:
            fitting["logits"] = fitting["embedding"]
        known = {*fitting, *own, *([DENSE] if self.gives == DENSE else [])}
        missing = [name for name in fields if name not in known]
        if missing:
            hint = "its tokens have another width than its embedding" if missing[0] in found else "it has none"
            raise ValueError(f"this student gives no {', '.join(missing)}: {hint}; choose another student or method")
        given = {
            name: own[name] if name in own else maps if name == DENSE else self.projection(fitting[name])
            for name in fields
        }
        return {
            name: self.classifier(value) if name == self.gives and self.classifier else value
            for name, value in given.items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one sample's features, of all fields there are, seen on a black image or a short text."""
        found = _tried(self, self.model.example(1), self.model)
        maps, own = found.pop(DENSE, None), self.model.own_fields
        shapes = {
            name: (*value.shape[1:-1], self.embedding_dim)
            for name, value in found.items()
            if name not in own and value.shape[-1] == self.width
        }
        shapes |= {name: field.shape for name, field in own.items()}
        if maps is not None and self.classes:
            shapes[DENSE] = (len(self.classes), *maps.shape[2:])
        return shapes | ({"logits": (len(self.classes),)} if self.gives == LOGITS and self.classes else {})

    def one_sided(self) -> bool:
        """Whether its embedding has next to no negative coordinates, as what is pooled after a rectifier; seen on noise."""
        noise = self.model.noise(4, torch.Generator().manual_seed(0))
        return one_sided(_tried(self, noise).float().numpy())

    def project(self) -> None:
        """Put a projection behind the model, of the embedding's own width."""
        self.projection = nn.Linear(self.width, self.embedding_dim)

    def input_like(self, teacher: Input[Any, Any]) -> Input[Any, Any]:
        """Its input: of texts its own; of images the same square as the teacher's, at its own size and normalised its own
        way.

        Raises:
            ValueError: the teacher was shown something of another kind.
        """
        if self.model.kind != teacher.kind:
            raise ValueError(
                f"the student takes {self.model.kind}s, and its teacher was shown {teacher.kind}s; give a student of "
                f"{teacher.kind}s, such as {'tiny' if teacher.kind == 'image' else 'bag/128'}"
            )
        if not isinstance(teacher, Preprocess):
            return self.model.input
        own = replace(teacher, size=self.image_size)
        if self.model.normalisation is None:
            return own
        mean, std = self.model.normalisation
        return image_input(own.to_dict() | {"mean": mean, "std": std})

    def record(self, preprocess: Input[Any, Any]) -> dict[str, Any]:
        """What `student.json` holds of it: all that `load_student` rebuilds it from, and its input."""
        projected = isinstance(self.projection, nn.Linear) and self.embedding_dim == self.width
        return {
            **self.model.record,
            "embedding_dim": self.embedding_dim,
            "preprocess": preprocess.to_dict(),
            **({"projected": True} if projected else {}),
            **({"classes": self.classes} if self.classes else {}),
        }


class _Maps(nn.Module):
    """Images → dense logits."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return self.student.features(images, (DENSE,))[DENSE]


def open_student(
    spec: str,
    *,
    embedding_dim: int | None = None,
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    drop_path: float = 0.0,
    pretrained: bool = False,
    trust_code: bool = False,
    texts: Texts | None = None,
) -> Student:
    """A student with new weights or, with `pretrained` or weights in the spec, with those.

    Weights that bring a projection (a run's, an export's) keep it, unless another `embedding_dim` is asked for.

    Args:
        spec: "tiny" or "tiny:FILE"; "timm/NAME", or as a teacher with weights of its own "timm/NAME[.TAG]:FILE",
            "timm/local-dir:FOLDER", "timm/hf-hub:…"; the image tower "open_clip/NAME", "open_clip/NAME:CHECKPOINT",
            "open_clip/NAME:TAG[:CHECKPOINT]"; "unet/WIDTH", "fpn/NAME", "smp/NAME", which give maps; of any other library that
            makes models to be trained; "run:FOLDER", the
            student of a finished run, "run:FOLDER@epoch=N", one kept on the way, "run:hf-hub:USER/NAME[@REVISION]", one on
            the hub; "MODULE:CALLABLE", importable from here too, that returns an `nn.Module` from
            (B, 3, S, S), or from token ids (B, L), −1 behind the end of each text, to (B, D); or of texts "bag/DIM",
            "gru/DIM", "transformers/CONFIG.json", or with pretrained "transformers/FOLDER_OR_REPOSITORY".
        embedding_dim: width of its output; its own when None.
        classes: see `Student`; those of a run when None.
        image_size: px; its own when None (32 for tiny and for MODULE:CALLABLE).
        patch_size: px, for timm's transformers; its own when None.
        drop_path: rate of stochastic depth while training, for timm models.
        pretrained: start from timm's weights of that name.
        trust_code: a run's MODULE:CALLABLE may be imported.
        texts: what a student of texts takes, unless it comes with a tokeniser.

    Raises:
        ValueError: unknown spec (the message suggests near names), or a setting that the model does not take.
    """
    variant = Variant(
        image_size=image_size, patch_size=patch_size, drop_path=drop_path, pretrained=pretrained, texts=texts
    )
    if spec.startswith("run:"):
        variant.refuse_all_but_size(spec)
        return _continued(spec, embedding_dim, classes, image_size, trust_code)
    found = _library(spec)
    if found is None:
        raise ValueError(
            f"unknown student {spec!r}; give tiny, timm/NAME, timm/NAME:WEIGHTS, builtin/NAME, open_clip/NAME, "
            "open_clip/NAME:CHECKPOINT, run:FOLDER, run:hf-hub:USER/NAME, MODULE:CALLABLE, or of texts bag/DIM, gru/DIM or "
            "transformers/CONFIG.json"
        )
    library, rest = found
    return _checked(spec, library.make_model(rest, variant), embedding_dim, classes)


def make_student(
    spec: str, teacher: Input[Any, Any], *, image_size: int | None = None, **settings: Any
) -> tuple[Student, Any, dict[str, Any]]:
    """A student that sees the same square of the image as its teacher, or the same texts; its input, and the record for
    `student.json`.

    Args:
        spec, settings: as `open_student` takes them.
        teacher: of texts, with the tokeniser that the student takes, unless it comes with one.
        image_size: px; the model's own when None (32 for tiny; the teacher's for MODULE:CALLABLE).
    """
    if isinstance(teacher, Texts):
        settings["texts"] = teacher
    elif isinstance(teacher, Preprocess) and names_code(spec):
        image_size = image_size or teacher.size
    student = open_student(spec, image_size=image_size, **settings)
    with naming(spec):
        preprocess = student.input_like(teacher)
    return student, preprocess, student.record(preprocess)


def load_student(folder: str | os.PathLike[str], *, trust_code: bool = False) -> tuple[Student, dict[str, Any]]:
    """The trained student of a run folder, in eval mode, and its record (`student.json`); of `FOLDER@epoch=N` or
    `FOLDER@step=N` one that the run, finished or not, kept on the way; of `hf-hub:USER/NAME[@REVISION]` one on the hub.

    Nothing else is fetched. A student `MODULE:CALLABLE` imports that module again, where code is trusted.

    Raises:
        ValueError: the folder holds no such student, its weights are not of the architecture it names, or that is
            code and not trusted.
    """
    folder = on_disk(folder)
    if split_spec(folder)[1]:
        kept = find(folder)
        return _with_tokenizer(
            _filled(kept.record, kept.path, kept.path, trust_code), split_spec(folder)[0]
        ), kept.record
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        unfinished = (folder / "config.toml").exists()
        remedy = (
            "finish it with `distill fit … --resume`" if unfinished else f"make one with `distill fit … --out {folder}`"
        )
        raise ValueError(f"{folder}: holds no finished student (student.json); {remedy}") from None
    except ValueError:
        raise ValueError(f"{folder / RECORD}: is damaged; train again with another --out") from None
    return _with_tokenizer(_filled(record, folder / RECORD, folder / WEIGHTS, trust_code), folder), record


def _with_tokenizer(student: Student, folder: Path) -> Student:
    """The student, and where it takes texts the tokeniser that its folder holds.

    Raises:
        ValueError: that is another one.
    """
    file = folder / TOKENIZER
    if student.model.kind == "text" and file.is_file():
        with naming(file):
            student.model.input = text_input(student.model.input.to_dict(), file.read_text(encoding="utf-8"))
    return student


def _filled(record: Any, said_in: Path, weights: Path, trust_code: bool) -> Student:
    """A student built as a record says, with weights from a file, in eval mode."""
    with naming(said_in):
        library, rest = _recorded_library(record, trust_code)
        model = library.rebuild_model(rest, record)
        student = _checked(record["architecture"], model, record["embedding_dim"], **_optional(record))
    if not weights.exists():
        raise ValueError(
            f"{weights}: is gone; `distill fit --out {weights.parent} --resume` makes it from the last checkpoint"
        )
    try:
        student.load_state_dict(read_weights(str(weights)))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise ValueError(f"{weights}: does not fit {record['architecture']} as built here ({reason})") from None
    return student.eval()


def _library(spec: str) -> tuple[ModuleType, str] | None:
    """The plugin that makes this student, and the rest of the spec; None where there is none."""
    if names_code(spec):
        return load_plugin("featcache.models", "python"), code_in(spec)
    match = re.fullmatch(r"(\w+)(?:[/:](.+))?", spec, re.DOTALL)
    if not match or match[1] not in plugin_names("featcache.models"):
        return None
    library = load_plugin("featcache.models", match[1])
    return (library, match[2] or "") if hasattr(library, "make_model") else None


def _recorded_library(record: Any, trust_code: bool) -> tuple[ModuleType, str]:
    """Of a record, once it is seen to name an architecture alone: no code, no file, nothing to fetch."""
    architecture = record.get("architecture") if isinstance(record, dict) else None
    if not isinstance(architecture, str):
        raise ValueError("names no architecture; train again with another --out")
    refuse_code("its student", architecture, trust_code)
    plain = names_code(architecture) or re.fullmatch(r"\w+(/[^:/\\]+)?", architecture)
    found = _library(architecture) if plain else None
    if found is None or not hasattr(found[0], "rebuild_model"):
        raise ValueError(f"{architecture!r} is no architecture; train again with another --out")
    try:
        like, sizes = input_of(record["preprocess"]), [record["embedding_dim"]]
        sizes += [record["preprocess"]["size"]] if like.kind == "image" else []
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is damaged ({type(error).__name__}: {error}); train again with another --out") from None
    if not all(type(number) is int and number > 0 for number in sizes):
        raise ValueError("is damaged (sizes must be whole numbers); train again with another --out")
    classes = record.get("classes", ["one"])
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError("is damaged (classes must be names); train again with another --out")
    return found


def _continued(
    spec: str, embedding_dim: int | None, classes: Sequence[str] | None, image_size: int | None, trust_code: bool
) -> Student:
    """The student of a run; with a new projection where another width, a new classifier where other classes are
    asked for."""
    student, record = load_student(spec.partition(":")[2], trust_code=trust_code)
    if image_size and image_size != student.image_size:
        raise ValueError(f"{spec}: works at {student.image_size} px, not {image_size}; leave image_size out")
    model = student.model
    if model.kind == "image":
        model.normalisation = record["preprocess"]["mean"], record["preprocess"]["std"]
    kept = student.classes if classes is None else list(classes)
    if embedding_dim and embedding_dim != student.embedding_dim:
        return _checked(spec, model, embedding_dim, kept)
    if kept != student.classes:
        student.classes = kept
        student.classifier = student._new_classifier()
    return student.train()


def _optional(record: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Student` that a record may leave out."""
    return {"classes": record.get("classes"), "projected": bool(record.get("projected"))}


def _checked(
    spec: str, model: Model, embedding_dim: int | None, classes: Sequence[str] | None, projected: bool = False
) -> Student:
    """The student of a model, once that has seen one black image; with the projection that its weights bring where that
    has the wanted width."""
    projection = model.projection
    if projection is not None:
        embedding_dim = embedding_dim or projection.out_features
    try:
        student = Student(model, embedding_dim, classes, projected)
    except _OddOutput as error:
        raise ValueError(f"{spec}: {error}") from None
    except Exception as error:  # a model's own code raises what it likes
        channels = next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), 3)
        if channels != 3:
            raise ValueError(
                f"{spec}: the student takes images of {channels} channels; it is given RGB images: begin with a layer that "
                "takes 3"
            ) from error
        raise ValueError(
            f"{spec}: the student does not take {model.takes} ({type(error).__name__}: {first_line(error)})"
            + ("; give another image_size" if model.kind == "image" else "")
        ) from error
    if projection is not None and projection.out_features == embedding_dim:
        student.projection = projection
    elif projection is not None:
        log.warning(
            "%s: its projection to %d is left out: %d is asked for", spec, projection.out_features, embedding_dim
        )
    model.refuse_untrainable(student.width)
    return student


class _OddOutput(ValueError):
    """A student's output is no embedding; the message says what it is."""


def _width(output: object) -> int:
    """Of the embedding that a student makes of one image.

    Raises:
        _OddOutput: it is none.
    """
    if isinstance(output, Mapping):
        named = ", ".join(map(str, output)) or "nothing"
        raise _OddOutput(f"the student returns a dictionary ({named}); let it return the embedding (B, D) alone")
    if not isinstance(output, Tensor):
        raise _OddOutput(f"the student returns a {type(output).__name__}; let it return the embedding (B, D) alone")
    shape = tuple(output.shape)
    if output.ndim == 4 and shape[0] == 1:
        raise _OddOutput(
            f"the student gives maps, (B, {', '.join(map(str, shape[1:]))}); pool them, say by `.mean((2, 3))`, to (B, D)"
        )
    if output.ndim != 2 or shape[0] != 1 or not shape[1] or not output.is_floating_point():
        raise _OddOutput(
            f"the student gives {shape} {output.dtype} of one image; let it give (B, D) floating-point numbers"
        )
    return shape[1]


@torch.no_grad()
def _tried(module: nn.Module, images: Tensor, run: Callable[[Tensor], T] | None = None) -> T:
    """What `module` (or `run`, a way of running it) makes of these in eval mode."""
    training = module.training
    module.eval()
    try:
        return (run or module)(images)
    finally:
        module.train(training)

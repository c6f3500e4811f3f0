"""The model card of an export: who taught it, on what, how, how well, and how to load it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from torch import Tensor

from distill.training.run import Run
from featcache.inputs import input_of
from featcache.inputs.images import Preprocess
from featcache.models import recorded_licence
from featcache.public import public
from featcache.store import FeatureStore
from featcache.student import Student


@dataclass(frozen=True, kw_only=True)
class Written:
    """A student's files in a folder, apart from the card.

    Attributes:
        loading: Python that makes `model` from the files in `folder`.
        load: runs it.
        sections: of the card, about these files.
        of_hub: Python by which their library makes `model` of a repository "{name}" on the Hugging Face hub that has them; ""
            where that takes `loading`.
    """

    loading: str
    load: Callable[[], Callable[[Tensor], Tensor]]
    sections: Sequence[str] = ()
    of_hub: str = ""


def write_card(
    path: Path,
    run: Run,
    record: dict[str, Any],
    student: Student,
    *,
    written: Written,
    checked: str,
    results: Sequence[dict[str, Any]],
    repository: str,
    preparing: str = "",
) -> None:
    """Write the card as Markdown.

    Args:
        record: `student.json`.
        checked: how close it was found to be to the student.
        results: contents of evalsuite's result files.
        repository: on the hub that this is the card of; "" for that of a folder.
        preparing: of a student of texts, how these become what it takes.
    """
    at = record.get("snapshot", {})
    config, like = run.config or {}, input_of(record["preprocess"])
    shown = (
        f"RGB, {like.size} × {like.size} px"
        if isinstance(like, Preprocess)
        else f"up to {record['preprocess']['max_length']} tokens"
    )
    named = str(record.get("teacher", "unknown"))
    teacher = public(named)
    trained_on = [record["trained_on"]] if "trained_on" in record else []
    parameters = sum(weight.numel() for weight in student.parameters())
    text = [
        f"# {record['architecture']}, taught by {teacher}",
        f"A small {like.kind} encoder that was trained to behave like a frozen teacher, from features of the teacher that were "
        "cached once.",
        _table(
            ("", ""),
            [
                ("student", f"{record['architecture']}, {parameters / 1e6:.2f} M parameters"),
                ("embedding", f"{student.embedding_dim} numbers, not normalised; compare them by cosine"),
                *(
                    [("logits", f"of {len(student.classes)} classes; they are what it gives")]
                    if student.classes
                    else []
                ),
                (f"{like.kind}s", shown),
                ("teacher", f"{teacher}, fingerprint `{config.get('teacher', 'unknown')}`"),
                *(("data", line) for line in _data(config)),
                *(
                    ("trained on", f"{of['samples']:,} {like.kind}s, {of['held_out']:,} held out; {of['views']}")
                    for of in trained_on
                ),
                ("method", str(record.get("method", "unknown"))),
                *([("unfinished", record["unfinished"])] if "unfinished" in record else []),
                *([("kept on the way", "after {epoch:g} epochs, {step:,} steps".format(**at))] if at else []),
            ],
        ),
        "## Loading",
        *(_from_hub(repository, written) if repository else [_from_here(written)]),
        f"Checked when it was written: {checked}.",
        "## Preprocessing",
        preparing or _of_pixels(student, record),
        *written.sections,
        "## Metrics",
        *_metrics(run, results, at.get("step")),
        "## Training",
        f"```toml\n{tomli_w.dumps({key: public(value) for key, value in config.items()})}```",
        "## Licence",
        _licence(named, str(config.get("student", "")), bool(config.get("pretrained"))),
    ]
    path.write_text("\n\n".join(text) + "\n")


def _of_pixels(student: Student, record: dict[str, Any]) -> str:
    code = preprocessing_code(Preprocess.from_dict(record["preprocess"]))
    return (
        f"```python\n{code}\n```\n\n`{student.gives} = model(pixels(Image.open(path)))`. featcache itself rounds the crop to whole "
        "pixels of the resized image, so a border may differ by a pixel."
    )


def _from_here(written: Written) -> str:
    return (
        f'Without featcache, from the folder that this file lies in:\n\n```python\nfolder = "."\n{written.loading}\n```'
    )


def _from_hub(repository: str, written: Written) -> list[str]:
    """By its library's own way, where it has one; of the files else."""
    name, _, revision = repository.partition("@")
    given = f'"{name}"' + (f', revision="{revision}"' if revision else "")
    fetched = f"from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({given})"
    own = written.of_hub.replace("{name}", repository)
    code = own or f"{fetched}\n{written.loading}"
    return [
        f"Without featcache:\n\n```python\n{code}\n```",
        *([f"What follows takes the files in a folder:\n\n```python\n{fetched}\n```"] if own else []),
        f"With featcache: `featcache extract IMAGES --teacher run:hf-hub:{repository}`.",
    ]


def preprocessing_code(preprocess: Preprocess) -> str:
    """Python that makes `pixels`, from a PIL image to a normalised batch of one: turned as its EXIF data says, of 8 bits."""
    size, squash = preprocess.size, preprocess.mode == "squash"
    share = preprocess.crop / preprocess.resize
    sides = "image.width, image.height" if squash else "min(image.size), min(image.size)"
    return f"""import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import normalize, pil_to_tensor

def pixels(image):
    if image.mode[0] in "IF":  # more than 8 bits, of which Pillow clips the bright ones
        raise ValueError("convert the image to 8 bits first")
    image = ImageOps.exif_transpose(image).convert("RGB")
    width, height = ({share!r} * side for side in ({sides}))
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = left, top, left + width, top + height
    image = image.resize(({size}, {size}), Image.Resampling.{preprocess.interpolation.upper()}, box=box)
    return normalize(pil_to_tensor(image) / 255, {list(preprocess.mean)}, {list(preprocess.std)}).unsqueeze(0)"""


def _data(config: dict[str, Any]) -> list[str]:
    """A line a corpus: its spec and how many rows its store has, where the store can still be read."""
    stores, corpora = (
        given if isinstance(given, list) else [given] for given in (config.get("store", []), config.get("corpus", []))
    )
    lines = []
    for i, corpus in enumerate(corpora):
        try:
            store = FeatureStore(stores[i])
            shown = "texts" if store.manifest.encoder.preprocess.get("input") == "texts" else "images"
            rows = f"{len(store.ok):,} {shown}, {len(store.failed):,} failed and left out"
        except (ValueError, OSError, IndexError):
            rows = "its store can no longer be read"
        lines.append(f"{public(corpus)}: {rows}")
    return lines


def _metrics(run: Run, results: Sequence[dict[str, Any]], step: int | None) -> list[str]:
    """Those of the last epoch that ended by that step, of the last of all when it is None; and the results'."""
    metrics = [each for each in run.metrics if step is None or each["step"] <= step]
    final = metrics[-1] if metrics else {}
    parts = [
        "At the end of training:" if step is None else "By then:",
        _table(("metric", "value"), [(name, f"{value:.6g}") for name, value in final.items()]),
    ]
    for result in results:
        parameters = {key: value for key, value in result.get("parameters", {}).items() if key != "chance"}
        settings = ", ".join(f"{key} {value}" for key, value in parameters.items())
        parts += [
            f"`evalsuite {result['command']}`" + (f" ({settings}):" if settings else ":"),
            _table(
                ("metric", "value", "95 % interval"),
                [
                    (name, f"{m['value']:.4f}", "{:.4f}–{:.4f}".format(*m["ci95"]) if m.get("ci95") else "")
                    for name, m in result["metrics"].items()
                    if not name.startswith("per_class/")
                ],
            ),
        ]
    return parts


def _licence(teacher: str, student: str, pretrained: bool) -> str:
    text = (
        f"These weights were learnt from what {public(teacher)} says of the data above; the terms of that model and of that data "
        "may bind them too. Look them up before you share or sell."
    )
    for name in [teacher, *([student] if pretrained else [])]:
        library, _, rest = name.partition("/")
        found = recorded_licence(library, rest)
        text += f" {library} records `{found}` for {public(name)}." if found else ""
    return text


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

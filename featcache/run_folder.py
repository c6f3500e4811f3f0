"""Students in run folders, as everybody reads them: that of a finished run, `FOLDER`, those that were kept on the way,
`FOLDER@epoch=N` or `FOLDER@step=N`, and those that `distill push` took to the hub, `hf-hub:USER/NAME[@REVISION]`."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

RECORD, WEIGHTS = "student.json", "student.safetensors"
TOKENIZER = "tokenizer.json"
"""Of a student of texts, unless it takes bytes."""
METRICS = "metrics.jsonl"
LOCK = ".lock"
"""Locked while a process trains in the folder; the operating system lets go of it when the process dies."""
FAILED = "failed.json"
"""Why the process that trained there last ended with an error; gone once another goes on."""
BESIDE = (TOKENIZER, "config.toml", "metrics.jsonl", "mapping.safetensors", "head.safetensors")
"""What else a pushed student has of its run, where the run has it."""
HUB = "hf-hub:"
SNAPSHOTS = "snapshots"
"""Of the students kept on the way: one file of weights each, whose record is in its metadata."""
EPOCH_DIGITS = 4
"""Behind the point: a third of an epoch is 0.3333."""
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A student that was kept after so many epochs, which may be a fraction, and steps."""

    path: Path
    record: dict[str, Any]
    epoch: float
    step: int


def on_disk(spec: str | os.PathLike[str]) -> str:
    """The spec of a local folder: as it is given, or of a student on the hub the folder in the hub's cache, fetched where it
    is not there yet, whose name is the commit.

    Raises:
        ValueError: there is none, or neither a network nor all of it in the cache.
    """
    text = os.fspath(spec).removeprefix("run:") if os.fspath(spec).startswith(f"run:{HUB}") else os.fspath(spec)
    if not text.startswith(HUB):
        return text
    from featcache.repository import Repository, fetch_folder

    repository = Repository.parse(text.removeprefix(HUB), "model")
    folder = fetch_folder(
        repository, text, (RECORD, WEIGHTS, *BESIDE), (RECORD, WEIGHTS),
        failed="the student cannot be had", remedy="or give the run's folder",
    )  # fmt: skip
    if missing := [name for name in (RECORD, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(
            f"{text}: holds no {' and no '.join(missing)}, which `distill push` puts there; a model of timm's own is "
            f"timm/{HUB}{repository}"
        )
    return str(folder)


def pinned(spec: str) -> str:
    """A spec `run:…` of a student on the hub with the commit that its revision means now; any other as it is."""
    if not spec.startswith(f"run:{HUB}"):
        return spec
    return f"{spec.partition('@')[0]}@{Path(on_disk(spec)).name}"


def split_spec(spec: str | os.PathLike[str]) -> tuple[Path, str, float]:
    """Folder, "epoch" or "step", and its number; ("", 0) for the student of a finished run.

    Raises:
        ValueError: it is no number.
    """
    text = os.fspath(spec)
    match = re.fullmatch(r"(.+)@(epoch|step)=([^@]*)", text, re.DOTALL)
    if match is None or os.path.exists(text):  # a folder may be called so
        return Path(text), "", 0.0
    try:
        return Path(match[1]), match[2], float(match[3])
    except ValueError:
        raise ValueError(f"{text}: {match[3]!r} is no number; give @{match[2]}=N") from None


def student_files(spec: str | os.PathLike[str]) -> list[str]:
    """The files that a student consists of: record and weights, or both in one, and of texts its tokeniser.

    Raises:
        ValueError: see `split_spec`, `find`.
    """
    folder, of, _ = split_spec(spec)
    tokenizer = [os.path.join(folder, TOKENIZER)] if os.path.isfile(os.path.join(folder, TOKENIZER)) else []
    own = [str(find(spec).path)] if of else [os.path.join(folder, RECORD), os.path.join(folder, WEIGHTS)]
    return own + tokenizer


def find(spec: str | os.PathLike[str]) -> Snapshot:
    """The snapshot that `FOLDER@epoch=N` or `FOLDER@step=N` means.

    Raises:
        ValueError: that is not kept; the message names those that are.
    """
    folder, of, number = split_spec(spec)
    kept = snapshots(folder)
    for each in kept:
        if abs((each.epoch if of == "epoch" else each.step) - number) < 10**-EPOCH_DIGITS:
            return each
    shown = [f"epoch {each.epoch:g} (step {each.step})" for each in kept[:SHOWN]]
    more = f", … ({len(kept)} in all)" if len(kept) > SHOWN else ""
    remedy = f"it keeps {', '.join(shown)}{more}" if kept else "it keeps none: fit with --set keep_checkpoints=EPOCHS"
    raise ValueError(f"{folder}: keeps no student of {of} {number:g}; {remedy}")


def snapshots(folder: Path) -> list[Snapshot]:
    """Oldest first.

    Raises:
        ValueError: one is damaged.
    """
    found = []
    for path in sorted((folder / SNAPSHOTS).glob("step-*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                record = json.loads(file.metadata()["record"])
            at = record["snapshot"]
            found.append(Snapshot(path=path, record=record, epoch=float(at["epoch"]), step=int(at["step"])))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is damaged ({type(error).__name__}); remove it") from None
    return found

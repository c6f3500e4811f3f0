"""A student on the Hugging Face hub: an export and the run folder that it came from, in one repository."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from distill.exporting.export import chosen, export
from distill.training.run import Run
from featcache.public import public
from featcache.repository import CARD, Pushed, Repository, push_folder, require_token
from featcache.run_folder import BESIDE, RECORD, WEIGHTS, on_disk
from featcache.student import Student

OWNED = (RECORD, WEIGHTS, *BESIDE, "model.safetensors", "config.json", "hubconf.py")
"""What a push may leave; the card stays whatever comes."""


@dataclass(frozen=True, kw_only=True)
class PushedStudent(Pushed):
    """What `push` left on the hub.

    Attributes:
        hub_code: Python by which the student's library loads it from there; "" where that takes the code of its card.
    """

    hub_code: str


def push(
    run: Run | str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str = "",
    message: str = "",
    licence: str | None = None,
    overwrite: bool = False,
    unfinished: bool = False,
    trust_code: bool = False,
    results: Sequence[str | os.PathLike[str]] = (),
) -> PushedStudent:
    """Push the student of a run to the hub, as model `USER/NAME`: what `export` writes, and what `run:hf-hub:USER/NAME` reads,
    an encoder of the same fingerprint. Folders of this machine, passwords and tokens are in none of it.

    Args:
        run, unfinished, trust_code, results: as of `export`.
        repository: USER/NAME; made where there is none, visible to you alone with `private`.
        revision: a branch, made where there is none; main when "".
        message: of the commit.
        licence: for the card's metadata, as the hub names it; what you may give is for you to find out.
        overwrite: replace another student that is there, by a new commit.

    Raises:
        ValueError, ConnectionError: see `push_folder`; or there is no such student.
    """
    place = _place(repository, revision)
    spec = on_disk(run.path if isinstance(run, Run) else run)
    of, student, record = chosen(spec, unfinished=unfinished, trust_code=trust_code)
    with tempfile.TemporaryDirectory(prefix="featcache-push-") as around:
        folder = Path(around) / "student"
        made = export(
            spec,
            folder,
            unfinished=unfinished,
            trust_code=trust_code,
            results=results,
            repository=str(place),
        )
        _write_run(folder, of, student, record)
        _write_metadata(folder / CARD, student, made.hub_code)
        message = message or f"{record['architecture']}, taught by {public(record.get('teacher', 'a teacher'))}"
        pushed = push_folder(
            folder, place, owned=OWNED, private=private, message=message, licence=licence, overwrite=overwrite
        )
    return PushedStudent(**vars(pushed), hub_code=made.hub_code.replace("{name}", str(place)))


def preview_push(
    run: Run | str | os.PathLike[str],
    repository: str,
    *,
    revision: str = "",
    unfinished: bool = False,
    trust_code: bool = False,
) -> tuple[Repository, int]:
    """Where `push` would push, and the bytes of the student's weights; refused as it would be, but for what the hub alone knows.
    Nothing is written, and the hub not asked."""
    place = _place(repository, revision)
    spec = on_disk(run.path if isinstance(run, Run) else run)
    _, student, _ = chosen(spec, unfinished=unfinished, trust_code=trust_code)
    return place, sum(tensor.nbytes for tensor in student.state_dict().values())


def _place(repository: str, revision: str) -> Repository:
    """Raises ValueError where it is no repository, or there is no token to push with."""
    place = Repository.parse(f"{repository}@{revision}" if revision else repository, "model")
    require_token(place)
    return place


def _write_run(folder: Path, run: Run, student: Student, record: dict[str, Any]) -> None:
    """What a run folder has of a finished run, its configuration as others may read it."""
    at = record.get("snapshot", {}).get("step")
    pushed = Run(folder)
    pushed.log([each for each in run.records if at is None or each.get("step", 0) <= at])
    (folder / "config.toml").write_text(tomli_w.dumps(public(run.config or {})), encoding="utf-8")
    for name in ("mapping.safetensors", *(["head.safetensors"] if at is None else [])):
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, folder / name)
    pushed.finish(student.state_dict(), public(record))


def _write_metadata(card: Path, student: Student, hub_code: str) -> None:
    from huggingface_hub import metadata_save

    kind = "image-classification" if student.classes else "image-feature-extraction"
    library = {"library_name": "timm"} if hub_code else {}
    metadata_save(card, {**library, "pipeline_tag": kind, "tags": ["featcache", "knowledge-distillation"]})

"""The run folder: everything a run leaves behind, each file complete or absent."""

import contextlib
import errno
import json
import logging
import os
import shutil
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

log = logging.getLogger("distill")

KEEP = 2
"""Checkpoints kept; older ones go. The last but one is for a disk that loses the last."""


class Run:
    """A run folder. `student.json` is written last: a run that has it is finished.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    @property
    def finished(self) -> bool:
        return all((self.path / name).exists() for name in ("student.json", "student.safetensors"))

    @property
    def config(self) -> dict[str, Any] | None:
        """The resolved configuration, or None in a folder that holds no run."""
        try:
            return tomllib.loads((self.path / "config.toml").read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record an epoch, oldest first."""
        file = self.path / "metrics.jsonl"
        try:
            return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        except ValueError:
            raise ValueError(f"{file}: is damaged; remove it, then what it tells of earlier epochs is lost") from None

    def open(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Claim the folder for `config`.

        Raises:
            ValueError: it holds another run, or this one and `resume` is not set.
        """
        # Through TOML and back, so that lists and tuples compare equal.
        config = tomllib.loads(tomli_w.dumps(config))
        if self.path.is_file():
            raise ValueError(f"{self.path}: is a file; choose another --out")
        if self.config is None:
            if self.path.exists() and any(p.suffix != ".partial" for p in self.path.iterdir()):
                raise ValueError(f"{self.path}: is not empty and holds no run; choose another --out")
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise ValueError(f"{self.path}: lies below a file; choose another --out") from None
            _atomically(self.path / "config.toml", lambda part: part.write_text(tomli_w.dumps(config)))
            (self.path / "checkpoints").mkdir()
        elif changed := difference(self.config, config):
            begun = (
                "choose another --out"
                if self.checkpoints or self.finished
                else "nothing is trained there yet: remove it"
            )
            raise ValueError(f"{self.path}: holds a run with another configuration ({changed}); {begun}")
        elif not resume and not self.finished:
            raise ValueError(
                f"{self.path}: holds this run, unfinished; continue it with --resume, or choose another --out"
            )

    def give_up(self) -> None:
        """Leave the folder as it was before `open`: nothing has been trained."""
        (self.path / "checkpoints").rmdir()
        (self.path / "config.toml").unlink()
        with contextlib.suppress(OSError):  # other files were there before
            self.path.rmdir()

    def log(self, records: list[dict[str, Any]]) -> None:
        _atomically(
            self.path / "metrics.jsonl", lambda part: part.write_text("".join(json.dumps(r) + "\n" for r in records))
        )

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """After `step` steps; older checkpoints but one go, and what a killed process left half-written."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        _atomically(folder / f"step-{step:08d}.pt", lambda part: torch.save(state, part))
        for old in [*self.checkpoints[:-KEEP], *folder.glob("*.partial")]:
            old.unlink()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest that is whole, or None where there is none yet.

        Raises:
            RuntimeError: there are some, and all are damaged.
        """
        for path in reversed(self.checkpoints):
            try:
                with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
                    whole = archive.testzip() is None
                if whole:
                    return torch.load(path, map_location="cpu", weights_only=True)
            except (zipfile.BadZipFile, RuntimeError, EOFError, OSError):
                pass
            log.warning("%s: is damaged, so it is passed over", path)
        if self.checkpoints:
            raise RuntimeError(
                f"{self.path / 'checkpoints'}: every checkpoint is damaged; train again with another --out"
            )
        return None

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.pt"))

    def refuse_small_disk(self, checkpoint_bytes: int) -> None:
        """Those kept and the one being written must fit.

        Raises:
            OSError: they do not.
        """
        folder = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        need = (KEEP + 1 - len(self.checkpoints)) * checkpoint_bytes
        free = shutil.disk_usage(folder).free
        if need > free:
            raise OSError(
                errno.ENOSPC,
                f"{self.path}: {need / 1e6:,.1f} MB of checkpoints to write, the disk of {folder} has "
                f"{free / 1e6:,.1f} MB free; make room or choose another --out",
            )

    def save_tensors(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        _atomically(self.path / name, lambda part: save_file(contiguous, part, metadata))

    def save_mapping(self, tensors: Mapping[str, torch.Tensor], report: Mapping[str, float]) -> None:
        """The method's own tensors; what `prepare` reported goes along, as JSON in the file's metadata."""
        self.save_tensors("mapping.safetensors", tensors, {"report": json.dumps(report)})

    def load_mapping(self) -> tuple[dict[str, torch.Tensor], dict[str, float]] | None:
        """What `save_mapping` was given; None where there is no such file, or none that can be read."""
        try:
            with safe_open(self.path / "mapping.safetensors", "pt") as file:
                report = {name: float(value) for name, value in json.loads(file.metadata()["report"]).items()}
                return {name: file.get_tensor(name) for name in file.keys()}, report  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):  # it can be fitted again
            return None

    def finish(self, student: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        self.save_tensors("student.safetensors", student)
        _atomically(self.path / "student.json", lambda part: part.write_text(json.dumps(record, indent=2) + "\n"))


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, sync, then rename."""
    part = path.with_name(f"{path.name}.partial")
    write(part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, digests by their beginning; "" where both name the same, by whatever path. A store of the same digest
    is the same wherever it lies."""
    was, now = (json.loads(json.dumps(each)) for each in (was, now))  # tuples and lists compare equal
    keys = sorted(key for key in {*was, *now} if _resolved(key, was.get(key)) != _resolved(key, now.get(key)))
    if was.get("store_digest") == now.get("store_digest"):
        keys = [key for key in keys if key != "store"]
    return ", ".join(f"{key}: {_short(key, was.get(key))!r} there, {_short(key, now.get(key))!r} here" for key in keys)


def _resolved(key: str, value: Any) -> Any:
    """Of a store or corpus, the path at its end (`mixed:8000:photos/`) made absolute; of a list, of each."""
    if isinstance(value, list):
        return [_resolved(key, each) for each in value]
    if key not in ("store", "corpus") or value is None or "://" in value:
        return value
    source, _, path = value.rpartition(":")
    return source, os.path.realpath(path)


def _short(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_short(key, each) for each in value]
    return value[:8] if key in ("store_digest", "teacher") and value else value

"""The run folder: everything a run leaves behind, each file complete or absent."""

import contextlib
import errno
import json
import logging
import os
import shutil
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import filelock
import safetensors.torch
import tomli_w
import torch
from safetensors import SafetensorError, safe_open

from featcache.disk.durable import is_held, replacing
from featcache.disk.refusals import refuse_unmakeable, writing
from featcache.run_folder import FAILED, LOCK, METRICS, RECORD, SNAPSHOTS, TOKENIZER, WEIGHTS

log = logging.getLogger("distill")

KEEP = 2
"""Checkpoints kept; older ones go. The last but one is for a disk that loses the last."""
BUSY = "{}: another process is training in it; wait for it, or choose another --out"
BELOW_FILE = "{}: lies below a file; choose another --out"
RESUMES = "continue with `distill fit --out {} --resume`: what is done is kept"


class Run:
    """A run folder. `student.json` is written last: a run that has it is finished.

    A process that trains in it does so within `with run:`. At its end, others may; and where that process had made the
    folder and failed before it `begun`, the folder goes.

    Attributes:
        path: the folder.
        begun: whether something has been trained since `open`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.begun = Path(path), False
        self._lock: filelock.BaseFileLock | None = None
        self._made: list[Path] | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        failed = kind is not None and issubclass(kind, Exception | KeyboardInterrupt)
        if failed and self._made is not None and not self.begun:
            self._give_up(self._made)
        if self._lock:
            if self.begun and kind is not None and issubclass(kind, Exception):
                with contextlib.suppress(OSError):  # a full disk, say
                    self._write(FAILED, json.dumps({"reason": " ".join(f"{error}".split()) or kind.__name__}) + "\n")
            if self.finished:
                (self.path / LOCK).unlink(missing_ok=True)
            self._lock.release()

    @property
    def finished(self) -> bool:
        return all((self.path / name).exists() for name in (RECORD, WEIGHTS))

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
        return [record for record in self.records if "epoch" in record]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All of `metrics.jsonl`, oldest first: of each epoch one with its number, "epoch"; and of groups of steps, the
        last of which is "step", the means of the losses."""
        file = self.path / METRICS
        try:
            return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        except ValueError:
            raise ValueError(f"{file}: is damaged; remove it, then what it tells of earlier epochs is lost") from None

    def open(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Claim the folder for `config`. One that is finished is left as it is.

        Raises:
            ValueError: it holds another run, or this one and `resume` is not set, or another process trains in it.
            OSError: it cannot be written.
        """
        # Through TOML and back, so that lists and tuples compare equal.
        config = tomllib.loads(tomli_w.dumps(config))
        self._refuse_place()
        made: list[Path] = []
        if self.config is None:
            made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            try:
                with writing(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise ValueError(BELOW_FILE.format(self.path)) from None
        if not self.finished:
            self._take_lock()
            (self.path / FAILED).unlink(missing_ok=True)
        if self.config is None:
            self._made = made
            self._write("config.toml", tomli_w.dumps(config))
            (self.path / "checkpoints").mkdir(exist_ok=True)
        else:
            self._refuse_config(self.config, config, resume)
            if not self.finished and _places(self.config) != _places(config):  # moved: the next --resume finds it
                self._write("config.toml", tomli_w.dumps(config))

    def refuse(self, config: Mapping[str, Any], *, resume: bool) -> None:
        """Raises what `open` would; nothing is made, claimed or written."""
        config = tomllib.loads(tomli_w.dumps(config))
        self._refuse_place()
        try:
            with writing(self.path):
                refuse_unmakeable(self.path)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(BELOW_FILE.format(self.path)) from None
        if not self.finished and is_held(self.path / LOCK):
            raise ValueError(BUSY.format(self.path))
        if self.config is not None:
            self._refuse_config(self.config, config, resume)

    def _refuse_place(self) -> None:
        """Raises ValueError where something else is there than a run, or nothing."""
        if self.path.is_file():
            raise ValueError(f"{self.path}: is a file; choose another --out")
        others = self.path.iterdir() if self.config is None and self.path.exists() else ()
        if any(p.suffix != ".partial" and p.name != LOCK for p in others):
            raise ValueError(f"{self.path}: is not empty and holds no run; choose another --out")

    def _refuse_config(self, was: Mapping[str, Any], config: Mapping[str, Any], resume: bool) -> None:
        """Raises ValueError where the run there is another one, or `resume` is not set for one that is not finished."""
        if changed := difference(was, config):
            begun = (
                f"choose another --out (and --student run:{self.path} to train its student further)"
                if self.finished
                else "choose another --out"
                if self.checkpoints
                else "nothing is trained there yet: remove it"
            )
            raise ValueError(f"{self.path}: holds a run with another configuration ({changed}); {begun}")
        if not resume and not self.finished:
            raise ValueError(
                f"{self.path}: holds this run, unfinished; continue it with --resume, or choose another --out"
            )

    def _take_lock(self) -> None:
        """Raises ValueError where another process has it."""
        lock = filelock.FileLock(self.path / LOCK, blocking=False)
        try:
            with writing(self.path):
                lock.acquire()
        except filelock.Timeout:
            raise ValueError(BUSY.format(self.path)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            log.warning("%s: this disk has no locks; see to it that no other process trains there", self.path)
            return
        self._lock = lock

    def _give_up(self, made: Iterable[Path]) -> None:
        """Leave the folder as it was before `open`; those in `made` were not there, the run's own first."""
        for name in ("config.toml", "mapping.safetensors", TOKENIZER, LOCK, "events.out.tfevents.*", "*.partial"):
            for file in self.path.glob(name):
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others may have put something there
            if (self.path / "checkpoints").exists():
                (self.path / "checkpoints").rmdir()
            for folder in made:
                folder.rmdir()

    def log(self, records: list[dict[str, Any]]) -> None:
        self._write(METRICS, "".join(json.dumps(r) + "\n" for r in records))

    def save_checkpoint(self, step: int, state: dict[str, Any], keep: int = KEEP) -> None:
        """After `step` steps; all but the newest `keep` checkpoints go, and what a killed process left half-written."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        self._write(f"checkpoints/step-{step:08d}.pt", lambda file: torch.save(state, file), _bytes_of(state))
        for old in [*self.checkpoints[:-keep], *folder.glob("*.partial")]:
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

    def refuse_small_disk(self, checkpoint_bytes: int, snapshots: int = 0, snapshot_bytes: int = 0) -> None:
        """Those kept and the one being written must fit, and so many snapshots.

        Raises:
            OSError: they do not.
        """
        folder = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        missing = max(0, snapshots - len(list((self.path / SNAPSHOTS).glob("step-*.safetensors"))))
        need = (KEEP + 1 - len(self.checkpoints)) * checkpoint_bytes + missing * snapshot_bytes
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
        # Each with memory of its own: safetensors refuses tied weights, and parts of a larger tensor.
        own = {
            key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for key, value in tensors.items()
        }
        self._write(name, safetensors.torch.save(own, metadata))

    def save_snapshot(self, step: int, student: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """A student that is kept whatever comes, as `featcache.run_folder` reads it. What a killed process left half-written
        is written anew by the one that goes on."""
        (self.path / SNAPSHOTS).mkdir(exist_ok=True)
        self.save_tensors(f"{SNAPSHOTS}/step-{step:08d}.safetensors", student, {"record": json.dumps(record)})

    def save_tokenizer(self, content: str) -> None:
        """What makes token ids of texts, which the student needs wherever it goes."""
        self._write(TOKENIZER, content)

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

    def finish(self, student: Mapping[str, torch.Tensor], record: Mapping[str, Any], head: bytes | None = None) -> None:
        """The student's weights, its classifier as `featcache.head.Head` reads it where it has one, and its record, last."""
        self.save_tensors(WEIGHTS, student)
        if head:
            self._write("head.safetensors", head)
        self._write(RECORD, json.dumps(record, indent=2) + "\n")

    def _write(self, name: str, content: str | bytes | Callable[[IO[bytes]], Any], size: int = 0) -> None:
        """Write beside the file, sync, then rename: it is whole or as it was.

        Args:
            content: or what writes it, then of about `size` bytes.

        Raises:
            OSError: the disk is full, or refuses; nothing is left of what was written.
        """
        path = self.path / name
        data = content.encode() if isinstance(content, str) else content
        again = RESUMES.format(self.path) if self.begun or self._made is None else "run the same command again"
        need = size if callable(data) else len(data)
        with writing(path, again, need=need), replacing(path, alone=True) as part, part.open("wb", buffering=0) as file:
            kept = _KeepsError(file)
            try:
                data(kept) if callable(data) else kept.write(data)  # type: ignore[arg-type]
            except RuntimeError:  # torch's, about a file that it finds too short
                if kept.error:
                    raise kept.error from None
                raise


class _KeepsError:
    """A file for `torch.save`, which loses what the disk said.

    Attributes:
        error: the first.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        try:
            while len(rest):  # a nearly full disk takes a part
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = self.error or error
            raise
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        pass


def _bytes_of(state: Any) -> int:
    """Of the tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    inside = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return sum(map(_bytes_of, inside))


def difference(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, digests by their beginning; "" where both name the same, by whatever path. Stores of the same digests
    are the same wherever they lie, and so are their images: each is held to the content that the teacher saw."""
    was, now = (json.loads(json.dumps(each)) for each in (was, now))  # tuples and lists compare equal
    keys = sorted(key for key in {*was, *now} if _resolved(key, was.get(key)) != _resolved(key, now.get(key)))
    if was.get("store_digest") == now.get("store_digest"):
        moved = {"store"} if _images(was) != _images(now) else {"store", "corpus"}
        keys = [key for key in keys if key not in moved]
    return ", ".join(f"{key}: {_short(key, was.get(key))!r} there, {_short(key, now.get(key))!r} here" for key in keys)


def _places(config: Mapping[str, Any]) -> list[Any]:
    return [_resolved(key, config.get(key)) for key in ("store", "corpus")]


def _images(config: Mapping[str, Any]) -> list[Any]:
    """Of each store, which images: "original", those that it "keeps", or the path of another store that keeps some."""
    stores, corpora = ([each] if isinstance(each, str) else each or [] for each in map(config.get, ("store", "corpus")))
    places = [
        (_resolved("store", store), _resolved("store", str(corpus).removeprefix("store:")), str(corpus))
        for store, corpus in zip(stores, corpora, strict=False)
    ]
    return [
        "original" if not spec.startswith("store:") else "keeps" if images == store else images
        for store, images, spec in places
    ]


def _resolved(key: str, value: Any) -> Any:
    """Of a store or corpus, the path at its end (`mixed:8000:photos/`) made absolute; of a list, of each."""
    if isinstance(value, list):
        return [_resolved(key, each) for each in value]
    if key not in ("store", "corpus", "head") or value is None or "://" in value:
        return value
    source, _, path = value.rpartition(":")
    return source, os.path.realpath(path)


def _short(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_short(key, each) for each in value]
    return value[:8] if key in ("store_digest", "teacher") and value else value

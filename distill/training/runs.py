"""Which runs there are and where each stands, read from their folders while they train; without torch."""

import contextlib
import json
import math
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featcache.disk.durable import is_held
from featcache.run_folder import FAILED, LOCK, METRICS, RECORD, WEIGHTS

STATES = ("running", "finished", "interrupted", "failed", "damaged")
REMOVE = "remove it, then what it tells of earlier epochs is lost"
DEEPEST = 4
"""Folders below the one that is searched in which runs are looked for."""
HELD_OUT = "holdout/"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""How the names of a norm's running statistics end, which are no parameters."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands.

    Attributes:
        path: its folder.
        state: "running" while a process of this machine trains in it; "finished"; "interrupted", to be continued with
            --resume; "failed" or "damaged", for `reason`.
        method, student, seed, epochs: as its config.toml says; None of a damaged run.
        done: epochs that are finished.
        step: the newest of which a loss is known, 0 before.
        loss: the newest.
        held_out: the newest figures on held-out samples, by name.
        parameters: numbers that the student of a finished run consists of, running statistics left out.
        seconds_left: of a running one, as its newest two checkpoints have it.
        records: all of metrics.jsonl, oldest first.
    """

    path: Path
    state: str
    reason: str = ""
    method: str | None = None
    student: str | None = None
    seed: int | None = None
    epochs: int | None = None
    done: int = 0
    step: int = 0
    loss: float | None = None
    held_out: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    seconds_left: float | None = None
    records: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def curve(self, name: str) -> list[float]:
        """What the records have under this name, oldest first; of the loss those of steps, where there are some."""
        every = [record for record in self.records if isinstance(record.get(name), int | float)]
        of_steps = [record for record in every if "epoch" not in record]
        return [float(record[name]) for record in (of_steps if name == "loss" and of_steps else every)]

    def to_json(self) -> dict[str, Any]:
        """All but the records."""
        return {**{key: value for key, value in asdict(self).items() if key != "records"}, "path": str(self.path)}


def runs(*folders: str | os.PathLike[str]) -> list[RunState]:
    """The runs in these folders (by default the working one), each of which may be a run itself; four folders deep, by name.

    Raises:
        ValueError: there is no such folder.
    """
    found: dict[Path, RunState] = {}
    for folder in map(Path, folders or (".",)):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give a run, or a folder of runs")
        for path in _run_folders(folder, DEEPEST):
            found.setdefault(path, state_of(path))
    return list(found.values())


def watch(*folders: str | os.PathLike[str], every: float = 2.0, sleep: Any = time.sleep) -> Iterator[list[RunState]]:
    """The runs in these folders as they are, again after each `every` seconds; for the last time when none is running.

    Raises:
        ValueError: there is no such folder, or no run in it.
    """
    while True:
        now = runs(*folders)
        if not now:
            raise ValueError(
                f"{', '.join(map(str, folders)) or '.'}: no run is there; `distill fit --out FOLDER` begins one"
            )
        yield now
        if not any(each.state == "running" for each in now):
            return
        sleep(every)


def state_of(path: str | os.PathLike[str]) -> RunState:
    """Of the run in this folder. What cannot be read makes it damaged; nothing is raised."""
    path = Path(path)
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        missing = [name for name in ("student", "method", "epochs", "batch_size", "seed") if name not in config]
        if missing:
            raise ValueError(f"it does not name {', '.join(missing)}")
    except FileNotFoundError:
        return RunState(path=path, state="damaged", reason="config.toml is missing")
    except (OSError, ValueError) as error:
        return RunState(path=path, state="damaged", reason=f"config.toml: {error}")
    given: dict[str, Any] = {name: config[name] for name in ("student", "method", "epochs", "seed")}
    # Backwards in the order in which a run writes them: one that ends in between has finished, with all its epochs.
    held, finished = is_held(path / LOCK), (path / RECORD).exists()
    try:
        records = _records(path / METRICS)
    except (OSError, ValueError) as error:
        return RunState(path=path, state="damaged", reason=f"{METRICS}: {error}; {REMOVE}", **given)
    epochs = [record for record in records if "epoch" in record]
    held_out = [
        {key.removeprefix(HELD_OUT): value for key, value in record.items() if key.startswith(HELD_OUT)}
        for record in epochs
    ]
    given |= {
        "records": records,
        "done": int(epochs[-1]["epoch"]) if epochs else 0,
        "step": int(records[-1].get("step", 0)) if records else 0,
        "loss": records[-1].get("loss") if records else None,
        "held_out": next((each for each in reversed(held_out) if each), {}),
    }
    if finished:
        try:
            return RunState(path=path, state="finished", parameters=_parameters(path / WEIGHTS), **given)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return RunState(path=path, state="damaged", reason=f"{WEIGHTS}: {error}", **given)
    if held:
        return RunState(path=path, state="running", seconds_left=_seconds_left(path, epochs, config["epochs"]), **given)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        reason = str(json.loads((path / FAILED).read_text(encoding="utf-8"))["reason"])
        return RunState(path=path, state="failed", reason=reason, **given)
    return RunState(path=path, state="interrupted", **given)


def _run_folders(folder: Path, deep: int) -> Iterator[Path]:
    """Those of runs, damaged ones too, sorted; what lies inside a run or a store is not looked at."""
    if _looks_like_run(folder):
        yield folder
        return
    if deep and not (folder / "zarr.json").exists():
        with contextlib.suppress(OSError):  # not ours to read
            for each in sorted(folder.iterdir()):
                if each.is_dir() and not each.name.startswith(".") and not each.is_symlink():
                    yield from _run_folders(each, deep - 1)


def _looks_like_run(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        return {"student", "method", "store"} <= config.keys() or _has_parts(folder)
    return _has_parts(folder)


def _has_parts(folder: Path) -> bool:
    """At least two things that only a run folder has together."""
    return sum((folder / name).exists() for name in (METRICS, RECORD, WEIGHTS, "checkpoints", "config.toml")) >= 2


def _records(file: Path) -> list[dict[str, Any]]:
    """None where there is no such file yet. Raises ValueError for a line that is none of ours."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = [json.loads(line) for line in lines]
    if not all(
        isinstance(record, dict) and isinstance(record.get("step"), int) and "loss" in record for record in records
    ):
        raise ValueError("a line is no record of a step")
    return records


def _parameters(file: Path) -> int:
    """Numbers in a safetensors file, by its header alone; running statistics are left out."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if not 2 <= size <= file.stat().st_size:
            raise ValueError("it is cut short")
        header = json.loads(opened.read(size))
    tensors = {name: each for name, each in header.items() if name != "__metadata__"}
    if 8 + size + max((each["data_offsets"][1] for each in tensors.values()), default=0) > file.stat().st_size:
        raise ValueError("it is cut short")
    return sum(math.prod(each["shape"]) for name, each in tensors.items() if not name.endswith(_STATISTICS))


def _seconds_left(path: Path, epochs: Sequence[Mapping[str, Any]], of: int) -> float | None:
    """As fast as between the newest two checkpoints; None before there are two, and an epoch is done."""
    with contextlib.suppress(OSError, ValueError):  # one goes when a newer one comes
        saved = sorted((path / "checkpoints").glob("step-*.pt"))[-2:]
        (first, began), (last, ended) = ((int(each.stem[5:]), each.stat().st_mtime) for each in saved)
        if epochs and last > first:
            steps = of * epochs[-1]["step"] / epochs[-1]["epoch"]
            return max(0.0, (steps - last) * (ended - began) / (last - first) - (time.time() - ended))
    return None

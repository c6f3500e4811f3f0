"""A sweep: methods × students × seeds × dimensions over one cache, from one TOML file, into one table.

`distill sweep --help` shows such a file. This module reads it and makes the table; training and evaluating is the
caller's, see `distill sweep`.
"""

import itertools
import math
import os
import re
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.training.config import METHOD, FitConfig
from distill.training.setup import open_all, set_up
from distill.training.step import make_accelerator
from featcache.plugins import suggest
from featcache.specs import naming, refuse_code, refuse_code_of_corpora


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(of, value))


Keys = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""What may stand in a file: key → (what its value must be, in words; whether a value is that)."""

ANY = ("anything", lambda value: True)
TEXT = ("a text", _text)
TABLE = ("a table", lambda value: isinstance(value, dict))
PATHS: Keys = dict.fromkeys(
    ("store", "corpus"), ("a path, or a list of them", lambda value: _text(value) or _list(_text)(value))
) | {"out": ("a path", _text)}
_ENTRIES = ("a list of at least one name or table", _list(lambda value: isinstance(value, str | dict)))
_COUNTS = ("a list of at least one whole number, 0 or more", _list(_count))
_CORPORA = ("a table of corpora", lambda value: isinstance(value, dict) and all(map(_text, value.values())))
_SWEEP: Keys = {
    **PATHS,
    **dict.fromkeys(("methods", "students"), _ENTRIES),
    **dict.fromkeys(("seeds", "dimensions"), _COUNTS),
    **dict.fromkeys(("common", "evaluate"), TABLE),
}
_EVALUATE: Keys = {
    **dict.fromkeys(("bank", "query"), ("a corpus", _text)),
    **dict.fromkeys(("near", "far"), _CORPORA),
    "teacher": ("the spec of an encoder", lambda value: isinstance(value, str)),
    "k": ("a whole number, 1 or more", lambda value: _count(value) and value > 0),
    "detectors": ("a list of at least one name", _list(_text)),
}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        store, corpus: as `distill.fit` takes them.
        out: the folder for runs, stores, results and the table; None when the file names none.
        methods, students: names, or tables of settings with a "method" or "student" and, if you like, a "name".
        seeds, dimensions: each run gets one of each; dimension 0 is the student's own.
        common: settings of every run.
        evaluate: corpora to test on, {} for none: "bank" and "query", "near" and "far" by name; and "k" (neighbours,
            20), "detectors" (["knn"]) and "teacher" (spec of the encoder to compare with; the store's when left out).
    """

    store: str | list[str]
    corpus: str | list[str] | None = None
    out: str | None = None
    methods: list[Any] = field(default_factory=lambda: [METHOD])
    students: list[Any] = field(default_factory=lambda: ["tiny"])
    seeds: list[int] = field(default_factory=lambda: [0])
    dimensions: list[int] = field(default_factory=lambda: [0])
    common: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NamedRun:
    """One run of a sweep.

    Attributes:
        name: of its folder, such as "tintem-tiny-d128-s0".
        group: the name without the seed; runs of a group differ in nothing else.
        settings: keyword arguments of `distill.FitConfig`.
    """

    name: str
    group: str
    settings: dict[str, Any]


def read_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Raises ValueError, naming the file and the key, for what is no sweep."""
    given = read_toml(path)
    with naming(path):
        check_keys(given, _SWEEP)
        common, evaluate = given.get("common", {}), given.get("evaluate", {})
        with naming("[common]"):
            check_keys(common, dict.fromkeys(FitConfig.__dataclass_fields__, ANY))
        with naming("[evaluate]"):
            check_keys(evaluate, _EVALUATE)
            missing = [key for key in ("bank", "query") if evaluate and key not in evaluate]
            if missing:
                raise ValueError(f"needs {' and '.join(missing)}, corpora with labels")
            parts = ["bank", "query", *evaluate.get("near", {}), *evaluate.get("far", {})]
            twice = sorted({part for part in parts if parts.count(part) > 1})
            if twice:
                raise ValueError(f"has two sets called {', '.join(twice)}; give each a name of its own")
        if "store" not in given:
            raise ValueError('names no store; add store = "teacher.zarr"')
    return Sweep(**given)


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Raises ValueError, naming the file, where there is none or it is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from None


def check_keys(given: Mapping[str, Any], known: Keys) -> None:
    """Raises ValueError, naming the key, for one that is not known or whose value is not what it must be."""
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{key}: no such setting; {suggest(key, known)}")
        what, right = known[key]
        if not right(value):
            raise ValueError(f"{key} = {value!r}: give {what}")


def expand(sweep: Sweep) -> list[NamedRun]:
    """Every run of a sweep, each checked, seeds innermost.

    Raises:
        ValueError: a setting that `FitConfig` refuses, or that one of the lists would override, with all runs that
            have it; or two runs of the same name.
    """
    runs: dict[str, NamedRun] = {}
    wrong: dict[str, list[str]] = defaultdict(list)
    named = (
        [_named(entry, "method") for entry in sweep.methods],
        [_named(entry, "student") for entry in sweep.students],
    )
    for (method, of_method), (student, of_student), dimension, seed in itertools.product(
        *named, sweep.dimensions, sweep.seeds
    ):
        own = {"seed": seed, **({"embedding_dim": dimension} if dimension else {})}
        group = f"{method}-{student}" + (f"-d{dimension}" if dimension else "")
        name = f"{group}-s{seed}"
        given = {**sweep.common, **of_student, **of_method}
        settings = {**given, **own}
        if name in runs:
            raise ValueError(f"two runs are called {name}; give one of them a name: {{name = …, …}}")
        runs[name] = NamedRun(name=name, group=group, settings=settings)
        try:
            check_keys(settings, dict.fromkeys(FitConfig.__dataclass_fields__, ANY))
            overridden = {key: value for key, value in sweep.common.items() if key in ("method", "student")}
            overridden |= {key: given[key] for key in own if key in given}
            for key, value in overridden.items():
                several = "dimensions" if key == "embedding_dim" else f"{key}s"
                raise ValueError(
                    f"{key} = {value!r}: {several} would override it; write {several} = [{value!r}] instead"
                )
            FitConfig(**settings)
        except ValueError as error:
            wrong[str(error)].append(name)
    _refuse(wrong)
    return list(runs.values())


def check(sweep: Sweep, runs: Sequence[NamedRun], trust_code: bool = False) -> None:
    """Open and build all that `distill.fit` will, once for runs that differ in nothing but the seed.

    Args:
        trust_code: students MODULE:CALLABLE may be imported: a sweep is a file, and so may be somebody else's.

    Raises:
        ValueError: something cannot be had or does not fit, with all runs that it concerns; nothing has been trained.
    """
    refuse_code_of_corpora("corpus", sweep.corpus, trust_code)
    with naming("store and corpus"):
        stores, corpora = open_all(sweep.store, sweep.corpus)
    accelerator = make_accelerator("cpu", "fp32", [], "")
    wrong: dict[str, list[str]] = defaultdict(list)
    for _, group in itertools.groupby(runs, key=lambda run: run.group):
        first, *others = group
        try:
            refuse_code("its student", first.settings["student"], trust_code)
            set_up(FitConfig(**first.settings), stores, corpora, accelerator, trust_code=trust_code)
        except Exception as error:
            wrong[reason(error)] += [run.name for run in (first, *others)]
    _refuse(wrong)


def reason(error: Exception) -> str:
    """What went wrong, on one line; with its kind, unless it is one of those that have a message for users."""
    said, ours = " ".join(str(error).split()), isinstance(error, ValueError | OSError | RuntimeError)
    return said if ours and said else f"{type(error).__name__}: {said}"


def _refuse(wrong: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for everything that is wrong, with the runs that it concerns; nothing may be."""
    if wrong:
        said = (f"run{'s' * (len(names) > 1)} {', '.join(names)}: {error}" for error, names in wrong.items())
        raise ValueError(" · ".join(said))


def tabulate(
    rows: Iterable[tuple[str, Mapping[str, float]]], failed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Mean ± sd of each metric over the runs of a group.

    Args:
        rows: (group, metrics by name) of each run, in the order of the table.
        failed: reason of each run that failed, by its name.

    Returns:
        {"metrics": names, "rows": [{"name", "runs", "metrics": {NAME: {"mean", "sd", "values"}}}], "failed"}. The sd
        is the sample's (n − 1); None for a single run. What is not finite is left out.
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    for group, metrics in rows:
        groups.setdefault(group, []).append(metrics)
    names = list(dict.fromkeys(name for runs in groups.values() for metrics in runs for name in metrics))
    table = []
    for group, runs in groups.items():
        summary = {}
        for name in names:
            values = [float(run[name]) for run in runs if name in run and math.isfinite(run[name])]
            if values:
                sd = statistics.stdev(values) if len(values) > 1 else None
                summary[name] = {"mean": statistics.fmean(values), "sd": sd, "values": values}
        table.append({"name": group, "runs": len(runs), "metrics": summary})
    return {"metrics": names, "rows": table, "failed": dict(failed or {})}


def cells(table: Mapping[str, Any]) -> list[list[str]]:
    """A table of `tabulate` as text, its header first: name, runs, then "0.741 ± 0.012" for each metric."""
    body = [
        [row["name"], str(row["runs"]), *(_mean_sd(row["metrics"].get(name)) for name in table["metrics"])]
        for row in table["rows"]
    ]
    return [["run", "seeds", *table["metrics"]], *body]


def markdown(table: Mapping[str, Any]) -> str:
    header, *body = cells(table)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    failed = "".join(f"\nFailed: {name}: {why}\n" for name, why in table["failed"].items())
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + failed


def _named(entry: Any, key: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of one entry of `methods` or `students`."""
    if isinstance(entry, str):
        entry = {key: entry}
    if not isinstance(entry, dict) or not _text(entry.get(key)):
        raise ValueError(f"{key}s: {entry!r}: give a name, or a table with {key} = …")
    settings = {name: value for name, value in entry.items() if name != "name"}
    # timm/resnet18:weights/a.safetensors → resnet18
    spec = entry[key]
    short = re.sub(r":.*", "", spec.partition("/")[2]) if "/" in spec else spec
    name = str(entry.get("name", short))
    return re.sub(r"[^\w.]+", "-", name).strip("-") or key, settings


def _mean_sd(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ""
    return f"{summary['mean']:.3f}" + ("" if summary["sd"] is None else f" ± {summary['sd']:.3f}")

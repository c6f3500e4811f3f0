"""A sweep: methods × students × seeds × dimensions over one cache, from one TOML file, into one table.

    store = "teacher.zarr"              # or a list, with a corpus for each
    corpus = "photos/"
    out = "sweeps/first"
    methods = ["tintem", {name = "tintem-long", method = "tintem", epochs = 200}]
    students = ["tiny", {name = "vit", student = "timm/vit_tiny_patch16_224", patch_size = 8}]
    seeds = [0, 1, 2]
    dimensions = [64, 128]

    [common]                            # any setting of `distill fit`
    epochs = 100

    [evaluate]                          # optional; corpora, not stores
    bank = "photos/"
    query = "photos-test/"
    near = {tin = "tiny-imagenet/"}
    far = {textures = "dtd/"}

This module reads it and makes the table; training and evaluating is the caller's, see `distill sweep`.
"""

import itertools
import math
import os
import re
import statistics
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.config import FitConfig
from featcache.plugins import suggest

KEYS = ("store", "corpus", "out", "methods", "students", "seeds", "dimensions", "common", "evaluate")
EVALUATE_KEYS = ("bank", "query", "near", "far", "teacher", "k", "detectors")


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
    methods: list[Any] = field(default_factory=lambda: ["tintem"])
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
    """Raises ValueError, naming the file and near names, for what is no sweep."""
    try:
        given = tomllib.loads(Path(path).read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
    for keys, known, where in (
        (given, KEYS, ""),
        (given.get("common", {}), FitConfig.__dataclass_fields__, "[common] "),
        (given.get("evaluate", {}), EVALUATE_KEYS, "[evaluate] "),
    ):
        for key in keys:
            if key not in known:
                raise ValueError(f"{path}: {where}{key}: no such setting; {suggest(key, known)}")
    if "store" not in given:
        raise ValueError(f'{path}: names no store; add store = "teacher.zarr"')
    for key in ("methods", "students", "seeds", "dimensions"):
        if key in given and (not isinstance(given[key], list) or not given[key]):
            raise ValueError(f"{path}: {key} = {given[key]!r}: give a list of at least one")
    missing = [key for key in ("bank", "query") if given.get("evaluate") and key not in given["evaluate"]]
    if missing:
        raise ValueError(f"{path}: [evaluate] needs {' and '.join(missing)}, corpora with labels")
    parts = ["bank", "query", *given.get("evaluate", {}).get("near", {}), *given.get("evaluate", {}).get("far", {})]
    twice = sorted({part for part in parts if parts.count(part) > 1})
    if twice:
        raise ValueError(f"{path}: [evaluate] has two sets called {', '.join(twice)}; give each a name of its own")
    return Sweep(**given)


def expand(sweep: Sweep) -> list[NamedRun]:
    """Every run of a sweep, each checked, seeds innermost.

    Raises:
        ValueError: a setting that `FitConfig` refuses, or two runs of the same name.
    """
    runs: dict[str, NamedRun] = {}
    named = (
        [_named(entry, "method") for entry in sweep.methods],
        [_named(entry, "student") for entry in sweep.students],
    )
    for (method, of_method), (student, of_student), dimension, seed in itertools.product(
        *named, sweep.dimensions, sweep.seeds
    ):
        width = {"embedding_dim": dimension} if dimension else {}
        group = f"{method}-{student}" + (f"-d{dimension}" if dimension else "")
        name = f"{group}-s{seed}"
        settings = {**sweep.common, **of_student, **of_method, **width, "seed": seed}
        for key in settings:
            if key not in FitConfig.__dataclass_fields__:
                raise ValueError(f"run {name}: {key}: no such setting; {suggest(key, FitConfig.__dataclass_fields__)}")
        try:
            FitConfig(**settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"run {name}: {error}") from None
        if name in runs:
            raise ValueError(f"two runs are called {name}; give one of them a name: {{name = …, …}}")
        runs[name] = NamedRun(name=name, group=group, settings=settings)
    return list(runs.values())


def tabulate(rows: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Mean ± sd of each metric over the runs of a group.

    Args:
        rows: (group, metrics by name) of each run, in the order of the table.

    Returns:
        {"metrics": names, "rows": [{"name", "runs", "metrics": {NAME: {"mean", "sd", "values"}}}]}. The sd is the
        sample's (n − 1); None for a single run. What is not finite is left out.
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
    return {"metrics": names, "rows": table}


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
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _named(entry: Any, key: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of one entry of `methods` or `students`."""
    if isinstance(entry, str):
        entry = {key: entry}
    if not isinstance(entry, dict) or key not in entry:
        raise ValueError(f"{key}s: {entry!r}: give a name, or a table with {key} = …")
    settings = {name: value for name, value in entry.items() if name != "name"}
    # timm/resnet18:weights/a.safetensors → resnet18
    spec = str(entry[key])
    short = re.sub(r":.*", "", spec.partition("/")[2]) if "/" in spec else spec
    name = str(entry.get("name", short))
    return re.sub(r"[^\w.]+", "-", name).strip("-") or key, settings


def _mean_sd(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ""
    return f"{summary['mean']:.3f}" + ("" if summary["sd"] is None else f" ± {summary['sd']:.3f}")

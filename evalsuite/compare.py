"""Two results of one command, sample by sample."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from evalsuite.evaluators.ood import measured
from evalsuite.intervals import Estimate, difference, share
from evalsuite.metrics import lower_is_better
from evalsuite.result import Result, samples_file, versions

COMMANDS = ("knn", "ood", "probe", "robustness")
"""The commands whose results hold what was measured of each sample."""

_NO_SETTING = (
    *(
        "seed",
        "resamples",
        "chance",
        "tied",
        "failed_detectors",
        "encoder",
        "reference",
        "head_accuracy",
        "identical_by",
    ),
    *("preset", "k"),  # a preset's settings stand beside it, and metrics have the k that votes in their names
    *("c", "steps", "held_out_rows", "held_out_top1", "held_out_cross_entropy"),  # what came of probe's `candidates`
)
"""Parameters that may differ between two results of one measurement."""

LEAST_SAMPLES = 10
"""Paired samples of a set below which there is no verdict."""

_Measured = dict[str, tuple[Estimate, Estimate]]
"""By metric: A's and B's."""


def compare(
    a: Result | str | os.PathLike[str],
    b: Result | str | os.PathLike[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """Whether B differs from A, of two results (or their files) of one of `COMMANDS` on the same samples.

    Samples are paired by `sample_id`, set by set; those that only one result has are left out and counted. Every
    metric that both have is measured again on the paired samples. `metrics` holds B − A with its 95 % interval
    (`evalsuite.intervals.difference`), for which what is hard for both cancels. `parameters["a"]` and `["b"]` hold the
    values on the paired samples; `parameters["verdicts"]` says `B better` or `A better` where the interval leaves out 0
    (of the FPR@95 the lower is better), else `no difference shown`; or `no verdict`, and why, where a set has fewer than
    `LEAST_SAMPLES` paired samples or the metric no interval. Many metrics are compared at once, and nothing is corrected
    for that: one in twenty verdicts is expected to be wrong where nothing differs.

    Compared are the accuracies of single samples, `top1` and `top5`, for robustness their means over severities and
    corruptions too, and for OOD every metric of the detectors that both have, means included. What samples do not give
    again (macro accuracies, a robustness result's AUROCs and mCE), and means over other severities or corruptions, are
    named in `parameters["not_compared"]`. Settings that differ warn and are named in `parameters["differing"]`.

    Raises `ValueError` when the results are of different commands or of another one, have different OOD sets, no
    metric in common, no samples, or fewer than 2 paired samples in a set.

    `resamples` and `seed` have no effect: nothing is drawn at random any more.
    """
    names = _name(a, "A"), _name(b, "B")
    both = [each if isinstance(each, Result) else Result.read(each) for each in (a, b)]
    _check(names, both)
    command = both[0].command
    differing = _differing(both)
    if command == "ood":
        found, counts = _compare_ood(names, both)
    else:
        found, counts = _compare_accuracy(names, both)
    if not found:
        raise ValueError(
            f"{names[0]} and {names[1]} have no metric in common that samples give again; "
            f"run {command} with the same {'detectors' if command == 'ood' else 'settings'}"
        )
    if differing:
        warnings.warn(f"{names[0]} and {names[1]} differ in: {'; '.join(differing)}", RuntimeWarning, stacklevel=2)
    differences = {metric: difference(ours, theirs) for metric, (ours, theirs) in found.items()}
    return Result(
        "compare",
        {
            side: {"path": name if isinstance(given, str | os.PathLike) else None, **each.inputs}
            for side, name, given, each in zip("ab", names, (a, b), both, strict=True)
        },
        {
            "command": command,
            "a": {metric: ours.value for metric, (ours, _) in found.items()},
            "b": {metric: theirs.value for metric, (_, theirs) in found.items()},
            "verdicts": {name: _verdict(name, of) for name, of in differences.items()},
            "samples": counts,
            "differing": differing,
            "not_compared": sorted((both[0].metrics.keys() & both[1].metrics.keys()) - found.keys()),
        },
        {metric: of.metric() for metric, of in differences.items()},
        versions(),
        remarks=[f"{side}: {remark}" for side, each in zip("AB", both, strict=True) for remark in each.remarks],
    )


def _name(given: Result | str | os.PathLike[str], side: str) -> str:
    return side if isinstance(given, Result) else os.fspath(given)


def _check(names: tuple[str, str], both: list[Result]) -> None:
    for name, result in zip(names, both, strict=True):
        if result.command not in COMMANDS:
            raise ValueError(f"{name} is a result of `{result.command}`; compare takes those of {', '.join(COMMANDS)}")
    if both[0].command != both[1].command:
        raise ValueError(
            f"{names[0]} is a result of `{both[0].command}`, {names[1]} of `{both[1].command}`; "
            "compare two results of one command"
        )
    for name, result in zip(names, both, strict=True):
        if not result.samples:
            beside = samples_file(Path(name)) if name not in ("A", "B") else "its samples"
            raise ValueError(
                f"{name} comes without {beside}, what was measured of each sample; "
                f"run the same `evalsuite {result.command}` command again with --json {name}"
            )


def _differing(both: list[Result]) -> list[str]:
    """The settings that are not the same, each as `NAME A's against B's`; those of a detector where both have it."""
    settings = [_settings(each) for each in both]
    return [
        f"{name} {_said(settings[0][name])} against {_said(settings[1][name])}"
        for name in settings[0]
        if name in settings[1] and _same(settings[0][name]) != _same(settings[1][name])
    ]


def _settings(result: Result) -> dict[str, Any]:
    found = {name: value for name, value in result.parameters.items() if name not in _NO_SETTING}
    if result.command == "probe":
        found.pop("head", None)  # where it was saved
    elif found.get("head") is not None:
        found["head"] = "given"  # each encoder has its own
    if pgd := found.pop("pgd", None):
        found["pgd steps"] = pgd["steps"]
    found.pop("autoattack", None)
    for spec, arguments in found.pop("detectors", {}).items():
        found |= {f"{spec} {name}": "a file" if "/" in str(value) else value for name, value in arguments.items()}
    return found


def _same(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _compare_accuracy(names: tuple[str, str], both: list[Result]) -> tuple[_Measured, dict[str, dict[str, int]]]:
    left, right, count = _paired(names, both, "sample_id")
    parts, other = (_parts(each) for each in both)
    found: _Measured = {}
    for name, of in parts.items():
        if set(of) == set(other.get(name, ())):
            ours, theirs = (
                share(sum(each.samples[part][rows].astype(np.int64) for part in of) / len(of))
                for each, rows in zip(both, (left, right), strict=True)
            )
            found[name] = ours, theirs
    return found, {"all": count}


def _parts(result: Result) -> dict[str, list[str]]:
    """By accuracy the names of those that it is the mean of: itself alone, or every severity (and corruption)."""
    parts = {name: [name] for name in result.samples if name not in ("sample_id", "content")}
    corrupted = [found for name in parts if (found := re.fullmatch(r"([^/]+)/\d+/(top1@\d+)", name))]
    for found in corrupted:
        parts.setdefault(f"{found[1]}/mean/{found[2]}", []).append(found[0])
    for found in corrupted:
        parts.setdefault(f"mean/{found[2]}", []).append(found[0])
    return parts


def _compare_ood(names: tuple[str, str], both: list[Result]) -> tuple[_Measured, dict[str, dict[str, int]]]:
    sets = [[key.removeprefix("sample_id/") for key in each.samples if key.startswith("sample_id/")] for each in both]
    if set(sets[0]) != set(sets[1]):
        only = [", ".join(sorted(set(one) - set(other))) or "none" for one, other in (sets, sets[::-1])]
        raise ValueError(
            f"{names[0]} and {names[1]} have different sets (only the first: {only[0]}; only the second: {only[1]}); "
            "run ood with the same sets"
        )
    rows: list[dict[str, np.ndarray]] = [{}, {}]
    counts: dict[str, dict[str, int]] = {}
    for key in sets[0]:
        rows[0][key], rows[1][key], counts[key] = _paired(names, both, f"sample_id/{key}")
    found: _Measured = {}
    for spec in _detectors(both[0].samples):
        if spec not in _detectors(both[1].samples):
            continue
        ours, theirs = (
            measured({key: each.samples[f"score/{spec}/{key}"][at[key]] for key in sets[0]})
            for each, at in zip(both, rows, strict=True)
        )
        found |= {f"{spec}/{name}": (ours[name], theirs[name]) for name in ours}
    return found, counts


def _detectors(samples: Mapping[str, Any]) -> list[str]:
    scored = (name.split("/", 2) for name in samples if name.startswith("score/"))
    return [spec for _, spec, key in scored if key == "id_test"]


def _paired(
    names: tuple[str, str], both: list[Result], key: str
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], dict[str, int]]:
    """Where the samples that both results have are in A and in B, in A's order; and how many there are."""
    ids = [each.samples[key] for each in both]
    where = key.removeprefix("sample_id").lstrip("/")
    of_set = f" of {where}" if where else ""
    for name, each in zip(names, ids, strict=True):
        if len(np.unique(each)) < len(each):
            raise ValueError(
                f"{name} has two samples{of_set} with one id; give the corpus unique ids and extract again"
            )
    _, left, right = np.intersect1d(ids[0], ids[1], assume_unique=True, return_indices=True)
    if len(left) < 2:
        raise ValueError(
            f"{names[0]} and {names[1]} share {len(left)} samples{of_set}, too few to compare; "
            "evaluate both on the same corpus"
        )
    contents = [each.samples.get(key.replace("sample_id", "content", 1)) for each in both]
    if contents[0] is not None and contents[1] is not None:
        a, b = contents[0][left], contents[1][right]
        others = int(((a != b) & (a != 0) & (b != 0)).sum())
        if others:
            raise ValueError(
                f"{names[0]} and {names[1]} are of different images under {others} of the {len(left)} ids{of_set} that "
                "both have; evaluate both on the same corpus"
            )
    order = np.argsort(left)
    count = {"paired": len(left), "only_a": len(ids[0]) - len(left), "only_b": len(ids[1]) - len(left)}
    return left[order], right[order], count


def _verdict(name: str, difference: Estimate) -> str:
    if difference.none is not None:
        return f"no verdict: {difference.none}"
    few = min(len(part.influence) for part in difference.parts.values())
    if few < LEAST_SAMPLES:
        return f"no verdict: too few samples ({few})"
    assert difference.ci95 is not None
    low, high = difference.ci95
    if low <= 0 <= high:
        return "no difference shown"
    return "B better" if (low > 0) != lower_is_better(name) else "A better"

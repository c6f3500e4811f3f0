"""Two results of one command, sample by sample."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from evalsuite import evaluators
from evalsuite.charts import Table
from evalsuite.intervals import Estimate, difference
from evalsuite.result import Result, samples_file, versions
from evalsuite.table import as_note

LEAST_SAMPLES = 10
"""Paired samples of a set below which there is no verdict."""


def compare(
    a: Result | str | os.PathLike[str],
    b: Result | str | os.PathLike[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """Whether B differs from A, of two results (or their files) of one evaluator on the same samples.

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
    evaluator, command = _evaluator(names, both), both[0].command
    samples, counts = _on_shared_samples(names, both)
    found = evaluator.compared(*samples)
    if not found:
        raise ValueError(
            f"{names[0]} and {names[1]} have no metric in common that samples give again; "
            f"run {command} with the same settings, such as k or detectors"
        )
    differing = _differing(evaluator, both)
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
            "verdicts": {name: _verdict(evaluator, name, of) for name, of in differences.items()},
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


def _evaluator(names: tuple[str, str], both: list[Result]) -> type[evaluators.Evaluator]:
    """That of both results. Raises `ValueError` where they are of two, or hold nothing of each sample."""
    known = evaluators.names()
    for name, result in zip(names, both, strict=True):
        if result.command not in known or not evaluators.load(result.command).per_sample:
            takes = ", ".join(each for each in known if evaluators.load(each).per_sample)
            raise ValueError(f"{name} is a result of `{result.command}`; compare takes those of {takes}")
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
    return evaluators.load(both[0].command)


def _differing(evaluator: type[evaluators.Evaluator], both: list[Result]) -> list[str]:
    """The settings that are not the same, each as `NAME A's against B's`; those of a detector where both have it."""
    settings = [evaluator.settings(each.parameters) for each in both]
    return [
        f"{name} {_said(settings[0][name])} against {_said(settings[1][name])}"
        for name in settings[0]
        if name in settings[1] and _same(settings[0][name]) != _same(settings[1][name])
    ]


def _same(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _on_shared_samples(
    names: tuple[str, str], both: list[Result]
) -> tuple[list[dict[str, np.ndarray]], dict[str, dict[str, int]]]:
    """Both results' samples, of those that both have, in one order; and by set how many these are."""
    keys = [[key for key in each.samples if key.partition("/")[0] == "sample_id"] for each in both]
    sets = [[key.removeprefix("sample_id/") for key in of] for of in keys]
    if set(sets[0]) != set(sets[1]):
        only = [", ".join(sorted(set(one) - set(other))) or "none" for one, other in (sets, sets[::-1])]
        raise ValueError(
            f"{names[0]} and {names[1]} have different sets (only the first: {only[0]}; only the second: {only[1]}); "
            f"run {both[0].command} with the same sets"
        )
    shared: list[dict[str, np.ndarray]] = [{}, {}]
    counts: dict[str, dict[str, int]] = {}
    for key, of_set in zip(keys[0], sets[0], strict=True):
        *rows, counts["all" if of_set == "sample_id" else of_set] = _paired(names, both, key)
        ending = key.removeprefix("sample_id")
        for found, each, at in zip(shared, both, rows, strict=True):
            found |= {name: of[at] for name, of in each.samples.items() if name.endswith(ending)}
    return shared, counts


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


def _verdict(evaluator: type[evaluators.Evaluator], name: str, difference: Estimate) -> str:
    if difference.none is not None:
        return f"no verdict: {difference.none}"
    few = min(len(part.influence) for part in difference.parts.values())
    if few < LEAST_SAMPLES:
        return f"no verdict: too few samples ({few})"
    assert difference.ci95 is not None
    low, high = difference.ci95
    if low <= 0 <= high:
        return "no difference shown"
    return "B better" if (low > 0) != evaluator.lower_is_better(name) else "A better"


def table(result: Result) -> Table:
    """A row a metric; below, what differs in the settings, what was not compared, and how many samples were paired."""
    given = result.parameters
    rows = []
    for name, metric in result.metrics.items():
        verdict = given["verdicts"][name]
        interval = f"{metric.ci95[0]:+.4f} to {metric.ci95[1]:+.4f}" if metric.ci95 else "none"
        short = verdict if verdict.endswith("better") else "none" if verdict.startswith("no verdict") else "–"
        rows.append(
            [name, f"{given['a'][name]:.4f}", f"{given['b'][name]:.4f}", f"{metric.value:+.4f}", interval, short]
        )
    said = ["–: no difference shown"]
    said += dict.fromkeys(verdict for verdict in given["verdicts"].values() if verdict.startswith("no verdict"))
    if given["differing"]:
        said.append(f"A and B differ in: {'; '.join(given['differing'])}")
    if left := given["not_compared"]:
        more = f", and {len(left) - 6} more: --json has them" if len(left) > 6 else ""
        said.append(f"not compared: {', '.join(left[:6])}{more}")
    for name, count in given["samples"].items():
        left_out = count["only_a"] + count["only_b"]
        said.append(
            f"{name}: {count['paired']:,} samples"
            + (f", left out {count['only_a']:,} only in A and {count['only_b']:,} only in B" if left_out else "")
        )
    columns = [given["command"], "A", "B", "B − A", "95 % interval", "verdict"]
    title = f"A: {result.inputs['a']['path']}   B: {result.inputs['b']['path']}"
    return Table(title=title, columns=columns, rows=rows, note=as_note(said))

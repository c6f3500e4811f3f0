"""What is shown of a result in a terminal: the command line draws it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evalsuite.charts import Table
from evalsuite.result import Metric, Result


def metric_table(result: Result, caption: Sequence[str] = ()) -> Table:
    """A row a metric, with what chance would reach; below, `caption`, how many rows there were, and the three classes of
    the lowest values (the rest: JSON)."""
    chance = result.parameters.get("chance", {})
    overall = {name: metric for name, metric in result.metrics.items() if not name.startswith("per_class/")}
    rows = [
        [name, f"{metric.value:.4f}", f"{chance[name]:.4f}" if name in chance else "", interval(metric)]
        for name, metric in overall.items()
    ]
    lowest = []
    for what in overall:
        classes = [
            (metric.value, name.removeprefix("per_class/").removesuffix(f"/{what}"))
            for name, metric in result.metrics.items()
            if name.startswith("per_class/") and name.endswith(f"/{what}")
        ]
        if classes:
            lowest.append(f"lowest {what}: " + ", ".join(f"{name} {value:.4f}" for value, name in sorted(classes)[:3]))
    columns = ["metric", "value", "chance", "95 % interval"]
    note = as_note([*caption, *rows_line(result.inputs), *lowest])
    return Table(title=result.command, columns=columns, rows=rows, note=note)


def as_note(lines: Iterable[str]) -> str:
    """Lines below a table; names in them that have line breaks have none there."""
    return "\n".join(line.replace("\n", r"\n") for line in lines)


def interval(metric: Metric) -> str:
    """Empty where a file of an earlier version gives neither an interval nor why there is none."""
    return f"{metric.ci95[0]:.4f}–{metric.ci95[1]:.4f}" if metric.ci95 else "none" if metric.no_ci95 else ""


def rows_line(inputs: Mapping[str, Any]) -> list[str]:
    """One line of how many rows each store among a result's inputs had; none where there is none."""
    found: dict[str, int] = {}
    for name, given in inputs.items():
        if isinstance(given, Mapping):
            parts = {name: given} if "rows" in given else {f"{name}/{part}": each for part, each in given.items()}
            found |= {
                part: each["rows"] for part, each in parts.items() if isinstance(each, Mapping) and "rows" in each
            }
    return ["rows: " + ", ".join(f"{name} {rows:,}" for name, rows in found.items())] if found else []

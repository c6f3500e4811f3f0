"""Results of evaluators as tables."""

import json
import re
from dataclasses import replace
from typing import Any

from rich.table import Table

from featcache_cli.screen import make_table, results, screen, shown, write_json


def show(result: Any, to_json: str | None) -> None:
    """Print a result's table, but for means of one set, and its remarks, a line each; and write the result to `to_json`:
    unless that is "-", with its samples beside it."""
    if to_json != "-":
        from evalsuite.charts import repeated_means

        once = repeated_means(result.metrics)
        listed = replace(result, metrics={name: of for name, of in result.metrics.items() if name not in once})
        tables = {"ood": _ood_table, "robustness": _robustness_table, "compare": _comparison_table}
        results.print(tables.get(result.command, _metric_table)(listed))
        for line in _without_interval(listed):
            screen.print(f"[yellow]note:[/] {shown(line)}", highlight=False)
    for remark in result.remarks:
        screen.print(f"[yellow]note:[/] {shown(remark)}", highlight=False)
    if to_json not in (None, "-"):
        result.write(to_json)  # and, beside it, what was measured of each sample
    else:
        write_json(json.loads(result.to_json()), to_json)


def _metric_table(result: Any) -> Table:
    """A row a metric, with what chance would reach; below, the three classes of the lowest values (the rest: JSON)."""
    chance = result.parameters.get("chance", {})
    table = make_table(result.command, "metric", "value", "chance", "95 % interval")
    overall = {name: metric for name, metric in result.metrics.items() if not name.startswith("per_class/")}
    for name, metric in overall.items():
        interval = _interval(metric)
        table.add_row(shown(name), f"{metric.value:.4f}", f"{chance[name]:.4f}" if name in chance else "", interval)
    lowest = []
    for what in overall:
        classes = [
            (metric.value, name.removeprefix("per_class/").removesuffix(f"/{what}"))
            for name, metric in result.metrics.items()
            if name.startswith("per_class/") and name.endswith(f"/{what}")
        ]
        if classes:
            named = ", ".join(f"{name} {value:.4f}" for value, name in sorted(classes)[:3])
            lowest.append(shown(f"lowest {what}: {named}"))
    table.caption = "\n".join(lowest) or None
    table.caption_justify = "left"
    return table


def _interval(metric: Any) -> str:
    """Empty where a file of an earlier version gives neither an interval nor why there is none."""
    return f"{metric.ci95[0]:.4f}–{metric.ci95[1]:.4f}" if metric.ci95 else "none" if metric.no_ci95 else ""


def _without_interval(result: Any) -> list[str]:
    """A line for every reason why metrics have no interval."""
    names: dict[str, list[str]] = {}
    for name, metric in result.metrics.items():
        if metric.no_ci95 and not name.startswith("per_class/"):
            names.setdefault(metric.no_ci95, []).append(name)
    return [
        f"no interval of {', '.join(of[:3])}{f' and {len(of) - 3:,} more' if len(of) > 3 else ''}: {reason}"
        for reason, of in names.items()
    ]


def _filled(title: str, columns: list[str], rows: list[list[str]], longest: int = 10_000) -> Table:
    """The rows as a table, their names folded after slashes where they are longer than `longest`."""
    table = make_table(title, *columns)
    table.collapse_padding = True
    for name, *values in rows:
        lines = [""]
        for part in re.findall(r"[^/]*/|[^/]+", name):
            if lines[-1] and len(lines[-1] + part) > longest:
                lines.append("")
            lines[-1] += part
        table.add_row("\n".join(map(shown, lines)), *values)
    return table


def _folded(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """The rows as a table, their names folded as far as the terminal's width wants it."""
    excess = _excess(_filled(title, columns, rows))
    longest = max(len(name) for name, *_ in rows)
    return _filled(title, columns, rows, longest - excess) if excess > 0 else _filled(title, columns, rows)


def _excess(table: Table) -> int:
    """By how many characters the table is wider than the terminal."""
    return results.measure(table, options=results.options.update(max_width=10_000)).maximum - results.width


def _comparison_table(result: Any) -> Table:
    """A row a metric; below, what differs in the settings, what was not compared, and how many samples were paired."""
    given = result.parameters
    rows = []
    for name, metric in result.metrics.items():
        interval = f"{metric.ci95[0]:+.4f} to {metric.ci95[1]:+.4f}" if metric.ci95 else "none"
        verdict = given["verdicts"][name]
        rows.append([
            name, f"{given['a'][name]:.4f}", f"{given['b'][name]:.4f}", f"{metric.value:+.4f}", interval,
            f"[bold]{verdict}[/]" if verdict.endswith("better") else "none" if verdict.startswith("no verdict") else "–",
        ])  # fmt: skip
    table = _folded(
        f"A: {result.inputs['a']['path']}   B: {result.inputs['b']['path']}",
        [given["command"], "A", "B", "B − A", "95 % interval", "verdict"],
        rows,
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
    table.caption, table.caption_justify = "\n".join(map(shown, said)), "left"
    return table


def _ood_table(result: Any) -> Table:
    """A row a detector and set, a column a metric, and the AUROC's interval where there is room."""
    rows: dict[str, dict[str, str]] = {}
    for name, metric in result.metrics.items():
        where, _, what = name.rpartition("/")
        rows.setdefault(where, {})[what] = f"{metric.value:.4f}"
        if what == "auroc":
            rows[where]["95 %_interval"] = _interval(metric)
    settings = "; ".join(
        " ".join([spec, *(f"{name}={value}" for name, value in given.items())])
        + (" (failed)" if spec in result.parameters["failed_detectors"] else "")
        for spec, given in result.parameters["detectors"].items()
    )
    columns = ["ood", *(column.replace("_", "\n") for column in next(iter(rows.values())))]
    cells = [[where, *values.values()] for where, values in rows.items()]
    table = _filled(settings, columns, cells)
    if _excess(table) > 0:
        at = columns.index("95 %\ninterval")
        for each in (columns, *cells):
            del each[at]
        table = _folded(settings, columns, cells)
        table.caption, table.caption_justify = "95 % intervals are in the JSON: --json PATH", "left"
    return table


def _robustness_table(result: Any) -> Table:
    """A row a metric and corruption, a column a severity; intervals are in the JSON."""
    levels = [*map(str, result.parameters["severities"]), "mean"]
    rows: dict[str, dict[str, str]] = {}
    for name, metric in result.metrics.items():
        corruption, _, rest = name.partition("/")
        level, _, what = rest.partition("/")
        if (
            corruption in ("pgd", "autoattack") or level not in levels
        ):  # of the clean images, attacked, or a mean over all
            corruption, level, what = name, "mean", ""
        rows.setdefault(f"{corruption}/{what}".rstrip("/"), {})[level] = f"{metric.value:.4f}"
    return _folded(
        "robustness",
        ["", *levels],
        [[row, *(values.get(level, "") for level in levels)] for row, values in rows.items()],
    )

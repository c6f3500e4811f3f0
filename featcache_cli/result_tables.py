"""Results as tables on the screen."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.table import Table as Drawn
from rich.text import Text

from featcache_cli.screen import make_table, printable, results, screen, shown, write_json

if TYPE_CHECKING:
    from evalsuite.charts import Table


def show(result: Any, to_json: str | None) -> None:
    """Print a result's table, but for means of one set, and its remarks, a line each; and write the result to `to_json`:
    unless that is "-", with its samples beside it."""
    if to_json != "-":
        from evalsuite.charts import repeated_means

        once = repeated_means(result.metrics)
        listed = replace(result, metrics={name: of for name, of in result.metrics.items() if name not in once})
        results.print(*_drawn(_table(listed)), sep="\n")
        for line in _without_interval(listed):
            screen.print(f"[yellow]note:[/] {shown(line)}", highlight=False)
    for remark in result.remarks:
        screen.print(f"[yellow]note:[/] {shown(remark)}", highlight=False)
    if to_json not in (None, "-"):
        result.write(to_json)  # and, beside it, what was measured of each sample
    else:
        write_json(json.loads(result.to_json()), to_json)


def _table(result: Any) -> "Table":
    if result.command == "compare":
        from evalsuite import comparison

        return comparison.table(result)
    from evalsuite import evaluators

    return evaluators.load(result.command).table(result)


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


def _drawn(table: "Table") -> list[Drawn | Text]:
    """The table, folded, and without its spare column, as far as the terminal's width wants it; and its note."""
    columns, rows, note = table.columns, [[*map(_text, row)] for row in table.rows], table.note
    if table.spare and _excess(_filled(table.title, columns, rows)) > 0:
        at = columns.index(table.spare)
        columns, *rows = [[cell for i, cell in enumerate(row) if i != at] for row in (columns, *rows)]
        note = f"{note}\n{' '.join(table.spare.split())}s are in the JSON: --json PATH".strip()
    drawn = _filled(table.title, columns, rows)
    if rows and (excess := _excess(drawn)) > 0:
        drawn = _filled(table.title, columns, rows, max(len(name) for name, *_ in rows) - excess)
    return [drawn, *(Text(printable(line), "table.caption") for line in note.splitlines())]


def _text(cell: Any) -> str:
    if cell is None or isinstance(cell, str | int):
        return "" if cell is None else str(cell)
    if isinstance(cell, float):
        return f"{cell:.4f}"
    return f"{cell.value:.4f}" + (f" ({cell.ci95[0]:.4f}–{cell.ci95[1]:.4f})" if cell.ci95 else "")


def _filled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], longest: int = 10_000) -> Drawn:
    """The rows as a table, their names broken after slashes where they are longer than `longest`."""
    table = make_table(title, *columns)
    table.collapse_padding = len(columns) > 4
    for name, *values in rows:
        lines = [""]
        for part in re.findall(r"[^/]*/|[^/]+", name):
            if lines[-1] and len(lines[-1] + part) > longest:
                lines.append("")
            lines[-1] += part
        best = [f"[bold]{shown(value)}[/]" if value.endswith(" better") else shown(value) for value in values]
        table.add_row("\n".join(map(shown, lines)), *best)
    return table


def _excess(table: Drawn) -> int:
    """By how many characters the table is wider than the terminal."""
    return results.measure(table, options=results.options.update(max_width=10_000)).maximum - results.width

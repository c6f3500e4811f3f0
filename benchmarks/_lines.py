"""Tables whose lines stand alone: one that fails, or that there is no time left for, says so, and the others go on."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

Row = dict[str, Any]
Line = tuple[str, Row, float, Callable[[], Row]]
"""The table's title, the first cells, about how many seconds the others take, and what finds them."""


def tables(lines: Iterator[Line], until: float) -> Iterator[tuple[str, list[Row]]]:
    """Each table, printed as Markdown when its last line is there.

    Args:
        until: when there is no time left, as `time.monotonic` has it.
    """
    for title, group in itertools.groupby(lines, key=lambda line: line[0]):
        rows = [measured(*each, until) for each in group]
        shown(title, rows)
        yield title, rows


def measured(title: str, row: Row, seconds: float, find: Callable[[], Row], until: float) -> Row:
    began = time.monotonic()
    if seconds > until - began:
        row = {**row, "remark": f"skipped: takes about {seconds:.0f} s, and {max(0, until - began):.0f} s are left"}
    else:
        try:
            row = {**row, **find(), "s": time.monotonic() - began}
        except Exception as error:
            row = {**row, "remark": reason(error)}
    print(f"{title}: {row}", file=sys.stderr, flush=True)
    return row


def shown(title: str, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        print(
            f"| {' | '.join(f'{cell:.4g}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True
        )


def reason(error: BaseException) -> str:
    """In one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def rate(images: int, function: Callable[[], Any], seconds: float) -> float:
    """Images/s of a function that takes so many, after a first call that does not count, for about `seconds`."""
    function()
    began, calls = now(), 0
    while not calls or now() - began < seconds:
        function()
        calls += 1
    return calls * images / (now() - began)


def now() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

"""Labels as a corpus gives them: indices into class names, -1 for none."""

import math
import numbers
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

MAX_CLASSES = 1_000_000

MISSING = {
    "", "#N/A N/A", "#N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
"""Texts that mean no label: those that pandas reads as missing."""

_NUMBER = re.compile(r"[+-]?(\d{1,18}\.?\d*|\.\d+)([eE][+-]\d{1,3})?", re.ASCII)


def from_names(names: Sequence[str | None]) -> tuple[list[int], list[str] | None]:
    """Labels and class names of samples whose class is known by name; the classes are sorted by name."""
    classes = sorted({name for name in names if name})
    index = {name: i for i, name in enumerate(classes)}
    return [index[name] if name else -1 for name in names], classes or None


def from_folders(paths: Sequence[str]) -> tuple[list[int], list[str] | None]:
    """Labels and class names of samples whose first folder, if any, is their class."""
    return from_names([path.split("/", 1)[0] if "/" in path else None for path in paths])


def from_numbers(numbers: Sequence[int | None], source: str) -> tuple[list[int], list[str] | None]:
    """Labels and class names ("0", "1", …) of samples whose class is a number.

    Raises:
        ValueError: a number below -1 or too large to be one of 0…classes-1.
    """
    labels = [-1 if number is None else int(number) for number in numbers]
    wrong = next((label for label in labels if not -1 <= label < MAX_CLASSES), None)
    if wrong is not None:
        raise ValueError(f"{source}: {wrong} is no class number; number the classes from 0, or name them in words")
    return labels, [str(i) for i in range(max(labels, default=-1) + 1)] or None


def from_values(values: Iterable[Any], source: str) -> tuple[list[int], list[str] | None]:
    """Labels and class names of samples with a cell of a table each, the same whatever kind of file the table is.

    White space around a text is not part of it. No label: None, NaN, `MISSING`, -1. What is left decides together:

    - whole numbers, as numbers or written ("2.0", "2"), are class numbers;
    - other numbers are classes in the order of numbers;
    - true and false, as such or written, are the classes "False" and "True";
    - anything else names its class in words, numbers too, and the classes are sorted by name.

    Raises:
        ValueError: a class number as in `from_numbers`; a list, or an infinite number.
    """
    cells = [None if _figure(cell) == -1 else cell for cell in (_cell(value, source) for value in values)]
    known = [cell for cell in cells if cell is not None]
    figures = [_figure(cell) for cell in known]
    if all(figure is not None for figure in figures):
        found = [_figure(cell) for cell in cells]
        if all(figure == int(figure) for figure in found if figure is not None):
            return from_numbers([None if figure is None else int(figure) for figure in found], source)
        classes = sorted({figure for figure in found if figure is not None})
        index = {figure: i for i, figure in enumerate(classes)}
        return [-1 if f is None else index[f] for f in found], [repr(int(f) if f == int(f) else f) for f in classes]
    if all(str(cell).lower() in ("true", "false") for cell in known):
        return [-1 if cell is None else int(str(cell).lower() == "true") for cell in cells], ["False", "True"]
    return from_names([None if cell is None else str(cell) for cell in cells])


def _cell(value: Any, source: str) -> Any:
    """bool, int, float or str; None where there is no label."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        value = value.strip()
        return None if value in MISSING else value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real | Decimal):
        if math.isinf(value):
            raise ValueError(f"{source}: {value} is no label; number the classes from 0, or name them in words")
        return None if math.isnan(value) else float(value)
    if isinstance(value, list | tuple | dict | set) or hasattr(value, "shape"):
        kind = type(value).__name__
        raise ValueError(f"{source}: a {kind} is no label; choose a column of one class a row with @label=COLUMN")
    return str(value)  # a date, say


def _figure(cell: Any) -> int | float | None:
    """What a cell is as a number; None for no label, for true and false, and for words."""
    if cell is None or isinstance(cell, bool) or (isinstance(cell, str) and not _NUMBER.fullmatch(cell)):
        return None
    if isinstance(cell, str):
        return int(cell) if cell.lstrip("+-").isdigit() else float(cell)
    return cell

"""Did a benchmark meet its targets? Ends its output with the answer."""

import operator
import sys
from typing import Literal

MEETS = {"at most": operator.le, "at least": operator.ge}


def judge(
    targets: list[tuple[str, float, float, Literal["at most", "at least"]]], size: str = "", full_size: str = ""
) -> None:
    """Prints a line for each target missed, then exits with status 1; or one line when all were met.

    Args:
        targets: (what, its figure, the limit, whether the figure is to be at most or at least that).
        size: of this run, and `full_size`: the one that the targets are for. Where they differ, the lines say so.
    """
    at = "" if size == full_size else f" (at {size}; the target is for {full_size})"
    missed = [target for target in targets if not MEETS[target[3]](target[1], target[2])]
    for what, figure, limit, bound in missed:
        print(f"target missed{at}: {what}: {figure:.3f}, not {bound} {limit:g}")
    if missed:
        sys.exit(1)
    print(f"all targets met{at}")


def span(rows: list[int]) -> str:
    """The size of a run that compares several."""
    return f"{rows[0]:,} to {rows[-1]:,} rows"

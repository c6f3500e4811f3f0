"""What detectors ask of their arguments, whatever the bank or of this one: each check raises `ValueError` with the argument's unit.

`name` is what the user set, as `react:percentile`.
"""

from __future__ import annotations

from typing import Any

from featcache.rows import Rows


def whole(name: str, value: Any, least: int) -> None:
    """A whole number from `least` on."""
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        raise ValueError(f"{name}={value!r} must be a whole number from {least}")


def neighbours(k: Any, bank: Rows, most: int) -> None:
    """A whole number from 1 to `most`, which the rows of the bank allow."""
    if not (isinstance(k, int) and 1 <= k <= most):
        raise ValueError(
            f"k={k!r} does not suit the bank {bank.name}, which has {len(bank)} rows; use k from 1 to {most}"
        )


def principal(name: str, components: int | None, bank: Rows) -> int:
    """How many principal directions of the bank are kept: from 1 to one less than it has dimensions, d; by default what
    ViM's authors take, 1000 of d ≥ 2048, 512 of d ≥ 768, else d/2."""
    d = bank.embedding_dim
    kept = (1000 if d >= 2048 else 512 if d >= 768 else d // 2) if components is None else components
    if not (type(kept) is int and 1 <= kept < d):
        raise ValueError(
            f"{name}={kept!r} does not suit {bank.name}, whose rows have {d} dimensions; "
            + (f"use components from 1 to {d - 1}" if d > 1 else "use another detector")
        )
    return kept


def share(name: str, value: float) -> None:
    """At least 0 and below 1."""
    if not 0 <= value < 1:
        raise ValueError(
            f"{name}={value!r} must be at least 0 and below 1: it is a share"
            + (f", so for {value:g} % give {value / 100:g}" if 1 < value < 100 else "")
        )


def temperature(name: str, value: float, most: float | None = None) -> None:
    """Above 0; `most` where a softmax is over cosines, which are no larger than 1."""
    if not value > 0:
        raise ValueError(f"{name}={value!r} must be above 0")
    if most is not None and value > most:
        raise ValueError(
            f"{name}={value!r} must be at most {most:g}: cosines are divided by it; for a scale of {value:g}, by which they "
            f"would be multiplied, give {1 / value:g}"
        )

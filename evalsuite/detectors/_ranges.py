"""What detectors ask of their arguments, whatever the bank: each check raises `ValueError` with the argument's unit.

`name` is what the user set, as `react:percentile`.
"""

from __future__ import annotations

from typing import Any


def whole(name: str, value: Any, least: int) -> None:
    """A whole number from `least` on."""
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        raise ValueError(f"{name}={value!r} must be a whole number from {least}")


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

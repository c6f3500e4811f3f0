"""Drift of a stream of images: what share of them a deployed detector takes for OOD, day by day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evalsuite.deployed.detector import DeployedDetector
from evalsuite.deployed.scored import Scored
from evalsuite.intervals import share
from evalsuite.intervals.order import by_chance, holm

LEVEL = 0.05
"""The probability that a stream of nothing but ID images has a day that is said to be beyond."""


@dataclass(frozen=True)
class Day:
    """The images of one day: `scored` ones, of which `ood` are beyond the threshold, and `failed` ones without a score.

    `share` is ood / scored with its 95 % interval, None without a score. `by_chance` is the probability of so many or more
    among as many ID images; `beyond` says whether that is too unlikely, all days together.
    """

    day: str
    scored: int
    failed: int
    ood: int
    share: float | None
    ci95: tuple[float, float] | None
    by_chance: float | None
    beyond: bool


@dataclass(frozen=True)
class Drift:
    """The days of a stream, oldest first; `expected` is the share of ID images beyond the threshold; `dates` says which days
    these are."""

    days: list[Day]
    expected: float
    keep: float
    dates: str

    @property
    def beyond(self) -> list[Day]:
        """The days with more OOD images than `keep` would give."""
        return [each for each in self.days if each.beyond]

    def statement(self) -> str:
        """In a sentence, which days these are."""
        if not self.beyond:
            return f"no day is beyond what keep {self.keep:g} gives ({self.expected:.1%} of ID images, on average)"
        named = ", ".join(f"{each.day} ({each.ood:,} of {each.scored:,})" for each in self.beyond)
        several = "are" if len(self.beyond) > 1 else "is"
        return f"{named} {several} beyond what keep {self.keep:g} gives ({self.expected:.1%} of ID images, on average)"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"beyond": [each.day for each in self.beyond], "statement": self.statement()}


def drift(detector: DeployedDetector, scored: Scored, days: Sequence[str], dates: str) -> Drift:
    """The share of OOD images on each of the `days`, one a row of `scored`; "" is no day, and only failed rows may have it.

    A day is beyond what `keep` gives where, of as many ID images, so many or more would be beyond the threshold too seldom:
    with a probability by the beta-binomial distribution, in which the uncertainty of the threshold is, and by Holm's
    procedure over all days, so that a stream of ID images has such a day with a probability of 5 % at most. It takes images
    to be drawn one by one: many of one scene, or frames of a video, count for less than they are.

    Raises `ValueError` for no rows, or a scored one without a day.
    """
    if len(days) != len(scored) or not len(scored):
        raise ValueError(f"{len(days):,} days of {len(scored):,} images; give a day for each, and one image at least")
    of, failed = np.array(days, dtype=str), scored.failed
    undated = np.flatnonzero((of == "") & ~failed)
    if len(undated):
        raise ValueError(f"{scored.ids[undated[0]]!r}: its file is gone, so its day is not known; give --dates TABLE")
    limit = detector.record["threshold"]
    rows: list[Day] = []
    for day in np.unique(of).tolist():
        here = of == day
        ood = scored.is_ood[here & ~failed]
        found = share(ood) if len(ood) else None
        chance = by_chance(int(ood.sum()), len(ood), limit["rank"], limit["rows"]) if len(ood) else None
        value, ci95 = (found.value, found.ci95) if found else (None, None)
        counts = {"scored": len(ood), "failed": int((here & failed).sum()), "ood": int(ood.sum())}
        rows.append(Day(day or "(no date)", **counts, share=value, ci95=ci95, by_chance=chance, beyond=False))
    told = [i for i, each in enumerate(rows) if each.by_chance is not None]
    rejected = holm([rows[i].by_chance or 0.0 for i in told], LEVEL)
    for i, beyond in zip(told, rejected, strict=True):
        rows[i] = Day(**{**asdict(rows[i]), "beyond": beyond})
    return Drift(rows, 1 - float(limit["kept"]), detector.keep, dates)

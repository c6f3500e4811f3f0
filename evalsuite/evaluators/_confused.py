"""Pairs of classes that are taken for each other, in pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from evalsuite.charts import Picture, Samples, Strip

PICTURES = 5  # of a strip
_PAIRS = 6

Beside = Callable[[int, Int[np.ndarray, " _"]], Mapping[str, Sequence[Picture]]]


@dataclass(frozen=True)
class Wrong:
    """Rows that are taken for another class than theirs: which samples, of which class by number, and with what share of the
    vote or which probability."""

    samples: Samples
    truth: Int[np.ndarray, " w"]
    predicted: Int[np.ndarray, " w"]
    sure: Float[np.ndarray, " w"]

    def taken_for(self, true: int) -> list[tuple[int, int]]:
        """The classes that rows of this one are taken for, and how many of them; the most frequent first."""
        return Counter(self.predicted[self.truth == true].tolist()).most_common()

    def strips(
        self, name: Callable[[int], str], rows: Mapping[int, int], unit: str, beside: Beside = lambda *_: {}
    ) -> list[Strip]:
        """A strip for each of the most frequent pairs, the surest first. `rows` are those of each true class, right or wrong;
        `beside` gives what stands beside the wrong ones, of the class they are taken for."""
        pairs = Counter(zip(self.truth.tolist(), self.predicted.tolist(), strict=True))
        found = []
        for (true, taken), count in pairs.most_common(_PAIRS):
            at = np.flatnonzero((self.truth == true) & (self.predicted == taken))
            at = at[np.argsort(-self.sure[at], kind="stable")][:PICTURES]
            shown = [
                Picture(picture=sample, words=f"{100 * sure:.0f} % {unit}", mark="wrong")
                for sample, sure in zip(self.samples.at(at), self.sure[at], strict=True)
            ]
            groups = {f"{name(true)}, taken for {name(taken)}": shown, **beside(taken, at)}
            note = f"{count:,} of {rows[true]:,} rows"
            found.append(Strip(name=f"{name(true)} → {name(taken)}", groups=groups, note=note))
        return found

"""Accuracy under attack: adversarial images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from evalsuite.attacks.adversarial import Pgd
from evalsuite.attacks.autoattack import AutoAttack

if TYPE_CHECKING:
    from featcache import Corpus, Encoder
else:  # `import featcache.encoder` brings torch: too slow for an annotation
    Corpus = Encoder = Any


class Attacks:
    """Those that were asked for by their ε (see `Pgd`), on one corpus. Raises as each does."""

    def __init__(
        self,
        pgd: Sequence[float | int],
        pgd_steps: int,
        autoattack: Sequence[float | int],
        head: str | os.PathLike[str] | None,
        corpus: Corpus,
    ) -> None:
        self._of = [Pgd(pgd, pgd_steps, head, corpus)] if pgd else []
        self._of += [AutoAttack(autoattack, head, corpus)] if autoattack else []
        self._images = len(corpus)
        self.records: dict[str, Any] = {attack.name: attack.record() for attack in self._of}

    def __len__(self) -> int:
        """How many images are attacked, each ε counted."""
        return sum(len(attack.epsilons) for attack in self._of) * self._images

    def measure(
        self, encoder: Encoder, rows: Int[np.ndarray, " n"], told: Callable[[int, str], None], **given: Any
    ) -> tuple[dict[str, Bool[np.ndarray, " n"]], dict[str, float], list[str]]:
        """Whether the head is right about each row (`Pgd.measure`, with what is `given`), chance levels, and remarks. `told`
        hears how many images are done, and of which attack."""
        found: dict[str, np.ndarray] = {}
        done = 0
        for attack in self._of:

            def progress(at: int, before: int = done, name: str = attack.name) -> None:
                told(before + at, name)

            found |= attack.measure(encoder, rows, progress=progress, **given)
            done += len(attack.epsilons) * self._images
        first = self._of[:1]  # any other starts from the same clean images
        chance = dict.fromkeys(found, first[0].chance(rows) if first else 0.0)
        return found, chance, [line for attack in first for line in attack.remarks(found, rows)]

"""Ours: TinTeM, and at every step each sample's place among the same landmarks, as the teacher sees it."""

import math
from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.methods import Batch, Features, Preparing
from distill.methods.tintem import TinTeM
from distill.objectives import MASKED, relation_kl
from featcache.rows import Rows
from featcache.store.layout import EMBEDDING

OWN = ("column", "none")


class Landmarks(TinTeM):
    """TinTeM with a fitted mapping, and the similarities to landmarks that the teacher finds (not in the paper).

    The landmarks are rows of the store, drawn once: possible because the teacher's features are all there before
    training begins. A batch says little of who is near whom; against the same thousands of landmarks, each sample is
    told at every step where it lies in the whole corpus, and what of it the mapping lost.

    Head: the mapping, teacher side, fitted before training and frozen. The student has none.

    Terms: TinTeM's, and "landmarks", relation_kl between cos(teacher, landmark) and cos(student, mapped landmark), rows
    the batch, columns the landmarks, mean over temperatures. No sample is its own landmark. With `own` "column" it has
    one column more, cos(teacher, teacher) = 1 and cos(student, mapped teacher): how much of the distribution is the
    sample itself, and how much its neighbours. Where the store has fewer rows than `landmarks`, each stands for several,
    so that this share does not depend on the size of the store.

    Options:
        mapping: a name from `distill/mappings/`, fitted to the pooled embeddings and used for tokens too.
        mapping_start, mapping_layer_norm, mapping_steps, mapping_batch_size, mapping_lr: of a mapping that has them; its
            own where left out.
        tokens: with patch tokens too, as `tintem` has them.
        landmarks: how many; all rows where there are fewer.
        own: "column", each sample's own mapped target is one of the columns; "none", only other rows are.
        weight: of the term "landmarks".
        temperatures: of the similarity distributions. Weight 1 with 0.02, 0.05 and 0.1 gives better neighbours and, where
            the stores hold images of many kinds, better OOD detection; on one small corpus it costs angles.
    """

    landmarks: Tensor
    mapped_landmarks: Tensor
    landmark_rows: Tensor

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        mapping: str = "sne",
        mapping_start: str | None = None,
        mapping_layer_norm: bool | None = None,
        mapping_steps: int | None = None,
        mapping_batch_size: int | None = None,
        mapping_lr: float | None = None,
        tokens: bool = False,
        landmarks: int = 4096,
        own: str = "column",
        weight: float = 0.3,
        temperatures: Sequence[float] = (0.05, 0.1),
    ):
        super().__init__(
            teacher_dim,
            student_dim,
            mapping=mapping,
            mapping_start=mapping_start,
            mapping_layer_norm=mapping_layer_norm,
            mapping_steps=mapping_steps,
            mapping_batch_size=mapping_batch_size,
            mapping_lr=mapping_lr,
            tokens=tokens,
        )
        if landmarks < 2:
            raise ValueError(f"landmarks must be 2 or more, got {landmarks}")
        if own not in OWN:
            raise ValueError(f"unknown own {own!r}; known: {', '.join(OWN)}")
        if not weight >= 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        if not temperatures or not all(value > 0 for value in temperatures):
            raise ValueError(f"temperatures must be one or more numbers greater than 0, got {list(temperatures)}")
        self._count, self._own, self._weight = landmarks, own, weight
        self._landmark_temperatures = tuple(temperatures)
        # Of unit length, and which rows they are. Not of the state: a resumed run draws the same rows again.
        for name in ("landmarks", "mapped_landmarks", "landmark_rows"):
            self.register_buffer(name, None, persistent=False)

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Fit the mapping, or take the one that is fitted already; draw the landmarks, in their plain views.

        Raises:
            ValueError: as in `tintem`.
        """
        report = super().prepare(rows, **given)
        drawn = np.random.default_rng(given["seed"]).choice(len(rows), min(self._count, len(rows)), replace=False)
        self.landmark_rows = torch.from_numpy(drawn)
        landmarks = torch.from_numpy(rows.gather(drawn)).float()
        self.landmarks, self.mapped_landmarks = (F.normalize(x, dim=-1) for x in (landmarks, self._map(landmarks)))
        return report

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        similar = self.similarities(student, batch, self._landmark_temperatures)
        terms = [
            relation_kl(target, output, temperatures=(temperature,), symmetric=False, mask_diagonal=False)
            for temperature, (target, output) in zip(self._landmark_temperatures, similar, strict=True)
        ]
        return {**super().loss(student, batch), "landmarks": self._weight * torch.stack(terms).mean()}

    def similarities(
        self, student: Features, batch: Batch, temperatures: Sequence[float]
    ) -> Iterator[tuple[Float[Tensor, "b columns"], Float[Tensor, "b columns"]]]:
        """The teacher's and the student's, to be divided by each of the temperatures; with `own` "column", the last is the
        own. All but that one are computed once."""
        seen, given = F.normalize(batch[EMBEDDING], dim=-1), F.normalize(student[EMBEDDING], dim=-1)
        target, output = seen @ self.landmarks.mT, given @ self.mapped_landmarks.mT
        itself = batch.row[:, None] == self.landmark_rows
        target, output = target.masked_fill(itself, MASKED), output.masked_fill(itself, MASKED)
        if self._own == "none":
            yield from [(target, output)] * len(temperatures)
            return
        with torch.no_grad():
            mapped = F.normalize(self._map(batch[EMBEDDING]), dim=-1)
        own = (given * mapped).sum(-1, keepdim=True)
        # Each other column stands for count / others rows: the same distribution as with the own one made less likely.
        others = len(self.landmarks) - itself.sum(1, keepdim=True)
        less = math.log(self._count) - others.to(own.dtype).log()
        for temperature in temperatures:
            yield (
                torch.cat([target, 1 - temperature * less], dim=1),
                torch.cat([output, own - temperature * less], dim=1),
            )

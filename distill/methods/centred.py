"""Ours, the default: directions from the corpus's mean rather than from the origin, and each sample's place among landmarks."""

from functools import partialmethod

import torch.nn.functional as F
from torch import Tensor

from distill.methods import Batch, Features
from distill.methods.landmarks import Landmarks
from distill.objectives import match
from featcache.store.layout import EMBEDDING


class Centred(Landmarks):
    """TinTeM's match of unit vectors, taken from the mean of the mapped corpus, and the similarities to landmarks.

    Embeddings of one teacher share a large mean direction, so the plain cosine is high before anything is learned, and
    its gradient says little of what tells images apart. The cosine between deviations from the mean has the same
    minimum, 0 where the student is the mapped teacher, and no such plateau (not in the paper; centring as in linear
    CKA, Kornblith et al. 2019, arXiv 1905.00414).

    Head: the mapping, teacher side, fitted before training and frozen. The student has none.

    Terms: "centred", 1 − cos(ŝ − μ, m̂ − μ), with ŝ the student's and m̂ the mapped teacher's embedding, both of unit
    length, and μ the mean of the mapped landmarks of unit length; "landmarks", as in `landmarks`, at temperatures so
    high that all landmarks count; with `tokens`, TinTeM's of the tokens.

    Options: those of `landmarks`.
        weight: of the term "landmarks".
        temperatures: of the similarity distributions. Lower ones give better kNN at the cost of angles; chosen, with the
            weight, on held-out photographs (docs/results.md, "Real classes").
    """

    __init__ = partialmethod(Landmarks.__init__, temperatures=(0.1, 0.2))

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(student, batch)
        del terms["cosine"]
        mapped = self.target(batch)
        mean = self.mapped_landmarks.mean(0)
        given, target = (F.normalize(rows, dim=-1) - mean for rows in (student[EMBEDDING], mapped))
        return {"centred": match(given, target, "cosine"), **terms}

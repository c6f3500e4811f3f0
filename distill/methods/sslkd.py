"""SSLKD (Ma, Karakus & Rosin 2024, arXiv 2402.05305): a light student of maps, from a few masks and two teachers' votes."""

from typing import Unpack

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from distill.methods import Batch, Features, Method, Preparing
from distill.methods._options import refuse_negative, refuse_not_positive
from distill.methods._tokens import check_tokens, resize_tokens
from distill.objectives import averaged, ce, kl, match, pixel_ce, pixels_first, resized
from featcache.rows import Rows
from featcache.store.layout import DENSE, EMBEDDING

TOKENS = "tokens"


class SSLKD(Method):
    """Semi-supervised distillation of maps: masks where there are some, everywhere what two teachers say (arXiv 2402.05305).

    L = L_sup + L_dis^f + L_dis^p + L_unsup, the paper's, with weights of 1:

    - "supervised": cross-entropy of the student's pixels with the masks, of the images that have one;
    - "feature": the distance of the student's backbone features, through a linear head, from the teacher's: of the embedding and,
      with tokens, of every position of the last feature map, the teacher's brought to the student's grid;
    - "probability": the distance of the student's class probabilities from the teachers' in every cell of their map, of all images;
    - "unsupervised": cross-entropy with the teachers' most probable class there, of the images without a mask.

    The store is of the teachers' votes: `featcache derive vote A B --set of=dense` of two teachers trained on the masks (`--method
    ce`), whose `dense` are logarithms of their mean probabilities; another teacher's dense logits will do. The last two terms count
    an image by its `weight`, how sure the teachers are of it. The student's logits are brought to the teachers' grid, and to the
    masks' pixels, bilinearly. Images are told apart by the corpus: `masks:FOLDER@labelled=FILE`.

    Which metrics the paper takes for its two distances, and how it mixes images in a batch, its abstracts do not say: all are options.

    Options:
        supervised, feature, probability, unsupervised: weights of the terms; 0 leaves one out.
        match: of "feature": "mse", "cosine" (1 − cos), "l2" or "huber".
        tokens: align the last feature map too, not its mean alone.
        align: of "probability": "kl", T² KL(teachers ‖ student), or "mse" of the probabilities.
        temperature: T, of "probability".
        least: probability that a cell's class needs, to be a pseudo-label.
        labelled_share: of what an epoch draws, the share that has a mask, in expectation; 0 draws every image once.
    """

    classifier = True
    labelled = True
    masks = True
    unmasked = True

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        supervised: float = 1.0,
        feature: float = 1.0,
        probability: float = 1.0,
        unsupervised: float = 1.0,
        match: str = "mse",
        tokens: bool = True,
        align: str = "kl",
        temperature: float = 1.0,
        least: float = 0.0,
        labelled_share: float = 0.5,
    ):
        super().__init__()
        refuse_negative(supervised=supervised, feature=feature, probability=probability, unsupervised=unsupervised)
        refuse_not_positive(temperature=temperature)
        if not supervised + feature + probability + unsupervised > 0:
            raise ValueError("all weights are 0, so nothing would be learned; give some of them a weight")
        if match not in ("cosine", "huber", "l2", "mse"):
            raise ValueError(f"match is {match!r}; give cosine, huber, l2 or mse")
        if align not in ("kl", "mse"):
            raise ValueError(f"align is {align!r}; give kl or mse")
        if not (0 <= least < 1 and 0 <= labelled_share < 1):
            raise ValueError(
                f"least and labelled_share are shares from 0 up to less than 1, got {least} and {labelled_share}"
            )
        self._of = {
            "supervised": supervised,
            "feature": feature,
            "probability": probability,
            "unsupervised": unsupervised,
        }
        self._match, self._align, self._temperature, self._least = match, align, temperature, least
        self._labelled_share = labelled_share
        self.head = nn.Linear(student_dim, teacher_dim) if feature else None
        aligned = (TOKENS,) if tokens and feature else ()
        self.fields = self.student_fields = (EMBEDDING, *aligned, DENSE)
        self._weights: Float[np.ndarray, " rows"] | None = None

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Look for tokens and masks.

        Raises:
            ValueError: a store has no tokens that the embedding's head can take.
        """
        if TOKENS in self.fields:
            check_tokens(rows)
        masked = given.get("masked")
        if masked is None or not self._labelled_share or masked.all() or not masked.any():
            return {}
        share = self._labelled_share
        self._weights = np.where(masked, share / masked.mean(), (1 - share) / (~masked).mean())
        return {}

    def weights(self, epoch: int) -> Float[np.ndarray, " rows"] | None:
        return self._weights

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        logits, teacher = student[DENSE], batch[DENSE]
        cells = pixels_first(resized(logits, teacher.shape[2:]))
        said, each = pixels_first(teacher), batch.weight[:, None, None].expand(-1, *teacher.shape[2:])
        terms: dict[str, Tensor] = {}
        unlabelled = each
        if batch.mask is not None:
            terms["supervised"] = pixel_ce(logits, batch.mask)
            unlabelled = each * (batch.mask < 0).flatten(1).all(dim=1)[:, None, None]
        if self.head:
            terms["feature"] = self._feature(student, batch, self.head)
        terms["probability"] = self._probability(said, cells, each.flatten())
        probability, pseudo = said.softmax(dim=1).max(dim=1)
        terms["unsupervised"] = ce(cells, pseudo, unlabelled.flatten() * (probability >= self._least))
        return {name: self._of[name] * term for name, term in terms.items() if self._of[name]}

    def _feature(self, student: Features, batch: Batch, head: nn.Module) -> Tensor:
        distance = match(head(student[EMBEDDING]), batch[EMBEDDING], self._match)
        if TOKENS not in self.fields:
            return distance
        target = resize_tokens(batch[TOKENS], student[TOKENS].shape[1])
        return (distance + match(head(student[TOKENS]), target, self._match)) / 2

    def _probability(
        self, said: Float[Tensor, "n c"], cells: Float[Tensor, "n c"], weight: Float[Tensor, " n"]
    ) -> Tensor:
        if self._align == "kl":
            return self._temperature**2 * kl(said, cells, temperature=self._temperature, weight=weight)
        apart = (said / self._temperature).softmax(dim=1) - (cells / self._temperature).softmax(dim=1)
        return averaged(apart.square().mean(dim=1), weight)

"""RKD (Park et al. 2019, arXiv 1904.05068): distances and angles between the samples of a batch."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.methods import Batch, Features, Method
from distill.methods._heads import make_head
from distill.methods._options import refuse_negative
from distill.objectives import gathered, match


class RKD(Method):
    """Distances and angles within the batch as the teacher has them (RKD, Park et al. 2019, arXiv 1904.05068).

    No head is needed: relations do not know dimensions. Terms and their means are those of the authors' code: huber
    over all pairs (triplets), those of a sample with itself included.

    Options:
        distance, angle: weights of the two terms; the paper's for classification.
        normalise: bring embeddings of both sides to length 1 first, since students are used by their cosines. Without
            it, as in the paper, a student may lie anywhere in its space, far from the origin too.
        angle_batch: angles are compared within parts of the batch of at most so many samples: time and memory are
            batch × angle_batch² instead of batch³.
        match: weight of 1 − cosine to the teacher through a Linear on the student's side; no such head at 0.
    """

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        distance: float = 25.0,
        angle: float = 50.0,
        normalise: bool = True,
        angle_batch: int = 64,
        match: float = 0.0,
    ):
        super().__init__()
        refuse_negative(distance=distance, angle=angle, match=match)
        if angle_batch < 3:
            raise ValueError(f"angle_batch must be 3 or more, got {angle_batch}: an angle is between three samples")
        self._distance, self._angle, self._match = distance, angle, match
        self._normalise, self._angle_batch = normalise, angle_batch
        self.head = make_head("linear", student_dim, teacher_dim) if match else None

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        output, target = gathered(student["embedding"]), gathered(batch["embedding"])
        if self._normalise:
            output, target = F.normalize(output, dim=-1), F.normalize(target, dim=-1)
        parts = math.ceil(len(output) / self._angle_batch)
        angles = [
            match(_angles(o), _angles(t), "huber")
            for o, t in zip(output.tensor_split(parts), target.tensor_split(parts), strict=True)
        ]
        terms = {
            "distance": self._distance * match(_distances(output), _distances(target), "huber"),
            "angle": self._angle * torch.stack(angles).mean(),
        }
        if self.head:
            terms["cosine"] = self._match * match(self.head(student["embedding"]), batch["embedding"], "cosine")
        return terms


def _distances(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Euclidean, in units of their mean over pairs that differ."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / (distances.sum() / (distances > 0).sum().clamp(min=1)).clamp(min=1e-12)


def _angles(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n n"]:
    """[j, i, k]: cosine of the angle at j between i and k; 0 where two of them are the same."""
    directions = F.normalize(rows[None] - rows[:, None], dim=-1)
    return directions @ directions.mT

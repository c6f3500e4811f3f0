"""The paper's mapping, fitted from the store alone: spectral start, then symmetric vMF-SNE."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.mappings.spectral import Spectral, unit_rows
from distill.objectives import TEMPERATURES, cosines, relation_kl
from distill.source import Source
from featcache.store import FeatureStore


class Sne:
    """Linear map that keeps who is near whom, at ten scales at once (TinTeM / CosPress, arXiv 2411.15239).

    Minimises `relation_kl(teacher cosines, mapped cosines)` over random batches, starting from `Spectral`.

    Args:
        dim: of the student's space.
        temperatures: of the neighbour distributions.
        steps, batch_size, lr: Adam, cosine decay to 0.
        seed: of the batches.

    Learned state:
        weight_: (dim, teacher_dim) float32.
        report_: what to say of it; see `orthogonality`. `sne_start`, `sne`: loss on one held-aside batch order
            before and after.
    """

    def __init__(
        self,
        dim: int,
        *,
        temperatures: Sequence[float] = TEMPERATURES,
        steps: int = 300,
        batch_size: int = 512,
        lr: float = 1e-3,
        seed: int = 0,
    ):
        self.dim, self.temperatures, self.steps = dim, tuple(temperatures), steps
        self.batch_size, self.lr, self.seed = batch_size, lr, seed

    def fit(self, store: Source | FeatureStore, progress: Callable[[int, int], None] | None = None) -> "Sne":
        """Memory O(D² + batch²), however many rows the store has.

        Args:
            progress: called with (steps done, steps).

        Raises:
            ValueError: fewer than two ok rows, or `dim` larger than the teacher's.
        """
        source = Source.of(store)
        if len(source) < 2:
            raise ValueError(f"{source.path}: {len(source)} rows with features; a mapping needs two or more")
        weight = torch.from_numpy(Spectral(self.dim).fit(source).weight_).requires_grad_()
        optimizer = torch.optim.Adam([weight])
        held = self._batch(source, step=-1)
        loss_at_start = self._loss(weight, held).item()
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2
            optimizer.zero_grad()
            self._loss(weight, self._batch(source, step)).backward()
            optimizer.step()
            if progress:
                progress(step + 1, self.steps)
        self.weight_ = weight.detach().numpy()
        self.report_ = {
            "sne_start": loss_at_start,
            "sne": self._loss(weight, held).item(),
            **orthogonality(self.weight_),
        }
        return self

    def transform(self, embedding: Float[np.ndarray, "n teacher_dim"]) -> Float[np.ndarray, "n dim"]:
        return unit_rows(embedding) @ self.weight_.T

    def _loss(self, weight: Tensor, unit: Tensor) -> Tensor:
        mapped = unit @ weight.T
        return relation_kl(cosines(unit, unit), cosines(mapped, mapped), temperatures=self.temperatures)

    def _batch(self, source: Source, step: int) -> Tensor:
        """Unit embeddings of distinct rows, each in a random view; a pure function of (seed, step)."""
        rng = np.random.default_rng([self.seed, step + 1])
        rows = rng.choice(len(source), min(self.batch_size, len(source)), replace=False)
        return torch.from_numpy(unit_rows(source.gather(rows, view=rng.integers(source.view_counts[rows]))))


def orthogonality(weight: Float[np.ndarray, "dim teacher_dim"]) -> dict[str, float]:
    """How far a map is from an orthogonal projection, up to one scale c.

    Returns:
        singular_min, singular_max: of W. deviation: ‖WWᵀ/c − I‖_F / √dim with c = tr(WWᵀ)/dim; 0 is orthogonal.
    """
    gram = weight.astype(np.float64) @ weight.T.astype(np.float64)
    singular = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    scale = np.trace(gram) / len(gram)
    deviation = np.linalg.norm(gram / scale - np.eye(len(gram))) / math.sqrt(len(gram))
    return {"singular_min": float(singular[0]), "singular_max": float(singular[-1]), "deviation": float(deviation)}

"""The paper's loss, over orthogonal projections only."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.mappings import FeatureMapping, Frozen, Told, checked_rows, orthogonality
from distill.mappings._descent import minimise_sne
from distill.mappings.spectral import Spectral
from distill.objectives import TEMPERATURES
from featcache.rows import Rows
from featcache.store import FeatureStore


class Orthogonal(FeatureMapping):
    """`sne` with W held to orthonormal rows. Cosines do not see a scale, so none is learned; rows are mapped at length one.

    TinTeM / CosPress (arXiv 2411.15239) call their map approximately orthogonal, yet hold it to nothing; this one is
    exactly so. W is the Q of V's QR decomposition and gradients pass through it: the loss sees W only through WᵀW,
    so any orthonormal basis of V's rows will do.

    Args:
        dim: of the student's space; with more than the teacher has, a lift keeps all cosines, and no step is taken.
        temperatures: of the neighbour distributions.
        steps, batch_size, lr: Adam, cosine decay to 0, from the map of `Spectral`.
        seed: of the batches and of the lift.

    Learned state:
        weight_: (dim, teacher_dim) float32, orthonormal rows, or columns of a lift.
        report_: as of `Sne`; `deviation` is rounding error.
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
        self.dim, self.temperatures, self.steps = dim, temperatures, steps
        self.batch_size, self.lr, self.seed = batch_size, lr, seed

    def fit(self, store: Rows | FeatureStore, progress: Told | None = None) -> "Orthogonal":
        """Memory O(block · D + D² + batch²).

        Args:
            progress: called with (steps done, steps).

        Raises:
            ValueError: fewer than two ok rows, or `dim` less than 1.
        """
        rows = checked_rows(store, self.dim, least_rows=2)
        if self.dim > rows.embedding_dim:
            self._lift(rows, self.seed)
            return self
        head = _Projection(torch.from_numpy(Spectral(self.dim).fit(rows).weight_))
        losses = minimise_sne(
            head,
            rows,
            temperatures=self.temperatures,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=self.seed,
            progress=progress,
        )
        with torch.no_grad():
            self.weight_ = _orthonormal(head.basis.double()).float().contiguous().numpy()
        self.report_ = {**losses, **orthogonality(self.weight_)}
        return self

    def module(self) -> Frozen:
        return Frozen(self.weight_)


class _Projection(nn.Module):
    def __init__(self, basis: Tensor):
        super().__init__()
        self.basis = nn.Parameter(basis)

    def forward(self, features: Tensor) -> Tensor:
        return features @ _orthonormal(self.basis).T


def _orthonormal(basis: Tensor) -> Tensor:
    """An orthonormal basis of the rows; rows that are orthonormal already stay as they are.

    Not torch's `parametrizations.orthogonal`: its Householder product takes 3.4 s a step at 1280 → 128, this 0.04 s.
    """
    q, r = torch.linalg.qr(basis.T)
    return (q * r.diagonal().sign()).T

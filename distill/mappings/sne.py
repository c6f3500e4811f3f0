"""The paper's mapping, fitted from the store alone: spectral start, then symmetric vMF-SNE."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from distill.mappings import FeatureMapping, Frozen, Told, checked_rows, orthogonality
from distill.mappings._descent import minimise_sne
from distill.mappings._moments import leading_directions, second_moment
from distill.objectives import TEMPERATURES
from featcache.geometry import unit
from featcache.rows import Rows
from featcache.store import FeatureStore

STARTS = ("spectral", "random")


class Sne(FeatureMapping):
    """Linear map that keeps who is near whom, at ten scales at once (TinTeM / CosPress, arXiv 2411.15239, section 3).

    Minimises `relation_kl(teacher cosines, mapped cosines)` over random batches. Nothing holds W orthogonal.

    In as many dimensions as the teacher has or more, a lift keeps all cosines: the loss is 0, the least there is, and nothing is
    left for `layer_norm`, `start` and the steps to do.

    Args:
        dim: of the student's space.
        layer_norm: the paper's head, LayerNorm (learned scale and shift) + Linear with bias, instead of a matrix
            on rows of length one.
        start: "spectral", the map of `Spectral` (with `layer_norm`, of the normalised rows); "random", as torch
            draws a Linear and as in the paper's code.
        temperatures: of the neighbour distributions.
        steps, batch_size, lr: Adam, cosine decay to 0.
        seed: of the batches, of a random start, and of the lift.

    Learned state:
        weight_: (dim, teacher_dim) float32. With `layer_norm`, the learned scale is multiplied into it.
        bias_: (dim,) float32, only with `layer_norm` and not of a lift; the learned shift is in it.
        report_: `orthogonality` of weight_; `sne_start`, `sne`: loss on one held-aside batch before and after.
    """

    turns = False

    def __init__(
        self,
        dim: int,
        *,
        layer_norm: bool = False,
        start: str = "spectral",
        temperatures: Sequence[float] = TEMPERATURES,
        steps: int = 300,
        batch_size: int = 512,
        lr: float = 1e-3,
        seed: int = 0,
    ):
        self.dim, self.layer_norm, self.start, self.temperatures = dim, layer_norm, start, temperatures
        self.steps, self.batch_size, self.lr, self.seed = steps, batch_size, lr, seed

    def fit(self, store: Rows | FeatureStore, progress: Told | None = None) -> "Sne":
        """Memory O(block · D + D² + batch²).

        Args:
            progress: called with (steps done, steps).

        Raises:
            ValueError: fewer than two ok rows, `dim` less than 1, or another `start`.
        """
        rows = checked_rows(store, self.dim, least_rows=2)
        if self.start not in STARTS:
            raise ValueError(f"unknown start {self.start!r} of the sne mapping; known: {', '.join(STARTS)}")
        if self.dim >= rows.embedding_dim:
            self._lift(rows, self.seed)
            return self
        linear = nn.utils.skip_init(nn.Linear, rows.embedding_dim, self.dim, bias=self.layer_norm)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(self._start(rows)))
            if self.layer_norm:
                linear.bias.zero_()
        head = nn.Sequential(nn.LayerNorm(rows.embedding_dim), linear) if self.layer_norm else linear
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
        weight = linear.weight.detach()
        if self.layer_norm:
            scale, shift = (parameter.detach() for parameter in head[0].parameters())
            self.bias_ = (weight @ shift + linear.bias.detach()).numpy()
            weight = weight * scale
        self.weight_ = weight.numpy()
        self.report_ = {**losses, **orthogonality(self.weight_)}
        return self

    def module(self) -> Frozen:
        dim, teacher_dim = self.weight_.shape
        if self.layer_norm and dim < teacher_dim:
            return Frozen(self.weight_, normalised="layer", bias=self.bias_)
        return Frozen(self.weight_)

    def _start(self, rows: Rows) -> np.ndarray:
        if self.start == "spectral":
            normalised = _layer_normalised if self.layer_norm else unit
            return leading_directions(second_moment(rows, normalised), self.dim)[1].astype(np.float32)
        bound = rows.embedding_dim**-0.5
        drawn = np.random.default_rng(self.seed).uniform(-bound, bound, (self.dim, rows.embedding_dim))
        return drawn.astype(np.float32)


def _layer_normalised(embedding: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return torch.nn.functional.layer_norm(torch.from_numpy(embedding).float(), embedding.shape[1:]).numpy()

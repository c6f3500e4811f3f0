"""Gradient descent on the paper's loss, shared by the mappings that learn."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from distill.mappings import Told
from distill.objectives import cosines, relation_kl
from featcache.rows import Rows


def minimise_sne(
    head: nn.Module,
    rows: Rows,
    *,
    temperatures: Sequence[float],
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: Told | None,
) -> dict[str, float]:
    """Train `head` so that who is near whom stays so, by Adam, `lr` falling along a cosine to 0.

    Args:
        head: (B, teacher_dim) embeddings as they are stored → (B, dim).

    Returns:
        sne_start, sne: the loss of one batch of its own, before and after.
    """

    def loss(batch: Tensor) -> Tensor:
        mapped = head(batch)
        return relation_kl(cosines(batch, batch), cosines(mapped, mapped), temperatures=temperatures)

    optimizer = torch.optim.Adam(head.parameters())
    held = _batch(rows, batch_size, seed, step=-1)
    with torch.no_grad():
        loss_at_start = loss(held).item()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss(_batch(rows, batch_size, seed, step)).backward()
        optimizer.step()
        if progress:
            progress(step + 1, steps)
    with torch.no_grad():
        return {"sne_start": loss_at_start, "sne": loss(held).item()}


def _batch(rows: Rows, size: int, seed: int, step: int) -> Tensor:
    """Embeddings of distinct rows, each in a random view; a pure function of (seed, step)."""
    rng = np.random.default_rng([seed, step + 1])
    drawn = rng.choice(len(rows), min(size, len(rows)), replace=False)
    return torch.from_numpy(rows.gather(drawn, view=rng.integers(rows.view_counts[drawn]))).float()

"""The primitives that every method is made of."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TEMPERATURES = tuple(t / 100 for t in range(1, 11))
"""0.01, 0.02, … 0.10: the paper's."""

MASKED = -1e8
"""Similarity given to masked pairs; their probability is exactly 0 in float32."""


def cosines(rows: Float[Tensor, "n d"], columns: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Cosine of every row with every column, -1…1."""
    return F.normalize(rows, dim=-1) @ F.normalize(columns, dim=-1).T


def match(output: Float[Tensor, "n d"], target: Float[Tensor, "n d"], kind: str = "cosine") -> Float[Tensor, ""]:
    """Mean distance of each output from its own target.

    Args:
        kind: "cosine", 1 − cos (0…2, TinTeM's student loss); "l2", Euclidean distance; "mse", mean squared
            difference over rows and dimensions (Proteus).

    Raises:
        ValueError: another kind.
    """
    if kind == "cosine":
        return (1 - F.cosine_similarity(output, target, dim=-1)).mean()
    if kind == "l2":
        return torch.linalg.vector_norm(output - target, dim=-1).mean()
    if kind == "mse":
        return F.mse_loss(output, target)
    raise ValueError(f"unknown match {kind!r}; known: cosine, l2, mse")


def relation_kl(
    target: Float[Tensor, "n m"],
    output: Float[Tensor, "n m"],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    symmetric: bool = True,
    mask_diagonal: bool = True,
) -> Float[Tensor, ""]:
    """KL(P_target ‖ P_output) between neighbour distributions, mean over temperatures; 0 when they agree.

    At each temperature τ, p_{j|i} = softmax_j(s_ij / τ) over the columns of row i. With `symmetric`, the rows
    become one joint distribution P_ij = (p_{j|i} + p_{i|j}) / Σ over the whole matrix, and the KL is over that:
    the vMF-SNE loss of TinTeM / CosPress (arXiv 2411.15239). Without it, the KL is averaged over rows.

    Args:
        target, output: similarities s (cosines), rows × columns.
        temperatures: each τ > 0.
        symmetric: needs rows and columns to be the same samples.
        mask_diagonal: leave s_ii out, likewise.

    Raises:
        ValueError: not square where it must be.
    """
    if (symmetric or mask_diagonal) and target.shape[0] != target.shape[1]:
        raise ValueError(
            f"symmetric or masked relations need rows and columns to be the same samples, got {tuple(target.shape)}"
        )
    diagonal = torch.eye(*target.shape, dtype=torch.bool, device=target.device) if mask_diagonal else None
    losses = []
    for temperature in temperatures:
        log_p, log_q = (_log_neighbours(s / temperature, diagonal, symmetric) for s in (target, output))
        p = log_p.exp()
        # Masked pairs have p = 0 and log_p = log_q = -∞ in effect: their term is 0, not NaN.
        terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
        losses.append(terms.sum() if symmetric else terms.sum() / len(target))
    return torch.stack(losses).mean()


def _log_neighbours(logits: Tensor, diagonal: Tensor | None, symmetric: bool) -> Tensor:
    if diagonal is not None:
        logits = logits.masked_fill(diagonal, MASKED)
    log_p = logits.log_softmax(dim=-1)
    if symmetric:
        # Every row sums to one, so Σ over (p_{j|i} + p_{i|j}) is exactly 2n.
        log_p = torch.logaddexp(log_p, log_p.T) - torch.tensor(2 * len(logits), dtype=logits.dtype).log()
    return log_p

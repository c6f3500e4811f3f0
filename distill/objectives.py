"""The primitives that every method is made of."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, distributed
from torch.autograd import Function

TEMPERATURES = tuple(t / 100 for t in range(1, 11))
"""0.01, 0.02, … 0.10: the paper's."""

MASKED = -1e8
"""Similarity given to masked pairs; their probability is exactly 0 in float32."""


def gathered(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """Rows of all processes, in the order of their ranks; `rows` itself where there is one process.

    A loss that every process takes of the same gathered rows has, once DistributedDataParallel has averaged over
    the processes, the gradient that one process would have with the whole batch. Every process has as many rows.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows
    return _Gather.apply(rows)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [
            torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())
        ]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Of what all processes make of this process's rows, together."""
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def cosines(rows: Float[Tensor, "*b n d"], columns: Float[Tensor, "*b m d"]) -> Float[Tensor, "*b n m"]:
    """Cosine of every row with every column, -1…1."""
    return F.normalize(rows, dim=-1) @ F.normalize(columns, dim=-1).mT


def averaged(values: Float[Tensor, " n"], weight: Float[Tensor, " n"] | None = None) -> Float[Tensor, ""]:
    """Mean of a batch's rows, each as often as its `weight` says (1 when None); 0, with a gradient of 0, where all weights are.

    Where there are several processes, weights are added up over all of them: what DistributedDataParallel makes of their
    shares is then the mean of the whole batch, however its weights are spread.
    """
    if weight is None:
        return values.mean()
    total, processes = _added_up(weight)
    return (values * weight).sum() * processes / total


def of_mean_one(weight: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Weights over their mean in the batch of all processes; zeros where all are. Of weights all alike, exactly ones."""
    total, processes = _added_up(weight)
    return weight * (len(weight) * processes / total)


def _added_up(weight: Float[Tensor, " n"]) -> tuple[Float[Tensor, ""], int]:
    """Weights of all processes together, 1 where that is 0; and how many processes there are."""
    total, processes = weight.sum(), 1
    if distributed.is_available() and distributed.is_initialized():
        processes = distributed.get_world_size()
        distributed.all_reduce(total)
    return torch.where(total > 0, total, 1), processes


def ce(
    logits: Float[Tensor, "n c"],
    target: Int64[Tensor, " n"] | Float[Tensor, "n c"],
    weight: Float[Tensor, " n"] | None = None,
    *,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy with classes or with class probabilities, in nats; at least the target's entropy.

    Args:
        target: rows of class −1 have none, and count for nothing.
        weight: of each row, see `averaged`.
        smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567).
    """
    if not target.is_floating_point():
        known = (target >= 0).to(logits.dtype)
        target, weight = target.clamp(min=0), known if weight is None else known * weight
    return averaged(F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing), weight)


def resized(maps: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c u v"]:
    """Maps, such as logits of every class, bilinearly between the centres of their cells."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def pixels_first(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "n c"]:
    """Every cell of every map as a row, n = b · h · w."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def pixel_ce(
    logits: Float[Tensor, "b c h w"],
    target: Int64[Tensor, "b u v"],
    weight: Float[Tensor, " b"] | None = None,
    *,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """`ce` of every pixel that has a class, in nats; the logits are `resized` to the target's pixels.

    Args:
        target: −1 where there is none.
        weight: of each image's pixels.
    """
    each = None if weight is None else weight[:, None, None].expand(target.shape).flatten()
    return ce(pixels_first(resized(logits, target.shape[1:])), target.flatten(), each, smoothing=smoothing)


def kl(
    target: Float[Tensor, "n c"],
    output: Float[Tensor, "n c"],
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    weight: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """KL between softmax(target / τ) and softmax(output / τ), mean over rows, in nats; 0 when they agree.

    Args:
        target, output: logits.
        temperature: τ > 0. The gradient shrinks with τ²; where a paper multiplies by τ², so must the method.
        direction: "forward", KL(target ‖ output); "reverse", KL(output ‖ target).
        weight: of each row, see `averaged`.

    Raises:
        ValueError: another direction.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"unknown direction {direction!r}; known: forward, reverse")
    log_p, log_q = (logits.div(temperature).log_softmax(dim=-1) for logits in (target, output))
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    if weight is None:
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return averaged(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1), weight)


def match(output: Float[Tensor, "*n d"], target: Float[Tensor, "*n d"], kind: str = "cosine") -> Float[Tensor, ""]:
    """Mean distance of each output from its own target.

    Args:
        kind: "cosine", 1 − cos (0…2, TinTeM's student loss); "l2", Euclidean distance; "mse", mean squared
            difference over rows and dimensions (Proteus); "huber", the same with x²/2 up to 1 and |x| − ½ beyond
            (RKD, of relations).

    Raises:
        ValueError: another kind.
    """
    if kind == "cosine":
        return (1 - F.cosine_similarity(output, target, dim=-1)).mean()
    if kind == "l2":
        return torch.linalg.vector_norm(output - target, dim=-1).mean()
    if kind == "mse":
        return F.mse_loss(output, target)
    if kind == "huber":
        return F.smooth_l1_loss(output, target)
    raise ValueError(f"unknown match {kind!r}; known: cosine, huber, l2, mse")


def relation_fro(
    target: Float[Tensor, "n m"], output: Float[Tensor, "n m"], weight: Float[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """‖target − output‖ of two matrices of similarities, Frobenius; neither squared nor divided, so it grows with n.

    As in EGA (arXiv 2211.13264).

    Args:
        weight: of each sample, where rows and columns are the same ones; 1 when None. A pair counts w_i w_j: n √(Σ w_i w_j d_ij² / (Σ w_i)²). The matrices are of all
            processes' samples, and so are these. 0, with a gradient of 0, where all are.
    """
    apart = target - output
    if weight is not None:
        share = of_mean_one(weight).sqrt()
        apart = share[:, None] * apart * share
    return torch.linalg.matrix_norm(apart)


def relation_kl(
    target: Float[Tensor, "*b n m"],
    output: Float[Tensor, "*b n m"],
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
        target, output: similarities s (cosines), rows × columns; of several matrices, the mean.
        temperatures: each τ > 0.
        symmetric: needs rows and columns to be the same samples.
        mask_diagonal: leave s_ii out, likewise.

    Raises:
        ValueError: not square where it must be.
    """
    rows, columns = target.shape[-2:]
    if (symmetric or mask_diagonal) and rows != columns:
        raise ValueError(
            f"symmetric or masked relations need rows and columns to be the same samples, got {tuple(target.shape)}"
        )
    diagonal = torch.eye(rows, columns, dtype=torch.bool, device=target.device) if mask_diagonal else None
    losses = []
    for temperature in temperatures:
        log_p, log_q = (_log_neighbours(s / temperature, diagonal, symmetric) for s in (target, output))
        # Masked pairs have p = 0, and logarithms that are finite: their term is 0, not NaN.
        terms = log_p.exp() * (log_p - log_q)
        losses.append(terms.sum((-2, -1)).mean() / (1 if symmetric else rows))
    return torch.stack(losses).mean()


def _log_neighbours(logits: Tensor, diagonal: Tensor | None, symmetric: bool) -> Tensor:
    if diagonal is not None:
        logits = logits.masked_fill(diagonal, MASKED)
    log_p = logits.log_softmax(dim=-1)
    if symmetric:
        # Every row sums to one, so Σ over (p_{j|i} + p_{i|j}) is exactly 2n.
        log_p = torch.logaddexp(log_p, log_p.mT) - math.log(2 * logits.shape[-1])
    return log_p

"""Projected gradient ascent: images near given ones on which a loss is large.

For evaluators, methods and corpora alike; importing it does not import PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int64

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

LEAST_EPSILON = 0.5
"""In 1/255ths: who gives less counts pixels from 0 to 1."""
STRIDE = 2.5
"""Step size × steps / ε where nobody chose one: far enough to cross the ball from any start (Madry et al. 2018)."""


@dataclass(frozen=True)
class Box:
    """An L∞ ball and what is allowed besides: images whose values are all between `low` and `high`."""

    low: Tensor
    high: Tensor

    @classmethod
    def around(
        cls,
        images: Float[Tensor, "b ..."],
        epsilon: float | int | Tensor,
        least: float | int | Tensor,
        most: float | int | Tensor,
    ) -> Box:
        """Values at most `epsilon` from those of `images`, and from `least` to `most`."""
        import torch

        lowest, highest = (torch.as_tensor(each, dtype=images.dtype, device=images.device) for each in (least, most))
        return cls(torch.maximum(images - epsilon, lowest), torch.minimum(images + epsilon, highest))

    def project(self, images: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The nearest images inside; those that are inside stay."""
        return images.clamp(self.low, self.high)

    def steepest(self, gradient: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """For each image the direction, of unit length in this norm, in which the loss grows the fastest."""
        return gradient.sign()


@dataclass(frozen=True)
class L2Ball:
    """Images at most `radius` from those of `centre`, each as one vector, and with values from `least` to `most`."""

    centre: Float[Tensor, "b ..."]
    radius: float | int
    least: float | int = 0
    most: float | int = 1

    def project(self, images: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """As `Box.project`, first into the ball, then into the range."""
        away = images - self.centre
        # The centre is in range, so what is cut off only brings the image nearer.
        return (self.centre + away * (self.radius / _lengths(away)).clamp(max=1)).clamp(self.least, self.most)

    def steepest(self, gradient: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """As `Box.steepest`; 0 where the gradient is."""
        return gradient / _lengths(gradient)


def ascend(
    loss: Callable[[Tensor], Tensor],
    start: Float[Tensor, "b ..."],
    ball: Box | L2Ball,
    *,
    step: float | int | Tensor,
    steps: int,
) -> Float[Tensor, "b ..."]:
    """Images of `ball` after so many steps uphill, each put back into it; nothing but the images gets a gradient.

    Args:
        loss: of the images, a sum over them, so that no image's gradient depends on how many there are.
        start: put into the ball first.
        step: length of a step in the ball's norm; a tensor where channels have units of their own.

    Madry et al. 2018, arXiv 1706.06083.
    """
    import torch

    at = ball.project(start)
    for _ in range(steps):
        at.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(at), at)
        at = ball.project(at.detach() + step * ball.steepest(gradient))
    return at.detach()


def log_odds(logits: Float[Tensor, "b c"], own: Int64[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Against the own class of each image, which attacks make large.

    Cross-entropy is log(1 + exp(odds)): its gradient points the same way, but rounds to zero on images that the classifier
    is sure of.
    """
    import torch

    own = own[:, None]
    return logits.scatter(1, own, -torch.inf).logsumexp(dim=1) - logits.gather(1, own)[:, 0]


def refuse_epsilon(epsilon: float | int) -> None:
    """Raises `ValueError` unless it is 0 or a radius in 1/255ths of the pixel range that changes something."""
    if not (math.isfinite(epsilon) and 0 <= epsilon <= 255):
        raise ValueError(f"ε {epsilon} of the attack: give 1/255ths of the pixel range, such as 4 or 8")
    if 0 < epsilon < LEAST_EPSILON:
        raise ValueError(
            f"ε {epsilon} of the attack is in 1/255ths of the pixel range, and {epsilon:g}/255 changes next to "
            f"nothing; for {epsilon:g} of the range give {255 * epsilon:.3g}"
        )


def _lengths(vectors: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """Of each image as one vector, to divide by: next to 0 where it is 0."""
    import torch

    lengths = torch.linalg.vector_norm(vectors.flatten(1), dim=1).clamp(min=1e-12)
    return lengths.view(-1, *[1] * (vectors.dim() - 1))

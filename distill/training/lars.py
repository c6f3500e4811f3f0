"""LARS (You, Gitman & Ginsburg 2017, arXiv 1708.03888): SGD whose steps are in proportion to each layer's weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lars(torch.optim.Optimizer):
    """v ← m·v + lr·λ·(∇ + β·w), w ← w − v, with λ = η·‖w‖ / (‖∇‖ + β·‖w‖) for each weight tensor.

    λ is 1 for tensors of one dimension (biases, norms), as is usual, and where ‖w‖ or ‖∇‖ is 0.

    Args:
        params: tensors or groups; a group may have its own `weight_decay` β.
        lr: the schedule's.
        momentum: m.
        trust: η.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad.add(weight, alpha=group["weight_decay"])
                if weight.ndim > 1:
                    size, slope = weight.norm(), weight.grad.norm()
                    ratio = group["trust"] * size / (slope + group["weight_decay"] * size)
                    update *= torch.where((size > 0) & (slope > 0), ratio, 1.0)
                state = self.state[weight]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(weight)
                weight -= state["velocity"].mul_(group["momentum"]).add_(update, alpha=group["lr"])

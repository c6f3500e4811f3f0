"""Learning rate, optimizer and moving average: what happens to the weights at a step."""

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from distill.config import FitConfig
from distill.lars import Lars


def learning_rate(step: int, steps: int, peak: float, warmup: int | None = None, least: float = 0.0) -> float:
    """Linear warm-up over the first `warmup` steps (a tenth when None), then half a cosine down to `least` at the last."""
    warmup = max(1, steps // 10 if warmup is None else warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    return least + (peak - least) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup))) / 2


def warmup_steps(settings: FitConfig, per_epoch: int) -> int:
    assert settings.warmup_epochs is not None
    return int(settings.warmup_epochs * per_epoch + 1e-6)


def make_optimizer(weights: Iterable[nn.Parameter], settings: FitConfig) -> torch.optim.Optimizer:
    """Two groups: weights with two dimensions or more decay, biases and norms do not."""
    trained = [weight for weight in weights if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "lars":
        return Lars(groups, lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


class Ema:
    """An exponential moving average of a module's weights; its buffers are copied.

    Attributes:
        module: a copy that carries the average, in eval mode.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module, self.decay = copy.deepcopy(module).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After the step numbered `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))  # at first the average would be of the initial weights
        mine, theirs = ([weight.detach() for weight in of.parameters()] for of in (self.module, module))
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for copied, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            copied.copy_(buffer)

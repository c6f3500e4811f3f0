"""Learning rate, optimizer and moving average: what happens to the weights at a step."""

import copy
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distill.training.config import FitConfig
from distill.training.lars import Lars
from featcache.run_folder import EPOCH_DIGITS


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    warmup: int | None = None,
    least: float = 0.0,
    milestones: Sequence[int] | None = None,
    gamma: float = 0.1,
) -> float:
    """Linear warm-up over the first `warmup` steps (a tenth when None), then half a cosine down to `least` at the last; given
    `milestones`, steps, instead × `gamma` at each of them, but never below `least`."""
    warmup = max(1, steps // 10 if warmup is None else warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    if milestones is not None:
        return max(least, peak * gamma ** bisect_right(milestones, step))
    return least + (peak - least) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup))) / 2


def steps_of(epochs: float | None, per_epoch: int) -> int:
    """Whole steps in so many epochs, which may be a fraction."""
    assert epochs is not None
    return int(epochs * per_epoch + 1e-6)


def kept_after(step: int, every: float, per_epoch: int) -> float | None:
    """How many epochs a multiple of `every` is that this step, of those numbered from 1, completes; None where none is."""
    if not every:
        return None
    before, now = (math.floor(each / (every * per_epoch) + 1e-6) for each in (step - 1, step))
    return round(now * every, EPOCH_DIGITS) if now > before else None


def make_optimizer(
    modules: Sequence[nn.Module], settings: FitConfig, scale: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.Optimizer:
    """Of the modules' weights, in groups: those that decay, then those of `undecayed`; frozen ones are in none.

    Args:
        scale: what the learning rate is multiplied by for some weights, which is then its group's "lr_scale"; 1 for others.
    """
    trained = {weight: None for module in modules for weight in module.parameters() if weight.requires_grad}
    kept = set().union(*map(undecayed, modules))
    by: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for weight in sorted(trained, key=lambda weight: weight in kept):
        by.setdefault((weight in kept, scale.get(weight, 1.0) if scale else 1.0), []).append(weight)
    groups: list[dict[str, Any]] = [
        {
            "params": weights,
            "weight_decay": 0.0 if exempt else settings.weight_decay,
            **({"lr_scale": times} if scale else {}),
        }
        for (exempt, times), weights in by.items()
    ]
    assert settings.lr is not None
    if settings.optimizer == "lars":
        return Lars(groups, lr=settings.lr, momentum=settings.momentum)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def undecayed(module: nn.Module) -> set[nn.Parameter]:
    """The weights that are not to decay: of one dimension or none, biases, all of norms, and those that a model itself
    names by `no_weight_decay()`, as timm's do (position embeddings, class tokens, tables of relative positions)."""
    found = set()
    for part in module.modules():
        names: Any = getattr(part, "no_weight_decay", None)
        own = set(names()) if callable(names) else set()
        norm = is_norm(part)
        for name, weight in part.named_parameters():
            direct = "." not in name
            if name in own or (direct and (weight.ndim <= 1 or name.endswith("bias") or norm)):
                found.add(weight)
    return found


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or bool(re.search("norm$", type(module).__name__, re.IGNORECASE))


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def train_mode(module: nn.Module) -> None:
    """As `module.train()`, but parts whose weights are all frozen stay in eval mode: their batch norms keep the statistics
    that they came with, and nothing in them is dropped at random."""
    module.train()
    for part in module.modules():
        weights = list(part.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            part.eval()


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

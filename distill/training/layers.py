"""Learning rates by layer: the lower a layer of a trained student lies, the less it is changed by further training."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from timm.models import group_parameters
from torch import nn

from distill.training.schedule import is_norm
from featcache.student import Student


def layer_scales(student: Student, decay: float) -> dict[nn.Parameter, float]:
    """What the learning rate of each weight is multiplied by: `decay` to the power of the number of layers above its own
    (Bao et al. 2022, arXiv 2106.08254, as in timm).

    Args:
        decay: above 0, at most 1; papers take 0.65 to 0.9, the higher the smaller the model.
    """
    layer = layers(student)
    top = max(layer.values())
    return {weight: decay ** (top - number) for weight, number in layer.items()}


def layers(student: Student) -> dict[nn.Parameter, int]:
    """Number of each weight's layer, from 0, the lowest.

    Those of a model of timm's are timm's own, and what is behind it (projection, classifier) is where its classifier would
    be. Those of others are their `blocks`, and what is behind is a layer above; weights in none of the blocks (position
    embeddings, class tokens) are in the lowest.
    """
    body: Any = student.body
    if hasattr(body, "group_matcher"):
        place = getattr(body, "pretrained_cfg", {}).get("classifier") or "classifier"
        place = place if isinstance(place, str) else place[0]
        named = dict(body.named_parameters())
        for i, linear in enumerate(student.behind):
            named |= {f"{place}.{i}.{name}": weight for name, weight in linear.named_parameters()}
        together: Any = SimpleNamespace(named_parameters=lambda: iter(named.items()))  # all that timm asks of it
        numbers = group_parameters(together, body.group_matcher(coarse=False), reverse=True)
        return {weight: numbers[name] for name, weight in named.items()}
    parts = blocks(body)
    found = dict.fromkeys(body.parameters(), 0)
    found |= {weight: i for i, part in enumerate(parts) for module in part for weight in module.parameters()}
    return found | {weight: len(parts) for linear in student.behind for weight in linear.parameters()}


def blocks(body: nn.Module) -> list[list[nn.Module]]:
    """A network's parts with weights in the order in which they are registered, norms with what they follow: its children,
    and those of its plain lists of layers (`nn.Sequential`, `nn.ModuleList`) in their place."""
    found: list[list[nn.Module]] = []
    for part in _parts(body):
        if found and is_norm(part):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        inside = [each for each in child.children() if any(True for _ in each.parameters())]
        listed = type(child) in (nn.Sequential, nn.ModuleList) or (
            len(inside) == 1 and type(inside[0]) is nn.ModuleList  # the blocks of a transformer
        )
        if listed:
            yield from _parts(child)
        elif any(True for _ in child.parameters()):
            yield child

"""Learning rates by layer, against timm's own groups and by hand."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from distill.training.config import FitConfig
from distill.training.layers import blocks, layer_scales
from distill.training.schedule import make_optimizer
from featcache.student import Student, open_student

CLASSES = list("abc")


def groups_of(student: Student, decay: float) -> dict[str, tuple[float, float]]:
    """(scale, weight decay) by the name of the weight."""
    settings = FitConfig(student="tiny", weight_decay=0.1)
    groups = make_optimizer((student,), settings, layer_scales(student, decay)).param_groups
    of = {id(weight): (group["lr_scale"], group["weight_decay"]) for group in groups for weight in group["params"]}
    named = dict(student.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(of) == len(named)
    assert len({(group["lr_scale"], group["weight_decay"]) for group in groups}) == len(groups)
    return {name: of[id(weight)] for name, weight in named.items()}


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224"]
)
def test_layers_of_timms_models_are_timms(name):
    """The oracle is given the same model with its own classifier."""
    own = timm.create_model(name, num_classes=3)
    named = own.no_weight_decay() if hasattr(own, "no_weight_decay") else ()
    groups = param_groups_layer_decay(own, 0.1, no_weight_decay_list=named, layer_decay=0.7)
    of = {id(w): (group["lr_scale"], group["weight_decay"]) for group in groups for w in group["params"]}
    expected = {key: of[id(weight)] for key, weight in own.named_parameters()}
    found = groups_of(open_student(f"timm/{name}", classes=CLASSES), 0.7)
    classifier = own.pretrained_cfg["classifier"]
    renamed = {
        key.replace("classifier.", f"{classifier}.")
        if key.startswith("classifier.")
        else key.removeprefix("body."): value
        for key, value in found.items()
    }
    assert {key: value[0] for key, value in renamed.items()} == pytest.approx({k: v[0] for k, v in expected.items()})
    assert {key: value[1] for key, value in renamed.items()} == {k: v[1] for k, v in expected.items()}
    assert found["classifier.weight"] == (1.0, 0.1)


def test_layers_of_tiny_by_hand():
    """Six convolutions, each with its norm, a linear layer, and the projection and classifier behind it."""
    student = open_student("tiny", embedding_dim=5, classes=CLASSES)
    found = {name: scale for name, (scale, _) in groups_of(student, 0.5).items()}
    assert [found[f"body.{3 * i}.weight"] for i in range(6)] == [0.5**power for power in (7, 6, 5, 4, 3, 2)]
    assert all(
        found[f"body.{3 * i + 1}.{of}"] == found[f"body.{3 * i}.weight"] for i in range(6) for of in ("weight", "bias")
    )
    assert (found["body.20.weight"], found["projection.weight"], found["classifier.bias"]) == (0.5, 1.0, 1.0)


def test_lists_of_layers_are_opened_and_blocks_are_not():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resblocks = nn.ModuleList([Block(), Block()])

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(4))
            self.conv1, self.ln_pre, self.transformer = nn.Conv2d(3, 4, 2), nn.LayerNorm(4), Transformer()
            self.ln_post, self.drop = nn.LayerNorm(4), nn.Dropout()

    tower = Tower()
    first, second = tower.transformer.resblocks
    assert blocks(tower) == [[tower.conv1, tower.ln_pre], [first], [second, tower.ln_post]]


def test_a_decay_of_one_is_todays_optimizer():
    student = open_student("tiny", embedding_dim=5)
    plain = make_optimizer((student,), FitConfig(student="tiny"))
    assert [group["weight_decay"] for group in plain.param_groups] == [0.05, 0.0]
    assert not any("lr_scale" in group for group in plain.param_groups)
    assert {name: scale for name, (scale, _) in groups_of(student, 1.0).items()} == dict.fromkeys(
        dict(student.named_parameters()), 1.0
    )


def test_heads_of_the_method_and_frozen_weights():
    student, head = open_student("tiny", classes=CLASSES), nn.Linear(128, 3)
    student.body[0].requires_grad_(False)
    groups = make_optimizer((student, head), FitConfig(student="tiny"), layer_scales(student, 0.5)).param_groups
    of = {id(weight): group["lr_scale"] for group in groups for weight in group["params"]}
    assert id(student.body[0].weight) not in of
    assert of[id(head.weight)] == of[id(student.classifier.weight)] == 1.0


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"^layer_decay must be above 0 and at most 1, got"):
        FitConfig(student="tiny", layer_decay=decay)

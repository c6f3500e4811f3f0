"""Optimizers, moving average, clipping and accumulation, against plain formulas."""

import copy
import re

import numpy as np
import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from distill.methods import Method
from distill.pairs import Drawn
from distill.training.config import FitConfig
from distill.training.lars import Lars
from distill.training.schedule import Ema, learning_rate, make_optimizer, steps_of, train_mode
from distill.training.step import Training, make_accelerator
from featcache.inputs.images import Preprocess
from featcache.student import open_student

PREPROCESS = Preprocess(resize=4, crop=4, size=4)


class Student(nn.Module):
    """Without batch statistics, so that half a batch is to it what a whole one is."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(48, 6), nn.Dropout(0.0)
        self.norm = nn.LayerNorm(6)

    def forward(self, images, fields):
        return {"embedding": self.norm(self.dropout(self.linear(images.flatten(1))))}


class Mse(Method):
    def loss(self, student, teacher):
        difference = student["embedding"] - teacher["embedding"]
        return {"mse": difference.square().mean(), "l1": 0.5 * difference.abs().mean()}


def batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size, 4, 4, 3), np.uint8)
    features = {"embedding": rng.normal(size=(size, 6)).astype(np.float16)}
    none = np.full(size, -1)
    return Drawn(pixels, features, np.arange(size), np.zeros(size, np.int64), none, np.ones(size, np.float32))


def training(checkpoint=None, **settings):
    torch.manual_seed(0)
    student = Student()
    config = FitConfig(student="tiny", batch_size=8, **settings)
    accelerator = make_accelerator("cpu", "fp32", [], ".")
    return Training(accelerator, student, Mse(), PREPROCESS, config, checkpoint)


def flat(module):
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


# -- learning rate ----------------------------------------------------------------------------------------


def test_learning_rate_golden_values():
    """21 steps: two of warm-up, then cos 0°, 60°, 90°, 120° and 180° at steps 2, 8, 11, 14 and 20."""
    at = {step: learning_rate(step, 21, 4.0) for step in range(21)}
    assert [at[step] for step in (0, 1, 2, 8, 11, 14, 20)] == pytest.approx([2, 4, 4, 3, 2, 1, 0])
    assert all(at[step] > at[step + 1] for step in range(2, 20))
    assert learning_rate(0, 1, 4.0) == 4.0


def test_learning_rate_with_another_warm_up_and_end():
    at = [learning_rate(step, 17, 5.0, 4, 1.0) for step in range(17)]
    assert at[:5] == pytest.approx([1.25, 2.5, 3.75, 5, 5])
    assert [at[step] for step in (8, 10, 12, 16)] == pytest.approx([4, 3, 2, 1])


@pytest.mark.parametrize("milestones", [[3.0, 7.0], [2.5], [0.1, 0.2, 9.9]], ids=str)
def test_a_stepped_learning_rate_is_torchs(milestones):
    """10 epochs of 20 steps; the oracle is torch's own schedule of steps, and for a while linear warm-up before it."""
    config = FitConfig(student="tiny", epochs=10, schedule="step", milestones=milestones, gamma=0.3, lr=2.0)
    at = [steps_of(epochs, 20) for epochs in config.milestones]
    assert at == [round(20 * epochs) for epochs in milestones]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, at, gamma=0.3)
    for step in range(200):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, 200, 2.0, 0, 0.0, at, 0.3) == pytest.approx(expected, rel=1e-12)
        assert learning_rate(step, 200, 2.0, 0, 0.5, at, 0.3) == pytest.approx(max(0.5, expected))
        optimizer.step()
        schedule.step()
    assert [learning_rate(step, 200, 2.0, 4, 0.0, [5], 0.3) for step in range(6)] == pytest.approx(
        [0.5, 1, 1.5, 2, 2, 0.6]
    )


@pytest.mark.parametrize("milestones", [[], [0.0], [5.0, 5.0], [6.0, 4.0], [10.0], [-1.0, 3.0]], ids=str)
def test_milestones_that_are_none_are_refused(milestones):
    with pytest.raises(ValueError, match=r"^schedule step needs milestones, epochs in order between 0 and 10, got \["):
        FitConfig(student="tiny", epochs=10, schedule="step", milestones=milestones)


def test_what_changes_nothing_is_told():
    assert FitConfig(student="tiny").ignored == []
    given = {"momentum": 0.8, "milestones": [3.0], "gamma": 0.5}
    assert FitConfig(student="tiny", **given).ignored == [
        "momentum 0.8 changes nothing with optimizer adamw; leave it out",
        "milestones (3.0,) changes nothing with schedule cosine; leave it out",
        "gamma 0.5 changes nothing with schedule cosine; leave it out",
    ]
    assert FitConfig(student="tiny", optimizer="sgd", schedule="step", **given).ignored == []
    with pytest.raises(ValueError, match=r"momentum must be less than 1, got 1\.0"):
        FitConfig(student="tiny", momentum=1.0)


@pytest.mark.parametrize(("epochs", "given", "steps"), [(30, None, 300), (3, None, 30), (7, None, 70), (5, 0.5, 50)])
def test_warm_up_is_a_tenth_or_what_is_given(epochs, given, steps):
    assert steps_of(FitConfig(student="tiny", epochs=epochs, warmup_epochs=given).warmup_epochs, 100) == steps


# -- optimizers -------------------------------------------------------------------------------------------


def test_biases_and_norms_are_not_decayed():
    student = Student()
    assert decays((student,), weight_decay=0.3) == {
        "linear.weight": 0.3,
        "linear.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
    }


def decays(modules, **settings):
    """Weight decay by the name of the weight."""
    groups = make_optimizer(modules, FitConfig(student="tiny", **settings)).param_groups
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    named = {name: weight for module in modules for name, weight in module.named_parameters()}
    assert len(decay) == sum(weight.requires_grad for weight in named.values())
    return {name: decay[id(weight)] for name, weight in named.items() if weight.requires_grad}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224", "convnext_atto"]
)
def test_what_timm_names_is_not_decayed(name):
    """The oracle is timm's own grouping, where it is given what its model names."""
    student = open_student(f"timm/{name}", embedding_dim=5)
    body = student.body
    named = body.no_weight_decay() if hasattr(body, "no_weight_decay") else set()
    kept, decayed = param_groups_weight_decay(body, 0.1, no_weight_decay_list=named)
    assert (kept["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    expected = {id(weight) for weight in decayed["params"]} | {id(student.projection.weight)}
    found = decays((student,), weight_decay=0.1)
    assert {name for name, value in found.items() if value} == {
        name for name, weight in student.named_parameters() if id(weight) in expected
    }
    assert not any(value for name, value in found.items() if re.search("pos_embed|cls_token|bias_table", name))


def test_norms_of_any_shape_and_frozen_weights_are_not_decayed():
    model = nn.Sequential(nn.LayerNorm([3, 4]), nn.Linear(4, 2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    assert decays((model,), weight_decay=0.3) == {
        "0.weight": 0.0,
        "0.bias": 0.0,
        "1.weight": 0.3,
        "1.bias": 0.0,
    }


def test_the_learning_rate_follows_the_batch_size_unless_it_is_given():
    assert FitConfig(student="tiny").lr == 3e-3
    assert FitConfig(student="tiny", batch_size=64).lr == pytest.approx(1.5e-3)
    assert FitConfig(student="tiny", batch_size=4096).lr == pytest.approx(12e-3)
    assert FitConfig(student="tiny", batch_size=64, lr=3e-3).lr == 3e-3


def test_sgds_learning_rate_and_decay_are_those_of_its_papers():
    plain, large = (FitConfig(student="tiny", optimizer="sgd", batch_size=size) for size in (128, 512))
    assert (plain.lr, large.lr) == pytest.approx((0.1, 0.4))
    assert (plain.weight_decay, FitConfig(student="tiny").weight_decay) == (5e-4, 0.05)
    assert FitConfig(student="tiny", optimizer="sgd", weight_decay=0.01).weight_decay == 0.01


def test_frozen_parts_keep_their_statistics():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.Dropout()),
        nn.BatchNorm2d(4),
    )
    model[0].requires_grad_(False)
    train_mode(model)
    frozen, free = copy.deepcopy(model[0].state_dict()), model[1].running_mean.clone()
    images = torch.randn(8, 3, 5, 5)
    assert torch.equal(model[0](images), model[0](images))  # no dropout either
    model(images)
    assert all(torch.equal(value, frozen[name]) for name, value in model[0].state_dict().items())
    assert not torch.equal(model[1].running_mean, free)
    assert model.training
    assert model[1].training


def test_lars_is_the_papers_formula():
    rng = np.random.default_rng(1)
    start = {"matrix": rng.normal(size=(4, 3)), "bias": rng.normal(size=3), "zero": np.zeros((2, 2))}
    weights = {name: nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    optimizer = Lars(list(weights.values()), lr=0.5, momentum=0.8, weight_decay=0.02, trust=0.01)
    velocity = {name: np.zeros_like(value) for name, value in start.items()}
    expected = {name: value.copy() for name, value in start.items()}
    for lr in (0.5, 0.3, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        for name, weight in weights.items():
            gradient = rng.normal(size=weight.shape)
            weight.grad = torch.from_numpy(gradient)
            w, trust = expected[name], 1.0
            size, slope = np.linalg.norm(w), np.linalg.norm(gradient)
            if w.ndim > 1 and size > 0:
                trust = 0.01 * size / (slope + 0.02 * size)
            velocity[name] = 0.8 * velocity[name] + lr * trust * (gradient + 0.02 * w)
            expected[name] = w - velocity[name]
        optimizer.step()
    for name, weight in weights.items():
        np.testing.assert_allclose(weight.detach().numpy(), expected[name], rtol=1e-12)


def test_lars_defaults_are_the_papers():
    group = Lars([nn.Parameter(torch.ones(2, 2))], lr=1.0).param_groups[0]
    assert (group["momentum"], group["trust"]) == (0.9, 0.001)


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0])
def test_sgd_is_nesterovs_formula(momentum):
    """g = ∇ + β·w, v ← m·v + g, w ← w − lr·(g + m·v) (Sutskever et al. 2013, as torch has it)."""
    rng = np.random.default_rng(1)
    linear = nn.Linear(3, 4).double()
    settings = {"optimizer": "sgd", "momentum": momentum, "weight_decay": 0.02}
    optimizer = make_optimizer((linear,), FitConfig(student="tiny", **settings))
    expected = {name: weight.detach().numpy().copy() for name, weight in linear.named_parameters()}
    velocity = {name: np.zeros_like(value) for name, value in expected.items()}
    for lr in (0.5, 0.3, 0.1):
        for name, weight in linear.named_parameters():
            gradient = rng.normal(size=weight.shape)
            weight.grad = torch.from_numpy(gradient)
            gradient = gradient + (0.02 * expected[name] if name == "weight" else 0)
            velocity[name] = momentum * velocity[name] + gradient
            expected[name] = expected[name] - lr * (gradient + momentum * velocity[name])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for name, weight in linear.named_parameters():
        np.testing.assert_allclose(weight.detach().numpy(), expected[name], rtol=1e-12)


# -- a step -----------------------------------------------------------------------------------------------


def test_a_step_is_adamw_on_the_mean_loss():
    run, drawn = training(weight_decay=0.1, lr=0.01), batch()
    model = copy.deepcopy(run.student)
    decayed, other = [model.linear.weight], [model.linear.bias, *model.norm.parameters()]
    reference = torch.optim.AdamW([{"params": decayed}, {"params": other, "weight_decay": 0.0}], weight_decay=0.1)
    features = drawn.features
    scaled = (drawn.pixels / 255 - np.array(PREPROCESS.mean)) / np.array(PREPROCESS.std)
    images = torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()
    for number, lr in enumerate((0.01, 0.004)):
        terms = run.step(drawn, number, lr)
        difference = model(images, None)["embedding"] - torch.from_numpy(features["embedding"]).float()
        expected = {"mse": difference.square().mean(), "l1": 0.5 * difference.abs().mean()}
        assert {name: float(term) for name, term in terms.items()} == pytest.approx(
            {name: float(term.detach()) for name, term in expected.items()}, rel=1e-5
        )
        for group in reference.param_groups:
            group["lr"] = lr
        reference.zero_grad()
        sum(expected.values()).backward()
        reference.step()
        torch.testing.assert_close(flat(run.student), flat(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_is_the_batch(parts):
    whole, accumulated = training(), training(accumulate=parts)
    for number in range(3):
        terms = [run.step(batch(seed=number), number, 0.01) for run in (whole, accumulated)]
        for name in terms[0]:
            torch.testing.assert_close(terms[1][name], terms[0][name])
        torch.testing.assert_close(flat(accumulated.student), flat(whole.student), rtol=1e-5, atol=1e-6)


def test_clipping_shortens_all_gradients_together():
    free, clipped = training(), training(clip_norm=0.25)
    for run in (free, clipped):
        run.step(batch(), 0, 0.01)
    gradients = [[weight.grad for weight in run.student.parameters()] for run in (free, clipped)]
    norm = np.sqrt(sum(float(gradient.square().sum()) for gradient in gradients[0]))
    assert norm > 0.25
    for before, after in zip(*gradients, strict=True):
        torch.testing.assert_close(after, before * 0.25 / norm, rtol=1e-5, atol=1e-7)


def test_clipping_leaves_small_gradients_alone():
    free, clipped = training(), training(clip_norm=1e6)
    for run in (free, clipped):
        run.step(batch(), 0, 0.01)
    assert torch.equal(flat(free.student), flat(clipped.student))


def test_the_moving_average_is_of_all_steps():
    run, decay = training(ema=0.6), 0.6
    average = flat(run.student).double()
    for number in range(6):
        run.step(batch(seed=number), number, 0.05)
        now = min(decay, (1 + number) / (10 + number))
        average = now * average + (1 - now) * flat(run.student).double()
        torch.testing.assert_close(flat(run.saved).double(), average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(flat(run.saved), flat(run.student))


def test_the_moving_average_copies_running_statistics():
    module = nn.BatchNorm1d(3)
    ema = Ema(module, 0.9)
    module(torch.randn(16, 3) + 5)
    ema.update(module, 100)
    assert torch.equal(ema.module.running_mean, module.running_mean)
    assert ema.module.num_batches_tracked == 1
    assert not ema.module.training


def test_without_a_moving_average_the_student_itself_is_saved():
    run = training()
    assert run.saved is run.student


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "lars"}, {"optimizer": "sgd"}, {"ema": 0.9}, {"accumulate": 2, "clip_norm": 0.1}]
)
def test_a_state_taken_between_any_two_steps_goes_on_bit_by_bit(settings):
    whole = training(**settings)
    for number in range(5):
        if number == 3:
            state = copy.deepcopy(whole.state())
        whole.step(batch(seed=number), number, 0.01)
    resumed = training(state, **settings)
    for number in (3, 4):
        resumed.step(batch(seed=number), number, 0.01)
    assert torch.equal(flat(resumed.student), flat(whole.student))
    assert torch.equal(flat(resumed.saved), flat(whole.saved))


def test_what_a_step_draws_follows_from_its_number():
    def dropped(number, seed=0, noise=0):
        run = training(seed=seed)
        run.student.dropout.p = 0.5
        torch.manual_seed(noise)
        return {name: float(term) for name, term in run.step(batch(), number, 0.01).items()}

    assert dropped(7) == dropped(7, noise=1)
    assert len({dropped(number, seed)["mse"] for number in (7, 8) for seed in (0, 1)}) == 4


def test_weights_that_are_no_numbers_are_noticed():
    run = training()
    assert run.finite()
    with torch.no_grad():
        run.student.norm.bias[2] = float("inf")
    assert not run.finite()


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    monkeypatch.setattr("distill.training.step.get_available_trackers", lambda: ["mlflow"])
    with pytest.raises(ValueError, match=r"^unknown tracker 'wandbb'; did you mean wandb"):
        make_accelerator("cpu", "fp32", ["wandbb"], ".")
    with pytest.raises(ValueError, match=r"^tracker 'wandb' is not installed; pip install wandb, or leave it out$"):
        make_accelerator("cpu", "fp32", ["wandb"], ".")


def test_the_compiled_student_trains_the_same(monkeypatch):
    compiled = []
    monkeypatch.setattr(Student, "compile", lambda self: compiled.append(self))
    assert flat(training(compile=True).student).equal(flat(training().student))
    assert len(compiled) == 1

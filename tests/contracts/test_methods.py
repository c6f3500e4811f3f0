"""What every registered distillation method must do."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

from distill import load_method
from featcache.plugins import plugin_names
from featcache.store import write_store

TEACHER, STUDENT, ROWS = 12, 6, 20


@pytest.fixture(params=plugin_names("distill.methods"))
def name(request):
    return request.param


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "s.zarr", np.random.default_rng(0).normal(size=(ROWS, 2, TEACHER)))


def build(name, store):
    """A prepared method, its heads drawn from seed 0, and what it reports."""
    torch.manual_seed(0)
    few = {"mapping_steps": 3} if "mapping_steps" in inspect.signature(load_method(name)).parameters else {}
    method = load_method(name)(TEACHER, STUDENT, **few)
    return method, method.prepare(store, seed=0, progress=None)


@pytest.fixture
def method(name, store):
    return build(name, store)[0]


@pytest.fixture
def embedding(store):
    return torch.from_numpy(store.gather(range(ROWS))).float()


@pytest.fixture
def output():
    return torch.randn(ROWS, STUDENT, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_is_a_module(method):
    assert isinstance(method, nn.Module)


def test_options_have_defaults(name):
    options = [
        p for n, p in inspect.signature(load_method(name)).parameters.items() if n not in ("teacher_dim", "student_dim")
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in options)


def test_prepare_reports_finite_numbers(name, store):
    report = build(name, store)[1]
    assert all(isinstance(key, str) and type(value) is float and math.isfinite(value) for key, value in report.items())


def test_prepare_is_a_function_of_store_and_seed(name, store):
    (first, report), (second, again) = build(name, store), build(name, store)
    assert report == again
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_state_goes_through_a_checkpoint(name, store, method, embedding, output):
    restored = load_method(name)(TEACHER, STUDENT)
    restored.load_state_dict(method.state_dict())
    assert torch.equal(restored.loss(output, restored.target(embedding)), method.loss(output, method.target(embedding)))


def test_loss_is_a_finite_scalar_that_reaches_the_student(method, embedding, output):
    loss = method.loss(output, method.target(embedding))
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    assert output.grad.isfinite().all()
    assert (output.grad.abs().sum(dim=1) > 0).all()


def test_exactly_what_trains_has_a_gradient(method, embedding, output):
    method.loss(output, method.target(embedding)).backward()
    for key, weight in method.named_parameters():
        assert (weight.grad is not None and weight.grad.abs().sum() > 0) == weight.requires_grad, key
    assert not any(buffer.requires_grad for buffer in method.buffers())


def test_a_step_downhill_lowers_the_loss(method, embedding, output):
    target = method.target(embedding)
    before = method.loss(output, target)
    before.backward()
    torch.optim.SGD([output, *(w for w in method.parameters() if w.requires_grad)], lr=0.05).step()
    assert method.loss(output, target) < before


def test_tintem_keeps_its_mapping_out_of_training(store, embedding, output):
    method, report = build("tintem", store)
    assert list(method.parameters()) == []
    assert dict(method.named_buffers())["weight"].shape == (STUDENT, TEACHER)
    before = method.weight.clone()
    method.loss(output, method.target(embedding)).backward()
    assert method.weight.grad is None
    assert torch.equal(method.weight, before)
    assert set(report) == {"sne_start", "sne", "singular_min", "singular_max", "deviation"}


def test_tintem_is_zero_along_the_mapped_teacher_and_two_against_it(store, embedding):
    method, _ = build("tintem", store)
    mapped = torch.from_numpy(embedding.numpy() @ method.weight.numpy().T)
    lengths = torch.linspace(0.1, 9, ROWS)[:, None]
    assert method.loss(lengths * mapped, method.target(embedding)).item() == pytest.approx(0, abs=1e-6)
    assert method.loss(-lengths * mapped, method.target(embedding)).item() == pytest.approx(2, abs=1e-6)


def test_proteus_is_the_mean_squared_error_of_layer_norm_and_linear(store, embedding, output):
    method, report = build("proteus", store)
    assert report == {}
    norm, linear = method.head
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, STUDENT))
    x = output.detach().numpy().astype(np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * np.linspace(0.5, 2, STUDENT)
    predicted = x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
    expected = ((predicted - embedding.numpy()) ** 2).mean()
    assert method.loss(output, method.target(embedding)).item() == pytest.approx(expected, rel=1e-5)

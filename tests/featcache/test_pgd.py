"""Projected gradient ascent: the known optimum of linear losses, and a slow float64 loop elsewhere."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from featcache.pgd import Box, L2Ball, ascend

SHAPE = (5, 3, 4, 4)


@pytest.fixture
def images():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weight():
    return torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(2))


def test_the_optimum_of_a_linear_loss_in_a_box_is_a_corner(images, weight):
    box = Box.around(images, 0.1, 0, 1)
    found = ascend(lambda x: (x * weight).sum(), images, box, step=0.05, steps=4)
    expected = np.where(weight > 0, (images + 0.1).clamp(max=1), (images - 0.1).clamp(min=0))
    np.testing.assert_array_equal(found.numpy(), expected)


def test_the_optimum_of_a_linear_loss_in_an_l2_ball_is_along_its_gradient(images, weight):
    ball = L2Ball(images, 0.7, least=-9, most=9)
    found = ascend(lambda x: (x * weight).sum(), images, ball, step=0.3, steps=5)
    expected = images + 0.7 * weight / weight.norm()
    torch.testing.assert_close(found, expected)


def test_channels_may_have_units_of_their_own(images, weight):
    """Normalised images: ε and the step in units of each channel's deviation."""
    unit = torch.tensor([1.0, 2.0, 0.5])[:, None, None]
    box = Box.around(images, 0.1 * unit, -torch.ones(3, 1, 1), 3 * unit)
    found = ascend(lambda x: (x * weight).sum(), images, box, step=0.05 * unit, steps=2)
    torch.testing.assert_close(found, torch.minimum(images + 0.1 * unit * weight.sign(), 3 * unit))


def curved(x):
    return (x**2).sum((1, 2, 3)).sqrt() + (3 * x[:, 0]).sin().sum((1, 2))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_the_loop_of_one_image_at_a_time(images, norm):
    start = images + 0.4 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    ball = Box.around(images, 0.2, 0, 1) if norm == "linf" else L2Ball(images, 0.8)
    found = ascend(lambda x: curved(x).sum(), start, ball, step=0.15, steps=6)

    def inside(x, centre):
        if norm == "linf":
            return np.clip(np.clip(x, centre - 0.2, centre + 0.2), 0, 1)
        length = np.sqrt(((x - centre) ** 2).sum())
        return np.clip(centre + (x - centre) * min(1, 0.8 / length), 0, 1)

    for centre, first, ours in zip(images.double().numpy(), start.double().numpy(), found, strict=True):
        x = inside(first, centre)
        for _ in range(6):
            at = torch.from_numpy(x)[None].requires_grad_()
            curved(at).sum().backward()
            gradient = at.grad[0].numpy()
            step = np.sign(gradient) if norm == "linf" else gradient / np.sqrt((gradient**2).sum())
            x = inside(x + 0.15 * step, centre)
        np.testing.assert_allclose(ours.numpy(), x, atol=1e-5)


def test_only_the_images_get_a_gradient_and_steps_of_none_stay(images):
    layer = torch.nn.Conv2d(3, 2, 3)
    with torch.no_grad():  # the caller may not want any
        found = ascend(lambda x: layer(x).relu().sum(), images, L2Ball(images, 0.5), step=0.5, steps=2)
    assert all(weight.grad is None for weight in layer.parameters())
    assert not found.requires_grad
    assert not images.requires_grad
    assert (found - images).flatten(1).norm(dim=1).max() <= 0.5 + 1e-6
    assert torch.equal(ascend(lambda x: 0 * x.sum(), images, L2Ball(images, 0.5), step=0.5, steps=2), images)
    assert torch.equal(ascend(lambda x: x.sum(), images, Box.around(images, 0.1, 0, 1), step=0.1, steps=0), images)


def test_importing_it_brings_no_torch():
    subprocess.run([sys.executable, "-c", "import sys, featcache.pgd; assert 'torch' not in sys.modules"], check=True)

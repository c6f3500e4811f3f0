"""The autoencoder against transposed convolutions in loops, and as an encoder afterwards."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import distill
import featcache
from distill.methods.autoencoder import Autoencoder
from distill.objectives import match
from distill.testing.methods import batch_of
from featcache.rows import Rows


def of_images(images):
    return replace(batch_of({"embedding": torch.zeros(len(images), 12)}), inputs=images)


def transposed(x, layer):
    """4 × 4 kernels, stride 2, padding 1, one input position at a time, in float64."""
    weight, bias = (each.detach().double().numpy() for each in (layer.weight, layer.bias))
    n, _, height, width = x.shape
    wide = np.zeros((n, weight.shape[1], 2 * height + 2, 2 * width + 2))
    for i in range(height):
        for j in range(width):
            wide[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("nc,cokl->nokl", x[:, :, i, j], weight)
    return wide[:, :, 1:-1, 1:-1] + bias[:, None, None]


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("grid", [1, 2])
def test_it_is_the_formula_in_float64(grid, sigmoid):
    torch.manual_seed(0)
    method, drawn = Autoencoder(12, 48 * grid**2, sigmoid=sigmoid), torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 8 * grid, 8 * grid, generator=drawn)
    embedding = torch.randn(3, 48 * grid**2, generator=drawn)
    found = method.loss({"embedding": embedding}, of_images(images))
    x = embedding.double().numpy().reshape(3, 48, grid, grid)
    layers = [layer for layer in method.decoder if isinstance(layer, nn.ConvTranspose2d)]
    for number, layer in enumerate(layers):
        x = np.maximum(x, 0) if number else x
        x = transposed(x, layer)
    x = 1 / (1 + np.exp(-x)) if sigmoid else x
    assert [*found] == ["mse"]
    assert found["mse"].item() == pytest.approx(((x - images.double().numpy()) ** 2).mean(), rel=1e-5)


def test_golden_values():
    """A decoder of zeros gives 0, and with a sigmoid ½: of images of −1 and 2, half of each, 2.5 and 2.25."""
    images = torch.tensor([-1.0, 2.0])[:, None, None, None].expand(2, 3, 32, 32)
    for sigmoid, expected in ((False, 2.5), (True, 2.25)):
        method = Autoencoder(12, 768, sigmoid=sigmoid)
        for weight in method.parameters():
            nn.init.zeros_(weight)
        assert method.loss({"embedding": torch.zeros(2, 768)}, of_images(images))["mse"].item() == pytest.approx(
            expected
        )


def test_images_count_as_often_as_their_weights_say():
    """In float64, one image at a time; all alike they change no bit."""
    torch.manual_seed(0)
    method, embedding, images = Autoencoder(12, 48), torch.randn(3, 48), torch.randn(3, 3, 8, 8)

    def loss(*weight):
        batch = replace(of_images(images), weight=torch.tensor(weight))
        return method.loss({"embedding": embedding}, batch)["mse"].item()

    decoded = method.decoder(embedding).detach().double()
    each = (decoded - images.double()).square().mean((1, 2, 3)).tolist()
    assert loss(0.5, 0.0, 2.0) == pytest.approx((0.5 * each[0] + 2 * each[2]) / 2.5, rel=1e-5)
    assert loss(1.0, 1.0, 1.0) == loss(4.0, 4.0, 4.0) == match(decoded.float(), images, "mse").item()
    assert loss(0.0, 0.0, 0.0) == 0


def test_the_least_is_at_the_image_itself():
    method, embedding = Autoencoder(12, 768), torch.randn(4, 768)
    images = method.decoder(embedding).detach()
    assert method.loss({"embedding": embedding}, of_images(images))["mse"].item() == 0
    assert method.loss({"embedding": embedding + 0.1}, of_images(images))["mse"].item() > 0


@pytest.mark.parametrize(("width", "size"), [(48, 8), (768, 32), (3072, 64), (6, 32), (49, 32), (96, 32)])
def test_any_width_is_decoded_and_images_averaged_to_what_comes_out(width, size):
    method = Autoencoder(12, width)
    assert method.decoder(torch.zeros(2, width)).shape == (2, 3, size, size)
    coarse = torch.randn(2, 3, size, size)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    student = {"embedding": torch.randn(2, width)}
    torch.testing.assert_close(method.loss(student, of_images(fine)), method.loss(student, of_images(coarse)))


def test_a_trained_one_is_an_encoder_like_any(store, images, tmp_path):
    given = {
        "student": "conv_autoencoder",
        "method": "autoencoder",
        "image_size": 16,
        "batch_size": 16,
        "device": "cpu",
    }
    run = distill.fit(store, str(images), out=tmp_path / "run", epochs=30, lr=0.01, views="plain", **given)
    first, *_, last = run.metrics
    assert last["loss/mse"] < 0.3 * first["loss/mse"]
    seen = featcache.extract(str(images), f"run:{run.path}", tmp_path / "s.zarr", device="cpu", precision="fp32")
    assert Rows.of(seen).embedding_dim == 48 * 2 * 2
    assert not (np.asarray(Rows.of(seen).gather(range(8))) < 0).any()
    # Images of a colour of their own are told apart.
    cosine = np.corrcoef(Rows.of(seen).gather(range(64)).astype(np.float64))
    assert np.median(cosine[~np.eye(64, dtype=bool)]) < 0.95


def test_the_student_takes_no_weights_and_says_what_it_does(tmp_path, store, images):
    with pytest.raises(ValueError, match="takes no weights; give run:FOLDER"):
        distill.fit(store, str(images), out=tmp_path / "r", student="conv_autoencoder:x", method="autoencoder")
    with pytest.raises(ValueError, match=r"is trained here, .* `distill fit --student conv_autoencoder"):
        featcache.extract(str(images), "conv_autoencoder:x", tmp_path / "s.zarr")

"""Votes on every cell of dense maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dense_world import dense_encoder, write_photos
from torch.nn import functional as F

from featcache import derive, extract, open_store
from featcache.maps import resampled

FIELDS = ["embedding", "tokens", "dense"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path, count=6)


def made(folder: Path, seed: int, **given):
    encoder = dense_encoder(seed, **given)
    return extract(
        f"masks:{folder}", encoder, folder / f"{seed}.zarr", fields=FIELDS, device="cpu", views=2, augment="flip"
    )


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)


def test_probabilities_are_means_and_rows_weigh_what_teachers_agree_on(photos):
    one, two = made(photos, 0), made(photos, 1)
    found = derive("vote", [one, two], photos / "v.zarr", of="dense", dtype="float32")
    assert not open_store(found.path).verify()
    assert found.manifest.derivation.options == {
        "of": "dense",
        "by": "probability",
        "least": 0.0,
        "temperature": 1.0,
        "relabel": False,
        "names": [],
    }
    rows = np.arange(6)
    for view in (0, 1):
        maps = [store.gather(rows, "dense", np.full(6, view)).astype(np.float64) for store in (one, two)]
        shares = (softmax(maps[0]) + softmax(maps[1])) / 2
        np.testing.assert_allclose(np.exp(found.gather(rows, "dense", np.full(6, view))), shares, rtol=1e-5)
        weight = found.gather(rows, "weight", np.full(6, view))[:, 0]
        np.testing.assert_allclose(weight, shares.max(axis=1).mean(axis=(1, 2)), rtol=1e-5)
        for field in ("embedding", "tokens"):
            kept = found.gather(rows, field, np.full(6, view)), one.gather(rows, field, np.full(6, view))
            assert (kept[0] == kept[1]).all()


def test_a_majority_of_three_and_disagreement_is_low_confidence(photos):
    stores = [made(photos, seed) for seed in (0, 1, 2)]
    found = derive("vote", stores, photos / "v.zarr", of="dense", by="majority", dtype="float32")
    rows, first = np.arange(6), np.zeros(6, int)
    votes = np.stack([store.gather(rows, "dense", first).argmax(axis=1) for store in stores])
    share = np.maximum((votes == 0).sum(axis=0), (votes == 1).sum(axis=0)) / 3
    np.testing.assert_allclose(found.gather(rows, "weight", first)[:, 0], share.mean(axis=(1, 2)), rtol=1e-6)
    assert (found.gather(rows, "dense", first).argmax(axis=1) == (votes.sum(axis=0) >= 2)).all()
    assert share.mean() < 1


def test_maps_of_another_grid_are_brought_to_the_firsts(photos):
    maps = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float16)
    wanted = F.interpolate(torch.from_numpy(maps).float(), size=(7, 9), mode="bilinear")
    np.testing.assert_allclose(resampled(maps, (7, 9)), wanted.numpy(), atol=1e-5)
    one, two = made(photos, 0), made(photos, 1, size=24, resize=24)
    found = derive("vote", [one, two], photos / "v.zarr", of="dense")
    assert found.manifest.fields["dense"] == [2, 4, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"of": "tokens"}, "of is 'tokens'; give logits or dense"),
        ({"of": "dense", "least": 0.9}, "least, head and relabel are of the labels of rows"),
        ({}, "has no logits; extract it again with --fields embedding,logits"),
    ],
)
def test_what_cannot_be_voted_on_is_refused(photos, given, message):
    with pytest.raises(ValueError, match=message):
        derive("vote", [made(photos, 0), made(photos, 1)], photos / "v.zarr", **given)


def test_maps_of_other_classes_are_refused(photos):
    with pytest.raises(ValueError, match="have dense of other classes"):
        derive("vote", [made(photos, 0), made(photos, 1, classes=3)], photos / "v.zarr", of="dense")

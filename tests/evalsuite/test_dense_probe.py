"""The dense linear probe, against scikit-learn on patches and PyTorch's interpolation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dense_world import dense_encoder, write_photos
from PIL import Image
from torch.nn import functional as F

import evalsuite
from evalsuite.segmented import classes_of_cells
from featcache import extract

linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")


def store_of(folder: Path, seed: int = 0, **given):
    fields = ["embedding", "tokens"]
    return extract(
        f"masks:{folder}",
        dense_encoder(seed, **given),
        folder / f"{seed}.zarr",
        fields=fields,
        device="cpu",
        precision="fp32",
        dtype="float32",
    )


def test_a_patch_is_of_the_class_that_most_of_its_pixels_are_of():
    mask, box = np.random.default_rng(0).integers(0, 4, (13, 17)).astype(np.uint8), (2.5, 0.0, 15.5, 13.0)
    slow = np.full(9, -1)
    for cell in range(9):
        counts = np.zeros(3, int)
        for y in range(13):
            for x in range(17):
                i = (x + 0.5 - 2.5) * 3 / 13
                if mask[y, x] and 0 <= i < 3 and 3 * int((y + 0.5) * 3 / 13) + int(i) == cell:
                    counts[mask[y, x] - 1] += 1
        slow[cell] = counts.argmax() if counts.any() else -1
    assert classes_of_cells(mask, box, 3, 3).tolist() == slow.tolist()
    assert (classes_of_cells(np.zeros_like(mask), box, 3, 3) == -1).all()


def test_it_is_scikit_learns_regression_of_patches_enlarged_bilinearly(tmp_path):
    train, test = write_photos(tmp_path / "train", count=12), write_photos(tmp_path / "test", count=6, seed=1)
    one, two = store_of(train, size=32, resize=32), store_of(test, size=32, resize=32)
    found = evalsuite.dense_probe(one, two, c=1.0, device="cpu")

    def masks(folder):
        levels = [np.asarray(Image.open(path)) for path in sorted((folder / "masks").iterdir())]
        return [np.where(each > 0, 2, 1).astype(np.uint8) for each in levels]

    tokens = one.gather(np.arange(12), "tokens", np.zeros(12, int)).reshape(-1, 6).astype(np.float64)
    labels = np.concatenate([classes_of_cells(mask, (0.0, 0.0, 24.0, 24.0), 8, 2) for mask in masks(train)])
    centre = tokens.mean(axis=0)
    length = np.sqrt(((tokens - centre) ** 2).sum(axis=1).mean())
    # Of two classes it penalises one row of weights, twice as long as each of a pair.
    theirs = linear_model.LogisticRegression(C=2.0, tol=1e-8, max_iter=5000).fit((tokens - centre) / length, labels)
    truth, taken = [], []
    for row, mask in enumerate(masks(test)):
        at = two.gather(np.array([row]), "tokens", np.array([0]))[0].astype(np.float64)
        score = theirs.decision_function((at - centre) / length).reshape(1, 1, 8, 8)
        large = F.interpolate(torch.from_numpy(score), size=(24, 24), mode="bilinear")[0, 0].numpy()
        truth.append(mask.ravel() - 1)
        taken.append((large > 0).ravel())
    wanted = metrics.jaccard_score(np.concatenate(truth), np.concatenate(taken), average="macro")
    assert found.metrics["dense_probe/iou"].value == pytest.approx(wanted, abs=2e-3)
    assert found.metrics["dense_probe/iou"].value > found.parameters["chance"]["dense_probe/iou"] + 0.05
    assert found.parameters["fitted_patches"] == len(labels)
    assert evalsuite.dense_probe(one, two, c=1.0, patches=120, device="cpu").parameters["fitted_patches"] == 120
    assert evalsuite.Result.read(found.write(tmp_path / "r.json")).metrics == found.metrics
    compared = evalsuite.compare(found, found)
    assert compared.metrics["dense_probe/iou"].value == 0


def test_other_encoders_and_classes_are_refused(tmp_path):
    folder = write_photos(tmp_path)
    one, two = store_of(folder, 0), store_of(folder, 1)
    with pytest.raises(ValueError, match="extract both with the same encoder"):
        evalsuite.dense_probe(one, two)
    with pytest.raises(ValueError, match="have masks of other classes; name them alike"):
        evalsuite.dense_probe(one, one, train_masks=f"masks:{folder}@classes=a:0,b:255")
    for path in (folder / "masks").iterdir():
        Image.new("L", (24, 24)).save(path)
    with pytest.raises(ValueError, match="its patches are of less than two classes"):
        evalsuite.dense_probe(one, one)
    with pytest.raises(ValueError, match="c must hold positive numbers"):
        evalsuite.dense_probe(one, one, c=0.0)

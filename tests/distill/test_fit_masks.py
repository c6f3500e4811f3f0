"""Students of masks: pixels and masks move together, what has no mask is never opened, and it learns."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_world import dense_encoder, write_photos
from PIL import Image

import distill
import evalsuite
from distill.objectives import pixel_ce
from distill.pairs import Pairs
from distill.training.held_out import confusion, mean_iou
from featcache import extract, open_store
from featcache.corpora import open_corpus
from featcache.encoder import load_encoder
from featcache.inputs import Views
from featcache.masks import render
from featcache.store.layout import DENSE

FEW = {
    "student": "unet/4",
    "method": "ce",
    "epochs": 2,
    "batch_size": 4,
    "image_size": 16,
    "device": "cpu",
    "workers": 1,
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight photographs, of which the first five are labelled."""
    (write_photos(tmp_path, size=(30, 24)) / "labelled.txt").write_text("\n".join("01234"))
    return tmp_path


def store_of(folder: Path, spec: str = "", name: str = "t.zarr", **given):
    fields = ["embedding", "tokens", "dense"]
    return extract(
        spec or f"masks:{folder}", dense_encoder(resize=18), folder / name, fields=fields, device="cpu", **given
    )


def test_pixel_ce_is_the_formula_over_known_pixels_with_a_golden_value():
    logits = torch.tensor([[[[2.0, -1.0]], [[0.5, 0.0]]], [[[0.0, 1.0]], [[3.0, 1.0]]]])
    target, weight = torch.tensor([[[0, -1]], [[0, 1]]]), torch.tensor([2.0, 1.0])
    found = pixel_ce(logits, target, weight)
    pixels = [(2.0, 2.0, 0.5), (1.0, 0.0, 3.0), (1.0, 1.0, 1.0)]  # weight, logit of the class, the other one
    slow = sum(w * np.log(1 + np.exp(other - own)) for w, own, other in pixels) / 4
    assert found.item() == pytest.approx(slow)
    assert found.item() == pytest.approx(1.0361403)
    assert pixel_ce(40.0 * torch.tensor([[[[1.0]], [[-1.0]]]]), torch.tensor([[[0]]])).item() == pytest.approx(
        0, abs=1e-6
    )
    assert pixel_ce(logits, torch.full((2, 1, 2), -1)).item() == 0


def test_logits_are_enlarged_to_the_masks_pixels():
    logits = torch.randn(1, 2, 3, 3)
    target = torch.randint(0, 2, (1, 6, 6))
    large = torch.nn.functional.interpolate(logits, size=(6, 6), mode="bilinear")
    assert pixel_ce(logits, target).item() == pytest.approx(torch.nn.functional.cross_entropy(large, target).item())


@pytest.mark.parametrize("augment", ["flip", "rotate4_crop", "rrc"])
@pytest.mark.parametrize("own_crops", [False, True])
def test_masks_are_rendered_in_the_view_of_the_pixels(photos, augment, own_crops):
    """Photographs here are bright where their masks are: what is shown says what the mask must be."""
    for path in (photos / "masks").iterdir():
        Image.open(path).convert("RGB").save(photos / "images" / path.name)
    store = store_of(photos, views=4, augment=augment)
    given = {"views": "student", "student_augment": "crops"} if own_crops else {}
    student = dense_encoder(size=16, resize=18).preprocess
    nearest = replace(student, interpolation="nearest")
    pairs = Pairs(store, open_corpus(f"masks:{photos}"), nearest, 1, masks=True, **given)
    seen = 0
    for number in range(4):
        for drawn in pairs.epoch(number, batch_size=4, seed=1):
            known = drawn.mask > 0
            assert ((drawn.pixels[..., 0] > 0) == (drawn.mask == 2))[known].all()
            seen += int((~known).sum())
    assert (seen > 0) == (augment == "rotate4_crop" and not own_crops)  # of them alone, some lies beyond the image


def test_images_without_a_mask_have_none_and_theirs_are_never_opened(photos):
    for row in "567":
        (photos / f"masks/{row}.png").write_bytes(b"not to be opened")
    corpus = open_corpus(f"masks:{photos}@labelled=labelled.txt")
    pairs = Pairs(store_of(photos), corpus, dense_encoder(resize=18).preprocess, 1, masks=True)
    pairs.check()
    (drawn,) = pairs.plain(range(8), batch_size=8)
    assert (drawn.mask.reshape(8, -1) > 0).any(axis=1).tolist() == [True] * 5 + [False] * 3
    view = dense_encoder(resize=18).preprocess.draw((30, 24), Views(), "0", 0)
    mask = np.where(np.asarray(Image.open(photos / "masks/0.png")) > 0, 2, 1).astype(np.uint8)
    assert (drawn.mask[0] == render(mask, dense_encoder(resize=18).preprocess, view)).all()


def test_a_student_learns_masks_and_its_maps_are_extracted_and_measured(photos):
    write_photos(photos, count=20, size=(30, 24))
    (photos / "labelled.txt").write_text("\n".join(map(str, range(16))))
    store_of(photos)
    spec = f"masks:{photos}@labelled=labelled.txt@classes=field:0,road:255"
    more = {"epochs": 30, "lr": 0.02, "holdout": 0.25, "eval_every": 30}
    run = distill.fit(photos / "t.zarr", spec, out=photos / "run", **FEW | more)
    student = load_encoder(f"run:{run.path}")
    assert student.classes == ["field", "road"]
    losses = [record["loss"] for record in run.records if "epoch" in record]
    assert losses[-1] < 0.6 * losses[0]
    assert 0 < run.records[-1]["holdout/iou"] <= 1
    assert not (run.path / "head.safetensors").exists()
    found = extract(f"masks:{photos}", student, photos / "s.zarr", fields=["embedding", DENSE], device="cpu")
    assert list(found.manifest.encoder.classes) == ["field", "road"]
    measured = evalsuite.segmentation(found, masks=spec)
    assert measured.metrics["segmentation/iou"].value > measured.parameters["chance"]["segmentation/iou"] + 0.1


def test_what_trains_is_what_has_a_mask(photos):
    store_of(photos)
    run = distill.fit(photos / "t.zarr", f"masks:{photos}@labelled=labelled.txt", out=photos / "a", **FEW)
    store_of(photos, f"masks:{photos}@list=labelled.txt", name="few.zarr")
    other = distill.fit(photos / "few.zarr", f"masks:{photos}@list=labelled.txt", out=photos / "b", **FEW)
    one, two = (torch.load(each.checkpoints[-1])["student"] for each in (run, other))
    assert all(torch.equal(one[key], two[key]) for key in one)
    record = json.loads((run.path / "student.json").read_text())
    assert record["trained_on"]["samples"] == 5
    assert record["trained_on"]["copies"] == 0


@pytest.mark.parametrize(
    ("given", "corpus", "message"),
    [
        ({"student": "tiny"}, "masks:{}", "tiny: gives no map, and masks:.* has masks; choose a student that does"),
        (
            {},
            "{}/classes",
            "has no masks, by which unet/4 with method ce learns classes of pixels; give --corpus masks:",
        ),
        (
            {"method": "kd"},
            "masks:{}",
            "method kd: it tells apart classes of whole images; for masks take method ce or sslkd",
        ),
        ({"method_options": {"mixup": 0.5}}, "masks:{}", "mixup and cutmix are of labels, not of masks"),
        ({}, "masks:{}@classes=a:0,b:1", r"0\.png: its mask holds the value 255"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(photos, given, corpus, message):
    for row in range(8):
        path = photos / f"classes/{row % 2}/{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((photos / f"images/{row}.png").read_bytes())
    store_of(photos, str(photos / "classes") if corpus == "{}/classes" else "")
    with pytest.raises(ValueError, match=message):
        distill.fit(photos / "t.zarr", corpus.format(photos), out=photos / "run", **FEW | given)
    assert not (photos / "run").exists()


def test_a_mask_of_another_size_is_refused_before_training(photos):
    store_of(photos)
    Image.new("L", (7, 7)).save(photos / "masks/4.png")
    with pytest.raises(ValueError, match=r"4\.png: its mask is 7 × 7 px, the image 30 × 24"):
        distill.fit(photos / "t.zarr", f"masks:{photos}", out=photos / "run", **FEW)


def test_the_held_out_iou_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    logits, mask = torch.randn(3, 4, 5, 5), torch.randint(-1, 4, (3, 5, 5))
    known, taken = mask >= 0, logits.argmax(1)
    wanted = metrics.jaccard_score(mask[known], taken[known], average="macro")
    assert mean_iou(confusion(logits, mask)) == pytest.approx(wanted)


def test_a_store_keeps_maps_of_its_shape(photos):
    assert open_store(store_of(photos).path).manifest.fields[DENSE] == [2, 4, 4]

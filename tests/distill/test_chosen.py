"""Settings chosen from images: the rules, and what they are chosen from."""

import math

import numpy as np
import pytest
from PIL import Image

from distill import FitConfig
from distill.chosen import Seen, choose, described, survey
from featcache.corpora import open_corpus

LARGE, SIDE = 86_000_000, 224


def chosen(images: int, side: int = 300, parameters: int = LARGE, **given) -> dict:
    seen = Seen(images=images, classes=2, side=side, unreadable=0.0)
    extracted, settings = choose(seen, teacher_parameters=parameters, teacher_side=SIDE, **given)
    return {name: each.value for name, each in {**extracted, **settings}.items()}


@pytest.mark.parametrize(
    ("images", "views", "batch_size", "epochs"),
    [
        (16, 8, 2, 100),
        (159, 8, 16, 100),
        (256, 8, 16, 100),
        (1_438, 8, 128, 100),
        (10_000, 8, 256, 100),
        (10_001, 4, 256, 100),
        (100_001, 1, 256, 100),
        (1_281_167, 1, 256, 20),
        (14_000_000, 1, 256, 4),
    ],
)
def test_views_batch_and_epochs_by_the_number_of_images(images, views, batch_size, epochs):
    found = chosen(images)
    assert (found["views"], found["batch_size"], found["epochs"]) == (views, batch_size, epochs)
    training = images - (min(1_000, round(0.05 * images)) if images >= 160 else 0)
    assert batch_size == 2 ** math.floor(math.log2(min(256, training / 8)))
    assert ("augment" in found) == (views > 1)
    assert found["lr"] == pytest.approx(0.003 * math.sqrt(batch_size / 256))
    assert ("holdout" in found) == (images >= 160)
    config = FitConfig(**{name: value for name, value in found.items() if name not in ("views", "augment")})
    assert config.lr == found["lr"]


@pytest.mark.parametrize(
    ("images", "side", "parameters", "student", "size"),
    [
        (1_000, 8, LARGE, "tiny", 32),
        (1_000, 64, LARGE, "tiny", 64),
        (1_000, 500, LARGE, "timm/resnet18", 224),
        (1_000, 130, LARGE, "timm/resnet18", 128),
        (300_000, 500, LARGE, "timm/resnet50", 224),
        (300_000, 500, 22_000_000, "timm/resnet18", 224),
        (300_000, 500, 4_600_000, "tiny", 64),
        (300_000, 500, 1_000, "tiny", 64),
    ],
)
def test_student_and_input_by_the_images_size_and_the_teachers(images, side, parameters, student, size):
    found = chosen(images, side, parameters)
    assert (found["student"], found["image_size"]) == (student, size)


def test_a_student_that_is_asked_for_is_taken():
    assert chosen(1_000, student="timm/vit_tiny_patch16_224")["student"] == "timm/vit_tiny_patch16_224"


def test_every_choice_has_its_reason():
    for count in (20, 5_000, 50_000, 2_000_000):
        parts = choose(
            Seen(images=count, classes=0, side=200, unreadable=0.0), teacher_parameters=LARGE, teacher_side=SIDE
        )
        for name, value, reason in [line for part in parts for line in described(part)]:
            assert value, name
            assert len(reason) > 20, name


def write_images(folder, count, size=(30, 20)):
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((size[1], size[0], 3), i, np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def test_what_is_seen_of_a_corpus(tmp_path):
    folder = write_images(tmp_path / "images", 30)
    for i in range(6):
        (folder / f"{i:02d}.png").write_bytes(b"no image")
    Image.new("CMYK", (500, 400)).save(folder / "large.jpg")
    seen = survey(open_corpus(str(folder)))
    assert (seen.images, seen.classes, seen.side) == (31, 0, 20)
    assert seen.unreadable == pytest.approx(6 / 31)


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    with pytest.raises(ValueError, match="few: too few images to train on: 3; give 16 or more"):
        survey(open_corpus(str(write_images(tmp_path / "few", 3))))
    folder = write_images(tmp_path / "broken", 20)
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"not one of 20 images could be read \(the first: 00\.png: no image\)"):
        survey(open_corpus(str(folder)))
    folder = write_images(tmp_path / "some", 18)
    for i in range(5):
        (folder / f"{i:02d}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"can be read: about 13; .* \(the first that cannot: 00\.png: no image\)"):
        survey(open_corpus(str(folder)))


def test_what_cannot_be_read_is_not_counted():
    def found(images, unreadable):
        seen = Seen(images=images, classes=2, side=300, unreadable=unreadable)
        return choose(seen, teacher_parameters=LARGE, teacher_side=SIDE)

    assert found(200, 0.5) == found(100, 0.0)


def test_reasons_are_true():
    def reason(setting, images=1_000, side=500, parameters=LARGE):
        seen = Seen(images=images, classes=2, side=side, unreadable=0.0)
        return choose(seen, teacher_parameters=parameters, teacher_side=SIDE)[1][setting].reason

    assert "the smallest there is, for the teacher has 0.001 M" in reason("student", parameters=1_000)
    assert "no larger than the teacher's 4.6 M" in reason("student", parameters=4_600_000)
    assert "pretrained" in reason("student")
    assert "pretrained" not in reason("student", side=8)  # tiny has no weights to begin from
    assert reason("holdout", 300_000).startswith("about 1,000 images")
    assert "950 images make 8 steps" in reason("batch_size")

"""Images classified by texts about their classes."""

import numpy as np
import pytest

from evalsuite import compare, zeroshot
from featcache.inputs.images import Preprocess

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


@pytest.fixture
def task(rng, make_store):
    """Six classes, three texts of each but the last, which has one; images of the first five in another numbering."""
    centres = rng.normal(size=(6, 8))
    of_text = np.repeat(np.arange(6), [3, 3, 3, 3, 3, 1])
    texts = (centres[of_text] + 0.5 * rng.normal(size=(16, 8))) * rng.uniform(0.1, 9, (16, 1))
    of_image = np.repeat(np.arange(5), 9)
    images = centres[of_image] + 0.9 * rng.normal(size=(45, 8))
    prompts = make_store("prompts", texts, labels=of_text, class_names=NAMES, fingerprint="text", dtype="float32")
    test = make_store(
        "test", images, labels=4 - of_image, class_names=NAMES[4::-1], fingerprint="image", dtype="float32"
    )
    return test, prompts, (images, of_image, texts, of_text)


def slow(images, texts, of_text):
    """The order of the classes for each image, as CLIP's zero-shot classifier has it."""
    images, texts = (np.float32(each).astype(np.float64) for each in (images, texts))
    weight = []
    for number in range(6):
        found = [text / np.linalg.norm(text) for text, label in zip(texts, of_text, strict=True) if label == number]
        weight.append(np.mean(found, axis=0) / np.linalg.norm(np.mean(found, axis=0)))
    return [sorted(range(6), key=lambda c: -(image @ weight[c])) for image in images]


def test_equals_a_slow_loop(task):
    test, prompts, (images, truth, texts, of_text) = task
    result, ranking = zeroshot(test, prompts), slow(images, texts, of_text)
    right = [order[0] == label for order, label in zip(ranking, truth, strict=True)]
    among = [label in order[:5] for order, label in zip(ranking, truth, strict=True)]
    assert result.samples["zeroshot/top1"].tolist() == right
    assert result.samples["zeroshot/top5"].tolist() == among
    assert 0.3 < np.mean(right) < 1
    of_class = [np.mean(np.array(right)[truth == label]) for label in range(5)]
    assert result.metrics["zeroshot/macro_top1"].value == pytest.approx(np.mean(of_class))
    for name, value in zip(NAMES, of_class, strict=False):
        assert result.metrics[f"per_class/{name}/zeroshot/top1"].value == pytest.approx(value)
    assert result.parameters["prompts"] == {"least": 1, "most": 3}
    assert result.metrics["zeroshot/top1"].ci95[0] < np.mean(right) < result.metrics["zeroshot/top1"].ci95[1]


def test_two_sets_of_prompts_are_compared_on_the_same_images(task, make_store):
    test, prompts, (_, _, texts, of_text) = task
    one = make_store("one", texts[::3], labels=of_text[::3], class_names=NAMES, fingerprint="text")
    a, b = zeroshot(test, one), zeroshot(test, prompts)
    found = compare(a, b).metrics["zeroshot/top1"]
    assert found.value == pytest.approx(b.metrics["zeroshot/top1"].value - a.metrics["zeroshot/top1"].value)


def test_classes_without_texts_are_wrong_and_said(task, make_store):
    test, _, (_, _, texts, of_text) = task
    few = make_store("few", texts[of_text < 3], labels=of_text[of_text < 3], class_names=NAMES)
    result = zeroshot(test, few)
    assert not result.samples["zeroshot/top1"][27:].any()
    assert any("18 of 45 rows are of classes without a row" in each for each in result.remarks)


def test_equal_classes_go_to_the_lower_one(make_store):
    prompts = make_store("p", np.eye(2)[[1, 0, 0]], labels=[0, 1, 2], class_names=["a", "b", "c"])
    test = make_store("t", np.array([[3.0, 0], [1, 0]]), labels=[1, 2], class_names=["a", "b", "c"])
    assert zeroshot(test, prompts).samples["zeroshot/top1"].tolist() == [True, False]


def test_what_does_not_suit_is_refused(task, make_store, rng):
    test, _, _ = task
    wide = make_store("wide", rng.normal(size=(2, 9)), labels=[0, 1], class_names=NAMES)
    with pytest.raises(ValueError, match=r"has 8 dimensions, .*wide\.zarr 9; embed the prompts with the text tower"):
        zeroshot(test, wide)
    like = Preprocess(resize=8, crop=8, size=8).to_dict()
    images = make_store("images", rng.normal(size=(2, 8)), labels=[0, 1], class_names=NAMES, preprocess=like)
    with pytest.raises(ValueError, match=r"images\.zarr is of images .*give texts about the classes"):
        zeroshot(test, images)
    bare = make_store("bare", rng.normal(size=(2, 8)))
    with pytest.raises(ValueError, match=r"bare\.zarr has no labels"):
        zeroshot(test, bare)
    against = make_store("against", np.array([[1.0] * 8, [-1.0] * 8, [2.0] * 8]), labels=[0, 0, 1], class_names=NAMES)
    with pytest.raises(ValueError, match="the texts of class 0 cancel each other out"):
        zeroshot(test, against)
    zero = make_store("zero", np.array([[1.0] * 8, [0.0] * 8]), labels=[0, 1], class_names=NAMES, sample_ids=["x", "y"])
    with pytest.raises(ValueError, match="the embedding of y is zero"):
        zeroshot(test, zero)

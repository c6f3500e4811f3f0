"""SSLKD: the four terms, against the formula in float64, literal values and their minima; and fits in which masks stay unseen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dense_world import dense_encoder, write_photos

import distill
from distill.methods.sslkd import SSLKD
from distill.testing.methods import batch_of
from featcache import derive, extract
from featcache.rows import Rows
from featcache.store.layout import DENSE

LOGITS = torch.tensor([[[[2.0, -1.0]], [[0.5, 0.0]]], [[[0.0, 1.0]], [[3.0, 1.0]]]])
SAID = torch.tensor([[[[0.9, 0.3]], [[0.1, 0.7]]], [[[0.6, 0.8]], [[0.4, 0.2]]]]).log()
EMBEDDING = torch.tensor([[1.0, 2.0], [0.5, -1.0]])


def batch(mask=None, weight=(1.0, 0.5)):
    made = batch_of({"embedding": EMBEDDING, "tokens": EMBEDDING[:, None], DENSE: SAID})
    given = {"mask": None if mask is None else torch.tensor(mask), "weight": torch.tensor(weight)}
    return type(made)(**{**vars(made), **given})


def method(**given) -> SSLKD:
    made = SSLKD(2, 2, **given)
    if made.head:
        with torch.no_grad():
            made.head.weight.copy_(torch.eye(2))
            made.head.bias.zero_()
    return made


MASK = [[[0, -1], [0, -1]], [[-1, -1], [-1, -1]]]
STUDENT = {
    "embedding": torch.tensor([[0.0, 2.0], [1.0, 1.0]]),
    "tokens": torch.tensor([[[1.0, 0.0]], [[0.5, 0.0]]]),
    DENSE: LOGITS,
}


def by_formula(temperature: float) -> dict[str, float]:
    """Cell by cell: image 0 has a mask of classes 0 and none, image 1 has none and counts half."""

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    cells = [
        (LOGITS[i, :, 0, j].double().numpy(), SAID[i, :, 0, j].double().numpy(), w)
        for i, w in ((0, 1), (1, 0.5))
        for j in (0, 1)
    ]
    kl = sum(
        w * (softmax(t / temperature) * (np.log(softmax(t / temperature)) - np.log(softmax(s / temperature)))).sum()
        for s, t, w in cells
    )
    unsupervised = -sum(np.log(softmax(s))[t.argmax()] for s, t, w in cells[2:]) / 2
    feature = (
        ((STUDENT["embedding"] - EMBEDDING) ** 2).mean() + ((STUDENT["tokens"][:, 0] - EMBEDDING) ** 2).mean()
    ) / 2
    return {
        "supervised": -np.log(softmax(cells[0][0]))[0],
        "feature": feature.item(),
        "probability": temperature**2 * kl / 3,
        "unsupervised": unsupervised,
    }


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_terms_are_the_formula(temperature):
    found = method(temperature=temperature).loss(STUDENT, batch(MASK))
    wanted = by_formula(temperature)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name


def test_literal_values():
    found = method(align="mse", match="l2").loss(STUDENT, batch(MASK))
    values = {"supervised": 0.2014133, "feature": 1.5153882, "probability": 0.0684759, "unsupervised": 1.8708674}
    assert {name: round(term.item(), 7) for name, term in found.items()} == pytest.approx(values, abs=1e-6)


def test_the_minimum_of_what_teachers_say_is_to_say_the_same():
    agreeing = {"embedding": EMBEDDING, "tokens": EMBEDDING[:, None], DENSE: SAID.clone().requires_grad_()}
    found = method().loss(agreeing, batch())
    assert found["feature"].item() == 0
    assert found["probability"].item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(found["probability"], agreeing[DENSE])
    assert gradient.abs().max() < 1e-6
    sure = {**agreeing, DENSE: 40 * SAID}
    assert method().loss(sure, batch())["unsupervised"].item() < 1e-4


def test_weights_of_0_leave_terms_out_and_thresholds_pixels():
    assert list(method(feature=0.0, supervised=0.0).loss(STUDENT, batch(MASK))) == [
        "probability",
        "unsupervised",
    ]
    some = method(least=0.7).loss(STUDENT, batch())["unsupervised"]
    log_p = LOGITS.log_softmax(1)
    known = [
        (1.0, log_p[0, 0, 0, 0]),
        (1.0, log_p[0, 1, 0, 1]),
        (0.5, log_p[1, 0, 0, 1]),
    ]  # of .9, .7 and .8; .6 is too little
    assert some.item() == pytest.approx(-sum(w * each for w, each in known).item() / 2.5, rel=1e-5)
    with pytest.raises(ValueError, match="all weights are 0"):
        SSLKD(2, 2, supervised=0.0, feature=0.0, probability=0.0, unsupervised=0.0)


@pytest.fixture
def votes(tmp_path: Path) -> Path:
    """Ten photographs, three of them labelled, and the votes of two encoders."""
    (write_photos(tmp_path, count=10) / "labelled.txt").write_text("0\n3\n4\n")
    for seed in (0, 1):
        fields = ["embedding", "tokens", "dense"]
        extract(
            f"masks:{tmp_path}",
            dense_encoder(seed),
            tmp_path / f"{seed}.zarr",
            fields=fields,
            device="cpu",
            views=2,
            augment="flip",
        )
    derive("vote", [tmp_path / "0.zarr", tmp_path / "1.zarr"], tmp_path / "v.zarr", of="dense")
    return tmp_path


FEW = {
    "student": "unet/4",
    "method": "sslkd",
    "epochs": 2,
    "batch_size": 4,
    "image_size": 16,
    "device": "cpu",
    "workers": 1,
}


def test_masks_of_unlabelled_images_are_never_opened_and_change_nothing(votes):
    corpus = f"masks:{votes}@labelled=labelled.txt"
    runs = [distill.fit(votes / "v.zarr", corpus, out=votes / "a", **FEW)]
    for row in "1256789":
        (votes / f"masks/{row}.png").write_bytes(b"not to be opened")
    runs.append(distill.fit(votes / "v.zarr", corpus, out=votes / "b", **FEW))
    one, two = (torch.load(run.checkpoints[-1])["student"] for run in runs)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert {f"loss/{name}" for name in ("supervised", "feature", "probability", "unsupervised")} <= runs[0].records[
        -1
    ].keys()


def test_half_of_what_is_drawn_has_a_mask():
    made, masked = SSLKD(2, 2, tokens=False), np.array([True, False, False, False])
    made.prepare(Rows.from_arrays(np.eye(4)), seed=0, masked=masked)
    weights = made.weights(0)
    assert weights[masked].sum() == pytest.approx(weights[~masked].sum())
    even = SSLKD(2, 2, tokens=False, labelled_share=0.0)
    even.prepare(Rows.from_arrays(np.eye(4)), seed=0, masked=masked)
    assert even.weights(0) is None


@pytest.mark.parametrize(
    ("given", "corpus", "message"),
    [
        ({}, "{}/images", "has no masks, by which unet/4 with method sslkd learns classes of pixels"),
        (
            {"views": "student", "student_augment": "crops"},
            "masks:{}",
            "not of the student's own crops; leave student_augment out",
        ),
        ({}, "masks:{}@classes=a:0,b:255,c:9", "its maps are of 2 classes, the masks of 3"),
    ],
)
def test_what_does_not_go_together_is_refused(votes, given, corpus, message):
    with pytest.raises(ValueError, match=message):
        distill.fit(votes / "v.zarr", corpus.format(votes), out=votes / "run", **FEW | given)


def test_a_store_without_maps_is_refused(votes):
    extract(f"masks:{votes}", dense_encoder(), votes / "e.zarr", fields=["embedding", "tokens"], device="cpu")
    with pytest.raises(
        ValueError, match=r"e\.zarr: holds no dense, which this method needs; extract with --fields embedding,dense"
    ):
        distill.fit(votes / "e.zarr", f"masks:{votes}", out=votes / "run", **FEW)

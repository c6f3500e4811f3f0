"""DAD: the formula in float64, which rows it takes, and that what is made of a held-out image does not train."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fit_cases import Interrupted, interrupt_at, without_speed
from PIL import Image
from small_world import make_images
from tiny import tiny_encoder

import distill
from distill.methods.dad import DAD
from distill.testing.methods import batch_of, write_token_rows, write_token_store
from distill.training import loop
from distill.training.held_out import same_images, split
from featcache import extract, open_corpus
from featcache.rows import Rows

TEACHER = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -1.0], [1.0, 1.0, 0.0], [0.0, 0.5, 2.0], [1.0, -1.0, 0.0]])
STUDENT = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 2.0], [0.5, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
LABEL = torch.tensor([0, 2, -1, 1, 0])
ROW = torch.tensor([3, 0, 7, 12, 19])
"""Of `write_token_rows`: the first three of clean images."""


@pytest.fixture
def rows(tmp_path):
    return write_token_rows(tmp_path)


def loss(rows, counts=None, student=STUDENT, keep=slice(None), **options):
    method = DAD(12, 6, **options)
    method.prepare(rows, seed=0)
    features = {"embedding": torch.zeros(5, 12), "logits": TEACHER}
    batch = batch_of({name: value[keep] for name, value in features.items()}, ROW[keep], LABEL[keep])
    if counts is not None:
        batch = replace(batch, weight=counts[keep])
    return method.loss({"embedding": torch.zeros(5, 6)[keep], "logits": student[keep]}, batch)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({}, {"ce": 0.4984938665, "kl": 0.6568763924, "kl_adversarial": 0.3353146854}),
        ({"temperature": 1.0, "weight": 2.0}, {"ce": 0.4984938665, "kl": 1.4921877442, "kl_adversarial": 1.2195694001}),
    ],
)
def test_the_terms_are_the_formula_and_have_these_values(rows, options, golden):
    t, share = options.get("temperature", 4.0), options.get("weight", 0.5)
    weight = np.array([1.0, 2.0, 0.5, 3.0, 1.0])
    kls = []
    for of_teacher, of_student in zip(TEACHER.double().numpy(), STUDENT.double().numpy(), strict=True):
        p, q = softmax(of_teacher / t), softmax(of_student / t)
        kls.append((p * np.log(p / q)).sum())
    kls = share * t**2 * np.array(kls)
    ces = [-np.log(softmax(STUDENT.double().numpy()[i])[LABEL[i]]) for i in (0, 1)]  # of labelled clean rows
    expected = {
        "ce": np.average(ces, weights=weight[:2]),
        "kl": np.average(kls[:3], weights=weight[:3]),
        "kl_adversarial": np.average(kls[3:], weights=weight[3:]),
    }
    found = loss(rows, torch.tensor(weight, dtype=torch.float32), **options)
    assert {name: term.item() for name, term in found.items()} == pytest.approx(expected, rel=1e-5)
    assert {name: term.item() for name, term in found.items()} == pytest.approx(golden, rel=1e-5)


def test_a_student_that_is_the_teacher_leaves_labels_alone(rows):
    student = TEACHER.clone().requires_grad_()
    terms = loss(rows, student=student)
    assert terms["kl"].item() == pytest.approx(0, abs=1e-6) == terms["kl_adversarial"].item()
    (terms["kl"] + terms["kl_adversarial"]).backward()
    assert student.grad.abs().max() < 1e-6


def test_a_batch_of_one_kind_has_nothing_of_the_other(rows):
    clean, made = loss(rows, keep=slice(0, 3)), loss(rows, keep=slice(3, 5))
    assert clean["kl_adversarial"] == made["ce"] == made["kl"] == 0
    whole = loss(rows)
    assert clean["kl"] == pytest.approx(whole["kl"].item())
    assert clean["ce"] == pytest.approx(whole["ce"].item())
    assert made["kl_adversarial"] == pytest.approx(whole["kl_adversarial"].item())


def test_it_needs_both_kinds(tmp_path, rows):
    assert DAD(12, 6).prepare(rows, seed=0) == {"adversarial_share": 0.5}
    for name, spec, message in (("c", "photos/", "no adversarial images"), ("a", "adversarial:t::::p/", "only advers")):
        one = Rows.of([write_token_store(tmp_path / f"{name}.zarr", spec=spec)])
        with pytest.raises(
            ValueError, match=rf"{name}\.zarr: {message}.*; method dad learns from .*give both with --store"
        ):
            DAD(12, 6).prepare(one, seed=0)


@pytest.mark.parametrize(
    ("options", "message"), [({"temperature": 0.0}, "temperature must be"), ({"weight": 0.0}, "weight must be greater")]
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DAD(12, 6, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """30 images of three classes, the last of each class the same image as its first; and negatives for attacked ones."""
    folder = tmp_path_factory.mktemp("dad")
    for seed, name in enumerate("abc"):
        make_images(folder / "images" / name, 10, seed=seed)
        (folder / "images" / name / "009.png").write_bytes((folder / "images" / name / "000.png").read_bytes())
    for path in sorted((folder / "images").rglob("*.png")):
        out = folder / "negatives" / path.relative_to(folder / "images")
        out.parent.mkdir(parents=True, exist_ok=True)
        image = 255 - np.asarray(Image.open(path))
        image[0, 0] = len(list(out.parent.iterdir()))  # no two are the same file
        Image.fromarray(image).save(out)
    clean, made = open_corpus(str(folder / "images")), open_corpus(str(folder / "negatives"))
    made.spec = f"adversarial:tiny::::{folder / 'images'}"
    given = {"fields": ("embedding", "logits"), "device": "cpu", "precision": "fp32"}
    stores = [extract(c, tiny_encoder(), folder / f"{i}.zarr", **given) for i, c in enumerate((clean, made))]
    return stores, [clean, made]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_made_of_a_held_out_image_is_left_out(pair, seed):
    rows = Rows.of(pair[0])
    assert rows.adversarial.tolist() == [False] * 30 + [True] * 30
    images = same_images(rows)
    for i, name in enumerate(rows.sample_ids):  # one number for an image, its copy, and what was made of either
        alike = {name, name.replace("009", "000"), name.replace("000", "009")}
        assert set(rows.sample_ids[images == images[i]]) == alike, name
    trained, held = split(images, 0.3, seed, never=rows.adversarial)
    assert 7 <= len(held) <= 9
    assert (held < 30).all()
    seen = {f"{rows.sample_ids[i]}".replace("009", "000") for i in trained}
    assert not seen & {f"{rows.sample_ids[i]}".replace("009", "000") for i in held}
    assert (trained >= 30).sum() == (trained < 30).sum()
    only_clean = Rows.of(pair[0][:1])
    np.testing.assert_array_equal(same_images(only_clean), only_clean.images())


def test_a_resumed_run_has_the_same_bits(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)

    def train(out, **given):
        few = {"student": "tiny", "embedding_dim": 8, "image_size": 16, "batch_size": 8, "epochs": 2, "holdout": 0.3}
        return distill.fit(*pair, out=out, method="dad", device="cpu", checkpoint_minutes=0.0, **few, **given)

    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("training", 5))
    run = train(tmp_path / "run", resume=True)
    assert (run.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()
    assert without_speed(run.metrics) == without_speed(whole.metrics)
    assert {"loss/ce", "loss/kl", "loss/kl_adversarial", "holdout/top1"} <= whole.metrics[-1].keys()
    trained_on = json.loads((run.path / "student.json").read_text())["trained_on"]
    assert trained_on["samples"] + trained_on["held_out"] + trained_on["copies"] == 60
    assert trained_on["copies"] >= trained_on["held_out"]
    with pytest.raises(ValueError, match="no adversarial images; method dad"):
        distill.fit(pair[0][0], pair[1][0], out=tmp_path / "one", method="dad", student="tiny", device="cpu")
    assert not (tmp_path / "one" / "checkpoints").exists()

"""What every user does next: a distilled student is fine-tuned with labels, and what comes of it is used everywhere."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fit_cases import Interrupted, interrupt_at
from PIL import Image
from safetensors.torch import load_file
from small_world import make_teacher

import distill
import evalsuite
import featcache
from distill.training.config import FitConfig
from featcache.encoder import load_encoder
from featcache.head import Head
from featcache.rows import Rows
from featcache.store import open_store
from featcache.student import open_student

COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (230, 30, 20)}
EXACT = {"device": "cpu", "precision": "fp32"}


def paint(folder, count, seed, colours=COLOURS):
    """`count` noisy pictures of each colour, large enough to be corrupted."""
    rng = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noisy = rng.normal(colour, 70, (36, 36, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Labelled images, a store of them, and a student that was distilled from it without labels; tests only read them."""
    folder = tmp_path_factory.mktemp("world")
    made = {"train": paint(folder / "train", 16, 0), "test": paint(folder / "test", 6, 1)}
    made["far"] = paint(folder / "far", 8, 2, {"grey": (120, 120, 120)})
    store = featcache.extract(made["train"], make_teacher(), folder / "train.zarr", **EXACT)
    world = SimpleNamespace(folder=folder, corpora=made, store=store)
    world.distilled = trained(
        world, folder / "distilled", student="tiny", method="proteus", embedding_dim=8, image_size=16
    )
    return world


def trained(world, out, **given):
    """Two epochs of six steps, from the distilled student unless another is given."""
    plain = {
        "student": f"run:{world.folder / 'distilled'}",
        "method": "ce",
        "epochs": 2,
        "batch_size": 8,
        "device": "cpu",
    }
    return distill.fit(world.store, world.corpora["train"], out=out, **{**plain, **given})


def weights_of(run):
    return load_file(run.path / "student.safetensors")


@pytest.mark.parametrize("settings", [{}, {"ema": 0.8}, {"optimizer": "sgd", "accumulate": 2}], ids=str)
def test_linear_leaves_all_but_the_classifier_alone(world, tmp_path, settings):
    """Running statistics of norms too; and the embeddings are those of the student it came from."""
    run = trained(world, tmp_path / "run", train="linear", **settings)
    was, now = weights_of(world.distilled), weights_of(run)
    assert now.keys() - was.keys() == {"classifier.weight", "classifier.bias"}
    assert any("running_mean" in name for name in was)
    assert all(torch.equal(now[name], value) for name, value in was.items())
    embedded = [
        featcache.extract(world.corpora["test"], f"run:{each.path}", tmp_path / f"{i}.zarr", **EXACT)
        for i, each in enumerate((world.distilled, run))
    ]
    one, other = (Rows.of(store).gather(range(18)) for store in embedded)
    np.testing.assert_array_equal(one, other)
    assert embedded[0].fingerprint != embedded[1].fingerprint
    losses = [record["loss"] for record in run.metrics]
    assert losses[1] < losses[0]


def test_linear_is_the_gradient_descent_of_a_linear_classifier(world, tmp_path):
    """One step over all images against that of the closed gradient, (p − y) eᵀ, in float64."""
    run = trained(
        world, tmp_path / "run", train="linear", epochs=1, batch_size=48, optimizer="sgd", momentum=0.0, lr=0.5,
        weight_decay=0.0, views="plain", warmup_epochs=0.0,
    )  # fmt: skip
    torch.manual_seed(0)  # as the run draws its classifier
    start = open_student(f"run:{world.distilled.path}", classes=[*COLOURS]).classifier
    weight, bias = (each.detach().double().numpy() for each in start.parameters())
    store = featcache.extract(world.corpora["train"], f"run:{world.distilled.path}", tmp_path / "s.zarr", dtype="float32", **EXACT)  # fmt: skip
    rows = Rows.of(store)
    e = rows.gather(range(48)).astype(float)
    logits = e @ weight.T + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    slope = (p / p.sum(1, keepdims=True) - np.eye(3)[rows.labels]) / 48
    now = weights_of(run)
    np.testing.assert_allclose(now["classifier.weight"].numpy(), weight - 0.5 * slope.T @ e, atol=1e-5)
    np.testing.assert_allclose(now["classifier.bias"].numpy(), bias - 0.5 * slope.sum(0), atol=1e-5)


def test_all_trains_all_and_lower_layers_less_where_asked(world, tmp_path):
    """With plain SGD and a decay of 1e-4 a layer, the lowest of eight layers cannot move by a bit, the classifier does."""
    plain = {"optimizer": "sgd", "momentum": 0.0, "epochs": 1, "weight_decay": 0.0}
    was = weights_of(world.distilled)
    whole, layered = (
        weights_of(trained(world, tmp_path / name, **plain, layer_decay=decay))
        for name, decay in (("whole", 1.0), ("layered", 1e-4))
    )
    first, last = "body.0.weight", "body.20.weight"
    assert not torch.equal(whole[first], was[first])
    assert torch.equal(layered[first], was[first])
    assert not torch.equal(layered["projection.weight"], was["projection.weight"])
    moved = [(now[last] - was[last]).abs().max() for now in (whole, layered)]
    assert moved[1] < 1e-2 * moved[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "linear"},
        {"layer_decay": 0.7},
        {"layer_decay": 0.7, "optimizer": "sgd", "schedule": "step", "milestones": [1.0], "ema": 0.9},
    ],
    ids=str,
)
def test_resumed_to_the_bit(world, tmp_path, settings):
    whole = trained(world, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(world, tmp_path / "run", **settings, progress=press_after(4))
    with pytest.raises(Interrupted):
        trained(world, tmp_path / "run", **settings, resume=True, progress=interrupt_at("training", 8))
    run = trained(world, tmp_path / "run", **settings, resume=True)
    assert (run.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()
    one, other = (Head.read(each.path / "head.safetensors") for each in (run, whole))
    assert (one.digest, one.fingerprint) == (other.digest, other.fingerprint)


def press_after(step):
    def progress(at):
        if (at.stage, at.done) == ("training", step):
            raise KeyboardInterrupt

    return progress


def test_a_classifier_of_the_same_classes_is_kept_and_of_others_made_anew(world, tmp_path):
    spec = f"run:{trained(world, tmp_path / 'run').path}"
    first, same, others = (open_student(spec, classes=names) for names in (None, [*COLOURS], ["cat", "dog"]))
    assert first.classes == [*COLOURS]
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert others.classifier.weight.shape == (2, 8)
    assert torch.equal(others.projection.weight, first.projection.weight)


def test_what_cannot_be_is_refused_and_what_changes_nothing_told(world, tmp_path):
    with pytest.raises(
        ValueError, match=r"^train=linear trains the student's classifier alone, and method proteus gives"
    ):
        trained(world, tmp_path / "run", method="proteus", train="linear")
    with pytest.raises(
        ValueError, match=r"the rest of student tiny has random weights; give a trained one \(run:FOLDER"
    ):
        trained(world, tmp_path / "run", student="tiny", train="linear")
    with pytest.raises(ValueError, match=r"^unknown train 'head'; known: all, linear$"):
        FitConfig(student="tiny", train="head")
    assert FitConfig(student="tiny", train="linear", layer_decay=0.5).ignored == [
        "layer_decay 0.5 changes nothing with train linear; leave it out"
    ]
    assert not (tmp_path / "run").exists()


# -- what comes of it -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def used(world):
    """A fine-tuned student's run, its stores of images by name, and its head."""
    run = trained(world, world.folder / "tuned", lr=3e-3, epochs=3)
    stores = {
        name: featcache.extract(
            corpus, f"run:{run.path}", world.folder / f"tuned-{name}.zarr",
            fields=("embedding", "logits"), **EXACT,
        )
        for name, corpus in world.corpora.items()
    }  # fmt: skip
    return SimpleNamespace(run=run, stores=stores, head=str(run.path / "head.safetensors"))


def right(store, head):
    rows = Rows.of(store)
    return float((Head.read(head).logits(rows.gather(range(len(rows)))).argmax(1) == rows.labels).mean())


def test_its_logits_are_what_its_head_makes_of_its_embeddings(world, used, tmp_path):
    head, fields = Head.read(used.head), ("embedding", "logits")
    store = featcache.extract(world.corpora["test"], f"run:{used.run.path}", tmp_path / "s.zarr", fields=fields, dtype="float32", **EXACT)  # fmt: skip
    assert head.class_names == [*COLOURS]
    assert head.fingerprint == store.fingerprint == used.stores["far"].fingerprint
    embedding, logits = (Rows.of(store).gather(range(18), name) for name in fields)
    np.testing.assert_allclose(logits, head.logits(embedding), atol=1e-5, rtol=1e-5)
    assert right(used.stores["test"], used.head) > 0.6


def test_detectors_take_its_head(used):
    sets = {
        "id_train": used.stores["train"],
        "id_test": used.stores["test"],
        "near": None,
        "far": {"grey": used.stores["far"]},
    }
    result = evalsuite.ood(**sets, detectors=("msp", "energy", "vim"), head=used.head)
    assert {"msp/far/grey/auroc", "energy/far/grey/auroc", "vim/far/grey/auroc"} <= {*result.metrics}
    assert result.parameters["head_accuracy"]["top1"] == pytest.approx(right(used.stores["test"], used.head))
    by_store = evalsuite.ood(**sets, detectors=("msp",))  # of the logits that the stores hold
    assert by_store.metrics["msp/far/grey/auroc"].value == pytest.approx(result.metrics["msp/far/grey/auroc"].value)


def test_attacks_take_its_head(world, used, tmp_path, monkeypatch):
    pytest.importorskip("art", reason="needs featcache[adversarial]")
    monkeypatch.setattr("evalsuite.attacks.autoattack.QUERIES", 5)
    result = evalsuite.robustness(
        f"run:{used.run.path}", world.corpora["test"], used.stores["train"], tmp_path / "corrupted", k=5,
        corruptions=["brightness"], severities=[1], head=used.head, pgd=[8], pgd_steps=3, autoattack=[8], device="cpu",
        far={"grey": used.stores["far"]}, detectors=("msp",),
    )  # fmt: skip
    clean, pgd, auto = (result.metrics[f"{name}/top1"].value for name in ("pgd/0", "pgd/8", "autoattack/8"))
    assert clean == pytest.approx(right(used.stores["test"], used.head))
    assert auto <= pgd <= clean


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_exports_give_its_logits(world, used, tmp_path, format):
    out = distill.export(used.run, tmp_path / "out", format=format).path
    student = load_encoder(f"run:{used.run.path}")
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = student.module(images)["logits"].numpy()
    if format == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(out / "model.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    else:
        names = {"folder": str(out)}
        code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        exec(code.replace('folder = "."', ""), names)
        found = names["model"](images).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert open_store(used.stores["test"].path).fingerprint == student.fingerprint

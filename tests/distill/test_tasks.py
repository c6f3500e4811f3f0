"""Students with a classifier: labels, a teacher's logits, what the run folder then holds, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fit_cases import Interrupted, interrupt_at
from PIL import Image
from small_world import make_images, make_teacher

import distill
import featcache
from distill.methods.ce import CE
from distill.methods.kd import KD
from distill.objectives import averaged, ce, kl
from distill.testing.methods import batch_of
from distill.training.config import FitConfig
from distill.training.setup import sampling_weights
from evalsuite import knn, probe
from featcache.classes import Classes, ordered
from featcache.derivations.mean import Mean
from featcache.encoder import load_encoder
from featcache.head import Head
from featcache.rows import Rows
from featcache.store import create_store

COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (230, 30, 20)}


# -- objectives -------------------------------------------------------------------------------------------------------


def slow_ce(logits, target, weight):
    """Row by row, in float64; rows of class −1 are passed over."""
    total = counted = 0.0
    for row, label, w in zip(logits, target, weight, strict=True):
        if label >= 0:
            top = max(row)
            total += w * (math.log(math.fsum(math.exp(each - top) for each in row)) + top - row[label])
            counted += w
    return total / counted


def test_rows_without_a_label_count_for_nothing(rng):
    logits, target = rng.normal(size=(7, 4)) * 3, np.array([2, -1, 0, 3, -1, 1, 1])
    for weight in (np.ones(7), rng.uniform(0.1, 2, 7)):
        given = ce(torch.from_numpy(logits), torch.from_numpy(target), torch.from_numpy(weight))
        assert given.item() == pytest.approx(slow_ce(logits.tolist(), target.tolist(), weight.tolist()), rel=1e-12)
    hidden = torch.from_numpy(logits).requires_grad_()
    ce(hidden, torch.from_numpy(target)).backward()
    assert (hidden.grad.abs().sum(dim=1) > 0).tolist() == (target >= 0).tolist()


def test_without_any_label_the_loss_is_zero_and_so_is_its_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = ce(logits, torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_smoothing_is_a_mixture_with_the_uniform_target(rng):
    logits, target = torch.from_numpy(rng.normal(size=(5, 4))), torch.tensor([0, 3, 1, 1, 2])
    soft = 0.8 * torch.nn.functional.one_hot(target, 4).double() + 0.2 / 4
    assert ce(logits, target, smoothing=0.2).item() == pytest.approx(ce(logits, soft).item(), rel=1e-12)


def test_a_weighted_mean_and_a_weighted_kl(rng):
    values, weight = rng.normal(size=6), rng.uniform(0, 1, 6)
    assert averaged(*map(torch.from_numpy, (values, weight))).item() == pytest.approx(
        np.average(values, weights=weight)
    )
    target, output = torch.from_numpy(rng.normal(size=(6, 5))), torch.from_numpy(rng.normal(size=(6, 5)))
    rows = torch.stack([kl(t[None], o[None], temperature=3.0) for t, o in zip(target, output, strict=True)])
    given = kl(target, output, temperature=3.0, weight=torch.from_numpy(weight))
    assert given.item() == pytest.approx(np.average(rows.numpy(), weights=weight))
    assert kl(target, output).item() == pytest.approx(kl(target, output, weight=torch.ones(6).double()).item())


# -- methods ----------------------------------------------------------------------------------------------------------

TEACHER = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
STUDENT = torch.tensor([[1.0, 0.5, -0.5], [0.3, 0.2, 0.1]])


def terms(method, label, **given):
    batch = batch_of({"embedding": torch.zeros(2, 4), "logits": TEACHER}, label=torch.tensor(label))
    return {name: term.item() for name, term in method.loss({"logits": given.get("of", STUDENT)}, batch).items()}


def test_golden_values():
    """By hand: −log softmax(1, .5, −.5)[0] = log(e¹ + e^.5 + e^−.5) − 1."""
    first = math.log(math.e + math.exp(0.5) + math.exp(-0.5)) - 1
    assert terms(CE(4, 4), [0, -1]) == {"ce": pytest.approx(first, rel=1e-6)}
    p = [np.exp(row / 4) / np.exp(row / 4).sum() for row in TEACHER.double().numpy()]
    q = [np.exp(row / 4) / np.exp(row / 4).sum() for row in STUDENT.double().numpy()]
    divergence = np.mean([(a * np.log(a / b)).sum() for a, b in zip(p, q, strict=True)])
    given = terms(KD(4, 4), [0, -1])
    assert given == {"kl": pytest.approx(0.9 * 16 * divergence, rel=1e-5), "ce": pytest.approx(0.1 * first, rel=1e-5)}
    assert given["kl"] == pytest.approx(0.170925, abs=1e-5)


def test_kd_is_least_where_the_student_is_the_teacher():
    method = KD(4, 4, alpha=1.0)
    assert terms(method, [-1, -1], of=TEACHER + 5) == {"kl": pytest.approx(0, abs=1e-6)}
    student = STUDENT.clone().requires_grad_()
    batch = batch_of({"embedding": torch.zeros(2, 4), "logits": TEACHER})
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        sum(method.loss({"logits": student}, batch).values()).backward()
        optimizer.step()
    torch.testing.assert_close(student.softmax(1), TEACHER.softmax(1), atol=1e-3, rtol=0)


def test_a_mixture_of_images_has_the_same_mixture_of_their_labels(rng):
    """Images of one colour a class: how much of each colour there is says what λ was."""
    rows = Rows.from_arrays(rng.normal(size=(6, 4)).astype(np.float32), np.array([0, 1, 2, 0, 1, 2]))
    label = torch.from_numpy(rows.labels)
    images = torch.nn.functional.one_hot(label, 3).float()[:, :, None, None].expand(6, 3, 8, 8).contiguous()
    for options in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}):
        method = CE(4, 4, **options)
        method.prepare(rows, seed=0)
        for seed in range(4):
            torch.manual_seed(seed)
            batch = batch_of({"embedding": torch.zeros(6, 4)}, label=label)
            mixed = method.inputs(replace(batch, inputs=images), torch.nn.Identity())
            logits = torch.randn(6, 3)
            expected = -(mixed.mean((2, 3)) * logits.log_softmax(1)).sum(1).mean()
            assert method.loss({"logits": logits}, batch)["ce"].item() == pytest.approx(expected.item(), rel=1e-5)
            plain = torch.nn.functional.cross_entropy(logits, label)  # nothing is remembered for the next batch
            assert method.loss({"logits": logits}, batch)["ce"].item() == pytest.approx(plain.item(), rel=1e-5)


# -- runs -------------------------------------------------------------------------------------------------------------


def painted(folder, count, seed=0):
    """`count` noisy pictures of each colour."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noisy = rng.normal(colour, 60, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Labelled and unlabelled images and stores of them, and a head fitted to the labelled ones."""
    folder = tmp_path_factory.mktemp("world")
    given = {"device": "cpu", "precision": "fp32"}
    made = {
        name: painted(folder / name, count, seed) for seed, (name, count) in enumerate({"train": 20, "test": 8}.items())
    }
    made["plain"] = str(make_images(folder / "plain", 20))
    stores = {
        name: featcache.extract(corpus, make_teacher(), folder / f"{name}.zarr", **given)
        for name, corpus in made.items()
    }
    probe(stores["train"], stores["test"], c=1.0, save=folder / "head.safetensors")
    return SimpleNamespace(folder=folder, corpora=made, stores=stores, head=str(folder / "head.safetensors"))


def fitted(world, out, *names, **given):
    names = names or ("train",)
    few = {"student": "tiny", "embedding_dim": 8, "image_size": 16, "device": "cpu", "epochs": 4, "batch_size": 10}
    stores, corpora = [world.stores[name] for name in names], [world.corpora[name] for name in names]
    return distill.fit(stores, corpora, out=out, **{**few, **given})


def classified(run, world, name):
    """Share of right answers of the student's own classifier, image by image."""
    encoder = load_encoder(f"run:{run.path}")
    store = featcache.extract(world.corpora[name], encoder, run.path.parent / f"{run.path.name}-{name}.zarr", fields=("embedding", "logits"), device="cpu", precision="fp32")  # fmt: skip
    rows = Rows.of(store)
    return (rows.take(np.arange(len(rows)), "logits").argmax(1) == rows.labels).mean(), store


@pytest.mark.parametrize("method", ["ce", "kd"])
def test_a_student_learns_the_classes(world, tmp_path, method):
    head = {"head": world.head} if method == "kd" else {}
    run = fitted(world, tmp_path / "run", method=method, eval_every=2, holdout=0.2, epochs=8, **head)
    assert json.loads((run.path / "student.json").read_text())["classes"] == [*COLOURS]
    accuracy, store = classified(run, world, "test")
    assert accuracy > 0.8
    held = [record for record in run.metrics if "holdout/top1" in record]
    assert [record["epoch"] for record in held] == [2, 4, 6, 8]
    assert held[-1]["holdout/nll"] < held[0]["holdout/nll"]
    own = Head.read(run.path / "head.safetensors")
    assert own.class_names == [*COLOURS]
    rows = Rows.of(store, own)  # the fingerprint is the student's
    logits = Rows.of(store).gather(np.arange(len(rows)), "logits")
    np.testing.assert_allclose(rows.take(np.arange(len(rows)), "logits"), logits, atol=2e-2)
    with pytest.raises(ValueError, match="was fitted to 8 dimensions of encoder"):
        Rows.of(world.stores["test"], own)


def test_the_held_out_figures_are_those_of_the_held_out_rows(world, tmp_path):
    """Against a slow loop over the saved student."""
    run = fitted(world, tmp_path / "run", method="ce", eval_every=4, holdout=0.3)
    rows = Rows.of(world.stores["train"])
    held = np.sort(np.random.default_rng([0, 60]).permutation(60)[:18])
    encoder = load_encoder(f"run:{run.path}")
    store = featcache.extract(world.corpora["train"], encoder, tmp_path / "s.zarr", fields=("embedding", "logits"), device="cpu", precision="fp32", dtype="float32")  # fmt: skip
    logits = Rows.of(store).gather(held, "logits").astype(float)
    truth = rows.labels[held]
    final = run.metrics[-1]
    assert final["holdout/top1"] == pytest.approx((logits.argmax(1) == truth).mean())
    assert final["holdout/nll"] == pytest.approx(slow_ce(logits.tolist(), truth.tolist(), [1.0] * 18), rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"method": "ce", "method_options": {"mixup": 0.8, "cutmix": 1.0}}, {"method": "kd"}]
)
def test_resumed_to_the_bit(world, tmp_path, options):
    given = {**options, "sampling": "balanced", **({"head": world.head} if options["method"] == "kd" else {})}
    whole = fitted(world, tmp_path / "whole", **given)
    with pytest.raises(Interrupted):
        fitted(world, tmp_path / "run", **given, progress=interrupt_at("training", 9), checkpoint_minutes=0.0)
    run = fitted(world, tmp_path / "run", **given, resume=True)
    assert (run.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()
    one, other = (Head.read(each.path / "head.safetensors") for each in (run, whole))
    assert (one.digest, one.fingerprint) == (other.digest, other.fingerprint)


def test_unlabelled_images_count_for_what_needs_no_label(world, tmp_path):
    run = fitted(world, tmp_path / "run", "train", "plain", method="kd", head=world.head)
    assert json.loads((run.path / "student.json").read_text())["trained_on"]["samples"] == 80
    assert classified(run, world, "test")[0] > 0.6


def test_a_student_of_a_head_without_any_label(world, tmp_path):
    run = fitted(world, tmp_path / "run", "plain", method="kd", head=world.head, method_options={"alpha": 1.0})
    assert json.loads((run.path / "student.json").read_text())["classes"] == [*COLOURS]


def test_the_columns_of_a_head_are_found_by_name(world, tmp_path):
    """A head whose classes stand in another order gives the same run."""
    head = Head.read(world.head)
    order = np.array([2, 0, 1])
    turned = Head(head.weight[order], head.bias[order], np.arange(3), class_names=[head.class_names[i] for i in order])
    (tmp_path / "turned.safetensors").write_bytes(turned.to_bytes())
    given = {"method": "kd", "epochs": 1}
    one = fitted(world, tmp_path / "one", head=world.head, **given)
    other = fitted(world, tmp_path / "other", head=str(tmp_path / "turned.safetensors"), **given)
    assert (one.path / "student.safetensors").read_bytes() == (other.path / "student.safetensors").read_bytes()


def test_a_resumed_run_keeps_to_its_head(world, tmp_path):
    (tmp_path / "h.safetensors").write_bytes(Path(world.head).read_bytes())
    given = {"method": "kd", "head": str(tmp_path / "h.safetensors")}
    with pytest.raises(Interrupted):
        fitted(world, tmp_path / "run", **given, progress=interrupt_at("training", 9), checkpoint_minutes=0.0)
    head = Head.read(world.head)
    (tmp_path / "h.safetensors").write_bytes(
        Head(head.weight * 2, head.bias, head.labels, class_names=head.class_names).to_bytes()
    )
    with pytest.raises(ValueError, match="head_digest"):
        fitted(world, tmp_path / "run", **given, resume=True)


def test_settings_that_are_not_used_are_not_in_the_config(world, tmp_path):
    run = fitted(world, tmp_path / "run", method="ce", epochs=1)
    assert not {"head", "head_digest", "sampling"} & run.config.keys()


def test_balanced_sampling_draws_every_class_as_often_and_the_unlabelled_as_before(world):
    rows = Rows.from_arrays(np.eye(8, dtype=np.float32), np.array([0, 0, 0, 0, 2, 2, -1, -1]))
    given = sampling_weights(FitConfig(student="tiny", sampling="balanced"), rows)
    np.testing.assert_allclose(given, [0.75] * 4 + [1.5] * 2 + [1, 1])
    assert sampling_weights(FitConfig(student="tiny"), rows) is None


def test_a_class_of_few_images_is_seen_as_often(world, tmp_path):
    seen = []

    class Counting(CE):
        def loss(self, student, batch):
            seen.extend(batch.label.tolist())
            return super().loss(student, batch)

    few = painted(tmp_path / "few", 2)
    painted(tmp_path / "more", 40)
    for path in (tmp_path / "more" / "red").iterdir():
        path.rename(tmp_path / "few" / "red" / f"more-{path.name}")
    store = featcache.extract(few, make_teacher(), tmp_path / "few.zarr", device="cpu", precision="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.training.setup.load_method", lambda name: Counting)
        distill.fit(store, few, out=tmp_path / "run", student="tiny", image_size=16, method="ce", sampling="balanced", epochs=10, batch_size=8, device="cpu")  # fmt: skip
    shares = np.bincount(seen) / len(seen)
    assert len(seen) == 10 * (46 // 8) * 8
    np.testing.assert_allclose(shares, 1 / 3, atol=0.08)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (("plain",), {"method": "ce"}, r"plain\.zarr has no classes: neither labels .* give a head"),
        (("train",), {"method": "kd"}, r"train\.zarr: holds no logits.*--fields embedding,logits, or .*--set head=FILE"),
        (("train",), {"method": "kd", "head": "nowhere.safetensors"}, r"nowhere\.safetensors: no such file"),
        (("train",), {"method": "kd", "method_options": {"alpha": 0.0}}, r"alpha must be above 0"),
        (("train",), {"method": "ce", "sampling": "weight"}, r"train\.zarr has no weight"),
        (("plain",), {"method": "cosine", "sampling": "balanced"}, r"plain\.zarr has no labels"),
        (("train",), {"method": "ce", "sampling": "often"}, r"unknown sampling 'often'; known: each, balanced, weight"),
        (("train", "plain"), {"method": "ce", "method_options": {"mixup": 1.0}}, r"20 rows have no label"),
    ],
)  # fmt: skip
def test_one_line_before_anything_is_trained(world, tmp_path, names, given, said):
    with pytest.raises(ValueError, match=said) as caught:
        fitted(world, tmp_path / "run", *names, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_labels_that_a_term_needs(world, tmp_path):
    with pytest.raises(ValueError, match=r"method kd learns from labels, and .*plain\.zarr has none"):
        fitted(world, tmp_path / "run", "plain", method="kd", head=world.head)


def test_one_class_is_none(world, tmp_path):
    (tmp_path / "one" / "red").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 20), (200, 10 * i, 10)).save(tmp_path / "one" / "red" / f"{i}.png")
    store = featcache.extract(
        str(tmp_path / "one"), make_teacher(), tmp_path / "one.zarr", device="cpu", precision="fp32"
    )
    with pytest.raises(ValueError, match=r"one\.zarr has one class \(red\)"):
        distill.fit(store, str(tmp_path / "one"), out=tmp_path / "run", student="tiny", method="ce", device="cpu")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["blue", "green", "rot"], "lacks red"),
        (["blue", "green"], "lacks red"),
        (["blue", "green", "red", "x"], "has 1 others"),
    ],
)
def test_a_head_of_other_classes_is_refused(names, said):
    head = Head(np.eye(len(names)), np.zeros(len(names)), np.arange(len(names)), "h.safetensors", class_names=names)
    with pytest.raises(
        ValueError, match=rf"h\.safetensors: its {len(names)} classes are not the 3 of s\.zarr \({said}\)"
    ):
        ordered(head, Classes("s.zarr", np.arange(3), [*COLOURS]))


def test_labels_stay_where_another_store_has_none(world):
    rows = Rows.of([world.stores["plain"], world.stores["train"]])
    assert rows.class_names == [*COLOURS]
    assert np.bincount(rows.labels + 1).tolist() == [20, 20, 20, 20]
    assert knn(rows.labelled(), world.stores["test"], k=[1]).metrics["top1@1"].value > 0.5


def test_a_store_knows_which_classes_its_logits_are_of(world, tmp_path):
    """A student as the teacher of another: names of its logits' columns go along, through ensembles too; others are refused."""
    teacher = fitted(world, tmp_path / "teacher", method="ce", epochs=1)
    given = {"device": "cpu", "precision": "fp32", "fields": ("embedding", "logits")}
    store = featcache.extract(world.corpora["train"], f"run:{teacher.path}", tmp_path / "a.zarr", **given)
    assert Rows.of(store).logit_classes == [*COLOURS]
    mean = featcache.derive("mean", [store, store], tmp_path / "mean.zarr", of="logits")
    assert Rows.of(mean).logit_classes == [*COLOURS]
    joined = featcache.derive(
        "join", [world.stores["train"], store], tmp_path / "both.zarr", take=("embedding", "logits")
    )
    assert Rows.of(joined).logit_classes == [*COLOURS]

    (tmp_path / "others").mkdir()
    for new, old in zip(("xanthic", "yellow", "zaffre"), COLOURS, strict=True):
        (tmp_path / "others" / new).symlink_to(Path(world.corpora["train"]) / old)
    other = featcache.extract(str(tmp_path / "others"), f"run:{teacher.path}", tmp_path / "b.zarr", **given)
    with pytest.raises(ValueError, match=r"b\.zarr: its logits are of other classes \(blue, green, red, …\)"):
        distill.fit(other, str(tmp_path / "others"), out=tmp_path / "run", student="tiny", method="kd", device="cpu")
    turned = Head(np.eye(3, 8), np.zeros(3), np.arange(3), class_names=["red", "green", "blue"])
    theirs = Rows.from_arrays(np.zeros((60, 8)), logits=np.zeros((60, 3)), head=turned)
    with pytest.raises(ValueError, match="logits of other classes, or in another order"):
        Mean(of="logits").open([Rows.of(store), theirs])


def test_the_plan_says_which_classes_and_how_many_rows_have_none(world, tmp_path):
    plans = []
    fitted(world, tmp_path / "run", "train", "plain", method="kd", head=world.head, epochs=1, announce=plans.append)
    assert (plans[0].classes, plans[0].unlabelled, plans[0].expected) == ([*COLOURS], 20, "")


def test_a_method_without_a_classifier_leaves_an_earlier_one_out(world, tmp_path):
    """It would belong to another embedding than the one that is trained now."""
    first = fitted(world, tmp_path / "first", method="ce", epochs=1)
    run = fitted(world, tmp_path / "run", method="cosine", student=f"run:{first.path}", epochs=1, image_size=0)
    assert "classes" not in json.loads((run.path / "student.json").read_text())
    assert not (run.path / "head.safetensors").exists()


def weighted(world, path, weight):
    """A store of the training images with a field `weight`."""
    store = world.stores["train"]
    manifest = store.manifest.without("sealed", "wide_chunk_rows").changed(
        fields={**store.manifest.fields, "weight": [1]}
    )
    made = create_store(path, manifest)
    names = ("embedding", "label", "sample_id", "content", "view", "reason", "state")
    for chunk in range(-(-len(store) // manifest.chunk_rows)):
        here = slice(chunk * manifest.chunk_rows, min(len(store), (chunk + 1) * manifest.chunk_rows))
        arrays = {name: store.read(name, here.start, here.stop) for name in names}
        made.write_chunk(chunk, {**arrays, "weight": weight[here, None, None].astype(np.float16)})
    made.seal()
    return made


def test_a_stores_weights_weigh_the_terms_and_may_draw_the_rows(world, tmp_path, monkeypatch):
    """Only rows of class 0 weigh anything: what the others say of it is as if they had no label."""
    weight = (Rows.of(world.stores["train"]).labels == 0).astype(float)
    store, seen = weighted(world, tmp_path / "w.zarr", weight), []

    class Recording(CE):
        def loss(self, student, batch):
            terms = super().loss(student, batch)
            alone = ce(student["logits"], torch.where(batch.label == 0, 0, -1))
            seen.append((batch.label.tolist(), batch.weight.tolist(), (terms["ce"] - alone).item()))
            return terms

    monkeypatch.setattr("distill.training.setup.load_method", lambda name: Recording)
    for sampling, classes in (("each", {0, 1, 2}), ("weight", {0})):
        seen.clear()
        distill.fit(store, world.corpora["train"], out=tmp_path / sampling, student="tiny", image_size=16, method="ce", sampling=sampling, epochs=1, batch_size=10, device="cpu")  # fmt: skip
        assert {label for labels, _, _ in seen for label in labels} == classes
        for labels, weights, apart in seen:
            assert weights == [float(label == 0) for label in labels]
            assert apart == pytest.approx(0, abs=1e-6)
    for number, wrong in enumerate((weight * 0, weight - 1, np.where(weight, np.inf, 0))):
        path = tmp_path / f"{number}.zarr"
        with pytest.raises(ValueError, match="its field weight must be finite numbers"):
            distill.fit(weighted(world, path, wrong), world.corpora["train"], out=tmp_path / "no", student="tiny", method="ce", device="cpu")  # fmt: skip


def test_stores_that_others_are_made_of_teach(world, tmp_path):
    """Two trained teachers: their largest logits alone, their votes on images without a label, and how alike classes look."""
    runs = [fitted(world, tmp_path / f"t{seed}", method="ce", epochs=8, seed=seed) for seed in (0, 1)]
    given = {"device": "cpu", "precision": "fp32", "fields": ("embedding", "logits")}
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for path in Path(world.corpora["train"]).rglob("*.png"):
        (unlabelled / f"{path.parent.name}-{path.name}").symlink_to(path)
    seen = [
        featcache.extract(str(unlabelled), f"run:{run.path}", tmp_path / f"s{number}.zarr", **given)
        for number, run in enumerate(runs)
    ]
    largest = featcache.extract(world.corpora["train"], f"run:{runs[0].path}", tmp_path / "top.zarr", top_k=2, **given)
    votes = featcache.derive("vote", seen, tmp_path / "vote.zarr", least=0.9)
    alike = featcache.derive("class_similarity", [world.stores["train"]], tmp_path / "alike.zarr", temperature=0.03)
    assert Rows.of(votes).class_names == [*COLOURS]
    assert 0 < Rows.of(votes).unlabelled < 60 or (Rows.of(votes).weight(np.arange(60)) == 1).all()
    for name, store, corpus, method in (
        ("top", largest, world.corpora["train"], "kd"),
        ("vote", votes, str(unlabelled), "ce"),
        ("alike", alike, world.corpora["train"], "kd"),
    ):
        run = distill.fit(
            store, corpus, out=tmp_path / name, student="tiny", embedding_dim=8, image_size=16, method=method, epochs=8,
            batch_size=10, device="cpu",
        )  # fmt: skip
        assert classified(run, world, "test")[0] > 0.6, name

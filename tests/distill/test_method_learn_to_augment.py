"""Learning to Augment: what is kept and how often it is drawn, REINFORCE against autograd, and a selector that resumes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fit_cases import Interrupted, interrupt_at, without_speed
from safetensors.torch import load_file
from small_world import make_images
from tiny import tiny_encoder

import distill
from distill.methods.kd import KD
from distill.methods.learn_to_augment import LearnToAugment, features, kept_on_average
from distill.testing.methods import batch_of
from distill.training import loop
from distill.training.setup import parted
from featcache import extract, open_corpus
from featcache.rows import Rows

TARGET, POOL, CLASSES = 6, 40, 3


@pytest.fixture
def rows(make_store, rng):
    """Six labelled rows and two without a label; a pool of 38 more, with labels that are not read."""
    labels = np.array([0, 1, 2, 0, 1, 2, -1, -1])
    given = {"class_names": list("abc")}
    target = make_store("target", rng.normal(size=(8, 12)), logits=rng.normal(size=(8, 3)), labels=labels, **given)
    pool = make_store(
        "pool", rng.normal(size=(38, 12)), logits=rng.normal(size=(38, 3)), labels=np.zeros(38, int), **given
    )
    return Rows.of([target, pool])


def prepared(rows, **options):
    method = LearnToAugment(12, 4, **{"keep": 10, "components": 3, **options})
    return method, method.prepare(rows, seed=0)


def test_what_is_drawn_of_target_and_pool(rows):
    """Half of an epoch is of the target, the rest of those that the selector keeps."""
    near = rows.take(np.arange(6, 46)).astype(np.float64)
    target = rows.take(np.arange(6)).astype(np.float64)
    cosine = (near / np.linalg.norm(near, axis=1)[:, None]) @ (target / np.linalg.norm(target, axis=1)[:, None]).T
    top = set(np.argsort(-cosine.max(axis=1))[:10])
    kept = {}
    for selector in ("similarity", "random", "all", "learned"):
        method, report = prepared(rows, selector=selector, target_share=0.25)
        assert report == {"target": 6.0, "pool": 40.0, "kept": 40.0 if selector == "all" else 10.0}
        weights = method.weights(3)
        assert weights[:6] == pytest.approx(0.25 / 6)
        kept[selector] = set(np.flatnonzero(weights[6:]))
        assert weights[6:].sum() == pytest.approx(0.75)
        assert len(np.unique(weights[6:][weights[6:] > 0])) == 1
        np.testing.assert_array_equal(weights, method.weights(4))
        assert method.judged == (selector == "learned")
    assert kept["similarity"] == top
    assert kept["all"] == set(range(40))
    assert len(kept["random"]) == 10
    assert kept["random"] != set(np.flatnonzero(drawn_of(rows, 1).weights(0)[6:]))


def drawn_of(rows, seed):
    method = LearnToAugment(12, 4, keep=10, selector="random")
    method.prepare(rows, seed=seed)
    return method


def test_the_selector_keeps_as_many_as_asked_on_average(rows):
    score = np.random.default_rng(0).normal(size=40) * 5
    share = kept_on_average(score, 10)
    assert share.sum() == pytest.approx(10)
    assert kept_on_average(np.log([4.0, 1.0]), 1) == pytest.approx([2 / 3, 1 / 3])
    odds = np.log(share / (1 - share)) - score
    assert odds == pytest.approx(odds[0])
    assert (kept_on_average(score, 40) == 1).all()
    method, _ = prepared(rows)
    counts = []
    for heard in range(300):
        method.drawn[1] = heard
        counts.append((method.weights(0)[6:] > 0).sum())
    assert np.mean(counts) == pytest.approx(10, abs=4 * np.sqrt(40 * 0.25 * 0.75 / 300))


def test_what_the_selector_sees(rows):
    """Principal components as scikit-learn has them, up to signs; likeness; entropy."""
    from sklearn.decomposition import PCA

    pool = np.arange(46) >= 6
    seen = features(rows, pool, 3)
    embedding = rows.take(np.arange(6, 46)).astype(np.float64)
    expected = PCA(3).fit_transform(embedding)
    np.testing.assert_allclose(np.abs(seen[:, :3]), np.abs(expected / expected.std(axis=0)), atol=1e-6)
    told = torch.from_numpy(rows.take(np.arange(6, 46), "logits")).double()
    entropy = torch.distributions.Categorical(logits=told).entropy().numpy()
    np.testing.assert_allclose(seen[:, -1], (entropy - entropy.mean()) / entropy.std(), atol=1e-5)
    np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(seen.std(axis=0), 1)
    assert (features(rows, pool, 20)[:, 12:20] == 0).all()  # of twelve dimensions there are no more


def test_a_reward_moves_the_selector_along_the_gradient_of_what_was_kept(rows):
    """Against autograd through the log-probability, c solved for by Newton's method within it."""
    method, _ = prepared(rows, selector_lr=0.2)
    assert (method.policy == 0).all()
    before, rewards = None, []
    for nll in (2.0, 1.5, 1.4, 1.35, 1.0):
        weight = method.policy.clone().requires_grad_()
        kept = torch.from_numpy(method.weights(0)[6:] > 0).double()
        score = method.seen.double() @ weight
        c = torch.tensor(np.log(kept_on_average(score.detach().numpy(), 10)[0]))
        share = torch.from_numpy(kept_on_average(score.detach().numpy(), 10))
        c = torch.logit(share[0]) - score[0].detach()
        for _ in range(2):  # Newton, differentiable: Σ σ(score + c) = 10
            p = torch.sigmoid(score + c)
            c = c - (p.sum() - 10) / (p * (1 - p)).sum()
        p = torch.sigmoid(score + c)
        (kept * p.log() + (1 - kept) * (1 - p).log()).sum().backward()
        direction = weight.grad / (p * (1 - p)).sum().sqrt().detach()
        method.learn(1, {"holdout/nll": nll})
        if before is not None:
            rewards.append(before - nll)
        expected = torch.zeros_like(direction)
        if len(rewards) > 1:
            mean, spread = rewards[0], None
            for reward in rewards[1:]:
                apart = reward - mean
                spread = apart**2 if spread is None else 0.8 * spread + 0.2 * apart**2
                mean = 0.8 * mean + 0.2 * reward
            expected = 0.2 * apart / np.sqrt(spread) * direction
        torch.testing.assert_close(method.policy, weight.detach() + expected, rtol=1e-6, atol=1e-9)
        before = nll
    assert method.policy.abs().sum() > 0


def test_it_learns_what_helps(rows):
    """Where an evaluation is the better, the more of the kept ones lie along a direction, the selector learns that direction."""
    method, _ = prepared(rows, selector_lr=0.2)
    fed = 0.0
    for _ in range(150):
        kept = method.weights(0)[6:] > 0
        fed += float(method.seen.numpy()[kept, 0].mean())
        method.learn(1, {"holdout/nll": -fed})
    assert method.policy[0] > 0.5
    assert method.policy[0] == method.policy.abs().max()


def test_the_terms_are_kds_and_labels_of_the_pool_are_not_read(rows):
    method, _ = prepared(rows, selector="all", alpha=0.3, temperature=2.0)
    row = torch.tensor([0, 4, 7, 20, 33])
    teacher = {"embedding": torch.zeros(5, 12), "logits": torch.arange(15.0).reshape(5, 3).sin()}
    student = {"embedding": torch.zeros(5, 4), "logits": torch.arange(15.0).reshape(5, 3).cos()}
    batch = batch_of(teacher, row, torch.from_numpy(rows.labels[row.numpy()]))
    assert batch.label.tolist() == [0, 1, -1, 0, 0]
    found = method.loss(student, batch)
    expected = KD(12, 4, alpha=0.3, temperature=2.0).loss(
        student, replace(batch, label=torch.tensor([0, 1, -1, -1, -1]))
    )
    assert found == expected
    assert {name: term.item() for name, term in found.items()} == pytest.approx(
        {"kl": 0.1327648, "ce": 0.7277062}, rel=1e-5
    )


def test_what_does_not_fit_is_refused(rows, make_store, rng):
    labelled, _ = (Rows.of([store]) for store in rows.stores)
    for given, message in (
        (labelled.labelled(), "no rows of a pool; method learn_to_augment takes the store of the target first"),
        (labelled.pick(np.array([6, 7])), "no labelled rows in the first store"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(given)
    with pytest.raises(ValueError, match="keep 40 is all of the pool's 40 samples, so there is nothing to select"):
        prepared(rows, keep=40)
    for options, message in (
        ({"selector": "best"}, "unknown selector 'best'; known: learned, random"),
        ({"reward": "loss"}, "unknown reward"),
        ({"keep": 0}, "keep must be greater than 0"),
        ({"target_share": 1.0}, "target_share must be between 0 and 1"),
        ({"alpha": 1.0}, "alpha 1 leaves the labels out"),
    ):
        with pytest.raises(ValueError, match=message):
            LearnToAugment(12, 4, **options)
    method, _ = prepared(rows)
    with pytest.raises(ValueError, match="learns from holdout/nll, which this evaluation has not"):
        method.learn(1, {"holdout/gram_pearson": 1.0})


def test_the_same_of_the_target_are_held_out_with_a_pool_and_without(make_store, rng):
    stores = [make_store(name, rng.normal(size=(30, 4)), labels=np.arange(30) % 2) for name in ("target", "pool")]
    settings = distill.FitConfig(student="tiny", holdout=0.4, eval_every=1, seed=3)
    trained, held = parted(settings, LearnToAugment(4, 4), Rows.of(stores))
    alone = parted(settings, KD(4, 4), Rows.of(stores[:1]))
    np.testing.assert_array_equal(held, alone[1])
    np.testing.assert_array_equal(trained, [*alone[0], *range(30, 60)])
    assert len(held) == 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two classes of twelve images, and a pool of twenty without labels."""
    folder = tmp_path_factory.mktemp("augment")
    for seed, name in enumerate("ab"):
        make_images(folder / "target" / name, 12, seed=seed)
    make_images(folder / "pool", 20, seed=2)
    corpora = [open_corpus(str(folder / name)) for name in ("target", "pool")]
    given = {"fields": ("embedding", "logits"), "device": "cpu", "precision": "fp32"}
    stores = [extract(each, tiny_encoder(), folder / f"{i}.zarr", **given) for i, each in enumerate(corpora)]
    return stores, corpora


def test_a_resumed_run_has_the_same_bits_and_its_selector_too(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    few = {"student": "tiny", "embedding_dim": 8, "image_size": 16, "batch_size": 8, "head": str(tmp_path / "head")}
    (tmp_path / "head").write_bytes(two_classes(pair[0][0].fingerprint))
    few |= {"method": "learn_to_augment", "method_options": {"keep": 6, "components": 2}}

    def train(out, **given):
        held = {"epochs": 6, "holdout": 0.5, "eval_every": 1}
        return distill.fit(*pair, out=out, device="cpu", checkpoint_minutes=0.0, **few, **{**held, **given})

    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("training", 14))
    run = train(tmp_path / "run", resume=True)
    assert (run.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()
    assert without_speed(run.metrics) == without_speed(whole.metrics)
    selectors = [load_file(each.path / "mapping.safetensors") for each in (whole, run)]
    assert all(torch.equal(selectors[0][name], selectors[1][name]) for name in selectors[0])
    assert selectors[0]["drawn"].tolist() == [0, 6]
    assert selectors[0]["policy"].abs().sum() > 0
    trained_on = json.loads((run.path / "student.json").read_text())["trained_on"]
    assert trained_on["held_out"] == 12  # half of the 24 of the target, and none of the pool
    assert trained_on["samples"] == 12 + 20
    for given in ({"eval_every": 0}, {"holdout": 0.0, "eval_every": 0}):
        with pytest.raises(ValueError, match="learns from evaluations on held-out rows, and there are none"):
            train(tmp_path / "no", **given)
    assert not (tmp_path / "no").exists()


def two_classes(fingerprint):
    from featcache.head import Head

    weight = np.random.default_rng(0).normal(size=(2, 6))
    head = Head(weight, np.zeros(2), np.arange(2), fingerprint=fingerprint, class_names=["a", "b"])
    return head.to_bytes()

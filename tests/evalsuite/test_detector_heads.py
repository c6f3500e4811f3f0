"""Detectors that need a head, against the slow way and against pytorch-ood."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pytorch_ood import detector as peer
from scipy.special import logsumexp, softmax

import featcache.rows
from evalsuite.detectors import _moments, build, react
from evalsuite.metrics import auroc
from featcache.head import Head
from featcache.rows import Rows

D, CLASSES = 10, 4


class Data:
    """Features after a ReLU, and a head that is right on most of them; its classes are not in the order of labels."""

    def __init__(self):
        rng = np.random.default_rng(5)
        prototypes = 1.5 * rng.normal(size=(CLASSES, D))
        self.labels = np.repeat(np.arange(CLASSES), [40, 25, 31, 52])
        rng.shuffle(self.labels)
        self.head = Head(prototypes / 2, rng.normal(size=CLASSES), np.arange(CLASSES), "head.safetensors")

        def draw(centre):
            return np.maximum(0.3 + centre + rng.normal(size=centre.shape), 0).astype(np.float32)

        self.train = draw(prototypes[self.labels])
        self.test = draw(prototypes[rng.integers(0, CLASSES, 60)])
        self.ood = draw(rng.normal(size=(50, D)))

    def bank(self, head=None):
        return Rows.from_arrays(self.train, self.labels, name="train", head=head or self.head)

    def scores(self, spec):
        detector = build(spec).fit(self.bank())
        return detector.score(self.test), detector.score(self.ood)


@pytest.fixture(scope="module")
def data():
    return Data()


def energy(logits):
    return -logsumexp(logits, axis=-1)


def slow_react(data, x, percentile=90):
    return energy(data.head.logits(np.minimum(x, np.percentile(data.train, percentile))))


def slow_ash(pruned, variant):
    def score(data, x):
        shaped = []
        for row in x.astype(np.float64):
            keep = np.argsort(row)[int(np.round(D * pruned)) :]
            out = np.zeros(D)
            out[keep] = row.sum() / len(keep) if variant == "b" else row[keep]
            shaped.append(out * np.exp(row.sum() / out.sum()) if variant == "s" else out)
        return energy(data.head.logits(np.array(shaped)))

    return score


def slow_scale(pruned):
    def score(data, x):
        rows = [
            row * np.exp(row.sum() / np.sort(row)[int(np.round(D * pruned)) :].sum()) for row in x.astype(np.float64)
        ]
        return energy(data.head.logits(np.array(rows)))

    return score


def slow_dice(dropped):
    def score(data, x):
        contribution = data.head.weight * data.train.astype(np.float64).mean(axis=0)
        kept = np.where(contribution > np.quantile(contribution, dropped), data.head.weight, 0)
        return energy(np.array([(kept * row).sum(axis=1) for row in x]) + data.head.bias)

    return score


def slow_she(data, x):
    right = data.head.logits(data.train).argmax(axis=1) == data.labels
    pattern = np.array([data.train[right & (data.labels == c)].astype(np.float64).mean(axis=0) for c in range(CLASSES)])
    return np.array([-row @ pattern[c] for row, c in zip(x, data.head.logits(x).argmax(axis=1), strict=True)])


def slow_vim(components):
    def score(data, x):
        u = -np.linalg.pinv(data.head.weight) @ data.head.bias
        train = data.train - u
        value, vector = np.linalg.eig(train.T @ train / len(train))
        rest = vector[:, np.argsort(value)[: D - components]].real
        alpha = data.head.logits(data.train).max(axis=1).mean() / np.linalg.norm(train @ rest, axis=1).mean()
        return alpha * np.linalg.norm((x - u) @ rest, axis=1) + energy(data.head.logits(x))

    return score


def slow_fdbd(data, x):
    mean, weight = data.train.astype(np.float64).mean(axis=0), data.head.weight
    scores = []
    for row, logits in zip(x, data.head.logits(x), strict=True):
        best = logits.argmax()
        away = [abs(logits[best] - logits[c]) / np.linalg.norm(weight[best] - weight[c]) for c in range(4) if c != best]
        scores.append(-np.mean(away) / np.linalg.norm(row - mean))
    return np.array(scores)


def slow_nci(alpha):
    def score(data, x):
        centred = x - data.train.astype(np.float64).mean(axis=0)
        own = data.head.weight[data.head.logits(x).argmax(axis=1)]
        return -(own * centred).sum(axis=1) / np.linalg.norm(centred, axis=1) - alpha * np.abs(x).sum(axis=1)

    return score


def slow_gradnorm(data, x):
    """By automatic differentiation, a row at a time."""
    scores = []
    for row in torch.from_numpy(x).double():
        weight = torch.from_numpy(data.head.weight).requires_grad_()
        logits = row @ weight.T + torch.from_numpy(data.head.bias)
        (-logits.log_softmax(0).mean()).backward()
        scores.append(-weight.grad.abs().sum().item())
    return np.array(scores)


ORACLES = {
    "react": slow_react,
    "react:percentile=60.0": lambda data, x: slow_react(data, x, 60),
    "ash": slow_ash(0.65, "s"),
    "ash:pruned=0.9,variant=b": slow_ash(0.9, "b"),
    "ash:pruned=0.3,variant=p": slow_ash(0.3, "p"),
    "scale": slow_scale(0.85),
    "scale:pruned=0.5": slow_scale(0.5),
    "dice": slow_dice(0.9),
    "dice:dropped=0.3": slow_dice(0.3),
    "she": slow_she,
    "vim": slow_vim(D // 2),
    "vim:components=3": slow_vim(3),
    "fdbd": slow_fdbd,
    "nci": slow_nci(1e-4),
    "nci:alpha=0.1": slow_nci(0.1),
    "gradnorm": slow_gradnorm,
    "energy": lambda data, x: energy(data.head.logits(x)),
    "msp": lambda data, x: 1 - softmax(data.head.logits(x), axis=1).max(axis=1),
}


@pytest.mark.parametrize("spec", ORACLES)
@pytest.mark.parametrize("blocks", ["whole", "small"])
def test_scores_equal_the_slow_way(data, monkeypatch, spec, blocks):
    if blocks == "small":  # 5 rows are read at a time, 3 are scored at a time
        monkeypatch.setattr(featcache.rows, "_BLOCK_FLOATS", 5 * D)
        monkeypatch.setattr(_moments, "_PIECE_FLOATS", 3 * D)
    detector = build(spec).fit(data.bank())
    for x in (data.test, data.ood):
        fields = {"embedding": x, "logits": data.head.logits(x)}
        ours = detector.score(*(fields[field] for field in getattr(detector, "needs", ("embedding",))))
        np.testing.assert_allclose(ours, ORACLES[spec](data, x), rtol=1e-6, atol=1e-9)


def linear(head):
    layer = torch.nn.Linear(D, CLASSES)
    layer.weight.data, layer.bias.data = torch.from_numpy(head.weight), torch.from_numpy(head.bias)
    return layer.requires_grad_(False)


class Flat(torch.nn.Module):
    """A head on maps of one pixel, as pytorch-ood asks of some."""

    def __init__(self, head):
        super().__init__()
        self.layer = linear(head)

    def forward(self, maps):
        return self.layer(maps.flatten(1))


def through(predict, fit=None, maps=False):
    def scores(detector, data):
        def given(x):
            x = torch.from_numpy(x).double()
            return x[:, :, None, None] if maps else x

        if fit is not None:
            getattr(detector, fit)(given(data.train), torch.from_numpy(data.labels))
        return [getattr(detector, predict)(given(x)).detach().numpy() for x in (data.test, data.ood)]

    return scores


features = through("predict_features", "fit_features")

PEERS = {
    "react": (
        lambda head: peer.ReAct(None, Flat(head)),
        through("predict_feature_maps", "fit_feature_maps", maps=True),
    ),
    "ash": (lambda head: peer.ASH(None, Flat(head)), through("predict_feature_maps", maps=True)),
    "ash:pruned=0.9,variant=b": (
        lambda head: peer.ASH(None, Flat(head), "ash-b", 0.9),
        through("predict_feature_maps", maps=True),
    ),
    "scale:pruned=0.65": (lambda head: peer.SCALE(None, Flat(head)), through("predict_feature_maps", maps=True)),
    "she": (lambda head: peer.SHE(None, linear(head)), features),
    "gradnorm": (
        lambda head: peer.GradNorm(linear(head).requires_grad_(True), lambda name: name == "weight").to("cpu"),
        through("predict"),
    ),
}


@pytest.mark.parametrize("spec", PEERS)
def test_auroc_equals_pytorch_oods(data, float64, spec):
    make, scores = PEERS[spec]
    assert auroc(*data.scores(spec)) == pytest.approx(auroc(*scores(make(data.head), data)), abs=1e-6)


# These cast to float32 whatever they are given: their head is float32 too.
PEERS_IN_FLOAT32 = {
    "dice:dropped=0.7": lambda w, b, layer: peer.DICE(None, w, b, 0.7),
    "vim:components=4": lambda w, b, layer: peer.ViM(None, 4, w, b),
    "fdbd": lambda w, b, layer: peer.fDBD(None, layer),
    "nci:alpha=0.01": lambda w, b, layer: peer.NCI(None, layer, 0.01),
}


@pytest.mark.parametrize("spec", PEERS_IN_FLOAT32)
def test_auroc_equals_pytorch_oods_in_float32(data, spec):
    layer = linear(data.head).float()
    detector = PEERS_IN_FLOAT32[spec](layer.weight, layer.bias, layer)
    detector.fit_features(torch.from_numpy(data.train), torch.from_numpy(data.labels))
    expected = [detector.predict_features(torch.from_numpy(x)).numpy() for x in (data.test, data.ood)]
    assert auroc(*data.scores(spec)) == pytest.approx(auroc(*expected), abs=1e-6)


def test_a_class_that_the_head_never_gets_right_has_the_mean_of_all_its_rows(data):
    head = Head(data.head.weight, data.head.bias - [0, 0, 1e6, 0], data.head.labels)
    pattern = build("she").fit(data.bank(head)).pattern_
    np.testing.assert_allclose(pattern[2], data.train[data.labels == 2].mean(axis=0), rtol=1e-6)


def test_heads_may_number_classes_in_their_own_order(data):
    order = np.array([2, 0, 3, 1])
    head = Head(data.head.weight[order], data.head.bias[order], order)
    for spec in ("she", "fdbd", "nci", "vim"):
        scores = build(spec).fit(data.bank(head)).score(data.test)
        np.testing.assert_allclose(scores, build(spec).fit(data.bank()).score(data.test), rtol=1e-9)


def test_react_takes_rows_evenly_spaced_from_a_large_bank(data, monkeypatch):
    monkeypatch.setattr(react, "_SAMPLE_FLOATS", 50 * D)
    assert build("react").fit(data.bank()).threshold_ == np.percentile(data.train[::3], 90)


@pytest.mark.parametrize("spec", ["react", "ash", "scale", "dice", "she", "vim", "fdbd", "nci", "gradnorm"])
def test_a_missing_head_is_explained(data, spec):
    with pytest.raises(ValueError, match="a head is needed to score against train; fit one with `evalsuite probe"):
        build(spec).fit(Rows.from_arrays(data.train, data.labels, name="train"))


@pytest.mark.parametrize("spec", ["ash", "scale"])
def test_features_of_either_sign_are_refused(data, spec):
    with pytest.raises(ValueError, match=f"train has negative features, {spec} is made for .*use energy or react"):
        build(spec).fit(Rows.from_arrays(data.train - 1, data.labels, name="train", head=data.head))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("react:percentile=101.0", "percentile=101.0 must be from 0 to 100"),
        ("ash:pruned=1.0", "ash:pruned=1.0 must be at least 0 and below 1"),
        ("ash:variant=q", "unknown variant 'q'"),
        ("scale:pruned=-0.5", "scale:pruned=-0.5 must be"),
        ("dice:dropped=1.0", "dropped=1.0 must be"),
        ("vim:components=10", "components=10 does not suit train, .*use components from 1 to 9"),
    ],
)
def test_wrong_arguments_are_explained(data, spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec).fit(data.bank())


def test_heads_that_do_not_suit_are_explained(data):
    one = Head(data.head.weight[:1], data.head.bias[:1], np.arange(1), "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors has one class"):
        build("fdbd").fit(data.bank(one))
    other = Head(data.head.weight, data.head.bias, np.arange(1, 5), "head.safetensors")
    with pytest.raises(ValueError, match=r"train has no row of class 4, which head\.safetensors predicts"):
        build("she").fit(data.bank(other))
    origin = Head(data.head.weight, np.zeros(CLASSES), data.head.labels)
    with pytest.raises(ValueError, match=r"flat lies within 5 dimensions.*use fewer vim:components"):
        build("vim").fit(Rows.from_arrays(np.zeros((9, D), np.float32), name="flat", head=origin))


def test_she_finds_classes_by_name(data):
    """A head whose classes are in another order scores as before where names say so; without names numbers count."""

    def patterns(of_bank, of_head, order=(0, 1, 2, 3)):
        order = np.array(order)
        head = Head(data.head.weight[order], data.head.bias[order], np.arange(CLASSES), "h", class_names=of_head)
        bank = data.bank(head)
        bank.class_names = of_bank
        she = build("she").fit(bank)
        return she.pattern_, she.score(data.test)

    names = ["ant", "bee", "cat", "dog"]
    expected, scores = patterns(names, names)
    for given in ((names, None), (None, names), (names, ["0", "1", "2", "3"]), (None, None)):
        np.testing.assert_array_equal(patterns(*given)[0], expected)
    order = [2, 0, 3, 1]
    found = patterns(names, [names[i] for i in order], order)
    np.testing.assert_array_equal(found[0], expected[order])
    np.testing.assert_allclose(found[1], scores, rtol=1e-12)
    # One who takes them by number learns other patterns.
    assert not np.allclose(patterns(names, None, order)[1], scores)
    with pytest.raises(ValueError, match="train has no row of class elk, which h predicts; use a bank with all"):
        patterns(names, ["ant", "bee", "cat", "elk"])


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_head_that_is_not_finite_is_refused(data, part, value):
    arrays = {name: getattr(data.head, name).copy() for name in ("weight", "bias")}
    arrays[part].flat[1] = value
    with pytest.raises(ValueError, match=rf"1 of {arrays[part].size} values of {part} are not finite"):
        replace(data.head, **arrays)


def test_a_head_whose_logits_overflow_is_named(data):
    huge = Head(1e300 * data.head.weight, data.head.bias, data.head.labels, "huge.safetensors")
    bank = data.bank(huge)
    with pytest.raises(
        ValueError, match=r"train row 0: what huge\.safetensors makes of it is not finite; fit the head again"
    ):
        bank.take(np.arange(3), "logits")

"""Each detector against the slow way, and against the peer that also has it."""

import warnings

import numpy as np
import pytest
import torch
from pytorch_ood import detector as peer
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor

import featcache.rows
from evalsuite.detectors import _moments, _nearest, build
from evalsuite.metrics import auroc
from featcache.rows import Rows

D, CLASSES = 7, 4


class Data:
    """float32 arrays, so that both sides start from the same numbers: correlated classes of unequal size with a
    common offset, held-out rows, and OOD rows that overlap them."""

    def __init__(self):
        rng = np.random.default_rng(3)
        mix = rng.normal(size=(D, D))
        prototypes = rng.normal(size=(CLASSES, D))
        centres = prototypes @ mix
        self.labels = np.repeat(np.arange(CLASSES), [40, 25, 31, 52])
        rng.shuffle(self.labels)
        head = np.linalg.solve(mix, prototypes.T)

        def draw(centre):
            return (5 + centre + 0.7 * rng.normal(size=centre.shape) @ mix).astype(np.float32)

        self.train = draw(centres[self.labels])
        self.test = draw(centres[rng.integers(0, CLASSES, 60)])
        self.ood = draw(rng.normal(size=(50, D)) @ mix)
        self.logits = {id(x): ((x - 5) @ head).astype(np.float32) for x in (self.train, self.test, self.ood)}

    def bank(self, **given):
        return Rows.from_arrays(self.train, self.labels, logits=self.logits[id(self.train)], **given)

    def scores(self, spec):
        detector = build(spec).fit(self.bank())

        def of(x):
            fields = {"embedding": x, "logits": self.logits[id(x)]}
            return detector.score(*(fields[field] for field in detector.needs))

        return of(self.test), of(self.ood)


@pytest.fixture(scope="module")
def data():
    return Data()


def unit(x):
    return x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)


def softmax(x):
    return np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True)


def class_distances(train, labels, x):
    """The squared Mahalanobis distance to each class by scikit-learn, as OpenOOD computes it."""
    means = [train[labels == c].mean(axis=0) for c in np.unique(labels)]
    centred = np.concatenate([train[labels == c] - mean for c, mean in zip(np.unique(labels), means, strict=True)])
    precision = EmpiricalCovariance().fit(centred).precision_
    return np.array([[(row - mean) @ precision @ (row - mean) for mean in means] for row in x])


def mahalanobis(data, x):
    return class_distances(data.train.astype(np.float64), data.labels, x.astype(np.float64)).min(axis=1)


def mahalanobis_pp(data, x):
    return class_distances(unit(data.train), data.labels, unit(x)).min(axis=1)


def rmd(data, x):
    return mahalanobis(data, x) - EmpiricalCovariance().fit(data.train.astype(np.float64)).mahalanobis(x)


def ssd(data, x):
    return EmpiricalCovariance().fit(unit(data.train)).mahalanobis(unit(x))


def cosine_mean(data, x):
    means = np.array([unit(data.train)[data.labels == c].mean(axis=0) for c in range(CLASSES)])
    return 1 - (unit(x) @ unit(means).T).max(axis=1)


def residual(components):
    def score(data, x):
        pca = PCA(n_components=components, svd_solver="full").fit(data.train.astype(np.float64))
        return np.linalg.norm(x - pca.inverse_transform(pca.transform(x.astype(np.float64))), axis=1)

    return score


def gmm(tied):
    """scikit-learn's density, with the parameters counted from the classes."""

    def score(data, x):
        train = data.train.astype(np.float64)
        parts = [train[data.labels == c] for c in range(CLASSES)]
        covariances = np.array([np.cov(part.T, bias=True) for part in parts])
        weights = np.array([len(part) for part in parts]) / len(train)
        if tied:
            covariances = np.repeat(np.tensordot(weights, covariances, 1)[None], CLASSES, axis=0)
        mixture = GaussianMixture(CLASSES)
        mixture.weights_ = weights
        mixture.means_ = np.array([part.mean(axis=0) for part in parts])
        mixture.covariances_ = covariances + 1e-6 * np.eye(D)
        mixture.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(mixture.covariances_))
        return -mixture.score_samples(x.astype(np.float64))

    return score


def knn(k, take):
    def score(data, x):
        return take(np.sort(1 - unit(x) @ unit(data.train).T, axis=1)[:, :k])

    return score


def lof(k):
    def score(data, x):
        return -LocalOutlierFactor(k, novelty=True).fit(unit(data.train)).score_samples(unit(x))

    return score


def energy_of(data, x, t=1.0):
    return t * np.log(np.exp(data.logits[id(x)].astype(np.float64) / t).sum(axis=1))


def nnguide(k):
    def score(data, x):
        bank = unit(data.train) * energy_of(data, data.train)[:, None]
        return -np.sort(unit(x) @ bank.T, axis=1)[:, -k:].mean(axis=1) * energy_of(data, x)

    return score


def gen(gamma, top):
    def score(data, x):
        p = np.sort(softmax(data.logits[id(x)]), axis=1)[:, ::-1][:, :top]
        return (p**gamma * (1 - p) ** gamma).sum(axis=1)

    return score


def klm(data, x):
    bank, p = softmax(data.logits[id(data.train)]), softmax(data.logits[id(x)])
    usual = [bank[bank.argmax(axis=1) == k].mean(axis=0) for k in np.unique(bank.argmax(axis=1))]
    return np.array([min((row * np.log(row / d)).sum() for d in usual) for row in p])


ORACLES = {
    "mahalanobis": mahalanobis,
    "mahalanobis++": mahalanobis_pp,
    "mahalanobis_pp": mahalanobis_pp,
    "rmd": rmd,
    "ssd": ssd,
    "cosine_mean": cosine_mean,
    "residual": residual(D // 2),
    "residual:components=5": residual(5),
    "gmm": gmm(tied=False),
    "gmm:covariance=tied": gmm(tied=True),
    "knn": knn(50, lambda d: d[:, -1]),
    "knn:k=5,mean=true": knn(5, lambda d: d.mean(axis=1)),
    "lof": lof(20),
    "lof:k=3": lof(3),
    "nnguide": nnguide(10),
    "nnguide:k=3": nnguide(3),
    "msp": lambda data, x: 1 - softmax(data.logits[id(x)]).max(axis=1),
    "msp:temperature=20.0": lambda data, x: 1 - softmax(data.logits[id(x)] / 20).max(axis=1),
    "maxlogit": lambda data, x: -data.logits[id(x)].max(axis=1),
    "energy": lambda data, x: -energy_of(data, x),
    "energy:temperature=3.0": lambda data, x: -energy_of(data, x, 3.0),
    "gen": gen(0.1, 100),
    "gen:gamma=0.5,top=2": gen(0.5, 2),
    "klm": klm,
}


@pytest.mark.parametrize("spec", ORACLES)
@pytest.mark.parametrize("blocks", ["whole", "small"])
def test_scores_equal_the_slow_way(data, monkeypatch, spec, blocks):
    if blocks == "small":  # 5 rows are read at a time, 3 are scored at a time
        monkeypatch.setattr(featcache.rows, "_BLOCK_FLOATS", 5 * D)
        monkeypatch.setattr(_moments, "_PIECE_FLOATS", 3 * D)
    rtol = 1e-5 if spec.startswith("lof") else 1e-6  # from float32 cosines of rows close together
    scores, expected = data.scores(spec), [ORACLES[spec](data, x) for x in (data.test, data.ood)]
    for ours, slow in zip(scores, expected, strict=True):
        np.testing.assert_allclose(ours, slow, rtol=rtol, atol=1e-7)
    assert auroc(*scores) == pytest.approx(auroc(*expected), abs=1e-6)


def through(fit, predict):
    """pytorch-ood's scores in float64; `fit` and `predict` name its methods for arrays."""

    def scores(detector, data):
        def given(x):
            return torch.from_numpy(x if fit == "fit_features" else data.logits[id(x)]).double()

        if detector.requires_fit:
            getattr(detector, fit)(given(data.train), torch.from_numpy(data.labels))
        return [getattr(detector, predict)(given(x)).numpy() for x in (data.test, data.ood)]

    return scores


features, logits = through("fit_features", "predict_features"), through("fit_logits", "predict_logits")

PEERS = {
    "knn": (lambda: peer.KNN(None), features),
    "knn:k=7": (lambda: peer.KNN(None, k=7), features),
    "mahalanobis": (lambda: peer.Mahalanobis(None), features),
    "rmd": (lambda: peer.RMD(None), features),
    "gmm": (lambda: peer.GMM(None), features),
    "msp": (lambda: peer.MaxSoftmax(None), logits),
    "maxlogit": (lambda: peer.MaxLogit(None), logits),
    "energy": (lambda: peer.EnergyBased(None), logits),
    "gen": (lambda: peer.GEN(None), logits),
    "klm": (lambda: peer.KLMatching(None), logits),
}


@pytest.mark.parametrize("spec", PEERS)
def test_auroc_equals_pytorch_oods(data, float64, spec):
    make, scores = PEERS[spec]
    id_scores, ood_scores = scores(make(), data)
    expected = roc_auc_score(np.repeat([0, 1], [len(id_scores), len(ood_scores)]), np.r_[id_scores, ood_scores])
    assert auroc(*data.scores(spec)) == pytest.approx(expected, abs=1e-6)
    assert 0.5 < expected < 1


def test_nnguides_auroc_equals_pytorch_oods(data):
    logits = {tuple(row): data.logits[id(x)][i] for x in (data.train, data.test, data.ood) for i, row in enumerate(x)}

    def head(x):  # the logits of rows known by their features
        return torch.from_numpy(np.array([logits[tuple(row)] for row in x.numpy()]))

    detector = peer.NNGuide(None, head)
    detector.fit_features(torch.from_numpy(data.train), torch.from_numpy(data.labels))
    id_scores, ood_scores = (detector.predict_features(torch.from_numpy(x)).numpy() for x in (data.test, data.ood))
    assert auroc(*data.scores("nnguide")) == pytest.approx(auroc(id_scores, ood_scores), abs=1e-6)


def test_confident_rows_do_not_tie():
    """Where pytorch-ood's float32 scores saturate: 1 − p rounds to zero, and GEN clips p."""
    rows = np.array([[40.0, 0.0], [60.0, 0.0], [80.0, 0.0]], np.float32)
    for spec, score in (("msp", peer.MaxSoftmax.score), ("gen", peer.GEN.score)):
        assert len(np.unique(score(torch.from_numpy(rows)).numpy())) == 1
        assert (np.diff(build(spec).score(rows)) < 0).all()


def test_gmm_tells_rows_apart_far_from_every_mean(data):
    """Where OpenOOD's log(Σ exp(·) + 1e-45) gives all of them the same score."""
    for covariance in ("full", "tied"):
        far = build(f"gmm:covariance={covariance}").fit(data.bank()).score(1000 * data.ood)
        assert len(np.unique(far)) == len(far)


class Followed(np.ndarray):
    """Rows of a subclass of NumPy's array, which a detector scores by its plain formula."""


@pytest.mark.parametrize("rows_of_a_class", [40, 12])
@pytest.mark.parametrize("apart", [0.2, 3.0])
def test_gmm_leaves_out_only_classes_that_add_nothing(rng, apart, rows_of_a_class):
    """Well-conditioned covariances and singular ones, classes that overlap and ones that do not: float32 changes nothing."""
    width, classes = 24, 6
    centres, mix = apart * rng.normal(size=(classes, width)), rng.normal(size=(width, width))
    labels = np.repeat(np.arange(classes), rows_of_a_class)
    bank = ((centres[labels] + rng.normal(size=(len(labels), width))) @ mix).astype(np.float32)
    near = (bank[::3] + 0.1 * rng.normal(size=bank[::3].shape)).astype(np.float32)
    x = np.concatenate([near, 1e3 * near, 1e30 * near, bank[:5], np.zeros((1, width), np.float32)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular covariances
        detector = build("gmm").fit(Rows.from_arrays(bank, labels))
    np.testing.assert_allclose(detector.score(x), detector.score(x.view(Followed)), rtol=1e-12, atol=1e-10)
    counting = detector.mixture_._counting(x.astype(np.float64))
    assert counting.any(axis=1).all()
    assert counting[: len(near)].mean() < (0.3 if apart > 1 else 0.9)


def test_directions_in_which_the_bank_does_not_vary_are_left_out(data):
    wide = [np.concatenate([x, np.ones((len(x), 2), np.float32), x[:, :1]], axis=1) for x in (data.train, data.test)]
    for spec in ("mahalanobis", "rmd"):
        expected = build(spec).fit(data.bank()).score(data.test)
        scores = build(spec).fit(Rows.from_arrays(wide[0], data.labels)).score(wide[1])
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.parametrize("spec", ["rmd", "mahalanobis", "mahalanobis++", "ssd"])
def test_a_bank_with_fewer_rows_than_dimensions_warns_and_takes_the_pseudo_inverse(rng, spec):
    bank, labels, x = rng.normal(size=(30, 40)), np.repeat(range(3), 10), rng.normal(size=(5, 40))
    with pytest.warns(RuntimeWarning, match="covariance of 30 rows in 40 dimensions is singular.*give a larger bank"):
        found = build(spec).fit(Rows.from_arrays(bank, labels)).score(x.astype(np.float32))
    if spec in ("mahalanobis++", "ssd"):
        bank, x = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, x))
    bank, x = bank.astype(np.float32).astype(np.float64), x.astype(np.float32).astype(np.float64)
    means = np.stack([bank[labels == c].mean(0) for c in range(3)])

    def squared(origins, covariance):
        from_origins = x[:, None] - origins
        return np.einsum(
            "qcd,de,qce->qc", from_origins, np.linalg.pinv(covariance, rcond=1e-9, hermitian=True), from_origins
        )

    within = np.cov((bank - means[labels]).T, bias=True)
    to_class, to_all = squared(means, within).min(1), squared(bank.mean(0), np.cov(bank.T, bias=True))[:, 0]
    expected = {"rmd": to_class - to_all, "ssd": to_all}.get(spec, to_class)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_labels_need_not_be_contiguous_and_rows_without_one_are_left_out(data):
    some = np.where(data.labels == 2, -1, 10 * data.labels + 5)
    only = Rows.from_arrays(data.train[some >= 0], data.labels[some >= 0])
    for spec in ("mahalanobis", "mahalanobis++", "rmd", "gmm", "cosine_mean"):
        scores = build(spec).fit(Rows.from_arrays(data.train, some)).score(data.test)
        np.testing.assert_allclose(scores, build(spec).fit(only).score(data.test), rtol=1e-9)


def test_the_bank_is_read_once_for_detectors_that_ask_the_same(data, monkeypatch):
    reads = []
    take = Rows.take
    monkeypatch.setattr(Rows, "take", lambda self, *given: reads.append(len(given[0])) or take(self, *given))
    bank = data.bank()
    for spec in ("mahalanobis", "rmd", "residual", "gmm:covariance=tied"):
        build(spec).fit(bank)
    assert sum(reads) == len(bank)
    for spec in ("mahalanobis++", "ssd", "cosine_mean"):
        build(spec).fit(bank)
    assert sum(reads) == 2 * len(bank)


def test_neighbours_are_searched_once_for_detectors_that_score_the_same_rows(data, monkeypatch):
    searches = []
    search = _nearest.search
    monkeypatch.setattr(_nearest, "search", lambda *given: searches.append(given[-1]) or search(*given))
    bank = data.bank()
    alone = {spec: data.scores(spec) for spec in ("knn", "knn:k=5,mean=true", "lof")}
    detectors = {spec: build(spec).fit(bank) for spec in alone}
    searches.clear()
    for spec, detector in detectors.items():
        np.testing.assert_array_equal(detector.score(data.test), alone[spec][0])
    assert searches == [50]
    np.testing.assert_array_equal(detectors["knn"].score(data.ood), alone["knn"][1])
    np.testing.assert_array_equal(build("knn:k=60").fit(bank).score(data.ood), data.scores("knn:k=60")[1])
    assert searches[:3] == [50, 50, 60]


def test_an_array_filled_anew_is_searched_anew(data):
    detector = build("knn").fit(data.bank())
    buffer = data.test[:50].copy()
    detector.score(buffer)
    buffer[:] = data.ood
    np.testing.assert_array_equal(detector.score(buffer), detector.score(data.ood))
    np.testing.assert_array_equal(detector.score(buffer), data.scores("knn")[1])


@pytest.mark.parametrize("spec", ["mahalanobis", "mahalanobis++", "rmd", "gmm", "cosine_mean"])
def test_labels_are_asked_for(data, spec):
    with pytest.raises(ValueError, match="train has no labels; extract a corpus with"):
        build(spec).fit(Rows.from_arrays(data.train, name="train"))


@pytest.mark.parametrize("spec", ["mahalanobis", "mahalanobis++", "rmd"])
def test_classes_that_do_not_vary_are_explained(data, spec):
    with pytest.raises(ValueError, match=r"rows of train do not vary about their means.*use a bank"):
        build(spec).fit(Rows.from_arrays(data.train, np.arange(len(data.train)), name="train"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gmm:covariance=diagonal", "unknown covariance 'diagonal'; use gmm:covariance=full or gmm:covariance=tied"),
        ("gmm:reg=-1000.0", "gmm:reg=-1000.0 must be at least 0: it is added to variances"),
        ("residual:components=7", "components=7 does not suit train, .*use components from 1 to 6"),
        ("residual:components=0", "residual:components=0 must be a whole number from 1"),
        ("lof:k=148", "k=148 does not suit the bank train, which has 148 rows; use k from 1 to 147"),
        ("nnguide:k=149", "use k from 1 to 148"),
        ("msp:temperature=0.0", "temperature=0.0 must be above 0"),
        ("energy:temperature=-1.0", "temperature=-1.0 must be above 0"),
        ("gen:gamma=0.0", "gamma=0.0 must be above 0"),
        ("gen:top=0", "top=0 must be a whole number"),
    ],
)
def test_wrong_arguments_are_explained(data, spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec).fit(data.bank(name="train"))


def test_gmm_names_the_remedy_for_small_classes_and_large_covariances(data, monkeypatch):
    labels = np.where(np.arange(len(data.train)) == 8, 9, data.labels)
    bank = Rows.from_arrays(data.train, labels, name="train")
    with pytest.raises(ValueError, match=r"class 9 of train has one row.*use gmm:covariance=tied"):
        build("gmm").fit(bank)
    monkeypatch.setattr("evalsuite.detectors.gmm._LIMIT", 8 * CLASSES * D * D - 1)
    with pytest.raises(ValueError, match=r"4 class covariances of train take .*use gmm:covariance=tied"):
        build("gmm").fit(data.bank(name="train"))
    for own in (bank, data.bank()):
        assert np.isfinite(build("gmm:covariance=tied").fit(own).score(data.test)).all()


@pytest.mark.parametrize("spec", ["mahalanobis", "ssd", "gmm", "residual", "knn", "lof"])
def test_a_row_that_is_not_finite_is_named(data, spec):
    train = data.train.copy()
    train[17, 3] = np.nan
    with pytest.raises(ValueError, match=r"row 17.* is not finite; extract it again"):
        build(spec).fit(Rows.from_arrays(train, data.labels)).score(data.test)


def test_a_store_without_logits_is_explained(data):
    for spec in ("klm", "nnguide"):
        with pytest.raises(ValueError, match="train has no logits; extract it again with --fields embedding,logits"):
            build(spec).fit(Rows.from_arrays(data.train, data.labels, name="train"))

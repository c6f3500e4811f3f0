"""Scores as graphs: what ONNX Runtime makes of rows is what the detector makes of them; what cannot be followed is refused."""

import warnings

import numpy as np
import onnxruntime
import pytest

from evalsuite.deployed.fit import deployable
from evalsuite.detectors import Detector, build, names
from evalsuite.traced import Untraceable, score_graph
from featcache.head import Head
from featcache.rows import Rows

DEPLOYABLE = (
    "cosine_mean", "dice", "energy", "gmm", "gradnorm", "klm", "knn", "mahalanobis", "mahalanobis_pp", "maxlogit", "msp",
    "react", "residual", "rmd", "ssd", "vim",
)  # fmt: skip
HEAD = Head(3 * np.eye(4, 8), np.full(4, -0.1), np.arange(4))


@pytest.fixture(scope="module")
def bank():
    return Rows.from_arrays(rows(40), np.repeat(np.arange(4), 40), head=HEAD)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.abs(np.concatenate([x + 0.5 * rng.normal(size=(count, 8)) for x in 4 * np.eye(4, 8)])).astype(np.float32)


def run(model, embedding):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"embedding": embedding})[0]


@pytest.mark.parametrize("spec", [*DEPLOYABLE, "knn:k=3,mean=true", "gmm:covariance=tied", "energy:temperature=2.0"])
def test_a_graph_gives_the_detectors_own_scores_of_any_number_of_rows(bank, spec):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = build(spec).fit(bank)

    def score(embedding):
        fields = {"embedding": embedding, "logits": HEAD.logits(embedding).astype(np.float32)}
        return detector.score(*(fields[each] for each in detector.needs))

    model = score_graph(score, {"embedding": rows(2)[:3]}, {})
    for count in (1, 7):
        some = np.concatenate([rows(count, seed=5), np.zeros((1, 8), np.float32)])
        np.testing.assert_allclose(run(model, some), score(some), rtol=1e-9, atol=1e-12)
    assert run(model, rows(1)[:1]).shape == (1,)


def test_those_that_deploy_are_found_by_trying():
    assert deployable() == sorted(DEPLOYABLE)
    assert set(DEPLOYABLE) < set(names())


class Odd(Detector):
    """Whatever `how` says."""

    how: str = ""

    def score(self, x):
        if self.how == "set":
            x[:, 0] = 1
        if self.how == "loop":
            return np.array([row.sum() for row in np.asarray(x)])
        if self.how == "over rows":
            return x.max(axis=0).sum() + x.sum(axis=1)
        if self.how == "view":
            return (x.T * 2).sum(axis=0)
        return np.cumsum(x, axis=1)[:, -1]


@pytest.mark.parametrize("how", ["set", "loop", "over rows", "view", "unknown"])
def test_what_a_graph_cannot_have_is_refused(how):
    with pytest.raises(Untraceable):
        score_graph(Odd(how).score, {"embedding": rows(1)[:3]}, {})

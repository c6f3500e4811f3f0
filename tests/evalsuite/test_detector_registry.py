"""The registry; what every detector must do is in tests/contracts."""

import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from evalsuite import detectors
from evalsuite.detectors.knn import KNN
from evalsuite.rows import Rows


def test_a_file_is_a_detector(tmp_path, monkeypatch):
    (tmp_path / "flat.py").write_text(
        "import numpy as np\n"
        "class Flat:\n"
        "    def __init__(self, level=0.0): self.level = level\n"
        "    def fit(self, bank): return self\n"
        "    def score(self, features): return np.full(len(features), self.level)\n"
    )
    monkeypatch.setattr(detectors, "__path__", [*detectors.__path__, str(tmp_path)])
    assert "flat" in detectors.names()
    assert detectors.build("flat:level=high").level == "high"
    flat = detectors.build("flat:level=0.5")
    assert flat.score(np.zeros((2, 3))).tolist() == [0.5, 0.5]
    assert detectors.parameters(flat) == {"level": 0.5}
    monkeypatch.delitem(sys.modules, "evalsuite.detectors.flat")


def test_an_entry_point_is_a_detector(monkeypatch):
    entry = EntryPoint("nearest", "evalsuite.detectors.knn", "evalsuite.detectors")
    monkeypatch.setattr("featcache.plugins.entry_points", lambda group: [entry] if group == entry.group else [])
    assert {"knn", "nearest"} <= set(detectors.names())
    assert detectors.load("nearest") is KNN


def test_specs():
    assert detectors.build("knn").k == 50
    assert detectors.build("knn:k=3").k == 3
    assert detectors.build("knn", k=4).k == 4
    assert detectors.build("knn:k=3", k=4).k == 3
    assert type(detectors.build("mahalanobis++")) is detectors.load("mahalanobis_pp")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kn", "unknown .*'kn'; did you mean knn?"),
        ("knn:n=3", "takes no argument 'n'; known: k"),
        ("knn:k", "cannot read .*NAME:ARG=VALUE"),
        ("knn:", "cannot read"),
        ("knn:k=1,k=2", "cannot read"),
        ("knn:k=a/b", "cannot read"),
    ],
)
def test_bad_specs_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        detectors.build(spec)


def test_knn_golden_values():
    bank = Rows.from_arrays(np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]))
    query = np.array([[5.0, 0.0], [0.0, 0.0]])
    assert KNN(k=1).fit(bank).score(query).tolist() == [0.0, 1.0]
    assert KNN(k=3).fit(bank).score(query).tolist() == [2.0, 1.0]


@pytest.mark.parametrize("k", [0, 4, 1.5, "many"])
def test_knn_refuses_a_k_that_does_not_suit_the_bank(k):
    detector = KNN()
    detector.k = k
    with pytest.raises(ValueError, match="the bank train, which has 3 rows; use k from 1 to 3"):
        detector.fit(Rows.from_arrays(np.eye(3), name="train"))

"""The registry; what every detector must do is in tests/contracts."""

import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from evalsuite import detectors
from evalsuite.detectors.knn import KNN
from featcache.rows import Rows


def test_a_file_is_a_detector(tmp_path, monkeypatch):
    (tmp_path / "flat.py").write_text(
        "import numpy as np\n"
        "from evalsuite.detectors import Detector\n"
        "class Flat(Detector):\n"
        "    level: float = 0.0\n"
        "    def score(self, features): return np.full(len(features), self.level)\n"
    )
    monkeypatch.setattr(detectors, "__path__", [*detectors.__path__, str(tmp_path)])
    assert "flat" in detectors.names()
    with pytest.raises(ValueError, match="detector flat: level must be a number, got 'high'"):
        detectors.build("flat:level=high")
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
    for text, value in (("true", True), ("True", True), ("false", False), ("False", False)):
        assert detectors.build(f"knn:mean={text}").mean is value
    assert detectors.build("energy:temperature=2").temperature == 2
    assert detectors.build("ash:variant=b").variant == "b"
    assert type(detectors.build("mahalanobis++")) is detectors.load("mahalanobis_pp")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kn", "^unknown detector 'kn'; did you mean knn?"),
        ("foo", rf"^unknown detector 'foo'; known: {', '.join(detectors.names())}$"),
        ("knn:mean=maybe", "^detector knn: mean must be true or false, got 'maybe'$"),
        ("knn:mean=1", "mean must be true or false, got 1"),
        ("knn:k=1.5", "detector knn: k must be a whole number, got 1.5"),
        ("knn:k=true", "k must be a whole number, got True"),
        ("energy:temperature=warm", "detector energy: temperature must be a number, got 'warm'"),
        ("energy:temperature=True", "temperature must be a number, got True"),
        ("ash:variant=1", "detector ash: variant must be a word, got 1"),
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

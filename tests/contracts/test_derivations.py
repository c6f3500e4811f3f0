"""Every registered derivation is one."""

from featcache.plugins import plugin_names
from featcache.testing import DerivationContract


class TestMean(DerivationContract):
    name, options = "mean", {"of": "probabilities", "temperature": 2.0, "weights": (1.0, 3.0)}


class TestJoin(DerivationContract):
    name, options = "join", {"take": ("embedding", "embedding+logits"), "unit": True}


class TestClassSimilarity(DerivationContract):
    name, options, stores = "class_similarity", {"per_class": 2, "temperature": 0.1}, 1


class TestVote(DerivationContract):
    name, options, stores = "vote", {"by": "probability", "least": 0.5, "relabel": True, "names": ("a", "b", "c")}, 3


def test_every_registered_derivation_is_under_its_contract():
    assert {*plugin_names("featcache.derivations")} <= {each.name for each in DerivationContract.__subclasses__()}

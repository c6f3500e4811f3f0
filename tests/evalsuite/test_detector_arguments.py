"""Arguments in another unit than the detector's, or out of its range: refused when the spec is read."""

import sys

import numpy as np
import pytest

from evalsuite import detectors, ood
from evalsuite.detectors import build, load
from featcache.rows import Rows


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("react:percentile=0.9", r"percentile=0\.9 is in percent; for the quantile 0\.9 give 90$"),
        ("react:percentile=0.95", "give 95$"),
        ("react:percentile=1", r"percentile=1\.0 is in percent; for the quantile 1 give 100$"),
        ("react:percentile=0", "from 0 to 100, in percent"),
        ("react:percentile=-5", "from 0 to 100, in percent"),
        ("react:percentile=101", "from 0 to 100, in percent"),
        ("ash:pruned=65", r"pruned=65\.0 must be at least 0 and below 1: it is a share, so for 65 % give 0\.65$"),
        ("scale:pruned=85", r"give 0\.85$"),
        ("dice:dropped=90", r"dropped=90\.0 must be .*give 0\.9$"),
        ("ash:pruned=-0.1", "must be at least 0 and below 1"),
        ("ash:pruned=1", "must be at least 0 and below 1: it is a share$"),
        ("ash:variant=x", "unknown variant 'x'"),
        ("mcm:temperature=100", r"at most 10: cosines are divided by it; for a scale of 100, .*give 0\.01$"),
        ("neglabel:temperature=100", r"give 0\.01$"),
        ("mcm:temperature=0", "must be above 0"),
        ("energy:temperature=0", "must be above 0"),
        ("msp:temperature=-1", "must be above 0"),
        ("gen:gamma=0", "must be above 0 and at most 1"),
        ("gen:gamma=10", "must be above 0 and at most 1"),
        ("gen:top=0", "must be a whole number from 1"),
        ("gmm:reg=-1e-3", "must be at least 0"),
        ("gmm:covariance=diag", "unknown covariance 'diag'"),
        ("knn:k=0", "knn:k=0 must be a whole number from 1"),
        ("knn:k=-3", "must be a whole number from 1"),
        ("lof:k=0", "lof:k=0 must be a whole number from 1"),
        ("nnguide:k=-1", "must be a whole number from 1"),
        ("neglabel:groups=0", "must be a whole number from 1"),
        ("neglabel:seed=-1", "must be a whole number from 0"),
        ("nci:alpha=-1", "must be at least 0"),
        ("residual:components=0", "must be a whole number from 1"),
        ("vim:components=-1", "must be a whole number from 1"),
    ],
)
def test_other_units_and_ranges_are_refused_before_anything_is_read(spec, said):
    name = spec.partition(":")[0]
    with pytest.raises(ValueError, match=said) as refused:
        build(spec)
    assert "\n" not in str(refused.value)
    assert f"{name}:{spec.partition(':')[2].partition('=')[0]}" in str(refused.value)


@pytest.mark.parametrize("value", ["0.9", "99%", "true", "None"])
@pytest.mark.parametrize("name", ["residual", "vim"])
def test_components_are_no_share(name, value):
    with pytest.raises(ValueError, match=f"^detector {name}: components must be a whole number, got "):
        build(f"{name}:components={value}")


def test_so_does_the_class_itself():
    bank = Rows.from_arrays(np.eye(3), np.arange(3), name="train")
    with pytest.raises(ValueError, match="give 90"):
        load("react")(percentile=0.9).fit(bank)
    with pytest.raises(ValueError, match=r"give 0\.9$"):
        load("dice")(dropped=90.0).fit(bank)


def test_numbers_of_numpy_and_one_name_without_a_list_are_taken(make_store, rng):
    stores = [make_store(name, rng.normal(size=(20, 4))) for name in ("train", "test", "far")]
    given = {"id_train": stores[0], "id_test": stores[1], "far": {"far": stores[2]}}
    assert ood(**given, detectors="knn", k=3).metrics == ood(**given, detectors=["knn"], k=3).metrics
    assert detectors.parameters(build("knn", k=np.int64(3))) == {"k": 3, "mean": False}
    with pytest.raises(ValueError, match=r"'ssd' takes no argument 'k'; it takes none$"):
        build("ssd:k=3")


def test_one_class_is_nothing_to_be_relative_to(rng):
    bank = Rows.from_arrays(rng.normal(size=(40, 4)), np.zeros(40, int), name="train")
    with pytest.raises(ValueError, match=r"train has one class, .*rmd is 0 everywhere; use mahalanobis$"):
        build("rmd").fit(bank)


@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_a_constant_that_alone_shapes_the_densities_warns(rng, covariance):
    x, labels = rng.normal(size=(80, 4)), np.arange(80) % 2
    build(f"gmm:covariance={covariance}").fit(Rows.from_arrays(x, labels))
    with pytest.warns(RuntimeWarning, match=r"gmm:reg=1e-06 is more than the features vary \(.*e-08 a dimension\)"):
        build(f"gmm:covariance={covariance}").fit(Rows.from_arrays(1e-4 * x, labels))


@pytest.mark.parametrize("name", detectors.names())
def test_defaults_are_in_range(name):
    assert detectors.parameters(build(name)) == vars(build(name))


def test_a_wrong_argument_ends_the_command_before_the_others_are_computed(make_store, rng, monkeypatch):
    """The whole list is read first."""
    stores = [make_store(name, rng.normal(size=(20, 4))) for name in ("train", "test", "far")]
    monkeypatch.setattr(sys.modules["evalsuite.scores"], "fit_all", lambda *_: pytest.fail("something was fitted"))
    with pytest.raises(ValueError, match="give 90"):
        ood(id_train=stores[0], id_test=stores[1], far={"far": stores[2]}, detectors=["knn", "react:percentile=0.9"])
    with pytest.raises(ValueError, match="knn:k=0"):
        ood(id_train=stores[0], id_test=stores[1], far={"far": stores[2]}, detectors=["knn"], k=0)


@pytest.mark.parametrize("spec", ["ash:pruned=0.99", "scale:pruned=0.96"])
def test_a_share_that_leaves_nothing_is_refused(spec):
    from featcache.head import Head

    head = Head(np.ones((2, 8)), np.zeros(2), np.arange(2))
    with pytest.raises(ValueError, match="leaves none of the 8 dimensions of train; prune fewer"):
        build(spec).fit(Rows.from_arrays(np.ones((9, 8), np.float32), name="train", head=head))

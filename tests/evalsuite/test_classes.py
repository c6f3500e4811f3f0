"""Which class of one store is which of another, through the evaluators that compare labels."""

import numpy as np
import pytest

from evalsuite import knn, probe
from featcache.classes import Classes, match

AXES = np.eye(4)
NAMES = ["ant", "bee", "cat", "dog"]


def top1(bank, query):
    return knn(bank, query, k=[1]).metrics["top1@1"].value


def probed(train, test):
    return probe(train, test, c=100.0).metrics["probe/top1"].value


EVALUATORS = pytest.mark.parametrize("measure", [top1, probed])


@pytest.fixture
def bank(make_store):
    return make_store("bank", AXES, labels=range(4), class_names=NAMES)


@EVALUATORS
def test_names_decide_not_numbers(bank, make_store, measure):
    for order in ([3, 0, 1, 2], [2, 1, 3, 0]):
        query = make_store(f"query{order}", AXES, labels=np.argsort(order), class_names=[NAMES[i] for i in order])
        assert measure(bank, query) == 1
    some = make_store("some", AXES[[1, 2]], labels=[0, 1], class_names=["bee", "cat"])
    assert measure(bank, some) == 1


@EVALUATORS
def test_names_against_numbers_are_refused(bank, make_store, measure):
    """By number, one in ten would be right by accident."""
    numbered = make_store("numbered", AXES[[1, 2, 3, 0]], labels=range(4))
    named = r"bank\.zarr has class names \(ant, bee, cat, … \(4 in all\)\), .*numbered\.zarr only numbers \(0, 1, 2, "
    for pair in ((bank, numbered), (numbered, bank)):
        with pytest.raises(ValueError, match=named + r".*; give .*numbered\.zarr class names") as refused:
            measure(*pair)
        assert "\n" not in str(refused.value)


@EVALUATORS
def test_numbers_are_names_where_corpora_name_classes_so(make_store, measure):
    """As folders 0, 1, 10, 2 do, sorted as words."""
    words = make_store("words", AXES, labels=range(4), class_names=["0", "1", "10", "2"])
    numbered = make_store("numbered", AXES, labels=[0, 1, 10, 2])
    assert measure(words, numbered) == measure(numbered, words) == 1


@EVALUATORS
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"labels": range(4)}, {"labels": range(100, 104)}),
        ({"labels": range(4), "class_names": NAMES}, {"labels": range(4), "class_names": ["elk", "fox", "gnu", "hen"]}),
        ({"labels": [0, 0, 1, 1], "class_names": NAMES}, {"labels": [2, 2, 3, 3], "class_names": NAMES}),
        (
            {"labels": [0, 0, 1, 1], "class_names": NAMES},
            {"labels": [1, 1, 2, 2], "class_names": ["ant", "cat", "dog"]},
        ),
    ],
)
def test_no_class_in_common_is_refused(make_store, measure, ours, theirs):
    bank, query = make_store("bank", AXES, **ours), make_store("query", AXES, **theirs)
    with pytest.raises(
        ValueError, match=r"query\.zarr and .*bank\.zarr have no class in common \(.+ against .+\).*; give"
    ):
        measure(bank, query)


@EVALUATORS
def test_an_unknown_name_is_refused_only_where_it_has_rows(bank, make_store, measure):
    names = ["bee", "elk"]
    assert measure(bank, make_store("a", AXES[[1]], labels=[0], class_names=names)) == 1
    with pytest.raises(ValueError, match=r"b\.zarr has 1 classes that .*bank\.zarr does not know \(elk\)"):
        measure(bank, make_store("b", AXES[:2], labels=[0, 1], class_names=names))


@EVALUATORS
def test_case_spaces_and_unicode_do_not_part_classes(make_store, measure):
    bank = make_store("bank", AXES, labels=range(4), class_names=["polar bear", "Caf\u00e9", "cat", "dog"])
    query = make_store("query", AXES, labels=[3, 2, 1, 0], class_names=["dog", "cat ", "Cafe\u0301", "Polar  Bear"])
    with pytest.warns(
        UserWarning, match=r"3 classes of .*query\.zarr and .*bank\.zarr are taken for the same .*'cat '"
    ):
        assert measure(bank, query) == 1
    # Two such names are two classes; a third is neither of them.
    both = make_store("both", AXES, labels=range(4), class_names=["Cat", "cat", "ant", "bee"])
    assert measure(both, make_store("swapped", AXES[:2], labels=[1, 0], class_names=["cat", "Cat"])) == 1
    with pytest.raises(ValueError, match=r"does not know \(CAT\)"):
        measure(both, make_store("third", AXES[[0, 2]], labels=[0, 1], class_names=["CAT", "ant"]))


@EVALUATORS
def test_two_classes_of_one_name(make_store, measure):
    """As ImageNet has: one list on both sides tells them apart, two lists do not."""
    cranes = ["crane", "ant", "crane", "bee"]
    bank = make_store("bank", AXES, labels=range(4), class_names=cranes)
    assert measure(bank, make_store("same", AXES[[2, 0]], labels=[2, 0], class_names=cranes)) == 1
    assert measure(bank, make_store("others", AXES[[1, 3]], labels=[1, 0], class_names=["bee", "ant"])) == 1
    with pytest.raises(ValueError, match=r"bank\.zarr has two classes of one name \(crane\); rename one"):
        measure(bank, make_store("crane", AXES[:2], labels=[0, 1], class_names=["crane", "ant"]))
    with pytest.raises(ValueError, match=r"bees\.zarr has two classes of one name \(bee\)"):
        measure(bank, make_store("bees", AXES[:2], labels=[0, 1], class_names=["bee", "bee"]))


def test_names_match_as_a_slow_loop_does(rng):
    """Random names of few letters, with duplicates, in two lists."""

    def slow(theirs, ours):
        found = {}
        for i, name in enumerate(theirs):
            if theirs.count(name) == 1 and ours.count(name) <= 1:
                found[i] = ours.index(name) if name in ours else None
        return found

    for _ in range(200):
        theirs, ours = (["".join(rng.choice(list("abc"), size=2)) for _ in range(5)] for _ in range(2))
        expected = slow(theirs, ours)
        numbers = np.array(sorted(expected), int)
        found = match(Classes("t", numbers, theirs), Classes("o", np.arange(5), ours))
        assert found == (expected if theirs != ours else {i: i for i in expected})


def test_a_label_without_a_name_is_refused():
    with pytest.raises(ValueError, match="old has label 9, but names for 3 classes only; give every class a name"):
        Classes("old", np.array([3, 9]), NAMES[:3])

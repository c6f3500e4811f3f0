"""Every registered evaluator is one."""

import inspect
import subprocess
import sys

import pytest

import evalsuite
from evalsuite.evaluators import flags, load, names
from evalsuite.testing import EvaluatorContract
from featcache_cli.flags import parameters


class TestKNN(EvaluatorContract):
    name, options = "knn", {"k": (1, 5)}


class TestProbe(EvaluatorContract):
    name, options = "probe", {"c": 1.0, "device": "cpu"}


class TestClassify(EvaluatorContract):
    name, stores, logits = "classify", ("test", "calibrate"), True


class TestMean(EvaluatorContract):
    name = "mean"


class TestSelect(EvaluatorContract):
    name, stores, options = "select", ("stores", "of"), {"c": (1.0,), "device": "cpu"}


class TestRetrieval(EvaluatorContract):
    name, options = "retrieval", {"labels": True, "k": (1, 5)}


class TestZeroshot(EvaluatorContract):
    name = "zeroshot"


class TestFidelity(EvaluatorContract):
    name, options = "fidelity", {"k": 3}


class TestOOD(EvaluatorContract):
    name, stores, options = "ood", ("id_train", "id_test", "far"), {"k": 5}


class TestDenseProbe(EvaluatorContract):
    name, runs = "dense_probe", False


class TestSegmentation(EvaluatorContract):
    name, runs = "segmentation", False


class TestRobustness(EvaluatorContract):
    name, runs = "robustness", False


def test_every_registered_evaluator_is_under_its_contract():
    assert {each.name for each in EvaluatorContract.__subclasses__()} >= {*names()}


@pytest.mark.parametrize("name", names())
def test_no_two_flags_are_spelled_alike(name):
    options = [each.annotation.__metadata__[0] for each in parameters(load(name))]
    assert list(flags(load(name))) == [each.name for each in parameters(load(name))]
    assert all(option.help for option in options)
    spelled = [flag for option in options for flag in option.param_decls or ()]  # arguments have none
    assert len(spelled) == len(set(spelled))


@pytest.mark.parametrize("name", names())
def test_the_function_takes_what_the_class_takes(name):
    given = inspect.signature(getattr(evalsuite, name)).parameters
    assert given == inspect.signature(load(name)).parameters


def test_help_imports_nothing_heavy():
    check = (
        "import sys, featcache_cli.evalsuite\n"
        "from evalsuite import evaluators\n"
        "evaluators.in_order(evaluators.names())\n"
        "assert not {'numpy', 'torch', 'faiss', 'zarr'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)

"""What every registered evaluator must do."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

import evalsuite
from evalsuite.evaluators import Evaluator, flags, inputs, load, names
from featcache_cli.flags import parameters


@pytest.fixture(params=names())
def name(request):
    return request.param


def test_it_is_a_frozen_dataclass_that_needs_a_store_and_says_what_it_does(name):
    evaluator = load(name)
    assert issubclass(evaluator, Evaluator)
    assert dataclasses.is_dataclass(evaluator)
    assert evaluator.__dataclass_params__.frozen
    assert evaluator.__doc__
    assert inputs(evaluator)
    assert evaluator.summary.endswith(".")
    assert all(line.startswith(f"evalsuite {name} ") for line in evaluator.examples)


def test_every_flag_is_explained_and_no_two_are_spelled_alike(name):
    evaluator = load(name)
    options = [each.annotation.__metadata__[0] for each in parameters(evaluator)]
    assert list(flags(evaluator)) == [each.name for each in parameters(evaluator)]
    assert all(option.help for option in options)
    spelled = [flag for option in options for flag in option.param_decls]
    assert len(spelled) == len(set(spelled))


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

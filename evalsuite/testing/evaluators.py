"""What every evaluator must do."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from evalsuite.charts import Headline, Named, Section
from evalsuite.evaluators import Evaluator, flags, inputs, load
from evalsuite.result import Result
from featcache.store.from_arrays import write_store

COMMON = ("device", "workers", "trust_code")
"""Flags that are the same in every program."""


class EvaluatorContract:
    """Of the evaluator `name`.

    Attributes:
        stores: the fields that are given a store; by default those that must be. Each gets rows of three labelled clusters
            in 8 dimensions, by one encoder, of the same samples and never the same values.
        options: what else it is given; small, so that it is quick.
        logits: whether these stores hold logits of the three classes, too. Single numbers, `nll` and `predicted`, all do.
        runs: whether that is all that it needs.
    """

    name: str
    stores: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    logits: ClassVar[bool] = False
    runs: ClassVar[bool] = True

    @pytest.fixture
    def registered(self) -> type[Evaluator]:
        return load(self.name)

    @pytest.fixture
    def evaluator(self, registered: type[Evaluator], tmp_path: Path) -> Evaluator:
        if not self.runs:
            pytest.skip("needs more than stores")
        rng, given = np.random.default_rng(0), dict(self.options)
        labels = np.repeat(np.arange(3), 20)
        required = {each.name for each in dataclasses.fields(registered) if each.default is dataclasses.MISSING}  # type: ignore[arg-type]
        for name in self.stores or [name for name in inputs(registered) if name in required]:
            rows = 3 * np.eye(3, 8)[labels] + rng.normal(size=(60, 8))
            path = tmp_path / f"{name}.zarr"
            logits = rows[:, :3] if self.logits else None
            fields = {"nll": np.linspace(0, 3, 60, dtype=np.float32), "predicted": np.arange(60, dtype=np.int32)}
            write_store(path, rows, labels=labels, class_names=["ant", "bee", "cat"], logits=logits, fields=fields)
            kind = flags(registered)[name].kind
            named = {"stores": {"other": str(path)}, "listed": {"one": str(path), "other": str(path)}}
            given[name] = named.get(kind, str(path))
        return registered(**given)

    def test_it_is_a_frozen_dataclass_that_needs_a_store_and_says_what_it_does(
        self, registered: type[Evaluator]
    ) -> None:
        assert issubclass(registered, Evaluator)
        assert dataclasses.is_dataclass(registered)
        assert registered.__dataclass_params__.frozen
        assert registered.__doc__
        assert inputs(registered)
        assert registered.summary.endswith(".")
        assert all(line.startswith(f"evalsuite {self.name} ") for line in registered.examples)

    def test_every_flag_is_explained(self, registered: type[Evaluator]) -> None:
        assert all(flag.help for name, flag in flags(registered).items() if name not in COMMON)

    def test_its_result_is_of_finite_metrics_and_goes_through_a_file(
        self, evaluator: Evaluator, tmp_path: Path
    ) -> None:
        result = evaluator.run()
        assert result.command == self.name
        assert result.metrics
        assert all(math.isfinite(metric.value) for metric in result.metrics.values())
        again = Result.read(result.write(tmp_path / "result.json"))
        assert again == result
        assert again.samples.keys() == result.samples.keys()

    def test_the_same_stores_give_the_same_numbers(self, evaluator: Evaluator) -> None:
        assert evaluator.run().metrics == evaluator.run().metrics

    def test_what_is_shown_of_a_result(self, evaluator: Evaluator) -> None:
        result = evaluator.run()
        assert type(evaluator).table(result).rows
        named = [Named("student", result)]
        assert all(isinstance(each, Headline) for each in type(evaluator).headlines(named))
        assert all(isinstance(each, Section) for each in type(evaluator).charts(named))

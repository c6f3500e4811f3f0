"""Evaluators: one file each, registered under the file's name, which is also its command.

An evaluator's file defines one class, an `Evaluator`: a frozen dataclass whose fields are what it is given. Nothing else
knows it: `evalsuite NAME` takes its flags from the fields, its table, charts and comparison from the class. Other
people's packages add evaluators through the entry-point group `evalsuite.evaluators`, each entry naming such a module.

`evalsuite --help` imports these files: what takes long to import (NumPy, torch, faiss) they import in `run`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec

if TYPE_CHECKING:
    import numpy as np

    from evalsuite.charts import Headline, Named, Section, Table
    from evalsuite.intervals import Estimate
    from evalsuite.result import Result
    from featcache.rows import Rows, Store

    Samples = Mapping[str, np.ndarray]
else:  # NumPy: too slow for an annotation
    Estimate = Headline = Named = Result = Rows = Samples = Section = Store = Table = Any

__all__ = [
    "Estimate",
    "Evaluator",
    "Flag",
    "Headline",
    "Named",
    "OfStores",
    "Result",
    "Samples",
    "Section",
    "Store",
    "Table",
]

Given = ParamSpec("Given")


class Evaluator:
    """What every evaluator is: a frozen dataclass of stores and options, checked when it is made, and `run`.

    Fields made by `store` and `named_stores` are its inputs; every other field is an option. Each is a flag of the
    command, a plain
    field (`k: int = 10`) too; `option` gives it a help text and more, `python_only` none. A field `progress`, a function
    of (done, of how many[, of what]), is the command's bar. `__post_init__` refuses with a `ValueError`, whose words are
    those of the command line, what no stores could suit.
    """

    summary: ClassVar[str] = ""
    """What it does, in a line: the command's help."""

    examples: ClassVar[tuple[str, ...]] = ()
    """Command lines, as a user types them."""

    order: ClassVar[int] = 100
    """Where it stands among the others in help and reports: lower ones first."""

    doing: ClassVar[str] = "measuring"
    """What the command says meanwhile, where there is no `progress`."""

    unit: ClassVar[str] = "steps"
    """What `progress` counts."""

    per_sample: ClassVar[bool] = True
    """Whether results hold what was measured of each sample (`Result.samples`), so that two can be compared."""

    several: ClassVar[bool] = False
    """Whether a result is about several encoders together: the report draws it under its file's name."""

    drawing: ClassVar[str] = ""
    """A module with functions `headlines` and `charts`, which takes long to import."""

    one_encoder: ClassVar[bool] = False
    """Whether all of its stores must be of one encoder."""

    outcomes: ClassVar[tuple[str, ...]] = ()
    """Parameters of results that came of the measurement, or show in its metrics' names: two may differ in them."""

    def run(self) -> Result:
        """Measure. `Result.command` is the evaluator's name. Raises `ValueError` for stores that do not suit."""
        raise NotImplementedError

    def look(self) -> dict[str, Rows]:
        """The rows that it would read, by input, opened and held against each other as far as that needs no pass over them.
        Raises `ValueError` as `run` would there."""
        from featcache.rows import Rows

        found: dict[str, Rows] = {}
        for name in inputs(type(self)):
            given = getattr(self, name)
            if isinstance(given, Mapping):
                found |= {f"{name} {key}": Rows.of(each) for key, each in given.items()}
            elif given is not None:
                found[name] = Rows.of(given)
        first, *others = found.values()
        for other in others if self.one_encoder else ():
            first.require_same_encoder(other, getattr(self, "any_precision", False))
        return found

    @staticmethod
    def step(done: int, of: int) -> str:
        """What comes next, in words, beside the bar."""
        return ""

    @staticmethod
    def below_help() -> str:
        """What the command's help ends with."""
        return ""

    @classmethod
    def table(cls, result: Result) -> Table:
        """What the command prints of a result."""
        from evalsuite.table import metric_table

        return metric_table(result)

    @classmethod
    def headlines(cls, results: Sequence[Named]) -> list[Headline]:
        """The columns of the report's summary, of all results of this evaluator, by encoder. By default those of `drawing`."""
        return import_module(cls.drawing).headlines(results) if cls.drawing else []

    @classmethod
    def charts(cls, results: Sequence[Named]) -> list[Section]:
        """The report's sections about these results. By default those of `drawing`; the page has every metric in a table, too."""
        return import_module(cls.drawing).charts(results) if cls.drawing else []

    @classmethod
    def compared(cls, a: Samples, b: Samples) -> dict[str, tuple[Estimate, Estimate]]:
        """By metric A's and B's, measured again on their samples (`Result.samples`), which are of the same images in the same
        order: here of every array of shares, one a sample. What is not among them is not compared."""
        from evalsuite.intervals import share

        both = [name for name in a if name in b and name.partition("/")[0] not in ("sample_id", "content")]
        numbers = [name for name in both if a[name].ndim == b[name].ndim == 1 and a[name].dtype.kind in "bfiu"]
        return {
            name: (share(a[name]), share(b[name]))
            for name in numbers
            if all(((each[name] >= 0) & (each[name] <= 1)).all() for each in (a, b))
        }

    @classmethod
    def settings(cls, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Of a result's parameters those in which two are expected not to differ; with the arguments of each detector."""
        left_out = (*cls.outcomes, "seed", "resamples", "chance", "identical_by", "detectors")
        found = {name: value for name, value in parameters.items() if name not in left_out}
        if found.get("head") is not None:
            found["head"] = "given"  # each encoder has its own
        for spec, arguments in parameters.get("detectors", {}).items():
            found |= {f"{spec} {name}": "a file" if "/" in str(of) else of for name, of in arguments.items()}
        return found

    @staticmethod
    def lower_is_better(metric: str) -> bool:
        """Whether the lower value of this metric, named as in the result, is the better one."""
        from evalsuite.metrics import lower_is_better

        return lower_is_better(metric)


@dataclass(frozen=True)
class Flag:
    """How a field is given in the command line, where that does not follow from its type.

    `kind` is `store`, `stores` (`NAME=STORE`, repeated), `listed` (the same without a flag, the name by default the file's) or
    `option`. `names` replace `--field-name`; `least` is the least
    number, `shown` what help says of a default None; `read` makes the value of the text that is given, and raises
    `ValueError` with what to give instead; `file` says that it is a file, `read` or `written`.
    """

    help: str = ""
    kind: str = "option"
    names: tuple[str, ...] = ()
    metavar: str | None = None
    least: int | None = None
    choices: tuple[str, ...] = ()
    shown: str | None = None
    hidden: bool = False
    read: Callable[[str], Any] | None = None
    file: str | None = None


def store(help: str, default: Any = MISSING, **given: Any) -> Any:
    """A field for a store: open, a path, or rows."""
    return field(default=default, metadata={"flag": Flag(help, "store", metavar="STORE", **given)})


def named_stores(help: str, **given: Any) -> Any:
    """A field for any number of stores by name; None for none."""
    return field(default=None, metadata={"flag": Flag(help, "stores", metavar="NAME=STORE", **given)})


def listed_stores(help: str) -> Any:
    """A field for stores by name, which are the command's arguments: `NAME=STORE`, or `STORE`, called as its file is."""
    return field(metadata={"flag": Flag(help, "listed", metavar="[NAME=]STORE…")})


def option(default: Any = MISSING, help: str = "", **given: Any) -> Any:
    """A field with a flag that `Flag` describes."""
    return field(default=default, metadata={"flag": Flag(help, **given)})


def numbers(text: str, kind: type[int] | type[float] = float) -> list[Any]:
    """The numbers of a comma list. Raises `ValueError`, with what to give, for other text."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"give {'whole ' if kind is int else ''}numbers, separated by commas") from None


def python_only(default: Any) -> Any:
    """A field without a flag."""
    return field(default=default, metadata={"flag": None})


@dataclass(frozen=True, kw_only=True)
class OfStores(Evaluator):
    """The options of every evaluator that compares images of several stores."""

    drop_identical: bool = option(
        False,
        "Leave out images that the other side has too (by their hashes; where a store has none, by the very same embedding).",
    )
    any_precision: bool = option(
        False, "Compare stores in whatever precision they were made and kept; the result says so."
    )
    resamples: int = python_only(1000)  # no effect: intervals are no longer drawn at random
    seed: int = option(0, "Of what is drawn at random.", least=0)

    def comparing(self, identical_by: Any) -> dict[str, Any]:
        """What `parameters` of a result say of that; `identical_by` is by what rows were found to be of the same image."""
        both = {"drop_identical": self.drop_identical, "any_precision": self.any_precision}
        return {**both, "identical_by": identical_by}


def flags(evaluator: type[Evaluator]) -> dict[str, Flag]:
    """The fields that are flags, in the order of the class, what it shares with others last."""
    found = {each.name: each.metadata.get("flag", Flag()) for each in fields(evaluator)}  # type: ignore[arg-type]
    given = {name: flag for name, flag in found.items() if flag is not None and name != "progress"}
    own = list(evaluator.__annotations__)
    return dict(sorted(given.items(), key=lambda each: own.index(each[0]) if each[0] in own else len(own)))


def inputs(evaluator: type[Evaluator]) -> list[str]:
    """The fields that are stores."""
    return [name for name, flag in flags(evaluator).items() if flag.kind != "option"]


def function(evaluator: Callable[Given, Evaluator]) -> Callable[Given, Result]:
    """The evaluator as a function: of the same arguments, its result."""

    def run(*args: Given.args, **options: Given.kwargs) -> Result:
        return evaluator(*args, **options).run()

    run.__name__ = run.__qualname__ = evaluator.__module__.rpartition(".")[2]
    run.__module__, run.__doc__ = evaluator.__module__, evaluator.__doc__
    run.__signature__ = inspect.signature(evaluator).replace(return_annotation="Result")  # type: ignore[attr-defined]
    return run


def names() -> list[str]:
    """The registered evaluators, sorted."""
    from featcache.plugins import plugin_names

    return plugin_names(__name__)


def in_order(names: Iterable[str]) -> list[str]:
    """These evaluators as help and reports have them."""
    return sorted(names, key=lambda name: (load(name).order, name))


def load(name: str) -> type[Evaluator]:
    """The evaluator registered as `name`. Raises `ValueError` when there is none; the message suggests near names."""
    from featcache.plugins import load_plugin, only_class

    return only_class(load_plugin(__name__, name), Evaluator)

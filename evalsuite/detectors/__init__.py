"""OOD detectors: one file each, registered under the file's name.

A file defines exactly one public class, a `Detector`. Other people's packages add detectors through the entry-point group
`evalsuite.detectors`, each entry naming such a module.

A detector is chosen by a *spec*: its name, then optionally `:` and the constructor's arguments, `knn` or
`knn:k=1`. The spec, without spaces, is also the first part of the detector's metric names. A name's `++` stands
for `_pp`, as no module can have a plus in its name: `mahalanobis++` is `mahalanobis_pp`.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, dataclass_transform

import numpy as np

from featcache.rows import Rows
from featcache.specs import value_in

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
_OPTIONAL = {"int | None": int, "str | None": str}  # of arguments that may be left to a rule


@dataclass_transform()
class Detector:
    """What every detector does. A subclass is made a dataclass, whose fields are its arguments (`k: int = 50`); what `fit`
    learns is kept in attributes that end in `_`. Making one computes nothing.
    """

    def __init_subclass__(cls) -> None:
        dataclass(eq=False)(cls)

    needs: ClassVar[tuple[str, ...]] = ("embedding",)
    """The store's fields that `score` takes, in its order."""

    score: Callable[..., np.ndarray]
    """Of the fields' rows (n, d) one finite score for each row, (n,): **higher = more OOD**, whatever other rows are scored
    beside it."""

    def check(self) -> None:
        """Raises `ValueError` for arguments that suit no bank, with their unit (in percent, a share, of cosines); called
        before anything is computed."""

    def fit(self, bank: Rows) -> Detector:
        """Learn from the ID training rows; returns self. By default there is nothing to learn.

        Raises `ValueError` when the arguments do not suit this bank.
        """
        self.check()
        return self


def names() -> list[str]:
    """The registered detectors, sorted."""
    from featcache.plugins import plugin_names  # `import featcache` brings torch, too slow for the top

    return plugin_names(__name__)


def load(name: str) -> type[Detector]:
    """The detector class registered as `name`.

    Raises `ValueError` when there is none; the message suggests near names.
    """
    from featcache.plugins import load_plugin, only_class

    return only_class(load_plugin(__name__, name), Detector)


def build(spec: str, **defaults: Any) -> Detector:
    """An unfitted detector from its spec. `defaults` are arguments that the spec may override.

    Raises `ValueError` for an unknown name, an unknown argument, a value of another kind than the argument's or out of
    its range, or a spec that does not read NAME:ARG=VALUE,….
    """
    from featcache.plugins import suggest

    name, arguments = _parse(spec)
    detector = load(name)
    known = inspect.signature(detector).parameters
    given = defaults | arguments
    for argument, value in given.items():
        if argument not in known:
            others = suggest(argument, known) if known else "it takes none"
            raise ValueError(f"detector {name!r} takes no argument {argument!r}; {others}")
        kind = _OPTIONAL.get(str(known[argument].annotation), type(known[argument].default))
        if isinstance(value, np.integer):
            value = given[argument] = int(value)
        if kind is float and type(value) is int:
            value = given[argument] = float(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"detector {name}: {argument} must be a finite number, got {value}")
        if kind in _KINDS and not (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
            raise ValueError(f"detector {name}: {argument} must be {_KINDS[kind]}, got {value!r}")
    built = detector(**given)
    built.check()
    return built


def arguments_of(spec: str) -> list[str]:
    """The names of the arguments that the spec's detector takes."""
    return _arguments(load(_parse(spec)[0]))


def parameters(detector: Detector) -> dict[str, Any]:
    """The constructor's arguments and the values this detector has for them."""
    return {argument: getattr(detector, argument) for argument in _arguments(type(detector))}


def choices(
    built: Mapping[str, Detector], failed: Mapping[str, str], head: str | os.PathLike[str] | None
) -> dict[str, Any]:
    """What `parameters` of a result say of the detectors that were asked for: each one's arguments, why some failed, and
    which classifier they had."""
    arguments = {spec: parameters(detector) for spec, detector in built.items()}
    return {"detectors": arguments, "failed_detectors": failed, "head": None if head is None else os.fspath(head)}


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    name, colon, tail = spec.partition(":")
    name = name.replace("++", "_pp")
    arguments: dict[str, Any] = {}
    for part in tail.split(",") if colon else []:
        argument, equals, text = part.partition("=")
        if not (argument and equals and text) or "/" in text or argument in arguments:
            raise ValueError(f"cannot read the detector spec {spec!r}; write NAME or NAME:ARG=VALUE,ARG=VALUE")
        arguments[argument] = value_in(text)
    return name, arguments


def _arguments(detector: type) -> list[str]:
    return list(inspect.signature(detector).parameters)

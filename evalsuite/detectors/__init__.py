"""OOD detectors: one file each, registered under the file's name.

A file defines exactly one public class. Other people's packages add detectors through the entry-point group
`evalsuite.detectors`, each entry naming such a module.

A detector is chosen by a *spec*: its name, then optionally `:` and the constructor's arguments, `knn` or
`knn:k=1`. The spec, without spaces, is also the first part of the detector's metric names. A name's `++` stands
for `_pp`, as no module can have a plus in its name: `mahalanobis++` is `mahalanobis_pp`.
"""

from __future__ import annotations

import inspect
import math
import tomllib
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from featcache.rows import Rows

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
_OPTIONAL = {"int | None": int, "str | None": str}  # of arguments that may be left to a rule
_BOOLEANS = {"True": "true", "False": "false"}


@runtime_checkable
class Detector(Protocol):
    """What every detector does. The constructor stores its arguments under their own names and does nothing
    else; what `fit` learns is kept in attributes that end in `_`.

    A class attribute `needs` names the store's fields that `score` takes, in its order; without one it takes
    `("embedding",)`. A method `check()`, where there is one, raises `ValueError` for arguments that suit no bank, with
    their unit (in percent, a share, of cosines): `build` calls it, so that nothing is computed for them.
    """

    def fit(self, bank: Rows) -> Detector:
        """Learn from the ID training rows; returns self.

        Raises `ValueError` when the parameters do not suit this bank.
        """
        ...

    def score(self, *fields: Float[np.ndarray, "n _"]) -> Float[np.ndarray, " n"]:
        """One finite score for each row, **higher = more OOD**, whatever other rows are scored beside it."""
        ...


def needs(detector: Detector | type[Detector]) -> tuple[str, ...]:
    """The fields of a store that the detector's `score` takes, in its order."""
    return getattr(detector, "needs", ("embedding",))


def names() -> list[str]:
    """The registered detectors, sorted."""
    from featcache.plugins import plugin_names  # `import featcache` brings torch, too slow for the top

    return plugin_names(__name__)


def load(name: str) -> type[Detector]:
    """The detector class registered as `name`.

    Raises `ValueError` when there is none; the message suggests near names.
    """
    from featcache.plugins import load_plugin

    return _only_class(load_plugin(__name__, name))


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
    if hasattr(built, "check"):
        built.check()
    return built


def arguments_of(spec: str) -> list[str]:
    """The names of the arguments that the spec's detector takes."""
    return _arguments(load(_parse(spec)[0]))


def parameters(detector: Detector) -> dict[str, Any]:
    """The constructor's arguments and the values this detector has for them."""
    return {argument: getattr(detector, argument) for argument in _arguments(type(detector))}


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    name, colon, tail = spec.partition(":")
    name = name.replace("++", "_pp")
    arguments: dict[str, Any] = {}
    for part in tail.split(",") if colon else []:
        argument, equals, text = part.partition("=")
        if not (argument and equals and text) or "/" in text or argument in arguments:
            raise ValueError(f"cannot read the detector spec {spec!r}; write NAME or NAME:ARG=VALUE,ARG=VALUE")
        try:
            arguments[argument] = tomllib.loads(f"value = {_BOOLEANS.get(text, text)}")["value"]
        except tomllib.TOMLDecodeError:  # a bare word
            arguments[argument] = text
    return name, arguments


def _arguments(detector: type) -> list[str]:
    return list(inspect.signature(detector).parameters)


def _only_class(module: ModuleType) -> Any:
    classes = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    assert len(classes) == 1, f"{module.__name__} must define one public class, it defines {len(classes)}"
    return classes[0]

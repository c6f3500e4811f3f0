"""Derivations: what is computed from stores alone, kept as a store. An ensemble of checkpoints, several teachers side by side.

One file each, named by the file; other packages join through the entry-point group `featcache.derivations`, each entry
naming such a module. A file defines exactly one public class, a `Derivation`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from jaxtyping import Bool, Float, Int64

from featcache.plugins import load_plugin, only_class, suggest
from featcache.rows import Rows
from featcache.specs import naming


@dataclass(kw_only=True)
class Derivation(ABC):
    """One way to compute features from those of the same samples in one or several stores.

    A subclass is a keyword-only dataclass whose fields are its options, each a bool, a whole number, a number, a text or
    a tuple of these, with a default; `field(metadata={"help": …})` says what one is. `made` checks their kinds; what else
    does not suit, `__post_init__` refuses with a ValueError.

    Attributes:
        inputs: the same samples in each store, in one order: row i of one is row i of every other. Set by `open`.
    """

    inputs: Sequence[Rows] = field(init=False, repr=False, compare=False)

    def open(self, inputs: Sequence[Rows]) -> None:
        """Take what is to be derived from; overridden, to refuse what does not suit the options.

        Raises:
            ValueError: it does not.
        """
        self.inputs = list(inputs)

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, Sequence[int]]:
        """Shape of one view's feature, by field; `embedding`, which is a vector, among them."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Of the fields of whole numbers, which `rows` gives as such; the others are kept in what is asked for."""
        return {}

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the columns of its `logits`, where it gives some and knows them."""
        return None

    @abstractmethod
    def rows(self, index: Int64[np.ndarray, " b"], view: int) -> dict[str, Float[np.ndarray, "b ..."]]:
        """Every field of these rows of `inputs` (all have features there) in this view, (b, *shape): a pure function of
        them, each row by itself, in float32."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Of the store's labels, the first store's unless overridden."""
        return self.inputs[0].class_names

    def labels(self, given: Int64[np.ndarray, " n"], ok: Bool[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Of every row of `inputs`, −1 for none: those of the first store, which are `given`, unless overridden. `ok` are the rows
        that have features. Labels are the samples', not a field: the manifest's digest of its rows takes them in, so that
        they are asked for at once, before any unit is computed."""
        return given

    @property
    def said(self) -> Sequence[str]:
        """What to know of the store, in lines that the manifest keeps and the command prints; after `open` and `labels`."""
        return ()

    @property
    def options(self) -> dict[str, Any]:
        """By name, as JSON has them."""
        given = {name: getattr(self, name) for name in options_of(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @property
    def record(self) -> dict[str, Any]:
        """The options as the manifest keeps them, after `open`: by what decides the result, a file's content rather than its
        name."""
        return self.options


def load_derivation(name: str) -> type[Derivation]:
    """The class registered under `name`.

    Raises:
        ValueError: there is none; the message has near names.
    """
    return only_class(load_plugin("featcache.derivations", name), Derivation)  # type: ignore[type-abstract]


def made(name: str, options: Mapping[str, Any]) -> Derivation:
    """The derivation of that name with these options.

    Raises:
        ValueError: there is none, or it has no such option, or an option is of another kind.
    """
    cls = load_derivation(name)
    known = options_of(cls)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; {suggest(option, known)}")
    with naming(name):
        return cls(**{option: _checked(option, value, known[option]) for option, value in options.items()})


def options_of(cls: type[Derivation]) -> dict[str, Any]:
    """The kinds of a derivation's options, by name."""
    kinds = get_type_hints(cls)
    return {each.name: kinds[each.name] for each in fields(cls) if each.init}


def from_text(text: str, kind: Any) -> Any:
    """An option as a command line gives it; lists are separated by commas. What is no such value stays text, and is refused
    where the derivation is made."""
    if get_origin(kind) is tuple:
        return tuple(
            from_text(each.strip(), get_args(kind)[0]) for each in text.strip("[] ").split(",") if each.strip()
        )
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _checked(name: str, value: Any, kind: Any) -> Any:
    """Raises ValueError where the value is of another kind; whole numbers are numbers too, lists tuples."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} is {value!r}; give a list")
        return tuple(_checked(name, each, get_args(kind)[0]) for each in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise ValueError(f"{name} is {value!r}; give {words[kind]}")
    return value

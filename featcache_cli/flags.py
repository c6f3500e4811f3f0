"""The flags of a command, from the fields of what it runs: of an evaluator, a derivation, a method."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import StrEnum
from functools import partial
from pathlib import PurePath
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from evalsuite.evaluators import Evaluator, Flag, flags, numbers
from featcache_cli.screen import DeviceOption, TrustCode, Workers, writable

_COMMON = {"device": DeviceOption, "workers": Workers, "trust_code": TrustCode}
"""Fields that are the same flag in every program."""


def parameter(name: str, kind: Any, option: Any, default: Any = None) -> inspect.Parameter:
    """A parameter for Typer."""
    annotation = kind if option is None else Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def plugin_option(
    name: str, owner: str, help: str, shown: str, metavar: str = "VALUE", **given: Any
) -> inspect.Parameter:
    """A flag for an option of a plugin, `owner` in words; what is given stays text, the plugin's own code reads it."""
    spelled = spelling(name, Flag())
    panel = f"Options of {owner}"
    option = typer.Option(
        spelled, metavar=metavar, help=help, rich_help_panel=panel, show_default=shown or False, **given
    )
    return parameter(name, str | None, option)


def takes(function: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """The function, whose parameters Typer takes to be these."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in parameters}
    return function


def parameters(evaluator: type[Evaluator]) -> list[inspect.Parameter]:
    """A parameter for Typer for each of the evaluator's flags, in order."""
    hints, of = get_type_hints(evaluator), {each.name: each for each in fields(evaluator)}  # type: ignore[arg-type]
    found = []
    for name, flag in flags(evaluator).items():
        default, kind = of[name].default, _kind(flag, hints[name])
        if default is MISSING:
            default = inspect.Parameter.empty
        elif not isinstance(default, str | int | float):
            default, kind = None, kind | None
        shared = _COMMON.get(name)
        found.append(parameter(name, shared or kind, None if shared else _option(name, flag), default))
    return found


def values(evaluator: type[Evaluator], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the evaluator is made of, from what Typer read; what was left out stays out. Raises `ValueError` for text that
    cannot be read."""
    hints, found = get_type_hints(evaluator), {}
    for name, flag in flags(evaluator).items():
        value, read = given[name], _reader(flag, hints[name])
        if value is None or value == []:
            continue
        if read is not None:
            try:
                value = read(value)
            except ValueError as error:
                raise ValueError(f"{spelling(name, flag)} {value or repr(value)}: {error}") from None
        found[name] = value.value if isinstance(value, StrEnum) else value
    return found


def spelling(name: str, flag: Flag) -> str:
    return flag.names[0] if flag.names else f"--{name.replace('_', '-')}"


def _option(name: str, flag: Flag) -> Any:
    if flag.kind == "listed":
        return typer.Argument(help=flag.help, metavar=flag.metavar)
    shown: dict[str, Any] = {} if flag.shown is None else {"show_default": flag.shown}
    return typer.Option(
        *(flag.names or (spelling(name, flag),)),
        help=flag.help,
        metavar=flag.metavar,
        min=flag.least,
        hidden=flag.hidden,
        callback=writable if flag.file == "written" else None,
        **shown,
    )


def _kind(flag: Flag, hint: Any) -> Any:
    """What Typer reads: text, where `_reader` makes the value of it."""
    if flag.choices:
        return StrEnum("Choice", {each: each for each in flag.choices})
    single, repeated = _types(hint)
    if flag.kind in ("stores", "listed") or (str in repeated and flag.read is None):
        return list[str]
    if flag.read is not None or repeated:
        return str
    return next((kind for kind in (bool, int, float) if kind in single), str)


def _reader(flag: Flag, hint: Any) -> Callable[[Any], Any] | None:
    """What makes the value of what is given: numbers of a comma list, a mapping of `NAME=STORE`."""
    if flag.read is not None or flag.kind != "option":
        return {"stores": _named, "listed": _listed}.get(flag.kind, flag.read)
    repeated = _types(hint)[1]
    return next((partial(numbers, kind=kind) for kind in (float, int) if kind in repeated), None)


def _types(hint: Any) -> tuple[list[Any], list[Any]]:
    """The alternatives of a type, and those of the elements of sequences among them."""

    def alternatives(hint: Any) -> list[Any]:
        return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]

    of = [each for each in alternatives(hint) if get_origin(each) is Sequence]
    return alternatives(hint), [kind for each in of for kind in alternatives(get_args(each)[0])]


def _named(given: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not (name and equals and path) or name in named:
            raise ValueError("give NAME=STORE, each NAME once")
        named[name] = path
    return named


def named(flag: str, given: list[str]) -> dict[str, str]:
    """`NAME=STORE` of a flag that is repeated, by name."""
    try:
        return _named(given)
    except ValueError as error:
        raise ValueError(f"{flag} {given}: {error}") from None


def _listed(given: list[str]) -> dict[str, str]:
    """`NAME=STORE` as they are, others named by their files."""
    named = [item if "=" in item else f"{PurePath(item).name.removesuffix('.zarr')}={item}" for item in given]
    try:
        return _named(named)
    except ValueError:
        raise ValueError("give each store a name of its own, NAME=STORE") from None

"""Plugins are files: the name of a module inside a plugin package is the name it is registered under.

Other people's packages join through an entry-point group named like the plugin package, for example
`[project.entry-points."featcache.models"]`. Nothing is imported until it is asked for by name, not even the package.
"""

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def plugin_names(package: str) -> list[str]:
    """Sorted names registered under `package` ("featcache.models"): its own files and entry points."""
    return sorted(_own(package) | {entry.name for entry in entry_points(group=package)})


def _own(package: str) -> set[str]:
    """The package's own files, without importing it: what it needs may take long, and help only names plugins."""
    if package in sys.modules:
        folders = list(sys.modules[package].__path__)
    else:
        top, *inside = package.split(".")
        spec = importlib.util.find_spec(top)
        assert spec is not None
        folders = [os.path.join(folder, *inside) for folder in spec.submodule_search_locations or ()]
    return {module.name for module in pkgutil.iter_modules(folders) if module.name[0] != "_"}


def load_plugin(package: str, name: str) -> ModuleType:
    """Import the plugin called `name`; of two, the package's own.

    Raises:
        ValueError: no plugin has that name; the message suggests near names, or has all.
    """
    if name in _own(package):  # most are, and the entry points of every installed distribution take a while to read
        return importlib.import_module(f"{package}.{name}")
    for entry in entry_points(group=package):
        if entry.name == name:
            return entry.load()
    known = plugin_names(package)
    named = {"corpora": "corpus", "models": "encoder", "interchange": "format"}
    kind = named.get(package.rpartition(".")[2], package.rpartition(".")[2].removesuffix("s"))
    raise ValueError(f"unknown {kind} {name!r}; {suggest(name, known, len(known))}")


def suggest(word: str, known: Iterable[str], most: int = 12) -> str:
    """The tail of an error message: the nearest known names, or when none is near the first `most`."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=4, cutoff=0.5)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"known: {', '.join(known[:most])}{', …' if len(known) > most else ''}"


def only_class(module: ModuleType, kind: type[T]) -> type[T]:
    """The one public class of `kind` that a plugin's file defines.

    Raises:
        ValueError: it defines none, or several.
    """
    found = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
        if issubclass(value, kind)
    ]
    if len(found) != 1:
        named = ", ".join(each.__name__ for each in found) or "none"
        raise ValueError(f"{module.__name__}: must define one public {kind.__name__}, it defines {named}")
    return found[0]

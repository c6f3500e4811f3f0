"""Teacher space → student space, one file each: estimators fitted from a store, then frozen.

A file defines exactly one public class, a `Mapping`, and is registered under its own name. Other people's packages
add mappings through the entry-point group `distill.mappings`, each entry naming such a module.
"""

import inspect
from typing import Any

from distill.mappings._mapping import Mapping
from distill.mappings._report import report
from featcache.plugins import load_plugin

__all__ = ["Mapping", "load_mapping", "report"]


def load_mapping(name: str) -> type[Mapping]:
    """The class of `distill/mappings/NAME.py`. Raises ValueError, with near names, when there is none."""
    module = load_plugin("distill.mappings", name)
    classes: list[Any] = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and c.__module__ == module.__name__ and not c.__name__.startswith("_")
    ]
    assert len(classes) == 1, f"{module.__name__} must define exactly one public class, not {len(classes)}"
    return classes[0]

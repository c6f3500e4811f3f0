"""`MODULE:CALLABLE` (or `python:MODULE:CALLABLE`): an encoder that the user's own code makes."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featcache.encoder import Encoder


def load_encoder(rest: str) -> Encoder:
    """Import MODULE, from the working directory too, and call CALLABLE without arguments.

    Raises:
        ValueError: there is no such module or callable, or it returns something else than an `Encoder`.
    """
    encoder = import_callable(rest, "teacher", "a featcache.Encoder")()
    if not isinstance(encoder, Encoder):
        raise ValueError(f"teacher {rest}: returned a {type(encoder).__name__}, not a featcache.Encoder")
    return encoder


def import_callable(spec: str, role: str, returns: str) -> Callable[[], Any]:
    """CALLABLE of `MODULE:CALLABLE`; MODULE may lie in the working directory.

    Args:
        role, returns: what it is and what it should return, for the message.

    Raises:
        ValueError: there is no such module or callable.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{role} {spec}: {error}; give MODULE:CALLABLE, importable from here, that returns {returns}"
        ) from None
    finally:
        sys.path.remove(here)

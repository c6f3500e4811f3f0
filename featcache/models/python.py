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
        ValueError: as `import_callable`, or it returns something else than an `Encoder`.
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
        ValueError: there is no such module or callable, or either raises anything; so does what is returned.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        raise ValueError(
            f"{role} {spec}: {type(error).__name__}: {error}; "
            f"give MODULE:CALLABLE, importable from here, that returns {returns}"
        ) from error
    finally:
        sys.path.remove(here)

    def call() -> Any:
        try:
            return function()
        except Exception as error:
            raise ValueError(
                f"{role} {spec}: it raised {type(error).__name__}: {error}; correct it (FEATCACHE_DEBUG=1 shows where)"
            ) from error

    return call

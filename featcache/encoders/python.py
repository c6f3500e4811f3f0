"""`MODULE:CALLABLE` (or `python:MODULE:CALLABLE`): an encoder that the user's own code makes."""

import importlib
import sys
from pathlib import Path

from featcache.encoder import Encoder


def load_encoder(rest: str) -> Encoder:
    """Import MODULE, from the working directory too, and call CALLABLE without arguments.

    Raises:
        ValueError: there is no such module or callable, or it returns something else than an `Encoder`.
    """
    module_name, _, name = rest.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"teacher {rest}: {error}; give MODULE:CALLABLE, importable from here, that returns a featcache.Encoder"
        ) from None
    finally:
        sys.path.remove(here)
    encoder = make()
    if not isinstance(encoder, Encoder):
        raise ValueError(f"teacher {rest}: returned a {type(encoder).__name__}, not a featcache.Encoder")
    return encoder

"""featcache, stage one: see every image once, keep what the teacher saw.

The names below are imported when they are first used, so that `import featcache` costs nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.arrays import write_store
    from featcache.check import check
    from featcache.corpus import Corpus, open_corpus
    from featcache.encoder import Encoder, load_encoder
    from featcache.extract import extract, extract_all
    from featcache.interchange import export_store, import_store
    from featcache.pixels import KeptPixels
    from featcache.preprocess import Preprocess
    from featcache.store import FeatureStore, open_store
    from featcache.views import Views

__all__ = [
    "Corpus",
    "Encoder",
    "FeatureStore",
    "KeptPixels",
    "Preprocess",
    "Views",
    "check",
    "export_store",
    "extract",
    "extract_all",
    "import_store",
    "load_encoder",
    "open_corpus",
    "open_store",
    "write_store",
]

_MODULE_OF = {
    "Corpus": "corpus",
    "Encoder": "encoder",
    "FeatureStore": "store",
    "KeptPixels": "pixels",
    "Preprocess": "preprocess",
    "Views": "views",
    "check": "check",
    "export_store": "interchange",
    "extract": "extract",
    "extract_all": "extract",
    "import_store": "interchange",
    "load_encoder": "encoder",
    "open_corpus": "corpus",
    "open_store": "store",
    "write_store": "arrays",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `featcache.extract` the function: on importing the module of that name, Python would bind it here instead."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

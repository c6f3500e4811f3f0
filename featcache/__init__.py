"""featcache, stage one: see every image once, keep what the teacher saw.

The names below are imported when they are first used, so that `import featcache` costs nothing.
"""

from typing import TYPE_CHECKING

from featcache.lazy import lazy_names

if TYPE_CHECKING:
    from featcache.corpora import Corpus, open_corpus
    from featcache.derivations._store import derive
    from featcache.encoder import Encoder, load_encoder
    from featcache.extraction.extract import extract, extract_all, preview
    from featcache.inputs import Views
    from featcache.inputs.images import KeptPixels, Preprocess
    from featcache.interchange import export_store, import_store, push_store
    from featcache.models import Field
    from featcache.store import FeatureStore, open_store
    from featcache.store.check import check
    from featcache.store.from_arrays import write_store

__all__ = [
    "Corpus",
    "Encoder",
    "FeatureStore",
    "Field",
    "KeptPixels",
    "Preprocess",
    "Views",
    "check",
    "derive",
    "export_store",
    "extract",
    "extract_all",
    "import_store",
    "load_encoder",
    "open_corpus",
    "open_store",
    "preview",
    "push_store",
    "write_store",
]

_MODULE_OF = {
    "Corpus": "corpora",
    "Encoder": "encoder",
    "FeatureStore": "store",
    "Field": "models",
    "KeptPixels": "inputs.images",
    "Preprocess": "inputs.images",
    "Views": "inputs",
    "check": "store.check",
    "derive": "derivations._store",
    "export_store": "interchange",
    "extract": "extraction.extract",
    "extract_all": "extraction.extract",
    "import_store": "interchange",
    "load_encoder": "encoder",
    "open_corpus": "corpora",
    "open_store": "store",
    "preview": "extraction.extract",
    "push_store": "interchange",
    "write_store": "store.from_arrays",
}

__getattr__, __dir__ = lazy_names(globals(), _MODULE_OF)

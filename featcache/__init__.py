"""featcache, stage one: see every image once, keep what the teacher saw."""

from featcache.corpus import Corpus, open_corpus
from featcache.encoder import Encoder, load_encoder
from featcache.extract import extract
from featcache.interchange import export_store, import_store
from featcache.preprocess import Preprocess
from featcache.store import FeatureStore, open_store, write_store
from featcache.views import Views

__all__ = [
    "Corpus",
    "Encoder",
    "FeatureStore",
    "Preprocess",
    "Views",
    "export_store",
    "extract",
    "import_store",
    "load_encoder",
    "open_corpus",
    "open_store",
    "write_store",
]

"""Stores of arrays whose rows have hashes of images, as extraction gives them."""

from collections.abc import Iterable

import numpy as np

from featcache.extraction.samples import content_hash
from featcache.store import FeatureStore, StoreWriter


def with_images(store: FeatureStore, images: Iterable[object]) -> FeatureStore:
    """The sealed store, sealed again with the hash of `images`, a name or the encoded file for each row; None is no image at all."""
    encoded = [each if each is None or isinstance(each, bytes) else str(each).encode() for each in images]
    hashes = [bytes(16) if each is None else content_hash(each) for each in encoded]
    content = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16)
    assert len(content) == len(store)
    store = StoreWriter(store.path)
    store.manifest = store.manifest.changed(sealed=None)
    for unit in map(store.rows_of, range(store.chunks)):
        store.write_rows("content", unit.start, content[unit.start : unit.stop])
    store.seal()
    return FeatureStore(store.path)

"""The images that a store's rows were made of, for formats that show them."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featcache.corpora import Corpus, open_corpus
from featcache.corpora.store import KeptImages
from featcache.extraction.samples import content_hash
from featcache.inputs.images import decode
from featcache.store import FeatureStore

NONE = "none"
"""Given for a corpus: show no images."""
_SHOWN = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}
"""What browsers show and is small, by Pillow's name."""


class Pictures:
    """Images of the rows of a store that have features: those that it keeps, or those of a corpus with the same ids.

    Args:
        images: a corpus or its spec; None for what the store keeps, else the corpus that it says it was made of.

    Raises:
        ValueError: none is known or can be opened, or it lacks samples; on reading, an image is not the one that was extracted.
    """

    def __init__(self, store: FeatureStore, images: str | Corpus | None):
        self._store, self._ids, self._content = store, store.sample_ids.tolist(), store.content
        self._corpus = images if isinstance(images, Corpus) else _opened(store, images)
        self._place = {sample_id: place for place, sample_id in enumerate(self._corpus.ids)}
        missing = [self._ids[row] for row in store.ok.tolist() if self._ids[row] not in self._place]
        if missing:
            raise ValueError(
                f"{self._corpus.spec}: {len(missing):,} of {len(store.ok):,} samples of {store.path} are not in it "
                f"({missing[0]!r}, say); give the corpus that was extracted as --images, or --images {NONE}"
            )

    def read(self, row: int) -> bytes:
        """The encoded image of a row."""
        place = self._place[self._ids[row]]
        try:
            encoded = self._corpus.read(place)
        except Exception as error:  # whatever a corpus or a service raises of one image
            raise ValueError(f"{self._named(row)} cannot be read ({error}); {self._remedy}") from None
        content = self._corpus.content(place) if isinstance(self._corpus, KeptImages) else content_hash(encoded)
        if self._content[row].any() and content != self._content[row].tobytes():  # stores of arrays know no hashes
            raise ValueError(f"{self._named(row)} is not the image that was extracted; {self._remedy}")
        return encoded

    def shown(self, row: int) -> tuple[bytes, str]:
        """An image file that browsers show, as it is where they do, and what its name is to end with."""
        encoded = self.read(row)
        with Image.open(io.BytesIO(encoded)) as image:
            ending = _SHOWN.get(image.format or "")
        if ending:
            return encoded, ending
        return _written(decode(encoded), "PNG"), ".png"

    def thumbnail(self, row: int, side: int) -> bytes:
        """A JPEG of the whole upright image, no side longer than `side` px, never enlarged."""
        image = decode(self.read(row))
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return _written(image, "JPEG", quality=90)

    def file(self, row: int) -> Path | None:
        """Where the image lies as a file of its own; None where it does not, or not here."""
        path = os.path.abspath(os.path.join(self._corpus.spec, self._ids[row]))
        return Path(path) if os.path.isdir(self._corpus.spec) and os.path.isfile(path) else None

    def _named(self, row: int) -> str:
        return f"{self._corpus.spec}: {self._ids[row]}"

    @property
    def _remedy(self) -> str:
        return f"give the images that {self._store.path} was made of as --images"


def _written(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The pixels alone: neither where a photograph was taken, nor a profile of colours that are no longer these."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, kind, **options)
    return file.getvalue()


def _opened(store: FeatureStore, spec: str | None) -> Corpus:
    if spec is not None:
        return open_corpus(spec)
    if store.manifest.pixels:
        return KeptImages(store)
    remedy = f"give them as --images CORPUS, or --images {NONE}"
    if not store.manifest.corpus.spec:
        raise ValueError(f"{store.path}: does not say which images it was made of; {remedy}")
    try:
        return open_corpus(store.manifest.corpus.spec)
    except (ValueError, OSError) as error:
        raise ValueError(f"{store.path}: the images that it was made of cannot be opened ({error}); {remedy}") from None

"""`store:PATH`: the images that a store keeps (`featcache extract … --pixels SIZE`), without the corpus they came from."""

from collections.abc import Sequence
from functools import cached_property

from featcache.store import FeatureStore, open_store


class KeptImages:
    """The kept images of a sealed store, row by row: decoded and resized once, whole, never enlarged.

    Raises:
        ValueError: no such store, or it keeps no images.
    """

    def __init__(self, path: str | FeatureStore):
        self._store = path if isinstance(path, FeatureStore) else open_store(path)
        self.spec = f"store:{self._store.path}"
        if not self._store.manifest.pixels:
            raise ValueError(f"{self._store.path}: keeps no images; extract with --pixels SIZE, or give --corpus")
        self.ids: Sequence[str] = [str(sample_id) for sample_id in self._store.sample_ids]
        self.class_names: Sequence[str] | None = self._store.class_names

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        encoded = self._store.pixels(i)
        if not encoded:
            raise ValueError(f"{self.ids[i]}: its image is not kept ({self._reasons.get(self.ids[i], 'unknown')})")
        return encoded

    def label(self, i: int) -> int:
        return int(self._store.labels[i])

    def content(self, i: int) -> bytes:
        """Hash of the image file that this one was made from."""
        return self._store.content[i].tobytes()

    @property
    def size(self) -> int:
        """The most px that a kept image's shorter side has."""
        kept = self._store.manifest.pixels
        assert kept is not None
        return kept.size

    def original_size(self, i: int) -> tuple[int, int]:
        """(width, height) in px of the image before it was resized."""
        width, height = self._store.row("image_size", i).tolist()
        return width, height

    @cached_property
    def _reasons(self) -> dict[str, str]:
        return self._store.reasons


open_corpus = KeptImages

"""scikit-learn's 1,797 real scans of handwritten digits, 8 × 8 px, offline."""

import io

import numpy as np
from PIL import Image

from featcache.corpora import Listed

SPLITS = {"train": slice(0, 1347), "test": slice(1347, None)}
"""The scans stand in order of writing: the last quarter holds other people's hands than the first three."""


class Digits(Listed):
    """`digits:train` (1,347 scans) or `digits:test` (450), as 8-bit grey PNG files; labels 0…9."""

    def __init__(self, split: str):
        if split not in SPLITS:
            raise ValueError(f"digits:{split}: no such split; give digits:train or digits:test")
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError("the digits corpus needs scikit-learn: pip install 'featcache[demo]'") from None
        scans = load_digits()
        self.spec = f"digits:{split}"
        self.class_names = [str(name) for name in scans.target_names]
        self._pixels = (scans.images[SPLITS[split]] * (255 / 16)).round().astype(np.uint8)
        self.labels = scans.target[SPLITS[split]].tolist()
        self.ids = [f"{split}/{i:04d}" for i in range(len(self._pixels))]

    def read(self, i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self._pixels[i]).save(buffer, "png")
        return buffer.getvalue()


open_corpus = Digits


def named_files(rest: str) -> list[str]:
    return []  # they come with scikit-learn, whose version is in the receipt

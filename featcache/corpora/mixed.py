"""`mixed:COUNT:CORPUS`: pictures that show nothing in the world, made of another corpus's images."""

import io
import random
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from featcache.corpora import Corpus, Listed, passed_over
from featcache.corpora import open_corpus as open_any_corpus
from featcache.inputs.images import KeptPixels, decode

SIZE = 256
"""Shorter side, in px, that larger images are reduced to first."""

LONGEST = 1 << 14
"""px; longer images, once reduced, are refused: others take the first one's size, and are computed on as numbers of 64 bits."""

Pixels = UInt8[np.ndarray, "_ _ 3"]
Other = Callable[[], Pixels]


class Mixed(Listed):
    """`count` unlabelled pictures made of `corpus`, lossless PNG files: more to learn a teacher's space from.

    A student that has seen only images of a few kinds follows its teacher badly on all others, and so cannot tell them
    apart. These are others, free of charge. Spec: `mixed:8000:photos/`. Picture i is of kind i mod 4:

    - `blend`: two images, the first with weight 0.3 … 0.7 (mixup, Zhang et al. 2018, arXiv 1710.09412);
    - `join`: an upper or left part, a third to two thirds, of one image and the rest of another (after CutMix,
      Yun et al. 2019, arXiv 1905.04899);
    - `piece`: a square of 8 … 30 % of an image's area;
    - `shuffle`: an image's quarters in another order (after Noroozi & Favaro 2016, arXiv 1603.09246), its colour
      channels exchanged, three times in ten as a negative.

    Which images and how is drawn from i and nothing else. An image is decoded, reduced to a shorter side of at most 256 px
    (whole, never enlarged), and takes the first one's size where two are mixed.

    Raises:
        ValueError: on opening, `count` or the corpus is empty; on reading, an image cannot be read, has a side under 2 px
            or, once reduced, over 16,384.
    """

    class_names: Sequence[str] | None = None

    def __init__(self, corpus: Corpus, count: int):
        if count < 1 or not len(corpus):
            raise ValueError(f"mixed:{count}:{corpus.spec}: give a COUNT of 1 or more, and a corpus that is not empty")
        self.spec = f"mixed:{count}:{corpus.spec}"
        self.ids: Sequence[str] = [f"{i:08d}-{_KINDS[i % len(_KINDS)].__name__.strip('_')}" for i in range(count)]
        self.labels = [-1] * count
        self._corpus, self.passed_over = corpus, passed_over(corpus)
        self._reduced = KeptPixels(size=SIZE, format="raw")

    def read(self, i: int) -> bytes:
        rng = random.Random(f"mixed\0{i}")
        first, second = rng.randrange(len(self._corpus)), rng.randrange(len(self._corpus))
        image = self._image(first)
        other: Other = lambda: self._image(second, image.shape[1::-1])  # noqa: E731
        file = io.BytesIO()
        Image.fromarray(_KINDS[i % len(_KINDS)](image, other, rng)).save(file, "PNG", compress_level=0)
        return file.getvalue()

    def _image(self, row: int, size: Sequence[int] | None = None) -> Pixels:
        try:
            image = decode(self._reduced.encode(decode(self._corpus.read(row))))
        except Exception as error:
            raise ValueError(f"{self._corpus.ids[row]}: {error}") from None
        if min(image.size) < 2:
            raise ValueError(
                f"{self._corpus.ids[row]}: {image.width} × {image.height} px; mixing needs 2 px a side or more"
            )
        if max(image.size) > LONGEST:
            raise ValueError(
                f"{self._corpus.ids[row]}: {image.width} × {image.height} px; mixing takes {LONGEST:,} px a side at most"
            )
        return np.asarray(image.resize((size[0], size[1]), Image.Resampling.BICUBIC) if size else image)


def _blend(image: Pixels, other: Other, rng: random.Random) -> Pixels:
    weight = rng.uniform(0.3, 0.7)
    return (weight * image + (1 - weight) * other()).round().astype(np.uint8)


def _join(image: Pixels, other: Other, rng: random.Random) -> Pixels:
    joined, share = other().copy(), rng.uniform(1 / 3, 2 / 3)
    height, width = round(share * image.shape[0]), round(share * image.shape[1])
    part = np.s_[:height] if rng.random() < 0.5 else np.s_[:, :width]
    joined[part] = image[part]
    return joined


def _piece(image: Pixels, other: Other, rng: random.Random) -> Pixels:
    height, width = image.shape[:2]
    side = min(max(2, round((rng.uniform(0.08, 0.3) * height * width) ** 0.5)), height, width)
    top, left = rng.randint(0, height - side), rng.randint(0, width - side)
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((min(height, width),) * 2, Image.Resampling.BICUBIC))


def _shuffle(image: Pixels, other: Other, rng: random.Random) -> Pixels:
    height, width = image.shape[0] // 2, image.shape[1] // 2
    quarters = [image[y : y + height, x : x + width] for y in (0, height) for x in (0, width)]
    rng.shuffle(quarters)
    shuffled = np.vstack([np.hstack(quarters[:2]), np.hstack(quarters[2:])])[..., rng.sample(range(3), 3)]
    return 255 - shuffled if rng.random() < 0.3 else shuffled


_KINDS = (_blend, _join, _piece, _shuffle)


def open_corpus(rest: str) -> Mixed:
    """Open `COUNT:CORPUS`."""
    count, _, corpus = rest.partition(":")
    if not (count.isdecimal() and corpus):
        raise ValueError(f"mixed:{rest} is not mixed:COUNT:CORPUS (for example mixed:8000:photos/)")
    return Mixed(open_any_corpus(corpus), int(count))

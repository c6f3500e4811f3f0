"""`corrupted:NAME:SEVERITY:CORPUS`: another corpus, every image of it damaged by one of ImageNet-C's corruptions."""

import hashlib
import io
import re
from collections.abc import Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from featcache.corpora import Corpus, passed_over
from featcache.corpora import open_corpus as open_any_corpus
from featcache.inputs.images import KeptPixels, decode
from featcache.plugins import suggest

COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The 15 corruptions that the paper's mean is taken over, in its order."""

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The paper's four more, held back for tuning."""

SIZE = 256
"""Shorter side, in px, that larger images are reduced to by default: at this scale ImageNet-C was made."""

SMALLEST = 32
"""px; the corruptions are not defined on smaller images."""

LONGEST = 1 << 14
"""px; longer images, once reduced, are refused: the corruptions compute on many copies, as numbers of 64 bits."""

_SEEDED = ("impulse_noise", "glass_blur")  # take their seed as an argument


class Corrupted:
    """`corpus` with corruption `name` at `severity` 1 (light) … 5 (heavy): the same ids and labels, lossless PNG files.

    Spec: `corrupted:fog:3:photos/`, or `corrupted:fog:3@size=224:photos/` for another `size`. An image is decoded,
    reduced to a shorter side of at most `size` px (whole, never enlarged), then corrupted at that size: the severities
    are ImageNet-C's, chosen for crops of 224 px, so the smaller the image, the more of it a blur of so many px destroys
    (CIFAR-10-C's own severities are milder). What is random is drawn from (sample id, name, severity) and nothing else:
    reading gives the same bytes in any order and from any number of threads.

    Hendrycks & Dietterich 2019, arXiv 1903.12261, in the implementation of the package imagecorruptions-imaug.

    Raises:
        ValueError: on opening, no such corruption or severity, or the package is missing; on reading, an image has a
            side under 32 px or, once reduced, over 16,384.
    """

    def __init__(self, corpus: Corpus, name: str, severity: int, size: int = SIZE):
        if name not in (*COMMON, *EXTRA):
            raise ValueError(f"unknown corruption {name!r}; {suggest(name, (*COMMON, *EXTRA))}")
        if severity not in range(1, 6):
            raise ValueError(f"severity {severity} of {name}: give 1 (light) to 5 (heavy)")
        if size < SMALLEST:
            raise ValueError(f"size {size}: corruptions need a shorter side of {SMALLEST} px or more")
        try:
            import imagecorruptions.corruptions  # noqa: F401
        except ImportError as error:
            remedy = "pip install 'featcache[robustness]'"
            if "libGL" in str(error):  # of opencv-python, on machines without a display
                remedy = "pip uninstall opencv-python, then pip install opencv-python-headless"
            raise ValueError(f"corrupted images need imagecorruptions-imaug ({error}): {remedy}") from None
        self.name, self.severity, self.size = name, severity, size
        self.spec = f"corrupted:{name}:{severity}{f'@size={size}' if size != SIZE else ''}:{corpus.spec}"
        self.ids: Sequence[str] = corpus.ids
        self.class_names: Sequence[str] | None = corpus.class_names
        self._corpus, self.passed_over = corpus, passed_over(corpus)
        self._reduced = KeptPixels(size=size, format="raw")

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        image = decode(self._reduced.encode(decode(self._corpus.read(i))))
        if min(image.size) < SMALLEST:
            width, height = image.size
            raise ValueError(f"{self.ids[i]}: {width} × {height} px; corruptions need {SMALLEST} px a side or more")
        if max(image.size) > LONGEST:
            raise ValueError(
                f"{self.ids[i]}: {max(image.size):,} px long; corruptions take {LONGEST:,} px a side at most"
            )
        corrupted = corrupt(np.asarray(image), self.name, self.severity, self.seed(i))
        file = io.BytesIO()
        Image.fromarray(corrupted).save(file, "PNG", compress_level=0)  # it is read again at once
        return file.getvalue()

    def label(self, i: int) -> int:
        return self._corpus.label(i)

    def seed(self, i: int) -> int:
        """What the corruption of sample `i` is drawn from: 32 bits."""
        digest = hashlib.blake2b(f"{self.ids[i]}\0{self.name}\0{self.severity}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")


def corrupt(
    image: UInt8[np.ndarray, "height width 3"], name: str, severity: int, seed: int
) -> UInt8[np.ndarray, "height width 3"]:
    """One image corrupted as by imagecorruptions right after `numpy.random.seed(seed)`, but safe in threads.

    NumPy's global generator is left alone: the package's functions run on a copy of their globals in which
    `numpy.random` is a generator of this call's own. Where a corruption draws nothing onto a pixel (spatter, on a
    small image, may draw no drop at all and then divides zero by zero), the pixel stays as it was.
    """
    from imagecorruptions import corruptions

    scope: dict[str, Any] = dict(vars(corruptions))
    scope["np"] = SimpleNamespace(**{**vars(np), "random": np.random.RandomState(seed)})
    scope["print"] = lambda *_: None  # only commands print
    for part in (name, "plasma_fractal"):
        function = scope[part]
        scope[part] = FunctionType(function.__code__, scope, part, function.__defaults__)
    with np.errstate(invalid="ignore"):
        result = scope[name](Image.fromarray(image), severity, **({"seed": seed} if name in _SEEDED else {}))
    result = np.asarray(result)
    return np.where(np.isfinite(result), result, image).astype(np.uint8)


def open_corpus(rest: str) -> Corrupted:
    """Open `NAME:SEVERITY[@size=PX]:CORPUS`."""
    name, severity, size, corpus = _parsed(rest)
    return Corrupted(open_any_corpus(corpus), name, int(severity), int(size or SIZE))


def made_of(rest: str) -> str:
    return _parsed(rest)[3]


def _parsed(rest: str) -> tuple[str, str, str | None, str]:
    match = re.fullmatch(r"(\w+):(\d+)(?:@size=(\d+))?:(.+)", rest)
    if not match:
        raise ValueError(
            f"corrupted:{rest} is not corrupted:NAME:SEVERITY[@size=PX]:CORPUS (for example corrupted:fog:3:photos/)"
        )
    return match[1], match[2], match[3], match[4]

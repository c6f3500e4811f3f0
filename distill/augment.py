"""Augmentations of the student's own, that the teacher did not see: pure functions of (seed, epoch, sample id)."""

import hashlib
import random

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageFilter

AUGMENTS = ("photometric", "crops")
JITTER = 0.4
"""Brightness, contrast and saturation are scaled by 1 ± this at most."""
JITTER_SHARE, GREY_SHARE, BLUR_SHARE = 0.8, 0.1, 0.2
"""Of the images, on average."""
BLUR_SIGMA = 0.01
"""At most, as a share of the image's side."""


def photometric(
    pixels: UInt8[np.ndarray, "s s 3"], seed: int, epoch: int, sample_id: str
) -> UInt8[np.ndarray, "s s 3"]:
    """Colour jitter, grey and blur, each with its probability; what the image shows stays where it is."""
    digest = hashlib.blake2b(f"{seed}\0{epoch}\0{sample_id}".encode(), digest_size=16).digest()
    # Only `random()` is used: the one stream that Python promises never to change. All are drawn, used or not.
    rng = random.Random(int.from_bytes(digest, "little"))
    jitter, grey, blur = rng.random() < JITTER_SHARE, rng.random() < GREY_SHARE, rng.random() < BLUR_SHARE
    factors = [1 + JITTER * (2 * rng.random() - 1) for _ in range(3)]
    sigma = BLUR_SIGMA * len(pixels) * rng.random()
    image = Image.fromarray(pixels)
    if jitter:
        for enhance, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
        ):
            image = enhance(image).enhance(factor)
    if grey:
        image = image.convert("L").convert("RGB")
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(image)

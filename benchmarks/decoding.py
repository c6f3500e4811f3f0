"""Is it worth decoding JPEGs on the GPU? Ours (Pillow, on all cores) beside torchvision's, and what a broken file costs.

torchvision decodes a batch or nothing: a batch with a file that it refuses is halved until that file is alone.

    python benchmarks/decoding.py --device cuda
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import torchvision
from _lines import Line, Row, rate, reason, tables
from photographs import arguments, unpacked
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from featcache.corpora import open_corpus
from featcache.inputs import Views
from featcache.inputs.images import Preprocess
from featcache.machine import cores, resolve_device

TEACHER = Preprocess(
    resize=256, crop=224, size=224, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--together", type=int, default=128, help="files a batch")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    options = parser.parse_args()
    corpus = open_corpus(str(unpacked("imagenet-samples-250", options.data, options.work)))
    warnings.simplefilter("ignore")  # torchvision's decoders will move to another package
    lines = decoders(
        list(map(corpus.read, range(len(corpus)))), resolve_device(options.device), options.together, options.seconds
    )
    for _ in tables(lines, time.monotonic() + 3600):
        pass


def decoders(files: list[bytes], device: str, together: int, seconds: float) -> Iterator[Line]:
    theirs = f"torchvision, {device}"
    title = f"Decoding {len(files):,} full-size JPEGs, images/s, {theirs} {together} at a time"
    yield title, {"by": f"ours, {cores()} threads"}, 10 * seconds, partial(ours, files, seconds)
    batches = [files[start : start + together] for start in range(0, len(files), together)]
    yield title, {"by": theirs}, 10 * seconds, partial(torchvisions, batches, device, seconds)
    first, whole, *others = files[:together]
    for broken, file in {"none": whole, "no picture": b"none", "half a JPEG": whole[: len(whole) // 2]}.items():
        given = partial(halving, [first, file, *others], device, seconds)
        yield f"A broken file among {together}, {theirs}", {"broken": broken}, 10 * seconds, given


def ours(files: list[bytes], seconds: float) -> Row:
    def rendered(file: bytes) -> np.ndarray:
        image = TEACHER.decode(file)
        return TEACHER.render(image, TEACHER.draw(image.size, Views(), "", 0))

    with ThreadPoolExecutor(cores()) as pool:
        ways = {"decoded": TEACHER.decode, "and resized": rendered}
        return {
            title: rate(len(files), lambda way=way: list(pool.map(way, files)), seconds) for title, way in ways.items()
        }


def torchvisions(batches: list[list[bytes]], device: str, seconds: float) -> Row:
    """With by how much, in 0…255, pixels differ from ours."""

    def resized(image: torch.Tensor) -> torch.Tensor:
        return center_crop(resize(image, [TEACHER.resize], InterpolationMode.BICUBIC), [TEACHER.crop])

    files, some = sum(map(len, batches)), batches[0][:50]
    pairs = zip((np.asarray(TEACHER.decode(file)) for file in some), decoded(some, device), strict=True)
    alike = [(a, b.permute(1, 2, 0).cpu().numpy()) for a, b in pairs if a.shape[:2] == b.shape[1:]]  # or else turned
    apart = np.concatenate([np.abs(a.astype(int) - b).ravel() for a, b in alike])
    return {
        "decoded": rate(files, lambda: [decoded(batch, device) for batch in batches], seconds),
        "and resized": rate(files, lambda: [[*map(resized, decoded(batch, device))] for batch in batches], seconds),
        "differ, mean": float(apart.mean()),
        "at most": int(apart.max()),
    }


def decoded(files: Sequence[bytes], device: str) -> list[Any]:
    given = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    return torchvision.io.decode_jpeg(given, mode=torchvision.io.ImageReadMode.RGB, device=device)


def by_halves(files: Sequence[bytes], device: str) -> list[Any]:
    """As `decoded`; None is what is refused alone, and would be left to Pillow."""
    try:
        return decoded(files, device)
    except RuntimeError:
        half = len(files) // 2
        return by_halves(files[:half], device) + by_halves(files[half:], device) if half else [None]


def halving(files: list[bytes], device: str, seconds: float) -> Row:
    said = "taken"
    try:
        decoded(files, device)
    except RuntimeError as error:
        said = reason(error)
    refused = sum(image is None for image in by_halves(files, device))
    return {
        "the batch": said,
        "refused": refused,
        "images/s": rate(len(files), partial(by_halves, files, device), seconds),
    }


if __name__ == "__main__":
    main()

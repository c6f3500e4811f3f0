"""Stage two's pixels from the images that a store keeps, against decoding the originals.

The same random resized crops of the same photographs, read, decoded and rendered by `distill.pairs.Pairs` on one thread:
(a) from a folder of the originals, (b) from a store made with --pixels SIZE, (c) likewise with --pixels-format raw. All
in one run, in turn, pages warm; times are of the processor. Prints images/s a core and bytes an image with their ratios
to (a), how far pixels are from those of (a), and how close the teacher's embedding of them is to the cached one.

    OMP_NUM_THREADS=1 python benchmarks/pixels.py --size 256 --rounds 3
"""

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _targets import judge
from photographs import arguments, unpacked

import featcache
from distill.pairs import Pairs
from featcache import KeptPixels
from featcache.corpora import Corpus
from featcache.corpora.store import KeptImages
from featcache.encoder import Encoder
from featcache.inputs.images import Preprocess
from featcache.store import FeatureStore

PHOTOGRAPHS = "imagenet-samples-250"
STUDENT_SIZES = (224, 96)
FASTER = 1.0  # × decoding the originals, at least: issue 3, Pixels once; kept images that were slower would be no use
CROP = 1
"""Number of the view that is timed; view 0 is the plain one."""


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="builtin/efficientnet_lite0")
    parser.add_argument("--size", type=int, default=256, help="of --pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=32, help="for the embeddings")
    options = parser.parse_args()
    if not (options.data / f"{PHOTOGRAPHS}.tar").exists():
        print(f"SKIP: {options.data / PHOTOGRAPHS}.tar is not here; give its folder with --data")
        return

    folder = featcache.open_corpus(str(unpacked(PHOTOGRAPHS, options.data, options.work)))
    teacher = featcache.load_encoder(options.teacher)
    sources: dict[str, tuple[FeatureStore, Corpus]] = {}
    for form in ("jpeg", "raw"):
        out = options.work / "stores" / f"pixels-{form}.zarr"
        shutil.rmtree(out, ignore_errors=True)
        kept = KeptPixels(size=options.size, format=form)
        store = featcache.extract(folder, teacher, out, views=2, augment="rrc", precision="fp32", pixels=kept)
        sources.setdefault("originals", (store, folder))
        sources[f"{options.size} px {form}"] = (store, KeptImages(store))

    print(f"{len(folder)} photographs, one thread, median of {options.rounds} rounds")
    sizes = {name: bytes_an_image(store, corpus) for name, (store, corpus) in sources.items()}
    for name, size in sizes.items():
        print(f"  {name:14} {size:9,.0f} bytes an image, {size / sizes['originals']:5.2f} × the originals")

    def ways(preprocess: Preprocess) -> dict[str, Pairs]:
        return {name: Pairs(store, corpus, preprocess, workers=1) for name, (store, corpus) in sources.items()}

    targets = []
    for px in STUDENT_SIZES:
        pairs = ways(replace(teacher.preprocess, size=px))
        speed = images_per_second(pairs, options.rounds)
        print(f"random resized crops of {px} px")
        for name, away in differences(pairs).items():
            against = f"{speed[name] / speed['originals']:5.2f} × the originals"
            print(f"  {name:14} {speed[name]:7.1f} images/s a core, {against}; pixels differ by {away:.2f} of 255")
            if name != "originals":
                what = f"{name} at {px} px, images/s × decoding the originals"
                targets.append((what, speed[name] / speed["originals"], FASTER, "at least"))

    print(f"embedding of the plain view, cosine to the cached one, {options.images} images")
    for name, cosine in cosines(ways(teacher.preprocess), teacher, options.images).items():
        print(f"  {name:14} mean {cosine.mean():.5f}, least {cosine.min():.5f}")
    judge(targets)


def bytes_an_image(store: FeatureStore, corpus: Corpus) -> float:
    """On disk: of the files of a folder, or of the chunks that hold kept images."""
    if isinstance(corpus, KeptImages):
        return sum(path.stat().st_size for path in Path(store.path, "pixels").rglob("*") if path.is_file()) / len(store)
    return statistics.mean(len(corpus.read(i)) for i in range(len(corpus)))


def images_per_second(pairs: dict[str, Pairs], rounds: int) -> dict[str, float]:
    """Of one core, by processor time; each round takes every way once, in an order of its own."""
    taken: dict[str, list[float]] = {name: [] for name in pairs}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(pairs)):
            order = rng.permutation(len(pairs[name])).tolist()
            taken[name].append(seconds(lambda i, way=pairs[name]: way.render(i, CROP), order))
    return {name: len(pairs[name]) / statistics.median(times) for name, times in taken.items()}


def seconds(render: Callable[[int], np.ndarray], order: list[int]) -> float:
    began = time.process_time()
    for i in order:
        render(i)
    return time.process_time() - began


def differences(pairs: dict[str, Pairs]) -> dict[str, float]:
    """Mean absolute difference of each way's pixels to the originals', 0…255."""

    def away(way: Pairs, i: int) -> float:
        ours, theirs = way.render(i, CROP), pairs["originals"].render(i, CROP)
        return float(np.abs(ours.astype(np.int16) - theirs).mean())

    return {name: statistics.mean(away(way, i) for i in range(len(way))) for name, way in pairs.items()}


def cosines(pairs: dict[str, Pairs], teacher: Encoder, count: int) -> dict[str, np.ndarray]:
    found = {}
    for name, way in pairs.items():
        chosen = np.linspace(0, len(way) - 1, count).astype(int)
        pixels = torch.from_numpy(np.stack([way.render(i, 0) for i in chosen.tolist()]))
        ours = teacher.encode(pixels)["embedding"].float()
        cached = torch.from_numpy(way.rows.gather(chosen)).to(ours)
        found[name] = torch.cosine_similarity(ours, cached).cpu().numpy()
    return found


if __name__ == "__main__":
    main()

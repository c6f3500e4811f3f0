"""The photographs that the benchmarks use, unpacked from `../shared/data` (or --data) into a work folder."""

import argparse
import random
import tarfile
from pathlib import Path

from PIL import Image

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WORK = Path(__file__).resolve().parent / "work"


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the .tar files")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for unpacked images, stores and runs")
    return parser


def unpacked(name: str, data: Path, work: Path) -> Path:
    """`data/NAME.tar` as a folder of class folders."""
    folder = work / "images" / name
    if not folder.exists():
        partial = folder.with_name(f"{name}.partial")
        with tarfile.open(data / f"{name}.tar") as archive:
            archive.extractall(partial, filter="data")
        partial.rename(folder)
    return folder


def resized(source: Path, size: int) -> Path:
    """A copy of a folder with every image resized to `size` × `size` px (bicubic), as PNG."""
    folder = source.with_name(f"{source.name}-{size}px")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        for path in sorted(source.rglob("*.JPEG")):
            target = (partial / path.relative_to(source)).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC).save(target)
        partial.rename(folder)
    return folder


def tiles(source: Path, count: int, size: int) -> Path:
    """`count` random squares of every image, a twentieth to a half of its area, at `size` × `size` px, as PNG."""
    folder = source.with_name(f"{source.name}-{count}-tiles-{size}px")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
            image = Image.open(path).convert("RGB")
            for tile in range(count):
                square(image, random.Random(f"{number} {tile}"), size).save(partial / f"{number:04d}-{tile:03d}.png")
        partial.rename(folder)
    return folder


def square(image: Image.Image, rng: random.Random, size: int) -> Image.Image:
    """A random square, a twentieth to a half of the image's area, at `size` × `size` px (bicubic)."""
    side = min(int((rng.uniform(0.05, 0.5) * image.width * image.height) ** 0.5), *image.size)
    left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)

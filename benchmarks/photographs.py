"""The photographs that the benchmarks use, unpacked from `../shared/data` (or --data) into a work folder."""

import argparse
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

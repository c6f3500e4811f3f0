"""Some 7,800 pictures of 32 px that are neither CIFAR-10's nor ImageNet's, to train on unlabelled.

Pieces of desktop wallpapers, and Tux Paint's stamps (photographs and drawings of single things) on white or pasted onto
such a piece, all from Debian packages: 0.4 GB to download. Needs apt-get and dpkg-deb, but installs nothing.

    python benchmarks/pictures.py
    python benchmarks/faithfulness.py --unlabelled benchmarks/work/images/pictures
"""

import random
import subprocess
from pathlib import Path

from photographs import arguments, square
from PIL import Image

WALLPAPERS = (
    "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "ukui-wallpapers", "sway-backgrounds",
    "plasma-workspace-wallpapers",
)  # fmt: skip
STAMPS = "tuxpaint-stamps-default"
PIECES, PASTED = 40, 4
"""Of each wallpaper; of each stamp."""
SIZE, CANVAS = 32, 128


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    folder = options.work / "images" / "pictures"
    unpacked = {name: unpack(name, options.work / "debian") for name in (*WALLPAPERS, STAMPS)}
    partial = folder.with_name("pictures.partial")
    partial.mkdir(parents=True, exist_ok=True)
    grounds = []
    for number, path in enumerate(path for name in WALLPAPERS for path in wallpapers(unpacked[name])):
        image = Image.open(path).convert("RGB")
        image.thumbnail((1200, 1200))
        grounds.append(image)
        for piece in range(PIECES):
            square(image, random.Random(f"w{number} {piece}"), SIZE).save(
                partial / f"wall-{number:03d}-{piece:02d}.png"
            )
    for number, path in enumerate(stamps(unpacked[STAMPS])):
        stamp = Image.open(path).convert("RGBA")
        stamp.thumbnail((400, 400))
        for copy in range(PASTED):
            rng = random.Random(f"s{number} {copy}")
            ground = (
                square(rng.choice(grounds), rng, CANVAS) if copy % 2 else Image.new("RGB", (CANVAS, CANVAS), "white")
            )
            pasted(stamp, ground, rng).save(partial / f"stamp-{number:03d}-{copy}.png")
    partial.rename(folder)
    print(f"{len(list(folder.iterdir()))} pictures in {folder}")


def unpack(package: str, folder: Path) -> Path:
    """The files of a Debian package, which is not installed."""
    files = folder / package
    if not files.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        (downloaded,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", downloaded, files], check=True)
    return files


def wallpapers(folder: Path) -> list[Path]:
    """One file of each wallpaper that comes in several sizes."""
    several = {"plasma-workspace-wallpapers": ("screenshot", "5120x2880", "3840x2160", "2560x1600"),
               "sway-backgrounds": ("1920x1080", "2048")}.get(folder.name, ("",))  # fmt: skip
    kept = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".png", ".webp"))
    return [path for path in kept if not path.is_symlink() and any(size in path.name for size in several)]


def stamps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.png") if "symbols/alphabets/english" not in str(path))


def pasted(stamp: Image.Image, ground: Image.Image, rng: random.Random) -> Image.Image:
    """The stamp somewhere on the ground, 0.6 to 1.2 times as large, at 32 px."""
    scale = rng.uniform(0.6, 1.2) * CANVAS / max(stamp.size)
    small = stamp.resize([max(1, int(side * scale)) for side in stamp.size], Image.Resampling.BICUBIC)
    at = [rng.randint(min(0, CANVAS - side), max(0, CANVAS - side)) for side in small.size]
    ground.paste(small, tuple(at), small)
    return ground.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main()

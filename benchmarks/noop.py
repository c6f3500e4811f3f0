"""The same `featcache extract` again when there is nothing to do, against the limit: an interpreter that imports the command line.

10,000 JPEGs of 64 px and the student `tiny`, each command in a process of its own as a user runs it, in turn; prints the
medians. The first, which extracts, is not counted. "verified" is the second command with its receipt deleted: every
image is read and hashed, every chunk checked.

    python benchmarks/noop.py --images 10000
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _targets import judge
from PIL import Image

IMAGES = 10_000
LIMIT = 2.0  # seconds that a command with nothing to do takes, at most: issue 3, Reuse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        write_images(here / "photos", options.images)
        student(here)
        featcache = str(Path(sys.executable).with_name("featcache"))
        again = [featcache, "extract", "photos", "--teacher", "run:student", "--out", "t.zarr"]
        taken: dict[str, list[float]] = {"verified": [], "again": [], "limit": []}
        seconds(again, here)
        time.sleep(3)  # of files this young a receipt is not trusted, because file systems' clocks are coarse
        for _ in range(options.rounds):
            shutil.rmtree(here / "home" / "receipts", ignore_errors=True)
            taken["verified"].append(seconds(again, here))
            taken["again"].append(seconds(again, here))
            taken["limit"].append(seconds([sys.executable, "-c", "import featcache_cli.programs"], here))
        for name, times in taken.items():
            print(f"{name:9} {statistics.median(times):6.2f} s")
    targets = [("again, seconds", statistics.median(taken["again"]), LIMIT, "at most")]
    judge(targets, f"{options.images:,} images", f"{IMAGES:,} images")


def student(here: Path) -> None:
    """A run folder whose encoder is quick; what it learned does not matter."""
    write_images(here / "few", 16)
    make_student = (
        "import sys, distill, featcache; featcache.extract('few', 'builtin/efficientnet_lite0', 'few.zarr'); "
    )
    make_student += "distill.fit('few.zarr', 'few', out='student', student='tiny', method='cosine', epochs=1)"
    seconds([sys.executable, "-c", make_student], here)


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i:06d}.jpg")


def seconds(command: list[str], here: Path) -> float:
    environment = {**os.environ, "FEATCACHE_HOME": str(here / "home"), "PYTHONPATH": str(here)}
    began = time.perf_counter()
    ran = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

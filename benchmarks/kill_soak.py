"""`kill -9` at random instants: does the store end as if nothing had happened?

Extracts one small corpus again and again, each run killed at a random instant and then run again until it ends; every
sealed store must be byte-identical to one never killed. Exit code 1 and the differing files when one is not. A small
run of this is part of the tests; for a long one:

    python benchmarks/kill_soak.py --kills 2000
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import featcache.job
import featcache.layout
from featcache import Encoder, Preprocess, extract
from featcache.pixels import KeptPixels


class Mean(torch.nn.Module):
    """The mean colour of each quarter of the image: 12 numbers; and of its sixteenths, 3 numbers each."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        quarters, sixteenths = (torch.nn.functional.adaptive_avg_pool2d(images, side) for side in (2, 4))
        return {"embedding": quarters.flatten(1), "tokens": sixteenths.flatten(2).mT}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    featcache.job.SAVE_SECONDS = 0.0  # a unit in progress is saved after every batch
    featcache.layout.CHUNK_BYTES = 4 * 12 * 2 * 2  # four rows of two views a chunk
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["FEATCACHE_HOME"] = str(work / "home")
        write_images(work / "images", options.images)
        began = time.monotonic()
        run(work, work / "whole.zarr", kill_after=None)
        duration = time.monotonic() - began
        whole = contents(work / "whole.zarr")
        shutil.rmtree(work / "home")
        kills = ends = 0
        while kills < options.kills or not ends:
            killed = run(work, work / "store.zarr", kill_after=rng.uniform(0, duration))
            kills += killed
            if killed:
                continue
            ends += 1
            found = contents(work / "store.zarr")
            differing = sorted(name for name in {*whole, *found} if whole.get(name) != found.get(name))
            if differing:
                print(f"after {kills} kills these files differ: {', '.join(differing)}")
                return 1
            shutil.rmtree(work / "store.zarr")
            shutil.rmtree(work / "home")
    print(f"{kills} kills, {ends} sealed stores, every one byte-identical to one never killed")
    return 0


def run(work: Path, out: Path, kill_after: float | None) -> bool:
    """One extraction in a process of its own; True when it was killed, False when it ended first."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            encoder = Encoder(
                name="mean",
                module=Mean(),
                preprocess=Preprocess(resize=18, crop=16, size=16),
                fields={"embedding": (12,), "tokens": (16, 3)},
                output="mean",
            )
            extract(
                str(work / "images"),
                encoder,
                out,
                views=2,
                augment="rrc",
                fields=["embedding", "tokens"],
                pixels=KeptPixels(size=16),
                batch_size=4,
                workers=2,
                device="cpu",
                precision="fp32+channels_last",
            )
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + (kill_after if kill_after is not None else 3600)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "an extraction failed by itself"
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    (folder / "a" / "broken.jpg").write_bytes(b"no image")


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


if __name__ == "__main__":
    sys.exit(main())

"""`kill -9` at random instants of training: does `--resume` end with the very weights of a run never killed?

Trains one small student again and again, each process killed at a random instant and the run then resumed, until it
ends; every finished run must be bit-identical to one never killed, its metrics included. Exit code 1 and the differing
files when one is not. A small run of this is part of the tests; for a long one:

    python benchmarks/kill_fit.py --kills 500
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: processes are forked after its import

import numpy as np
import torch
from PIL import Image

import distill
from featcache import Encoder, Preprocess, extract

IMAGES, EPOCHS, BATCH = 48, 4, 4
CONFIG = {
    "student": "tiny", "embedding_dim": 8, "image_size": 16, "method": "proteus", "epochs": EPOCHS, "batch_size": BATCH,
    "ema": 0.9, "clip_norm": 1.0, "accumulate": 2, "eval_every": 2, "holdout": 0.2,
}  # fmt: skip


class Mean(torch.nn.Module):
    """The mean colour of each quarter of the image: 12 numbers."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    importlib.import_module("distill.training.loop").LOG_EVERY = 2  # checkpoints within the short epochs too
    rng, found = random.Random(options.seed), Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FEATCACHE_HOME"] = str(folder / "home")
        finish(os.fork() or make_store(folder))
        started = time.perf_counter()
        finish(os.fork() or train(folder, "whole"))
        seconds, runs = time.perf_counter() - started, 0
        expected = outcome(folder / "whole")
        while sum(found.values()) < options.kills:
            shutil.rmtree(folder / "run", ignore_errors=True)
            while not (folder / "run" / "student.json").exists():
                child = os.fork() or train(folder, "run")
                if sum(found.values()) < options.kills:
                    time.sleep(rng.uniform(0, seconds))
                    os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                if os.WIFSIGNALED(status):
                    found[newest(folder / "run")] += 1
                elif status:
                    return 1
            runs += 1
            different = [name for name, value in outcome(folder / "run").items() if value != expected[name]]
            if different:
                print(f"differs from a run never killed: {', '.join(different)}")
                return 1
    where = ", ".join(f"{name or 'none'}: {count}" for name, count in sorted(found.items()))
    print(f"{sum(found.values())} kills, {runs} runs finished, all bit-identical to one never killed")
    print(f"newest checkpoint at a kill: {where}")
    return 0


def make_store(folder: Path) -> int:
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(IMAGES):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((20, 20)).save(folder / "images" / f"{i:03d}.png")
    preprocess = Preprocess(resize=16, crop=16, size=16)
    encoder = Encoder(name="mean", module=Mean(), preprocess=preprocess, fields={"embedding": 12}, output="quarters")
    extract(str(folder / "images"), encoder, folder / "t.zarr", views=2, augment="rrc", device="cpu", precision="fp32")
    os._exit(0)


def train(folder: Path, name: str) -> int:
    """In a forked process, which it ends."""
    try:
        distill.fit(
            folder / "t.zarr", str(folder / "images"), out=folder / name, device="cpu", workers=1, resume=True,
            checkpoint_minutes=0.0, **CONFIG,
        )  # fmt: skip
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def finish(child: int) -> None:
    if os.waitpid(child, 0)[1]:
        sys.exit("the run that is not killed failed")


def newest(run: Path) -> str:
    names = sorted(path.stem for path in (run / "checkpoints").glob("step-*.pt")) if run.exists() else []
    return names[-1] if names else ""


def outcome(run: Path) -> dict[str, bytes | list]:
    """Final weights, and metrics but for their speeds."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second", None)  # of epochs
        record.pop("wait_share", None)
    names = ("student.safetensors", "mapping.safetensors", "student.json")
    return {**{name: (run / name).read_bytes() for name in names}, "metrics.jsonl": records}


if __name__ == "__main__":
    sys.exit(main())

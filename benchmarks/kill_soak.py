"""`kill -9` at random instants: does the store end as if nothing had happened?

Extracts one small corpus again and again, with a convolutional network, a transformer and an encoder of texts in every
precision, each run killed at a random instant and then run again until it ends. Some images and texts cannot be read, others are known to another
store, and half of the runs have tried all precisions before; every sealed store must be byte-identical to one made in
one go, by an encoder that saw one precision only, with nothing known. Exit code 1 and the differing files when one is
not. A small run of this is part of the tests; for a long one:

    python benchmarks/kill_soak.py --kills 2000
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import featcache.extraction.job
import featcache.extraction.passes
import featcache.store.layout
from featcache import Encoder, Preprocess, extract
from featcache.inputs.images import KeptPixels
from featcache.precision import CANDIDATES
from featcache.testing.models import small_text_teacher

SIZE = 32
MODELS = {"convolutional": ("test_efficientnet", {}), "transformer": ("test_vit", {"img_size": SIZE})}
KINDS = (*MODELS, "texts")


class Tokens(torch.nn.Module):
    """A timm model's pooled embedding, and what it pools."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.model.forward_features(images)
        tokens = features if features.dim() == 3 else features.flatten(2).mT
        return {"embedding": self.model.forward_head(features), "tokens": tokens}


def make_encoder(kind: str) -> Encoder:
    if kind == "texts":
        return small_text_teacher()
    name, options = MODELS[kind]
    torch.manual_seed(0)
    module = Tokens(timm.create_model(name, num_classes=0, **options).eval())
    with torch.inference_mode():
        found = module(torch.zeros(1, 3, SIZE, SIZE))
    return Encoder(
        name=kind,
        module=module,
        preprocess=Preprocess(resize=SIZE + 2, crop=SIZE, size=SIZE),
        fields={field: tuple(features.shape[1:]) for field, features in found.items()},
        output="pooled",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--precisions", default=",".join(CANDIDATES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    featcache.extraction.job.SAVE_SECONDS = 0.0  # a unit in progress is saved after every batch
    featcache.extraction.passes.WINDOW = 1  # of texts, too
    rng = random.Random(options.seed)
    pairs = list(itertools.product(KINDS, options.precisions.split(",")))
    kills = ends = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_images(work / "images", options.images)
        write_images(work / "some", options.images, every=3)
        write_texts(work / "images.txt", options.images)
        write_texts(work / "some.txt", options.images, every=3)
        for kind, precision in pairs:
            encoder = make_encoder(kind)
            featcache.store.layout.CHUNK_BYTES = 8 * encoder.embedding_dim * 2 * 2  # eight rows of two views a unit
            more = soak(work / f"{kind}-{precision}", encoder, precision, -(-options.kills // len(pairs)), rng)
            if more is None:
                return 1
            kills, ends = kills + more[0], ends + more[1]
    print(f"{kills} kills, {ends} sealed stores, every one byte-identical to one never killed")
    return 0


def soak(work: Path, encoder: Encoder, precision: str, least: int, rng: random.Random) -> tuple[int, int] | None:
    """At least so many kills of one encoder in one precision: kills and sealed stores; None when a store differs."""
    home, images = work / "home", work.parent
    os.environ["FEATCACHE_HOME"] = str(home)
    run(encoder, images / "images", work / "whole.zarr", precision)
    whole = contents(work / "whole.zarr")
    shutil.rmtree(home)
    began = time.monotonic()
    run(encoder, images / "some", work / "some.zarr", precision)
    duration = 2 * (time.monotonic() - began)
    shutil.copytree(home, work / "knows-some")
    kills = ends = 0
    while kills < least or not ends:
        tries = rng.random() < 0.5
        killed = run(encoder, images / "images", work / "store.zarr", precision, rng.uniform(0, duration), tries)
        kills += killed
        if killed:
            continue
        ends += 1
        found = contents(work / "store.zarr")
        differing = sorted(name for name in {*whole, *found} if whole.get(name) != found.get(name))
        if differing:
            print(f"{work.name}: after {kills} kills these files differ: {', '.join(differing)}")
            return None
        shutil.rmtree(work / "store.zarr")
        shutil.rmtree(home)
        shutil.copytree(work / "knows-some", home)
    return kills, ends


def run(
    encoder: Encoder, images: Path, out: Path, precision: str, kill_after: float | None = None, tries: bool = False
) -> bool:
    """One extraction in a process of its own; True when it was killed, False when it ended first."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for each in CANDIDATES.values() if tries else ():
                encoder.to("cpu", each)
            texts = encoder.preprocess.kind == "text"
            kept = {} if texts else {"fields": ["embedding", "tokens"], "pixels": KeptPixels(size=16)}
            kept |= {} if texts else {"views": 2, "augment": "flip"}
            corpus = f"lines:{images}.txt" if texts else str(images)
            extract(corpus, encoder, out, batch_size=8, workers=2, device="cpu", precision=precision, **kept)
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


def write_images(folder: Path, count: int, every: int = 1) -> None:
    """`count` images, or every third of the same ones under other names; some cannot be read."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (36, 40, 3), np.uint8)
        if i % every:
            continue
        path = folder / "ab"[i % 2] / f"{every}-{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    for name in ("a/0.jpg", "a/1-010.jpg", "b/1-019.jpg"):
        (folder / name).write_bytes(b"no image")


def write_texts(file: Path, count: int, every: int = 1) -> None:
    """As many texts, of 1 to 30 bytes; some are none."""
    rng = np.random.default_rng(0)
    lines = [bytes(rng.integers(97, 123, rng.integers(1, 31)).tolist()) for _ in range(count)][::every]
    lines[2 :: len(lines) // 2] = [b"", b"\xff"]
    file.write_bytes(b"\n".join(lines))


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


if __name__ == "__main__":
    sys.exit(main())

"""How close `extract` comes to the bare encoder, and where the rest goes.

Both sides in one run, in turn, on the same images, batch and precision: (A) `featcache.extract`, from JPEG files to a
sealed store; (B) a loop of forward passes over tensors already in memory, before and after each A, their mean. Prints
the ratio A/B of images/s, pair by pair.

Where reading and encoding share the same cores, A cannot reach B. The limit is cores ÷ core-seconds an image, reading
(decode + resize + hash) and encoding each measured alone; A's share of it is printed too.

    python benchmarks/throughput.py --rounds 3

Teachers: EfficientNet-Lite0 with its real weights, and ViT-S/16 with random ones, which cost the same to run.
"""

import itertools
import os
import shutil
import statistics
import time
from pathlib import Path

import timm
import torch
from _targets import judge
from photographs import arguments, unpacked

import featcache
from featcache.encoder import Encoder
from featcache.extraction.extract import ExtractionProgress
from featcache.extraction.samples import Wanted, read_sample
from featcache.inputs import Views
from featcache.machine import keep_freed_memory
from featcache.models.timm import as_teacher
from featcache.precision import CANDIDATES, full_fp32

SHARE = 0.9  # of the limit, at least (on CUDA, of the bare forward): issue 3, Speed


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--teachers", default="builtin/efficientnet_lite0,vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    os.environ["FEATCACHE_HOME"] = str(options.work / "throughput-home")  # forgotten between rounds: nothing is reused
    names = ("cifar10-test-half", "imagenet-samples-250")
    targets = []
    for teacher, name in itertools.product(options.teachers.split(","), names):
        corpus = Some(featcache.open_corpus(str(unpacked(name, options.data, options.work))), options.images)
        ratios, shares = [], []
        _, at, precision, batch = extracted(corpus, teacher, options.work / "throughput.zarr")
        before = forward_only(teacher, precision, batch, seconds=at.encode)
        for _ in range(options.rounds):
            speed, at, precision, batch = extracted(corpus, teacher, options.work / "throughput.zarr", precision)
            after = forward_only(teacher, precision, batch, seconds=at.encode)
            bare, before = (before + after) / 2, after
            ratios.append(speed / bare)
            cores = len(os.sched_getaffinity(0))
            limit = cores / (cores / bare + read_seconds(corpus, teacher)) if not torch.cuda.is_available() else bare
            shares.append(speed / limit)
            spent = at.wait + at.encode + at.write
            print(
                f"{teacher}, {name}: extract {speed:.1f} images/s, bare forward {bare:.1f} "
                f"({precision}, batch {batch}), ratio {ratios[-1]:.3f}, of the limit {shares[-1]:.3f}; "
                f"of extract's time: waiting for pixels {at.wait / spent:.1%}, encoder {at.encode / spent:.1%}, "
                f"writing {at.write / spent:.1%}",
                flush=True,
            )
        ratio, share = statistics.median(ratios), statistics.median(shares)
        print(f"{teacher}, {name}: median ratio {ratio:.3f}, of the limit {share:.3f}")
        targets.append((f"{teacher}, {name}, of the limit", share, SHARE, "at least"))
    judge(targets)


def read_seconds(corpus: "Some", teacher: str) -> float:
    """Core-seconds that reading one image takes, alone and on one thread."""
    preprocess = load(teacher).preprocess
    began = time.process_time()
    for row in range(len(corpus)):
        read_sample(corpus, row, Views(), [Wanted(preprocess)])
    return (time.process_time() - began) / len(corpus)


def load(teacher: str) -> Encoder:
    """An encoder by its spec, or a timm model with random weights by its bare name."""
    return (
        featcache.load_encoder(teacher)
        if "/" in teacher
        else Encoder.of(as_teacher(teacher, timm.create_model(teacher)))
    )


class Some:
    """The first images of a corpus."""

    def __init__(self, corpus: featcache.Corpus, count: int):
        step = max(1, len(corpus) // count)
        self._rows = list(range(0, len(corpus), step))[:count]
        self._corpus, self.spec, self.class_names = corpus, corpus.spec, corpus.class_names
        self.ids = [corpus.ids[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, i: int) -> bytes:
        return self._corpus.read(self._rows[i])

    def label(self, i: int) -> int:
        return self._corpus.label(self._rows[i])


def extracted(
    corpus: Some, teacher: str, out: Path, precision: str = "auto"
) -> tuple[float, ExtractionProgress, str, int]:
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(os.environ["FEATCACHE_HOME"], ignore_errors=True)
    seen: list[ExtractionProgress] = []
    store = featcache.extract(corpus, load(teacher), out, precision=precision, progress=lambda at: seen.append(at))
    extraction = store.manifest.extraction
    return seen[-1].images_per_second, seen[-1], str(extraction.precision), int(extraction.batch_size or 0)


@torch.inference_mode()
def forward_only(teacher: str, precision: str, batch: int, seconds: float) -> float:
    keep_freed_memory()
    encoder = load(teacher)
    size, mode = encoder.preprocess.size, CANDIDATES[precision]
    encoder.to("cuda" if torch.cuda.is_available() else "cpu", mode)
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=encoder.device)
    images = encoder.preprocess.to_model(pixels).to(mode.weights, memory_format=mode.memory_format)
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=mode.autocast), full_fp32(encoder.device):
        encoder.module(images)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            encoder.module(images)
            count += batch
    if encoder.device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()

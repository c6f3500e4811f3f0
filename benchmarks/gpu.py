"""What a GPU makes of it: extraction, neighbours, precision, training, and what students become.

Prints Markdown tables, and writes them as JSON too. A line that fails, or does not fit into --minutes, says so, and the
others go on. Run again, students that are finished are only measured. Parts:

    extract     full-size JPEGs through a ViT-B/16 of random weights, beside its bare forward pass; and decoding them:
                ours (Pillow, on all cores) beside torchvision on the GPU, with a file that is broken too
    neighbours  exact search on the GPU and, in a process that sees none, on the CPU: the same rows
    precision   how far each precision, TF32 among them, is from float64; and the null test of `null_test.py`
    train       images/s of `distill.fit` in bf16, beside the student's bare step on a batch that stays on the GPU
    students    what methods make of students: trained on Tiny-ImageNet (`classes.py`), measured on images and classes
                held out of training; with --test, trained on all of these and measured on the test sets

    python benchmarks/gpu.py --minutes 15 --json gpu.json
    python benchmarks/gpu.py --device cpu --small     # does it work? the figures say nothing
"""

import copy
import datetime
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import classes
import numpy as np
import torch
import torchvision
from _lines import Line, Row, rate, reason, shown, tables
from decoding import decoders
from fit_cost import Some
from null_test import aurocs, some_of
from photographs import arguments, unpacked
from throughput import extracted, forward_only, load
from torch.nn.functional import cosine_similarity

import distill
import evalsuite
import featcache
from distill.objectives import match
from distill.training.schedule import make_optimizer
from evalsuite.neighbours.exact import import_faiss, search
from featcache.extraction.samples import Wanted, read_sample
from featcache.inputs import Views
from featcache.machine import cores, machine_kind, resolve_device
from featcache.precision import CANDIDATES
from featcache.rows import Rows
from featcache.student import open_student

TEACHER, PX = "builtin/efficientnet_lite0", 64  # the students' input
STUDENTS: dict[str, dict[str, Any]] = {"timm/resnet18": {}, "timm/vit_tiny_patch16_224": {"patch_size": 8}}
METRICS = {
    "kNN top-1": "top1@20", "probe top-1": "probe/top1", "near, k = 1": "knn:k=1/near/near/auroc",
    "near, k = 50": "knn:k=50/near/near/auroc", "near, `mahalanobis++`": "mahalanobis++/near/near/auroc",
    "far, k = 50": "knn:k=50/far/far/auroc", "Gram": "gram_pearson", "mutual kNN@10": "mutual_knn@10",
    "CKA (unit)": "cka_debiased_unit",
}  # fmt: skip
FULL = SimpleNamespace(
    vit="vit_base_patch16_224", batch=256, mapping={}, seconds=3.0, overhead=60, jpegs=8192, decoded=1024, together=128,
    rows=(1_000_000, 5_000, 384), null=(2000, 500), precision=128, shards=[f"cifar10-train-{shard}" for shard in range(5)],
)  # fmt: skip
SMALL = SimpleNamespace(
    vit="vit_tiny_patch16_224", batch=16, mapping={"mapping_steps": 3}, seconds=0.1, overhead=1, jpegs=24, decoded=12,
    together=6, rows=(3_000, 20, 32), null=(40, 20), precision=4, shards=["cifar10-train-0"],
)  # fmt: skip


class Run:
    """What the parts are given."""

    def __init__(self, options: Any):
        self.options, self.device = options, options.device
        self.size, name = (SMALL, "gpu-small") if options.small else (FULL, f"gpu-{options.device}")
        self.work = options.work / name
        self.work.mkdir(parents=True, exist_ok=True)

    def unpacked(self, name: str) -> Path:
        return unpacked(name, self.options.data, self.options.work)

    def few(self, folder: Path) -> Path:
        """All of a folder; with --small two images of each of 26 classes."""
        if not self.options.small:
            return folder
        for path in (path for each in sorted(folder.iterdir())[:26] for path in sorted(each.iterdir())[:2]):
            link = self.work / "images" / folder.name / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(path.resolve())
        return self.work / "images" / folder.name

    def stores(self, images: dict[str, Path], encoder: str, name: str) -> dict[str, featcache.FeatureStore]:
        given = {"device": self.device, "precision": "fp32"}
        stores = {part: self.work / "stores" / f"{name}-{part}.zarr" for part in images}
        return {part: featcache.extract(str(images[part]), encoder, stores[part], **given) for part in images}

    def rate(self, images: int, function: Callable[[], Any]) -> float:
        return rate(images, function, self.size.seconds)


def extract(run: Run) -> Iterator[Line]:
    corpus = Some(featcache.open_corpus(str(run.unpacked("imagenet-samples-250"))), run.size.jpegs)
    title = f"Extraction of {len(corpus):,} full-size JPEGs, {run.size.vit} (the first line sets up)"
    for precision in ("auto", "auto", "fp32"):
        yield title, {"precision": precision}, 30, partial(extraction, run, corpus, precision)
    files = [corpus.read(row) for row in range(run.size.decoded)]
    yield from decoders(files, run.device, run.size.together, run.size.seconds)


def extraction(run: Run, corpus: Some, precision: str) -> Row:
    with patch.dict(os.environ, FEATCACHE_HOME=str(run.work / "extract-home")):  # emptied each time: no row is known
        speed, at, made, batch = extracted(corpus, run.size.vit, run.work / "extract.zarr", precision)
    bare, spent = forward_only(run.size.vit, made, batch, run.size.seconds), at.wait + at.encode + at.write
    shares = {"waiting": at.wait / spent, "encoder": at.encode / spent, "writing": at.write / spent}
    return {"made in": made, "images/s": speed, "bare forward": bare, "share": speed / bare, **shares}


def neighbours(run: Run) -> Iterator[Line]:
    (bank, queries, width), rng = run.size.rows, np.random.default_rng(0)
    centres, files = rng.standard_normal((1000, width), np.float32), [run.work / "bank.npy", run.work / "query.npy"]
    for file, count in zip(files, (bank, queries), strict=True):
        around = rng.standard_normal((count, width), np.float32)
        np.save(file, (centres[rng.integers(1000, size=count)] + around).astype(np.float16))
    title = f"50 exact neighbours of {queries:,} rows in {bank:,} × {width}: the same rows and similarities"
    for backend in ("torch", "faiss"):
        yield title, {"backend": backend}, 90, partial(on_both, files, backend)


def on_both(files: list[Path], backend: str) -> Row:
    here, gpus, *found = searched(files, backend)
    with (
        patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as one,
    ):
        on_cpu, none, *expected = one.submit(searched, files, backend).result()
    assert none == 0, "the CPU's process sees a GPU"
    assert all(map(np.array_equal, found, expected)), "rows or similarities are others than the CPU's"
    return {"GPUs": gpus, "here, seconds": here, f"CPU, {cores()} cores": on_cpu, "CPU / here": on_cpu / here}


def searched(files: list[Path], backend: str) -> tuple[float, int, np.ndarray, np.ndarray]:
    """Seconds of a second search, how many GPUs the backend sees, and what it finds."""
    bank, query = (np.load(file, mmap_mode="r") for file in files)
    step = 2**24 // bank.shape[1]
    for _ in range(2):
        began = time.perf_counter()
        blocks = (bank[start : start + step].astype(np.float32) for start in range(0, len(bank), step))
        found = search(blocks, query.astype(np.float32), 50, backend=backend)
        seconds = time.perf_counter() - began
    return seconds, torch.cuda.device_count() if backend == "torch" else import_faiss().get_num_gpus(), *found


def precision(run: Run) -> Iterator[Line]:
    corpus = featcache.open_corpus(str(run.unpacked("imagenet-samples-250")))
    names = [name for name in CANDIDATES if run.device == "cuda" or "fp16" not in name]
    for spec in (TEACHER, run.size.vit):
        encoder = load(spec)
        read = [read_sample(corpus, row, Views(), [Wanted(encoder.preprocess)]) for row in range(run.size.precision)]
        pixels = torch.from_numpy(np.concatenate([sample.seen[0].pixels for sample in read])).to(run.device)
        images = encoder.preprocess.to_model(pixels)
        with torch.inference_mode():
            exact = copy.deepcopy(encoder.module).to(run.device).double()(images.double())["embedding"]
        for name in (*names, "fp32 with TF32"):
            found = partial(distance, run, encoder, pixels, exact, name)
            yield f"Distance to float64, {spec}", {"precision": name}, 15, found
    sets = {"bank": "cifar10-train-0", "query": "cifar10-test-half"}
    folders = {
        part: some_of(run.unpacked(sets[part]), n, run.work) for part, n in zip(sets, run.size.null, strict=True)
    }
    yield (
        f"Null test, {run.size.null[1]} images against themselves",
        {"encoder": TEACHER},
        60,
        partial(null, run, folders),
    )


def distance(run: Run, encoder: featcache.Encoder, pixels: torch.Tensor, exact: torch.Tensor, name: str) -> Row:
    encoder.to(run.device, CANDIDATES.get(name, CANDIDATES["fp32"]))
    images = encoder.preprocess.to_model(pixels)

    @torch.inference_mode()
    def embed() -> torch.Tensor:
        return encoder.encode(pixels)["embedding"] if name in CANDIDATES else encoder.module(images)["embedding"]

    torch.set_float32_matmul_precision("high" if "TF32" in name else "highest")
    try:
        apart, speed = 1 - cosine_similarity(embed().double(), exact), run.rate(len(pixels), embed)
    finally:
        torch.set_float32_matmul_precision("highest")
    return {"1 − cosine, mean": float(apart.mean()), "most": float(apart.max()), "images/s": speed}


def null(run: Run, folders: dict[str, Path]) -> Row:
    """AUROCs furthest from 0.5, and the detectors they are of."""
    half = "bf16+channels_last"
    with patch.dict(os.environ):  # it sets FEATCACHE_HOME
        found = aurocs(folders, TEACHER, half, run.work / "null")
    worst = [max(each.items(), key=lambda item: abs(item[1] - 0.5)) for each in found]
    titles = ("fp32", half, "one against the other")
    return {title: f"{auroc:.4f} {name}" for title, (name, auroc) in zip(titles, worst, strict=True)}


def train(run: Run) -> Iterator[Line]:
    parts = classes.parts(run.options.data, run.options.work)
    shards = [name for name in run.size.shards if (run.options.data / f"{name}.tar").exists()]
    sets = {
        "CIFAR-10": {name: run.few(run.unpacked(name)) for name in shards},
        "Tiny-ImageNet": {part: run.few(parts[part]) for part in ("fit", "held", "unseen")},
    }
    for title, student in itertools.product(sets, STUDENTS):
        stores = run.stores(sets[title], TEACHER, "teacher")
        row = {"images": f"{title}, {sum(map(len, stores.values())):,}", "student": student}
        found = partial(training, run, list(stores.values()), list(map(str, sets[title].values())), student)
        yield f"Training by `centred` in bf16, {PX} px, batches of {run.size.batch}", row, run.size.overhead, found


def training(run: Run, stores: list[featcache.FeatureStore], corpora: list[str], student: str) -> Row:
    out = run.work / "runs" / "rate"
    shutil.rmtree(out, ignore_errors=True)
    *_, last = fitted(run, stores, corpora, out, student, "centred", 3, {"mapping_steps": 3}).metrics
    bare, speed = bare_step(run, student), last["images_per_second"]
    return {"images/s": speed, "bare step": bare, "share": speed / bare, "wait": last["wait_share"]}


def fitted(
    run: Run, stores: list[featcache.FeatureStore], corpora: list[str], out: Path, student: str, method: str, epochs: int,
    method_options: dict[str, Any],
) -> distill.Run:  # fmt: skip
    return distill.fit(
        stores, corpora, out=out, device=run.device, student=student, image_size=PX, method=method, epochs=epochs,
        method_options=method_options, batch_size=run.size.batch, precision="bf16", resume=True, **STUDENTS[student],
    )  # fmt: skip


def bare_step(run: Run, spec: str) -> float:
    """Images/s of forward, backward and optimizer, over one batch that is there."""
    student = open_student(spec, image_size=PX, **STUDENTS[spec]).train().to(run.device)
    student.to(memory_format=torch.channels_last)
    images = torch.randn(run.size.batch, 3, PX, PX, device=run.device).to(memory_format=torch.channels_last)
    target = torch.randn(run.size.batch, student.embedding_dim, device=run.device)
    optimizer = make_optimizer((student,), distill.FitConfig(student=spec, batch_size=run.size.batch))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(run.device, torch.bfloat16):
            output = student(images)
        match(output.float(), target, "cosine").backward()
        optimizer.step()

    return run.rate(run.size.batch, step)


def students(run: Run) -> Iterator[Line]:
    trained, query, near = (
        (["fit", "held", "unseen"], "test", "near") if run.options.test else (["fit"], "held", "unseen")
    )
    folders = classes.parts(run.options.data, run.options.work)
    images = {part: run.few(folders[part]) for part in (*trained, query, near, "far")}
    teacher, epochs = run.stores(images, TEACHER, "teacher"), run.options.epochs
    count = sum(len(teacher[part]) for part in trained)
    title = f"{epochs} epochs of {count:,} images of Tiny-ImageNet; ID: {query}, near OOD: {near}"
    measure = partial(measured, teacher, trained, query, near)

    def made(student: str, method: str, name: str) -> Row:
        stores, corpora = [teacher[part] for part in trained], [str(images[part]) for part in trained]
        options = run.size.mapping if method in ("centred", "tintem", "landmarks") else {}
        out = fitted(run, stores, corpora, run.work / "runs" / name, student, method, epochs, options).path
        return measure(run.stores(images, f"run:{out}", name))

    yield f"The teacher, {title}", {}, run.size.overhead, partial(measure, teacher)
    for student in STUDENTS:
        seconds = epochs * count / (0.7 * bare_step(run, student))
        for method in run.options.methods.split(","):
            name = f"{student.partition('/')[2]}-{method}-{epochs}-{count}"
            left = 0 if (run.work / "runs" / name / "student.json").exists() else seconds
            found = partial(made, student, method, name)
            yield f"{student}, {title}", {"method": method}, left + run.size.overhead, found


def measured(
    teacher: dict[str, featcache.FeatureStore], trained: list[str], query: str, near: str, mine: dict[str, featcache.FeatureStore]
) -> Row:  # fmt: skip
    bank, detectors = Rows.of([mine[part] for part in trained]), ["knn:k=1", "knn:k=50", "mahalanobis++"]
    sets = {"near": {"near": mine[near]}, "far": {"far": mine["far"]}}
    found = [
        evalsuite.knn(bank, mine[query], k=[20]),
        evalsuite.probe(bank, mine[query], c=1.0),
        evalsuite.ood(id_train=bank, id_test=mine[query], detectors=detectors, **sets),
        evalsuite.fidelity(teacher[query], mine[query]),
    ]
    metrics = {name: metric.value for result in found for name, metric in result.metrics.items()}
    return {title: metrics[name] for title, name in METRICS.items()}


def driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.check_output(query, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


PARTS = {part.__name__: part for part in (extract, neighbours, precision, train, students)}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="a few images: does it work?")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma list")
    parser.add_argument("--minutes", type=float, default=15.0, help="what does not fit into them is left out")
    parser.add_argument(
        "--methods", default="centred,landmarks,cosine,tintem,proteus", help="of students, in this order"
    )
    parser.add_argument("--epochs", type=int, help="of students; 100, with --small 2")
    parser.add_argument("--test", action="store_true", help="look at the test sets")
    parser.add_argument("--json", type=Path, help="file for the tables")
    options = parser.parse_args()
    options.epochs, began = options.epochs or (2 if options.small else 100), time.monotonic()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for all that takes a GPU where there is one
    try:
        resolve_device(options.device)
    except ValueError as error:
        sys.exit(str(error))
    run = Run(options)
    made = {
        "device": machine_kind(run.device), "driver, memory": driver(), "cores": cores(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    shown("Where", [made])
    made["tables"] = {}
    os.environ["FEATCACHE_HOME"] = str(run.work / "home")
    warnings.simplefilter("ignore")  # of few images, and that torchvision's decoders will be others
    for name in options.parts.split(","):
        try:
            for title, rows in tables(PARTS[name](run), began + 60 * options.minutes):
                made["tables"] |= {title: rows}
                written(made, options.json)
        except Exception as error:
            made["tables"] |= {name: reason(error)}
            written(made, options.json)
            print(f"\n{name}: {reason(error)}", flush=True)


def written(made: Row, path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()

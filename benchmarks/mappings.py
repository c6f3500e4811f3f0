"""Which mapping keeps most of the teacher? All of them, at equal steps, on CIFAR-10 and one number of dimensions.

Teacher EfficientNet-Lite0 (1280 dimensions); fitted to the 10,000 images of one CIFAR-10 shard; measured on 5,000
held-out ones and, as OOD, 5,000 Tiny-ImageNet photographs at 32 px: the stores of `faithfulness.py`. Prints a Markdown
table. `identity` needs the teacher's own width and stands for the teacher.

    OMP_NUM_THREADS=1 python benchmarks/mappings.py --steps 300

`--streaming ROWS` instead fits every mapping to a store of ROWS × 1024 random rows, which it writes first, and prints
the memory that each needs: at 1281167 rows, ImageNet's, 2.6 GB of disk.

    OMP_NUM_THREADS=1 python benchmarks/mappings.py --streaming 1281167 --dim 384 --steps 20
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from photographs import arguments, resized, unpacked

TEACHER = "builtin/efficientnet_lite0"
WIDTH = 1024
CASES = {
    "identity (the teacher)": ("identity", {}),
    "random_orthonormal": ("random_orthonormal", {}),
    "phi_s": ("phi_s", {}),
    "spectral": ("spectral", {}),
    "orthogonal": ("orthogonal", {}),
    "sne, spectral start": ("sne", {}),
    "sne, random start": ("sne", {"start": "random"}),
    "sne, LayerNorm, spectral start": ("sne", {"layer_norm": True}),
    "sne, LayerNorm, random start (the paper's)": ("sne", {"layer_norm": True, "start": "random"}),
}
COLUMNS = {
    "SNE loss": "sne",
    "singular values": "singular",
    "‖WWᵀ/c − I‖/√dim": "deviation",
    "Gram correlation": "gram_pearson",
    "mutual kNN@10": "mutual_knn@10",
    "kNN top-1 (k = 20)": "top1@20",
    "AUROC (k = 1)": "auroc@1",
    "AUROC (k = 50)": "auroc@50",
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--streaming", type=int, metavar="ROWS", help="measure memory instead, on so many rows")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "STORE"), help="of --streaming: one mapping, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(memory_of(*options.one, options)))
    elif options.streaming:
        streaming(options)
    else:
        compare(options)


def compare(options) -> None:
    import featcache
    from distill.mapping_report import report

    images = {
        "train": unpacked("cifar10-train-0", options.data, options.work),
        "test": unpacked("cifar10-test-half", options.data, options.work),
        "tin": resized(unpacked("tiny-imagenet-val-half", options.data, options.work), 32),
    }
    stores = {
        part: featcache.extract(str(folder), TEACHER, options.work / "stores" / f"teacher-{part}.zarr")
        for part, folder in images.items()
    }
    print("| mapping | " + " | ".join(COLUMNS) + " | seconds |\n|" + "---|" * (len(COLUMNS) + 2))
    for case in CASES:
        dim = stores["train"].embedding_dim if case.startswith("identity") else options.dim
        start = time.perf_counter()
        mapping = fitted(case, dim, stores["train"], options)
        seconds = time.perf_counter() - start
        found = report(mapping, stores["train"], id_test=stores["test"], ood=stores["tin"], sample=5000)
        cells = {key: f"{value:.3f}" for key, value in found.items()}
        cells["singular"] = f"{found['singular_min']:.2f}–{found['singular_max']:.2f}"
        print(f"| {case} | " + " | ".join(cells[key] for key in COLUMNS.values()) + f" | {seconds:.0f} |", flush=True)


def fitted(case: str, dim: int, store, options):
    from distill.mappings import load_mapping

    name, given = CASES[case]
    known = inspect.signature(load_mapping(name)).parameters
    training = {"steps": options.steps, "batch_size": options.batch_size} if "steps" in known else {}
    return load_mapping(name)(dim, **given, **training).fit(store)


def streaming(options) -> None:
    """Each mapping in a process of its own, which counts only its own memory."""
    folder = Path(tempfile.mkdtemp(dir=options.work))
    shared = ["--dim", str(options.dim), "--steps", str(options.steps), "--batch-size", str(options.batch_size)]
    try:
        write_random_store(folder / "rows.zarr", options.streaming)
        megabytes = options.streaming * WIDTH * 2 / 2**20
        print(f"{options.streaming:,} × {WIDTH} float16 are {megabytes:,.0f} MiB; mapped to {options.dim} dimensions\n")
        print("| mapping | MiB before | MiB more at the peak of fit | seconds |\n|---|---|---|---|")
        for case in CASES:
            if not case.startswith("identity"):
                command = [sys.executable, __file__, *shared, "--one", case, str(folder / "rows.zarr")]
                now = json.loads(subprocess.check_output(command))
                print(f"| {case} | {now['before']:,.0f} | {now['more']:,.0f} | {now['seconds']:.0f} |", flush=True)
    finally:
        shutil.rmtree(folder)


def write_random_store(path: Path, rows: int) -> None:
    """Gaussian rows whose dimensions differ in strength, written by way of a file, not of memory."""
    import numpy as np

    from featcache.store.from_arrays import write_store

    rng, scale = np.random.default_rng(0), np.geomspace(1, 0.03, WIDTH, dtype=np.float32)
    file = path.with_suffix(".npy")
    embedding = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=(rows, WIDTH))
    for start in range(0, rows, 8192):
        block = embedding[start : start + 8192]
        block[:] = rng.standard_normal(block.shape, np.float32) * scale
    write_store(path, embedding)
    file.unlink()


def memory_of(case: str, store: str, options) -> dict[str, float]:
    """MiB of memory of its own (not the store's pages, which the system takes back when it wants) and seconds."""
    import featcache

    opened = featcache.open_store(store)
    fitted("random_orthonormal", 1, opened, options)  # loads what is loaded once
    before, peak, done = private_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], private_mib())

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.perf_counter()
    fitted(case, options.dim, opened, options)
    seconds = time.perf_counter() - start
    done.set()
    watching.join()
    return {"before": before, "more": peak[0] - before, "seconds": seconds}


def private_mib() -> float:
    """Linux counts anonymous pages apart from those of mapped files."""
    with open(f"/proc/{os.getpid()}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    main()

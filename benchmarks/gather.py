"""1,024 random rows from a store, against the limit (a plain .npy memmap) and against zarr's own indexing.

All three on the same rows, in turn, in one run, pages warm; prints the medians and their ratios. The rows are made and
written chunk by chunk, never all of them in memory; on disk they take twice 1.5 GB.

    OMP_NUM_THREADS=1 python benchmarks/gather.py --rows 1000000
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _targets import judge

from featcache import write_store

ROWS, WIDTH = 1_000_000, 768
LIMIT = 1.5  # × a plain .npy memmap, at most: issue 3, Speed
FASTER = 10  # × zarr's own indexing, at least: issue 3, Speed, says "many times faster"
AT_ONCE = 8192
TAKEN = 1024
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where both files are written, by default the system's for such")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        plain = written(Path(folder) / "plain.npy", options.rows, options.width, rng)
        store = write_store(Path(folder) / "store.zarr", plain)
        ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "npy memmap": lambda rows: plain[rows],
            "gather": store.gather,
            "zarr oindex": store.gather_portable,
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            rows = rng.integers(0, options.rows, TAKEN)
            for name in rng.permutation(list(ways)):  # none always comes after the slow one
                found = ways[name](rows)
                assert (found == plain[rows]).all()
                for _ in range(REPEATS):
                    began = time.perf_counter()
                    found = ways[name](rows)
                    taken[name].append(time.perf_counter() - began)
        median = {name: statistics.median(seconds) for name, seconds in taken.items()}
        print(
            f"{TAKEN:,} random rows of {options.rows:,} × {options.width} float16, {store.chunks} chunks, "
            f"median of {REPEATS * options.rounds}:"
        )
        for name, seconds in median.items():
            against = f"{seconds / median['npy memmap']:8.2f} × the npy memmap, {median['zarr oindex'] / seconds:8.1f} × as fast as zarr"
            print(f"  {name:12} {seconds * 1e3:9.3f} ms {against}")
    targets = [
        ("gather, × the npy memmap", median["gather"] / median["npy memmap"], LIMIT, "at most"),
        ("gather, × as fast as zarr", median["zarr oindex"] / median["gather"], FASTER, "at least"),
    ]
    judge(targets, f"{options.rows:,} × {options.width}", f"{ROWS:,} × {WIDTH}")


def written(path: Path, rows: int, width: int, rng: np.random.Generator) -> np.memmap:
    """A .npy file of random numbers, opened for reading."""
    array = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    for start in range(0, rows, AT_ONCE):
        part = array[start : start + AT_ONCE]
        part[:] = rng.standard_normal(part.shape, np.float32)
    array.flush()
    return np.load(path, mmap_mode="r")


if __name__ == "__main__":
    main()

"""1,024 random rows from a store, against the limit (a plain .npy memmap) and against zarr's own indexing.

All three on the same rows, in turn, in one run, pages warm; prints the medians and their ratios.

    python benchmarks/gather.py --rows 200000
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from featcache import write_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        array = rng.standard_normal((options.rows, options.width), np.float32).astype(np.float16)
        np.save(Path(folder) / "plain.npy", array)
        store = write_store(Path(folder) / "store.zarr", array)
        plain = np.load(Path(folder) / "plain.npy", mmap_mode="r")
        ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "npy memmap": lambda rows: plain[rows],
            "gather": store.gather,
            "zarr oindex": store.gather_portable,
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            rows = rng.integers(0, options.rows, 1024)
            for name, read in ways.items():
                read(rows)
                began = time.perf_counter()
                found = read(rows)
                taken[name].append(time.perf_counter() - began)
                assert (found == array[rows]).all()
        median = {name: statistics.median(seconds) for name, seconds in taken.items()}
        print(
            f"1,024 random rows of {options.rows:,} × {options.width} float16, {store.chunks} chunks, median of {options.rounds}:"
        )
        for name, seconds in median.items():
            print(f"  {name:12} {seconds * 1e3:8.3f} ms   {seconds / median['npy memmap']:6.2f} × the npy memmap")


if __name__ == "__main__":
    main()

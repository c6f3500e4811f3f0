"""How much memory do evaluators take over large stores? Peak RSS beyond the interpreter with its imports, each
evaluator in a process of its own.

Stores of random rows, made once: 2,000,000 × 384 and 10,000 × 384 for `knn`, 1,000,000 × 384 (teacher) and × 128
(student) for `fidelity`; 2.6 GB. Pages of a mapped store count as RSS, though the system drops them when it wants the
memory for something else: the anonymous part, which it cannot drop, is shown beside the whole (Linux only).

    OMP_NUM_THREADS=1 python benchmarks/evalsuite_memory.py
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _targets import judge

# Nothing heavy is imported here: until it starts its own program, a new process counts the memory of the one that
# made it as its own.

FOLDER = Path(__file__).parent / "work" / "evalsuite-memory"
LIMIT = 1.5 * 2**30  # bytes beyond the imports, at most: issue 5, Memory
STORES = {  # rows at full size, width
    "bank": (2_000_000, 384),
    "query": (10_000, 384),
    "teacher": (1_000_000, 384),
    "student": (1_000_000, 128),
}
USES = {"knn": ("bank", "query"), "fidelity": ("teacher", "student")}
CLASSES = 1000
BLOCK = 2**16  # rows made at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=STORES["bank"][0], help="of the bank; the others in proportion")
    parser.add_argument("--only", choices=USES, help="one of the two evaluators")
    parser.add_argument("--index", default="exact", help="of knn")
    parser.add_argument("--keep", action="store_true", help="the stores, for another run of the same size")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one in STORES:
        write(options.one, options.rows, options.folder)
        return
    if options.one:
        print(json.dumps(used(options.one, options.index, options.folder)))
        return
    targets = []
    try:
        for evaluator in [options.only] if options.only else USES:
            for store in USES[evaluator]:
                subprocess.check_call([*child(store, options.folder), "--rows", str(options.rows)])
            now = measured([*child(evaluator, options.folder), "--index", options.index])
            more, anonymous = now["peak"] - now["peak_before"], now["anonymous"] - now["anonymous_before"]
            print(
                f"{evaluator}: {more / 2**20:,.0f} MiB beyond the {now['peak_before'] / 2**20:,.0f} of the imports "
                f"(limit {LIMIT / 2**20:,.0f}); anonymous: {anonymous / 2**20:,.0f} MiB more; {now['seconds']:,.0f} s",
                flush=True,
            )
            targets.append((f"{evaluator}, GiB beyond the imports", more / 2**30, LIMIT / 2**30, "at most"))
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)
    judge(targets, f"a bank of {options.rows:,} rows", f"a bank of {STORES['bank'][0]:,} rows")


def child(one: str, folder: Path) -> list[str]:
    return [sys.executable, __file__, "--one", one, "--folder", str(folder)]


def write(name: str, bank_rows: int, folder: Path) -> None:
    """A store of random rows and labels, unless it is there. Its rows go to the disk in blocks."""
    import numpy as np

    from featcache.store import open_store
    from featcache.store.from_arrays import write_store

    full, width = STORES[name]
    rows, path = max(1, full * bank_rows // STORES["bank"][0]), folder / f"{name}.zarr"
    if path.exists() and len(open_store(path)) == rows:
        return
    shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    rng, array = np.random.default_rng(list(STORES).index(name)), folder / f"{name}.npy"
    embedding = np.lib.format.open_memmap(array, "w+", np.float16, (rows, width))
    for start in range(0, rows, BLOCK):
        part = embedding[start : start + BLOCK]
        part[:] = rng.standard_normal(part.shape, np.float32)
    ids = [f"image/{row:09d}" for row in range(rows)]
    labels = rng.integers(min(CLASSES, rows), size=rows)
    encoder = "student" if name == "student" else "teacher"
    write_store(path, embedding, labels=labels, sample_ids=ids, encoder_name=encoder, fingerprint=encoder)
    array.unlink()


def measured(command: list[str]) -> dict[str, float]:
    """What the child says of itself, and the most anonymous memory that it was seen with."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        anonymous = 0.0
        while process.poll() is None:
            anonymous = max(anonymous, memory("RssAnon", process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    return {**json.loads(said), "anonymous": anonymous}


def used(evaluator: str, index: str, folder: Path) -> dict[str, float]:
    """Bytes of RSS at its peak, up to the last import and in all; of anonymous memory after the imports; seconds."""
    import faiss  # noqa: F401
    import torch  # noqa: F401

    import evalsuite
    import featcache.store.read  # noqa: F401

    before, anonymous, began = memory("VmHWM"), memory("RssAnon"), time.perf_counter()
    first, second = (folder / f"{name}.zarr" for name in USES[evaluator])
    if evaluator == "knn":
        evalsuite.knn(first, second, **({} if index == "exact" else {"index": index}))
    else:
        evalsuite.fidelity(first, second)
    seconds = time.perf_counter() - began
    return {"peak_before": before, "peak": memory("VmHWM"), "anonymous_before": anonymous, "seconds": seconds}


def memory(what: str, process: int | str = "self") -> float:
    """Bytes that the system counts for a process under this name; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), 0.0)


if __name__ == "__main__":
    main()

"""Does the memory that `extract` takes grow with the corpus? Peak RSS at two sizes, each in a process of its own.

A synthetic encoder and corpus (`synthetic.py`), whose ids are made when asked for: what grows is featcache's own. With
`--list-ids` the corpus holds its ids in a list, as the corpora that come with featcache do.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --rows 50000 1000000
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _targets import judge, span

# Nothing heavy is imported here: until it starts its own program, a new process counts the memory of the one that
# made it as its own.

ROWS = [50_000, 1_000_000]
LIMIT = 1.10  # × the peak at the first size, at most: issue 3, Speed ("within 10 %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--list-ids", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the stores are written; 1.6 GB for a million rows of 768")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(extracted(options.one, options.width, options.list_ids, options.folder)))
        return
    first: dict[str, float] = {}
    targets = []
    for rows in options.rows:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        environment = {**os.environ, "FEATCACHE_HOME": str(folder / "home")}
        command = [sys.executable, __file__, "--one", str(rows), "--width", str(options.width), "--folder", str(folder)]
        try:
            said = subprocess.check_output([*command, *["--list-ids"] * options.list_ids], env=environment)
        finally:
            shutil.rmtree(folder)
        now = json.loads(said)
        first = first or now
        more = (now["peak"] - first["peak"]) / max(1, rows - options.rows[0])
        print(
            f"{rows:,} rows: peak {now['peak'] / 2**20:,.1f} MiB, before extract {now['before'] / 2**20:,.1f}, after the "
            f"last batch {now['batches'] / 2**20:,.1f}; {now['seconds']:,.0f} s; {now['peak'] / first['peak']:.3f} × "
            f"the peak at {options.rows[0]:,} rows, {more:,.1f} bytes more a row",
            flush=True,
        )
        what = f"peak at {rows:,} rows, × the peak at {options.rows[0]:,}"
        targets.append((what, now["peak"] / first["peak"], LIMIT, "at most"))
    judge(targets, span(options.rows), span(ROWS))


def extracted(rows: int, width: int, list_ids: bool, folder: Path) -> dict[str, float]:
    """Bytes of RSS before, its peak up to the last batch, and its peak in all; and seconds."""
    from synthetic import Synthetic, synthetic_encoder

    from featcache.extraction.extract import ExtractionProgress, extract

    corpus, encoder = Synthetic(rows), synthetic_encoder(width)
    if list_ids:
        corpus.ids = list(corpus.ids)  # type: ignore[assignment]
    before, batches, began = peak_bytes(), 0.0, time.perf_counter()

    def progress(at: ExtractionProgress) -> None:
        nonlocal batches
        batches = batches or (peak_bytes() if at.done == rows else 0.0)

    extract(corpus, encoder, folder / "s.zarr", batch_size=256, precision="fp32", progress=progress)
    return {"before": before, "batches": batches, "peak": peak_bytes(), "seconds": time.perf_counter() - began}


def peak_bytes() -> float:
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main()

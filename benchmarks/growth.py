"""Does an image cost more when more are stored already? Microseconds a row, at 10 thousand, 100 thousand, a million.

Extracts a synthetic corpus (`synthetic.py`) of each size into a fresh cache and measures, all in one run:
  opening   from the call to the first batch: the corpus is listed and hashed
  last      the last rows of the extraction, of which the store then holds all the others
  closing   from the last batch to the return: sealed, and registered in the index
  control   a whole extraction of `--more` rows with nothing stored: how fast the machine was at this moment
Then, with that store in the index, over images that it does not hold (misses) and that it does (hits, under other ids):
  extract   a whole extraction of `--more` rows
  find      the index alone
Each in wall and processor time (of all threads; other work on the machine disturbs it less), and as a ratio to the
smallest size. At the end the growth from the size before the largest to the largest is carried on to ten times more.

    OMP_NUM_THREADS=1 python benchmarks/growth.py --rows 10000 100000 1000000
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _targets import judge, span
from synthetic import Synthetic, synthetic_encoder

from featcache.extraction.extract import ExtractionProgress, extract
from featcache.extraction.samples import content_hash
from featcache.store import FeatureStore
from featcache.store.index import KnownRows

ROWS = [10_000, 100_000, 1_000_000]
GROWTH = 1.5
"""× the processor time a row at the smallest size, at most, of what is JUDGED: issue 3, Speed, "does not grow". A cost
in step with the rows stored would be many times as high. Less than this proves nothing: `control`, which no stored row
can slow down, came out up to 1.36 × as high on a busy machine."""
JUDGED = ("opening", "last", "closing", "extract misses", "extract hits")
"""All that an image costs. `find` is a part of the last two, and a search of a sorted list: with the logarithm of the
rows, it does grow."""
LAST = 32_768
"""At most so many rows are "the last"."""
FINDS = 20_000
FAR = 10**12
"""Images from this number on are in no store."""


class Cost(NamedTuple):
    """Microseconds a row."""

    wall: float
    processor: float


class Clock:
    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def to(self, later: "Clock", rows: int) -> Cost:
        return Cost((later.wall - self.wall) / rows * 1e6, (later.processor - self.processor) / rows * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--more", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--folder", type=Path, help="where the stores are written; 1.6 GB for a million rows of 768")
    options = parser.parse_args()
    costs: dict[int, dict[str, Cost]] = {}
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            os.environ["FEATCACHE_HOME"] = str(Path(folder) / "home")
            costs[rows] = measured(rows, options.more, options.width, Path(folder))
        first = costs[options.rows[0]]
        print(f"{rows:,} rows: µs a row, wall / processor, and × {options.rows[0]:,} rows:")
        for what, cost in costs[rows].items():
            wall, processor = cost.wall / first[what].wall, cost.processor / first[what].processor
            print(f"  {what:14} {cost.wall:9.2f} / {cost.processor:9.2f}   {wall:6.2f} / {processor:6.2f}", flush=True)
    if len(options.rows) > 1:
        before, largest = options.rows[-2:]
        decades = np.log10(largest / before)
        print(f"{10 * largest:,} rows, if each tenfold adds what the last one did (not measured):")
        for what, cost in costs[largest].items():
            wall, processor = (
                now + max(0.0, now - was) / decades for was, now in zip(costs[before][what], cost, strict=True)
            )
            print(f"  {what:14} {wall:9.2f} / {processor:9.2f}")
    last = costs[options.rows[-1]]
    targets = [
        (f"{what} a row, × at the smallest size", last[what].processor / first[what].processor, GROWTH, "at most")
        for what in JUDGED
    ]
    judge(targets, span(options.rows), span(ROWS))


def measured(rows: int, more: int, width: int, folder: Path) -> dict[str, Cost]:
    """What each step costs a row, on the way to a store of `rows` and next to it."""
    store, costs = extracted(Synthetic(rows), width, folder / "s.zarr")
    home, began = os.environ["FEATCACHE_HOME"], Clock()
    os.environ["FEATCACHE_HOME"] = str(folder / "empty")
    extracted(Synthetic(more), width, folder / "control.zarr")
    costs["control"] = began.to(Clock(), more)
    os.environ["FEATCACHE_HOME"] = home
    for what, corpus in {"misses": Synthetic(more, FAR), "hits": Synthetic(more, rows - more, "other")}.items():
        if what == "hits" and more > rows:
            corpus = Synthetic(rows, 0, "other")
        began = Clock()
        extracted(corpus, width, folder / f"{what}.zarr")
        costs[f"extract {what}"] = began.to(Clock(), len(corpus))
    known = KnownRows(store.manifest, besides=folder / "none.zarr")
    numbers = np.random.default_rng(0).integers(0, rows, FINDS)
    for what, found, shift in (("misses", False, 2 * FAR), ("hits", True, 0)):
        corpus = Synthetic(FAR, shift)
        contents = [content_hash(corpus.read(int(number))) for number in numbers]
        for content in contents:  # pages warm
            assert (known.find(content, "") is not None) == found
        began = Clock()
        for content in contents:
            known.find(content, "")
        costs[f"find {what}"] = began.to(Clock(), FINDS)
    return costs


def extracted(corpus: Synthetic, width: int, out: Path) -> tuple[FeatureStore, dict[str, Cost]]:
    """The store, and the cost of opening, of the last rows and of closing."""
    seen: list[tuple[int, Clock]] = []

    def progress(at: ExtractionProgress) -> None:
        if len(seen) < 2 or at.done > seen[-1][0]:
            seen.append((at.done, Clock()))

    encoder, began = synthetic_encoder(width), Clock()
    store = extract(corpus, encoder, out, batch_size=256, precision="fp32", progress=progress)
    ended, rows = Clock(), len(corpus)
    start, from_then = next((done, clock) for done, clock in seen if done >= rows - LAST)
    return store, {
        "opening": began.to(seen[0][1], rows),
        "last": from_then.to(seen[-1][1], rows - start),
        "closing": seen[-1][1].to(ended, rows),
    }


if __name__ == "__main__":
    main()

"""What the engine `ray` adds to a unit: milliseconds of units of no work, and its time over that of `local` where they have some.

Both on one worker, in one run, interleaved, without what comes before the first unit is finished (the cluster, the worker's imports).

    OMP_NUM_THREADS=1 python benchmarks/ray_overhead.py --units 200 --seconds 0.2
"""

import argparse
import time
from collections.abc import Generator, Iterable

from featcache.engines import Engine, Report, open_engine


class Busy:
    """So many seconds of processor time a span."""

    threads = 1

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, spans: Iterable[range]) -> Generator[Report, None, None]:
        for span in spans:
            ends = time.process_time() + self.seconds
            while time.process_time() < ends:
                pass
            yield Report(rows=len(span), batches=1)


def seconds_a_unit(engine: Engine, units: int, work: Busy) -> float:
    """From the first report to the last."""
    told = [time.perf_counter() for _ in engine.map([range(i, i + 1) for i in range(units)], work)]
    return (told[-1] - told[0]) / (units - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.2, help="of processor time, that a unit with work takes")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    ray, local = open_engine("ray:@workers=1"), open_engine("local")
    for _ in range(asked.rounds):
        empty = 1000 * seconds_a_unit(ray, asked.units, Busy(0))
        busy = [seconds_a_unit(each, max(2, asked.units // 10), Busy(asked.seconds)) for each in (local, ray)]
        print(f"{empty:.1f} ms a unit of no work; {asked.seconds:g} s of work: local {busy[0]:.3f} s, ray {busy[1]:.3f} s "
              f"a unit, {busy[1] / busy[0]:.3f} ×")  # fmt: skip


if __name__ == "__main__":
    __import__("ray_overhead").main()  # under this name workers find `Busy`, too

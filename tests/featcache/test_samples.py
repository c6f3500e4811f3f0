"""Reading in bursts: the order of `map`, an idle pool in between, and in the background where reading only waits."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from featcache.extraction.samples import bursts, prefetch


@pytest.mark.parametrize("read", [bursts, prefetch])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 23])
def test_all_of_them_in_order(read, count):
    with ThreadPoolExecutor(3) as pool:
        assert list(read(lambda i: i * i, iter(range(count)), pool, 4)) == [i * i for i in range(count)]


def test_nothing_is_read_while_a_burst_is_used(monkeypatch):
    monkeypatch.setattr(time, "process_time", time.perf_counter)  # as if every second were spent computing
    begun = []
    with ThreadPoolExecutor(3) as pool:
        for taken, _ in enumerate(bursts(begun.append, range(12), pool, 4)):
            assert len(begun) == 4 * (taken // 4 + 1)


def test_reading_that_only_waits_goes_on_in_the_background(monkeypatch):
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    begun, later = [], threading.Event()

    def read(i):
        begun.append(i)
        if len(begun) > 6:
            later.set()
        return i

    with ThreadPoolExecutor(1) as pool:
        reading = bursts(read, range(12), pool, 4)
        assert [next(reading) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert later.wait(60), "row 6 is not read before row 5 is asked for"
        assert list(reading) == list(range(5, 12))


def test_an_error_comes_where_its_result_would_have():
    def read(i):
        if i == 5:
            raise OSError("gone")
        return i

    with ThreadPoolExecutor(2) as pool, pytest.raises(OSError, match="gone"):
        list(bursts(read, range(12), pool, 4))

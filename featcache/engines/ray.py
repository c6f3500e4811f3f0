"""`ray[:ADDRESS]`: workers of a Ray cluster (extra `ray`), each with encoders and corpus of its own.

Ray Data's pool of actors begins and ends them, and gives the span of one that was lost to another. Without an address it is
the cluster that $RAY_ADDRESS or `ray start` on this machine name, or else one on the cores here, for as long as it takes.
What may follow, `ray:@workers=2` say: `@workers=N`, at most so many, by default as there is room for; `@cpus=N` and
`@gpus=N` that each takes, by default as many cores as PyTorch has threads here, or one beside a GPU; `@stall=SECONDS`
without a finished span that end it.
"""

import contextlib
import importlib.util
import logging
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featcache.engines import Engine, Report, Work
from featcache.specs import options_in

PAUSES = (1.0, 4.0, 16.0)
"""Seconds before a span is tried again that a service failed."""
SERVICE_ERRORS = (ConnectionError, TimeoutError)


@dataclass(frozen=True, kw_only=True)
class Ray(Engine):
    """A cluster, and what of it is taken: the options of the spec."""

    address: str | None = None
    workers: int | None = None
    cpus: float | None = None
    gpus: float = 0.0
    stall: float = 3600.0

    def map(self, spans: Sequence[range], work: Work) -> Generator[Report, None, None]:
        """Raises also TimeoutError, where nothing was finished for `stall` seconds."""
        pickled = pickle.dumps(work)  # refused here what cannot travel
        if not spans:
            return
        # As many cores as threads, which decide bits: on fewer they would wait for each other.
        cpus = self.cpus or float(1 if self.gpus else getattr(work, "threads", 1))
        with _connected(self.address):
            for row in self._computed(spans, pickled, cpus):
                done = pickle.loads(row["done"])
                if isinstance(done, Exception):
                    raise done
                yield from done

    def _computed(self, spans: Sequence[range], pickled: bytes, cpus: float) -> Generator[dict[str, Any], None, None]:
        """A row of each span, in the order that they are finished in."""
        from ray.data import ActorPoolStrategy, from_items
        from ray.data.exceptions import ExecutionTimeoutError

        here = {name: value for name, value in os.environ.items() if name.startswith("FEATCACHE_")}
        most = min(self.workers or len(spans), len(spans))
        pool = ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=most if self.workers else 1, max_tasks_in_flight_per_actor=2
        )
        rows = from_items([{"first": span.start, "stop": span.stop} for span in spans], override_num_blocks=len(spans))
        rows = rows.map(
            Worker, fn_constructor_args=(pickled, os.getcwd(), here), compute=pool, num_cpus=cpus, num_gpus=self.gpus
        )
        rows.context.max_errored_blocks = 0
        rows.context.enable_progress_bars = rows.context.print_on_execution_start = False
        rows.context.execution_no_progress_timeout_s = self.stall
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            yield from rows.iter_rows()
        except ExecutionTimeoutError:
            raise TimeoutError(
                f"engine ray: nothing was finished for {self.stall:g} s, so it was ended (is there a node with {cpus:g} "
                f"cores and {self.gpus:g} GPUs? is a unit slower? then raise @stall=); the same command resumes"
            ) from None


class Worker:
    """In a process of its own: the work as it was pickled, in the folder and with the settings of whoever sent it."""

    def __init__(self, pickled: bytes, folder: str, settings: Mapping[str, str]):
        os.environ.update(settings)
        with contextlib.suppress(OSError):  # where it is another machine's, only whole paths are found
            os.chdir(folder)
        self._pickled = pickled
        self._work: Work = pickle.loads(pickled)

    def __call__(self, span: Mapping[str, Any]) -> dict[str, bytes]:
        """Its reports, or why there are none: an error is a value, since Ray would tell of it in many lines."""
        for pause in (*PAUSES, None):
            try:
                return {"done": pickle.dumps(list(self._work([range(int(span["first"]), int(span["stop"]))])))}
            except Exception as error:
                self._work = pickle.loads(self._pickled)  # what was begun of the span is forgotten
                if pause is None or not isinstance(error, SERVICE_ERRORS):
                    return {"done": _pickled_error(error)}
                time.sleep(pause)
        raise AssertionError


def _pickled_error(error: Exception) -> bytes:
    try:
        pickle.loads(written := pickle.dumps(error))
    except Exception:  # of a kind that does not travel
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return written


@contextlib.contextmanager
def _connected(address: str | None) -> Generator[None, None, None]:
    """Within a cluster, which the program may be connected to already. Raises ValueError where there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to Ray's makers
    import ray

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong is told here, in one line
    if ray.is_initialized():
        yield
        return
    stopped = signal.getsignal(signal.SIGTERM)
    try:
        if at := re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address or ""):
            socket.create_connection((at[1], int(at[2])), timeout=10).close()  # Ray itself tries for minutes
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"engine ray:{address or ''}: no cluster there ({said}); begin one: ray start --head, or set "
            "RAY_AUTH_MODE=token where it has tokens"
        ) from None
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stopped)  # Ray's own would end this process without a word
        yield
    finally:
        ray.shutdown()


def open_engine(rest: str) -> Ray:
    """Raises ValueError where Ray is not installed, or for an option that there is not."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("engine ray: needs the ray package: pip install 'featcache[ray]'")
    address, options = re.fullmatch(r"([^@]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    given: dict[str, Any] = {}
    for name, value in options_in(options, f"ray:{rest}", ("workers", "cpus", "gpus", "stall")).items():
        whole = r"[1-9]\d*" if name == "workers" else r"\d*\.?\d+"
        if not re.fullmatch(whole, value) or not float(value):
            raise ValueError(f"engine ray:{rest}: @{name}={value}: give a number above 0 (of workers, a whole one)")
        given[name] = int(value) if name == "workers" else float(value)
    return Ray(address=address or None, **given)

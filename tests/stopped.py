"""Runs that are stopped between two batches, and what they leave."""

from collections.abc import Callable
from pathlib import Path


class Stop(Exception):
    """Ends a run, as a kill would."""


def stop_after(batches: int) -> Callable[[object], None]:
    """A progress callback that stops the run after so many batches."""
    left = [batches]

    def progress(at: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return progress


def files(path: str | Path) -> dict[str, bytes]:
    """All files below a folder, by their path in it."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}

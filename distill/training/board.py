"""TensorBoard's curves of a run."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from distill.training.run import RESUMES, Run
from featcache.disk.refusals import writing


@contextlib.contextmanager
def tensorboard(run: Run, first_step: int) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
    """Yields what writes metrics of a step; those of `first_step` and later ones that are there already go.

    Raises:
        OSError: the disk is full, or refuses.
    """
    events, telling = f"{run.path}: TensorBoard's events", threading.excepthook
    again = RESUMES.format(run.path)

    def quiet(thrown: threading.ExceptHookArgs) -> None:  # its thread's error is raised here again
        if not isinstance(thrown.exc_value, OSError):
            telling(thrown)

    threading.excepthook = quiet
    try:
        with writing(events, again):
            board = SummaryWriter(str(run.path), purge_step=first_step)

        def write(metrics: Mapping[str, Any], step: int) -> None:
            with writing(events, again):
                for name, value in metrics.items():
                    board.add_scalar(name, value, step)
                board.flush()

        try:
            yield write
        finally:
            with contextlib.suppress(OSError):  # told by `flush`, or the reason why this ends is told
                board.close()
    finally:
        threading.excepthook = telling

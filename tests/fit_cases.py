"""A small fit, what its tests share."""

from pathlib import Path

EPOCHS, BATCH, IMAGES, TEACHER, STUDENT = 3, 16, 64, 12, 8
STEPS = EPOCHS * IMAGES // BATCH
SPEED = ("images_per_second", "wait_share")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_speed(metrics: list[dict]) -> list[dict]:
    assert all(speed in record for record in metrics for speed in SPEED)
    return [{key: value for key, value in record.items() if key not in SPEED} for record in metrics]


class Interrupted(BaseException):
    """Neither an error nor Ctrl-C: as if the process had been killed there."""


def interrupt_at(stage: str, done: int):
    def progress(at):
        if (at.stage, at.done) == (stage, done):
            raise Interrupted

    return progress

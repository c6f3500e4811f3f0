"""What a disk refuses, told as a user needs it."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

RESUMES = "run the same command again: it resumes"


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], again: str = RESUMES, out: str = "--out", need: int = 0) -> Iterator[None]:
    """Errors of the system inside say which target it is, what happened, and what to do.

    Args:
        path: the target.
        again: what to do once the reason is gone.
        out: what else the user may choose.
        need: bytes to be written, where known.

    Raises:
        OSError: of the same number as the system's own.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a service, not a disk: told already
            raise
        said = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = f": {need:,} bytes to write" if need else ""
            message = f"{path}: its disk is full ({said}){size}; make room, then {again}"
        elif error.errno == errno.EFBIG:
            message = (
                f"{path}: its files may not be that large here ({said}); raise the limit (`ulimit -f`), then {again}"
            )
        elif error.errno == errno.EBUSY:
            message = f"{path}: in use, or where a disk is mounted ({said}); choose a folder inside it as {out}"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            message = f"{path}: cannot be written ({said}); choose another {out}, or make it writable and {again}"
        else:
            message = f"{path}: cannot be read or written ({said}); check the path and its disk, then {again}"
        raise OSError(error.errno, message) from error


def destination(path: str | os.PathLike[str]) -> Path:
    """Where what is written to `path` goes: to the place that a link there leads to, and the link stays.

    Raises:
        ValueError: the link leads nowhere that exists, or to itself.
    """
    if not Path(path).is_symlink():
        return Path(path)
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise ValueError(f"{path}: a link that leads to itself; remove it, or choose another path")
    if not real.parent.is_dir():
        raise ValueError(
            f"{path}: a link to {real}, whose folder is not there; mount its disk or make the folder, or choose another path"
        )
    return real


def refuse_unmakeable(path: Path) -> None:
    """What making this folder, and those above it, would raise; nothing is made.

    Raises:
        OSError: the system's own.
    """
    missing = [each for each in (path, *path.absolute().parents) if not os.path.lexists(each)]
    there = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if not there.is_dir():
        kind, number = (NotADirectoryError, errno.ENOTDIR) if missing else (FileExistsError, errno.EEXIST)
        raise kind(number, os.strerror(number), str(path))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(missing[-1] if missing else path))


def refuse_mount_point(path: str | os.PathLike[str]) -> None:
    """A folder that a disk is mounted at can be filled, but neither replaced nor removed.

    Raises:
        ValueError: `path` is one.
    """
    if os.path.ismount(path):
        raise ValueError(
            f"{path}: a disk is mounted here, and a folder cannot be replaced or removed where one is; give a folder "
            f"inside it, such as {Path(path) / 'teacher.zarr'}"
        )


def refuse_inside_store(path: str | os.PathLike[str]) -> None:
    """A sealed store accounts for every file in it, and mending it removes all others.

    Raises:
        ValueError: `path` would lie inside one.
    """
    if store := _store_around(path):
        raise ValueError(
            f"{path}: would lie inside a store, {store}, and be removed when that is mended; choose another path"
        )


def _store_around(path: str | os.PathLike[str]) -> Path | None:
    return next((each for each in Path(os.path.realpath(path)).parents if (each / "zarr.json").exists()), None)


def require_writable(path: str | os.PathLike[str], what: str = "path") -> None:
    """Before any work: a file can be made at `path`. Nothing is left behind.

    Raises:
        ValueError: it cannot; give another `what`.
    """
    target, reason = Path(path), None
    try:
        if target.exists() and not target.is_file():
            reason = "it is a folder" if target.is_dir() else "it is no plain file"
        if _store_around(target):
            reason = "it would lie inside a store"
        folder = next(each for each in target.absolute().parents if each.exists())
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ValueError(f"cannot write {path} ({reason}); give another {what}")

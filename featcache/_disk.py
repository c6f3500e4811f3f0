"""What a disk refuses, told as a user needs it."""

import contextlib
import errno
import os
from collections.abc import Iterator

RESUMES = "run the same command again: it resumes"


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], again: str = RESUMES, out: str = "--out") -> Iterator[None]:
    """Errors of the system inside say which target it is, what happened, and what to do.

    Args:
        path: the target.
        again: what to do once the reason is gone.
        out: what else the user may choose.

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
            message = f"{path}: its disk is full ({said}); make room, then {again}"
        elif error.errno == errno.EFBIG:
            message = (
                f"{path}: its files may not be that large here ({said}); raise the limit (`ulimit -f`), then {again}"
            )
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            message = f"{path}: cannot be written ({said}); choose another {out}, or make it writable and {again}"
        else:
            message = f"{path}: cannot be read or written ({said}); check the path and its disk, then {again}"
        raise OSError(error.errno, message) from error

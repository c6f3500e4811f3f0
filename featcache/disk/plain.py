"""Local files of a corpus: nothing but plain files is opened, and no folder is left out because it cannot be listed."""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterator


def read_plain(path: str | os.PathLike[str], count: int = -1) -> bytes:
    """The file at `path`, or its first `count` bytes.

    Raises:
        OSError: it is a pipe, a socket or a device, which might never end, or whatever the system says.
    """
    # A pipe without a writer would wait in `open` already.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "a pipe, a socket or a device, no file", str(path))
        return file.read(count)


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in `folder`.

    Raises:
        OSError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise unlisted(folder, error) from error


def unlisted(path: str, error: OSError) -> OSError:
    """What to say of a `path` that cannot be looked into."""
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    return OSError(
        error.errno,
        f"{shown}: cannot be listed ({error.strerror or error}), so images would be missing; make it readable, or move it away",
    )


def require_listable(folder: str) -> None:
    """Every folder under `folder` can be listed.

    Raises:
        OSError: one cannot.
    """

    def refuse(error: OSError) -> None:
        raise unlisted(str(error.filename or folder), error) from error

    for _ in os.walk(folder, onerror=refuse):
        pass


def matching(pattern: str) -> list[str]:
    """The paths that `pattern` stands for, sorted: `glob.glob`, which leaves out what it cannot list.

    Raises:
        OSError: a folder that may hold some of them cannot be listed.
    """
    return sorted(_matching(pattern))


def _matching(pattern: str) -> Iterator[str]:
    folder, name = os.path.split(pattern)
    if not glob.has_magic(pattern):
        yield from [pattern] if os.path.lexists(pattern) else []
        return
    folders = list(_matching(folder)) if glob.has_magic(folder) else [folder]
    for each in folders:
        if not os.path.isdir(each or "."):
            continue
        if glob.has_magic(name):
            names = [entry.name for entry in entries(each or ".")]
            hidden = name.startswith(".")
            yield from (os.path.join(each, n) for n in fnmatch.filter(names, name) if hidden or not n.startswith("."))
        elif os.path.lexists(os.path.join(each, name)):
            yield os.path.join(each, name)

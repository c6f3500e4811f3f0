"""Where featcache keeps what it makes for itself. What is only kept to save time goes, where that cannot be written, to
a folder that is gone with this process."""

import logging
import os
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger("featcache")


def cache_home() -> Path:
    """$FEATCACHE_HOME, by default ~/.cache/featcache.

    Raises:
        ValueError: the system knows no home of this user, and the folder in its stead is another user's.
    """
    if given := os.environ.get("FEATCACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "featcache"
    except RuntimeError:  # a user that the system does not know, as in some containers
        user = os.getuid() if hasattr(os, "getuid") else 0  # Windows has none; there all files are user 0's
        home = Path(tempfile.gettempdir()) / f"featcache-{user}"
        if home.exists() and home.stat().st_uid != user:
            raise ValueError(f"{home}: another user's; set FEATCACHE_HOME to a folder of your own") from None
        return home


def writable_home(*below: str) -> Path:
    """The place `below` under `cache_home`, whether it is there or not, if it can be written; else under `temporary_home`,
    and a warning says so."""
    home = cache_home()
    wanted = home.joinpath(*below)
    nearest = next(str(each) for each in (wanted, *wanted.absolute().parents) if os.path.lexists(each))
    if os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK):
        return wanted
    _say_refused(home, nearest)
    return temporary_home().joinpath(*below)


@cache
def temporary_home() -> Path:
    """A folder of this process alone, gone when it ends."""
    _kept.append(tempfile.TemporaryDirectory(prefix="featcache-"))
    return Path(_kept[0].name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _say_refused(home: Path, nearest: str) -> None:
    log.warning(
        "%s cannot be written (%s): what is kept there is made again by every command; set FEATCACHE_HOME to a folder of "
        "your own",
        home,
        nearest,
    )


def found_under(folder: Path, pattern: str) -> list[Path]:
    """Sorted paths in a folder that match; none where it is not there, or may not be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []

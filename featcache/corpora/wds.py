"""Images in tar files, as webdataset writes them, local or at URLs; random access through an index made once."""

import glob
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from featcache.corpora._labels import from_folders, from_numbers
from featcache.corpora._shards import SUFFIX, Place, Shard
from featcache.corpora._urls import asking_service, is_url, open_filesystem
from featcache.corpora.folder import EXTENSIONS

_AT_ONCE = 8  # shards asked for at once: a service answers slowly, but many


class WebDataset:
    """The images in one or more tar files: `wds:photos-{000..099}.tar`, `wds:s3://bucket/*.tar`, `wds:a.tar.gz`.

    A sample's key is its member's name up to the first dot of the base name; its image is the member with an
    image extension; its label is the integer in the `.cls` member, else the first folder of the key. The
    sample id is SHARD/KEY, where SHARD is the file's name without `.tar`, with the folders that a pattern
    chose among: the same for shards on local disk and at a URL.

    Each shard is indexed once, under $FEATCACHE_HOME/shards, by path or URL, size and time of change or ETag: a
    changed shard is indexed again. A compressed shard cannot be read from the middle, so it is also unpacked there,
    once; that takes the disk space of its contents.

    Raises:
        ValueError: on opening, a shard is missing, damaged or cannot be read.
        OSError: on reading, a shard has changed since it was opened.
        ConnectionError: on reading, the service that a URL names cannot be asked.
    """

    def __init__(self, pattern: str):
        self.spec = f"wds:{pattern}"
        try:
            places, names = _places_at(pattern) if is_url(pattern) else _places_under(pattern)
            self._shards = _open_all(places, self.spec)
        except ConnectionError as error:
            raise ValueError(f"{self.spec}: {error}; check the address, the network and credentials") from None
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{self.spec}: more than one shard is called {twice}; name every shard once")

        keys = [key for shard in self._shards for key in shard.keys]
        if not keys:
            shards = _few([place.name for place in places])
            raise ValueError(f"{self.spec}: no images in {shards} (looked for {', '.join(sorted(EXTENSIONS))})")
        self.ids = [f"{name}/{key}" for name, shard in zip(names, self._shards, strict=True) for key in shard.keys]
        numbers = [number for shard in self._shards for number in shard.labels]
        numbered = any(number is not None for number in numbers)
        self._labels, self.class_names = from_numbers(numbers, self.spec) if numbered else from_folders(keys)
        self._starts = np.cumsum([0] + [len(shard.keys) for shard in self._shards])

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        i = range(len(self.ids))[i]
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shards[number].read(i - int(self._starts[number]))

    def label(self, i: int) -> int:
        return self._labels[i]


def _places_under(pattern: str) -> tuple[list[Place], list[str]]:
    """The local files that `pattern` names, and their shard names: what differs, without the ending."""
    paths = []
    for path in [pattern] if os.path.exists(pattern) else _expand(pattern):
        paths += sorted(glob.glob(path)) or [path] if glob.has_magic(path) and not os.path.exists(path) else [path]
    root = os.path.dirname(_constant(pattern))
    names = [SUFFIX.sub("", Path(os.path.relpath(path, root)).as_posix()) for path in paths]
    return [Place(path, str(Path(path).resolve())) for path in paths], names


def _places_at(url: str) -> tuple[list[Place], list[str]]:
    """The same for the address of one file, or the pattern of several."""
    filesystem, pattern = open_filesystem(url)
    paths = []
    for path in _expand(pattern):
        if glob.has_magic(path):
            with asking_service(path):
                filesystem.invalidate_cache()  # else a listing made earlier answers
                paths += sorted(filesystem.glob(path)) or [path]
        else:
            paths.append(path)
    root = posixpath.dirname(_constant(pattern))
    names = [SUFFIX.sub("", path.removeprefix(root).lstrip("/")) for path in paths]
    return [Place(filesystem.unstrip_protocol(path), path, filesystem) for path in paths], names


def _open_all(places: list[Place], spec: str) -> list[Shard]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        states = list(pool.map(_state, places))
        missing = [place.name for place, state in zip(places, states, strict=True) if state is None]
        if missing:
            raise ValueError(f"{spec}: no such file: {_few(missing)}; correct the pattern, or put the shards back")
        wrong = next((place.name for place in places if not SUFFIX.search(place.name)), None)
        if wrong is not None:
            raise ValueError(f"{spec}: {wrong} is not a .tar, .tar.gz or .tgz file; leave it out of the pattern")
        return list(pool.map(Shard, places, states))


def _state(place: Place) -> list[int | str | None] | None:
    """None for a file that is not there, or that this user may not look at."""
    try:
        return place.state()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


def _constant(pattern: str) -> str:
    """What all names that `pattern` stands for start with."""
    return re.split(r"[{*?\[]", pattern, maxsplit=1)[0]


def _expand(pattern: str) -> Iterator[str]:
    """Brace ranges {000..099} and lists {a,b}, as the shell expands them."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        yield pattern
        return
    first, last, listed = match.groups()
    if listed is not None:
        choices = listed.split(",")
    else:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    for choice in choices:
        yield from _expand(pattern[: match.start()] + choice + pattern[match.end() :])


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


open_corpus = WebDataset

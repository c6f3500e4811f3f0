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

from featcache.corpora import Listed, in_words
from featcache.corpora._images import suffixes
from featcache.corpora._labels import from_folders, from_values
from featcache.corpora._options import split_options
from featcache.corpora._shards import SUFFIX, Place, Shard, Wanted
from featcache.disk.plain import matching
from featcache.disk.urls import asking_service, is_url, local_path, open_filesystem

_AT_ONCE = 8  # shards asked for at once: a service answers slowly, but many


class WebDataset(Listed):
    """The images in one or more tar files: `wds:photos-{000..099}.tar`, `wds:s3://bucket/*.tar`, `wds:a.tar.gz`.

    A sample's key is its member's name up to the first dot of the base name; its image is the member with an
    image extension, or that begins like one; its label is what the `.cls` members say, read as tables' labels are
    (`_labels.from_values`), or without any the first folder of the key. `wds:a.tar@image=left.png@label=json.species`
    chooses other members by what follows the first dot, `@label=` none. The sample id is SHARD/KEY, where SHARD is the
    file's name without `.tar`, with the folders that a pattern chose among: the same for shards on local disk and at a URL.

    Each shard is indexed once, under $FEATCACHE_HOME/shards, by path or URL, size and time of change or ETag, and the
    formats that can be decoded: a changed shard is indexed again, and any when more can be read. A compressed shard
    (gzip, bzip2, xz, zstd; by its content, whatever its name) cannot be read from the middle, so it is also unpacked
    there, once; that takes the disk space of its contents.

    Raises:
        ValueError: on opening, a shard is missing, damaged or cannot be read.
        OSError: on opening, a folder that may hold shards cannot be listed; on reading, a shard has changed since it
            was opened.
        ConnectionError: on reading, the service that a URL names cannot be asked.
    """

    def __init__(self, rest: str):
        self.spec = f"wds:{rest}"
        pattern, options = split_options("wds", rest, ("image", "label"))
        try:
            self._places, names = _places(pattern)
            self._shards = _open_all(self._places, self.spec, Wanted(**options))
        except ConnectionError as error:
            raise ValueError(f"{self.spec}: {error}; check the address, the network and credentials") from None
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{self.spec}: more than one shard is called {twice}; name every shard once")

        keys = [key for shard in self._shards for key in shard.keys]
        self.passed_over = dict(sum((Counter(shard.passed_over) for shard in self._shards), Counter()).most_common())
        if not keys:
            shards, kinds = _few([place.name for place in self._places]), ", ".join(sorted(suffixes()))
            wanted = f"@image={options['image']}" if "image" in options else f"looked for {kinds}"
            passed = f"; passed over: {in_words(self.passed_over)}" if self.passed_over else ""
            raise ValueError(f"{self.spec}: no images in {shards} ({wanted}){passed}")
        self.ids = [f"{name}/{key}" for name, shard in zip(names, self._shards, strict=True) for key in shard.keys]
        said = [label for shard in self._shards for label in shard.labels]
        labelled = any(label is not None for label in said) or "label" in options
        self.labels, self.class_names = from_values(said, self.spec) if labelled else from_folders(keys)
        self._starts = np.cumsum([0] + [len(shard.keys) for shard in self._shards])

    def read(self, i: int) -> bytes:
        i = range(len(self.ids))[i]
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shards[number].read(i - int(self._starts[number]))


def _places(pattern: str) -> tuple[list[Place], list[str]]:
    """The files that `pattern` names, and their shard names."""
    return (
        _places_at(pattern)
        if is_url(pattern) and not local_path(pattern)
        else _places_under(local_path(pattern) or pattern)
    )


def _places_under(pattern: str) -> tuple[list[Place], list[str]]:
    """The local files that `pattern` names, and their shard names: what differs, without the ending."""
    paths = []
    for path in [pattern] if os.path.exists(pattern) else _expand(pattern):
        paths += matching(path) or [path] if glob.has_magic(path) and not os.path.exists(path) else [path]
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


def _open_all(places: list[Place], spec: str, wanted: Wanted) -> list[Shard]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        states = list(pool.map(_state, places))
        missing = [place.name for place, state in zip(places, states, strict=True) if state is None]
        if missing:
            raise ValueError(f"{spec}: no such file: {_few(missing)}; correct the pattern, or put the shards back")
        wrong = next(
            (place.name for place in places if not SUFFIX.search(place.name) or os.path.isdir(place.path)), None
        )
        if wrong is not None:
            remedy = (
                f"write 'wds:{wrong}/*.tar' for those in it" if os.path.isdir(wrong) else "leave it out of the pattern"
            )
            raise ValueError(f"{spec}: {wrong} is not a .tar, .tar.gz or .tgz file; {remedy}")
        return list(pool.map(Shard, places, states, [wanted] * len(places)))


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


def named_files(rest: str) -> list[str] | None:
    return None if is_url(rest) else [place.path for place in WebDataset(rest)._places]

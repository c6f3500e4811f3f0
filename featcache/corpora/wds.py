"""Images in tar files, as webdataset writes them; random access through an index made once."""

import errno
import glob
import gzip
import hashlib
import json
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import filelock
import numpy as np

from featcache.cache import cache_home
from featcache.corpora._labels import from_folders, from_numbers
from featcache.corpora._urls import is_url
from featcache.corpora.folder import EXTENSIONS

INDEX_VERSION = 1
SUFFIX = re.compile(r"\.(tar|tar\.gz|tgz)$")


class WebDataset:
    """The images in one or more tar files: `wds:photos-{000..099}.tar`, `wds:shards/*.tar`, `wds:a.tar.gz`.

    A sample's key is its member's name up to the first dot of the base name; its image is the member with an
    image extension; its label is the integer in the `.cls` member, else the first folder of the key. The
    sample id is SHARD/KEY, where SHARD is the file's name without `.tar`, with the folders that a pattern
    chose among.

    Each shard is indexed once, under $FEATCACHE_HOME/shards, by path, size and time of change: a changed
    shard is indexed again. A compressed shard cannot be read from the middle, so it is also unpacked there,
    once; that takes the disk space of its contents.

    Raises:
        ValueError: on opening, a shard is missing, damaged or not local.
        OSError: on reading, a shard has changed since it was opened.
    """

    def __init__(self, pattern: str):
        self.spec = f"wds:{pattern}"
        paths, root = _shards(pattern)
        self._shards = [_index(path) for path in paths]
        names = [SUFFIX.sub("", Path(os.path.relpath(path, root)).as_posix()) for path in paths]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{self.spec}: more than one shard is called {twice}; name every shard once")

        keys = [key for shard in self._shards for key in shard.keys]
        if not keys:
            raise ValueError(f"{self.spec}: no images in {_few(paths)} (looked for {', '.join(sorted(EXTENSIONS))})")
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
        shard, row = self._shards[number], i - int(self._starts[number])
        with open(shard.tar, "rb", buffering=0) as file:
            if _state(os.fstat(file.fileno())) != shard.tar_state:
                raise OSError(errno.ESTALE, f"{shard.tar} has changed since it was opened; open {self.spec} again")
            file.seek(shard.offsets[row])
            return file.read(shard.sizes[row])

    def label(self, i: int) -> int:
        return self._labels[i]


@dataclass(frozen=True)
class _Index:
    """Where the images of one shard lie: in `tar`, which is the shard itself, or its unpacked copy."""

    tar: str
    tar_state: list[int]
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int | None]


def _shards(pattern: str) -> tuple[list[str], str]:
    """The files that `pattern` names, and the folder under which their names differ."""
    if is_url(pattern):
        raise ValueError(f"wds:{pattern}: tar files are read from local disk; copy the shards there first")
    paths, missing = [], []
    for path in [pattern] if os.path.exists(pattern) else _expand(pattern):
        found = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
        paths += found
        missing += [path for path in found or [path] if not os.path.exists(path)]
    if missing:
        raise ValueError(f"wds:{pattern}: no such file: {_few(missing)}; correct the pattern, or put the shards back")
    wrong = next((path for path in paths if not SUFFIX.search(path)), None)
    if wrong is not None:
        raise ValueError(f"wds:{pattern}: {wrong} is not a .tar, .tar.gz or .tgz file; leave it out of the pattern")
    return paths, os.path.dirname(re.split(r"[{*?\[]", pattern, maxsplit=1)[0])


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


def _index(path: str) -> _Index:
    """The index of one shard: the kept one if it is of this very file, else made and kept."""
    shard = Path(path).resolve()
    state = _state(shard.stat())
    stem = f"{shard.name}-{_short(str(shard))}"
    kept = cache_home() / "shards" / f"{stem}-{_short(json.dumps([INDEX_VERSION, *state]))}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(kept.parent / f"{stem}.lock"):  # of several processes, one makes it and the others wait
        index = _kept_index(kept)
        if index is not None:
            return index
        for stale in kept.parent.glob(f"{glob.escape(stem)}-*"):
            stale.unlink(missing_ok=True)
        tar = shard if shard.suffix == ".tar" else _unpack(shard, kept.with_suffix(".tar"))
        try:
            index = _Index(str(tar), _state(tar.stat()), *_members(tar, path))
        except ValueError:
            if tar != shard:
                tar.unlink()
            raise
        if _state(shard.stat()) != state:
            raise ValueError(f"{path}: changed while it was read; wait until it is complete")
        _write_atomically(kept, lambda file: file.write(json.dumps(asdict(index)).encode()))
    return index


def _kept_index(kept: Path) -> _Index | None:
    """The index in the file `kept`; None when there is none, it is damaged, or the file it describes is not that one."""
    try:
        index = _Index(**json.loads(kept.read_text(encoding="utf-8")))
        return index if _state(os.stat(index.tar)) == index.tar_state else None
    except (OSError, ValueError, TypeError):
        return None


def _members(tar: Path, path: str) -> tuple[list[str], list[int], list[int], list[int | None]]:
    """Key, offset, size and `.cls` number of every image in `tar`, in order of appearance; `path` is its name in errors."""
    images: dict[str, list[tuple[str, int, int]]] = {}
    numbers: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                name = posixpath.normpath(member.name).lstrip("/")
                directory, base = posixpath.split(name)
                stem, _, extension = base.partition(".")
                if not member.isreg() or member.issparse() or not stem or not extension:
                    continue
                key = posixpath.join(directory, stem)
                if os.path.splitext(base)[1].lower() in EXTENSIONS:
                    images.setdefault(key, []).append((extension.lower(), member.offset_data, member.size))
                elif extension.lower() == "cls":
                    numbers[key] = _number(archive.extractfile(member).read(64), f"{path}: {name}")  # type: ignore[union-attr]
            end = archive.offset
        with open(tar, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile itself takes this for the end
                raise tarfile.ReadError("no end-of-archive mark")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); copy or write this shard again") from None
    chosen = [_the_image(path, key, members) for key, members in images.items()]
    offsets, sizes = [offset for _, offset, _ in chosen], [size for _, _, size in chosen]
    return list(images), offsets, sizes, [numbers.get(key) for key in images]


def _the_image(path: str, key: str, members: list[tuple[str, int, int]]) -> tuple[str, int, int]:
    """The one image of a sample: `KEY.jpg` before `KEY.mask.png`."""
    plain = [member for member in members if "." not in member[0]] or members
    if len(plain) > 1:
        extensions = ", ".join(f".{extension}" for extension, _, _ in plain)
        raise ValueError(
            f"{path}: {key} has several images ({extensions}); write one image a key (a key ends at the first dot)"
        )
    return plain[0]


def _number(text: bytes, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where} holds {text!r}, which is no integer label; write the shard again") from None


def _unpack(shard: Path, tar: Path) -> Path:
    """Decompress `shard` to `tar`."""
    with open(shard, "rb") as file:  # gzip ends with the unpacked size, modulo 4 GiB
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4))
        needed = max(size, int.from_bytes(file.read(4), "little"))
    room = shutil.disk_usage(tar.parent).free
    remedy = f"unpacking it under {tar.parent} needs at least {needed / 1e9:.2f} GB; free some, or set FEATCACHE_HOME"
    if room < needed:
        raise ValueError(f"{shard}: {room / 1e9:.2f} GB free; {remedy}")
    try:
        with gzip.open(shard, "rb") as packed:
            _write_atomically(tar, lambda file: shutil.copyfileobj(packed, file, 1 << 20))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{shard}: damaged or cut short ({error}); copy or write this shard again") from None
    except OSError as error:
        raise ValueError(f"{shard}: {error.strerror}; {remedy}") from None
    return tar


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Under a name of its own until it is whole: readers see all of it or nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".partial", delete=False) as file:
        try:
            write(file)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns]


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


open_corpus = WebDataset

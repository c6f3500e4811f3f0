"""One tar file of images, local or at a URL: indexed once, then read image by image."""

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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import filelock

from featcache.corpora._urls import asking_service, file_state, read_file, reads_ranges
from featcache.corpora.folder import EXTENSIONS
from featcache.home import cache_home

INDEX_VERSION = 2
SUFFIX = re.compile(r"\.(tar|tar\.gz|tgz)$")
HEADER = tarfile.BLOCKSIZE

_NEAR = 1 << 20  # bytes; to read through a gap this small takes less time than to ask the service again
_AHEAD_NEAR, _AHEAD_FAR = 4 << 20, 8 << 10  # bytes asked for at once, where members are smaller or larger than that


@dataclass(frozen=True)
class Place:
    """Where a file lies: `path` on local disk, or in `filesystem`; `name` is what errors call it."""

    name: str
    path: str
    filesystem: Any = None

    def state(self) -> list[int | str | None]:
        """Size and mark of change. Raises FileNotFoundError, and ConnectionError for a URL that cannot be asked for."""
        return file_state(self.filesystem, self.path) if self.filesystem else _state(os.stat(self.path))


@dataclass(frozen=True)
class Index:
    """Where the images of one shard lie: in `tar`, an unpacked local copy, or, if that is empty, in the shard itself."""

    tar: str
    tar_state: list[int | str | None]
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    headers: list[int]  # CRC-32 of the tar header before each image
    labels: list[int | None]


class _Image(NamedTuple):
    extension: str
    offset: int
    size: int
    header: int


class Shard:
    """The images of one tar file in order of appearance: `keys`, `labels` (the numbers of `.cls` members), `read`.

    The index is kept under $FEATCACHE_HOME/shards. Of a plain shard at a URL no more is transferred for it than the
    headers and what lies within 1 MiB between them. A shard that cannot be read from the middle, which is a compressed
    one or one on a web server without ranges, is copied there, unpacked.

    Raises:
        ValueError: the shard is damaged, or there is no room for its copy.
        ConnectionError: the service that a URL names cannot be asked.
    """

    def __init__(self, source: Place, state: list[int | str | None]):
        self._source, self._index = source, _open(source, state)
        self.keys, self.labels = self._index.keys, self._index.labels

    def read(self, row: int) -> bytes:
        """The image in `row`.

        Raises:
            OSError: ESTALE, the shard has changed or gone since it was opened.
            ConnectionError: the service cannot be asked.
        """
        index = self._index
        start, end = index.offsets[row] - HEADER, index.offsets[row] + index.sizes[row]
        try:
            if self._source.filesystem and not index.tar:
                data, changed = read_file(self._source.filesystem, self._source.path, start, end), False
            else:
                with open(index.tar or self._source.path, "rb", buffering=0) as file:
                    changed = _state(os.fstat(file.fileno())) != index.tar_state
                    file.seek(start)
                    data = file.read(end - start)
        except FileNotFoundError:
            changed, data = True, b""
        # a header read along with each image costs no request, and tells when a shard at a URL has been replaced
        if changed or len(data) != end - start or zlib.crc32(data[:HEADER]) != index.headers[row]:
            raise OSError(errno.ESTALE, f"{self._source.name} has changed since it was opened; open the corpus again")
        return data[HEADER:]


def _open(source: Place, state: list[int | str | None]) -> Index:
    """The index of one shard: the kept one if it is of this very file, else made and kept."""
    stem = f"{posixpath.basename(source.path)}-{_short(source.name if source.filesystem else source.path)}"
    kept = cache_home() / "shards" / f"{stem}-{_short(json.dumps([INDEX_VERSION, *state]))}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(kept.parent / f"{stem}.lock"):  # of several processes, one makes it and the others wait
        index = _kept_index(kept)
        if index is not None:
            return index
        for stale in kept.parent.glob(f"{glob.escape(stem)}-*"):
            stale.unlink(missing_ok=True)
        copy = _copy(source, state, kept.with_suffix(".tar"))
        try:
            with _opened(source, state[0]) if copy is None else open(copy, "rb") as file:
                members = _members(file, source.name)
        except ValueError:
            if copy is not None:
                copy.unlink()
            raise
        if source.state() != state:
            raise ValueError(f"{source.name}: changed while it was read; wait until it is complete")
        index = Index(str(copy or ""), _state(copy.stat()) if copy else state, *members)
        _write_atomically(kept, lambda file: file.write(json.dumps(asdict(index)).encode()))
    return index


def _kept_index(kept: Path) -> Index | None:
    """The index in the file `kept`; None when there is none, or it is damaged, or its copy of the shard is."""
    try:
        index = Index(**json.loads(kept.read_text(encoding="utf-8")))
        return index if not index.tar or _state(os.stat(index.tar)) == index.tar_state else None
    except (OSError, ValueError, TypeError):
        return None


def _members(file: Any, name: str) -> tuple[list[str], list[int], list[int], list[int], list[int | None]]:
    """Key, offset, size, header's CRC and `.cls` number of every image in the tar `file`, which errors call `name`."""
    images: dict[str, list[_Image]] = {}
    numbers: dict[str, int] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as archive:  # of names that are not UTF-8
            for member in archive:
                path = posixpath.normpath(member.name).lstrip("/")
                directory, base = posixpath.split(path)
                stem, _, extension = base.partition(".")
                if not member.isreg() or member.issparse() or not stem or not extension:
                    continue
                key = posixpath.join(directory, stem)
                if os.path.splitext(base)[1].lower() in EXTENSIONS:
                    file.seek(member.offset_data - HEADER)
                    header = zlib.crc32(file.read(HEADER))
                    image = _Image(extension.lower(), member.offset_data, member.size, header)
                    images.setdefault(key, []).append(image)
                elif extension.lower() == "cls":
                    numbers[key] = _number(archive.extractfile(member).read(64), f"{name}: {path}")  # type: ignore[union-attr]
            file.seek(archive.offset)
            if file.read(HEADER) != bytes(HEADER):  # tarfile itself takes this for the end
                raise tarfile.ReadError("no end-of-archive mark")
    except tarfile.TarError as error:
        raise ValueError(f"{name}: damaged or cut short ({error}); copy or write this shard again") from None
    chosen = [_the_image(name, key, members) for key, members in images.items()]
    offsets, sizes = [image.offset for image in chosen], [image.size for image in chosen]
    return list(images), offsets, sizes, [image.header for image in chosen], [numbers.get(key) for key in images]


def _the_image(name: str, key: str, images: list[_Image]) -> _Image:
    """The one image of a sample: `KEY.jpg` before `KEY.mask.png`."""
    plain = [image for image in images if "." not in image.extension] or images
    if len(plain) > 1:
        extensions = ", ".join(f".{image.extension}" for image in plain)
        raise ValueError(
            f"{name}: {key} has several images ({extensions}); write one image a key (a key ends at the first dot)"
        )
    return plain[0]


def _number(text: bytes, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where} holds {text!r}, which is no integer label; write the shard again") from None


class _RemoteTar:
    """A tar file at a URL as `tarfile` reads it: from header to header, over what lies between."""

    def __init__(self, source: Place, size: int):
        self._source, self._size = source, size
        self._at, self._last = 0, -_NEAR  # where the next read starts, where the last one ended
        self._start, self._buffer = 0, b""

    def __enter__(self) -> "_RemoteTar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def read(self, count: int) -> bytes:
        end = min(self._at + count, self._size)
        if self._at >= end:
            return b""
        if not self._start <= self._at <= end <= self._start + len(self._buffer):
            ahead = _AHEAD_NEAR if 0 <= self._at - self._last < _NEAR else _AHEAD_FAR
            self._start, stop = self._at, min(max(end, self._at + ahead), self._size)
            self._buffer = read_file(self._source.filesystem, self._source.path, self._start, stop)
            if len(self._buffer) != stop - self._start:
                raise ConnectionError(
                    f"{self._source.name}: {stop - self._start} bytes wanted, {len(self._buffer)} came"
                )
        data = self._buffer[self._at - self._start : end - self._start]
        self._at = self._last = end
        return data


def _opened(source: Place, size: Any) -> Any:
    return _RemoteTar(source, size) if source.filesystem else open(source.path, "rb")


def _copy(source: Place, state: list[int | str | None], tar: Path) -> Path | None:
    """`tar`, where the shard now lies unpacked; None for one that can be read where it is."""
    size, packed = state[0], not source.name.endswith(".tar")
    assert not isinstance(size, str)
    if not source.filesystem:
        return _unpack(Path(source.path), source.name, tar) if packed else None
    if not packed and reads_ranges(source.filesystem, source.path, size):
        return None
    _require_room(size or 0, source.name, tar.parent)
    download = tar.with_suffix(".download")
    try:
        with asking_service(source.path):
            source.filesystem.get_file(source.path, str(download))
        if packed:
            return _unpack(download, source.name, tar)
        os.replace(download, tar)
        return tar
    finally:
        download.unlink(missing_ok=True)


def _unpack(packed: Path, name: str, tar: Path) -> Path:
    """Decompress `packed` to `tar`."""
    with open(packed, "rb") as file:  # gzip ends with the unpacked size, modulo 4 GiB
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4))
        remedy = _require_room(max(size, int.from_bytes(file.read(4), "little")), name, tar.parent)
    try:
        with gzip.open(packed, "rb") as content:
            _write_atomically(tar, lambda file: shutil.copyfileobj(content, file, 1 << 20))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name}: damaged or cut short ({error}); copy or write this shard again") from None
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}; {remedy}") from None
    return tar


def _require_room(needed: int, name: str, folder: Path) -> str:
    """What to do if there is less room than `needed` bytes; raises ValueError if that shows already."""
    room = shutil.disk_usage(folder).free
    remedy = f"unpacking it under {folder} needs at least {needed / 1e9:.2f} GB; free some, or set FEATCACHE_HOME"
    if room < needed:
        raise ValueError(f"{name}: {room / 1e9:.2f} GB free; {remedy}")
    return remedy


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


def _state(stat: os.stat_result) -> list[int | str | None]:
    return [stat.st_size, stat.st_mtime_ns]


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

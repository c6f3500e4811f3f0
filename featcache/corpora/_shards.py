"""One tar file of images, local or at a URL: indexed once, then read image by image."""

import bz2
import contextlib
import errno
import glob
import gzip
import hashlib
import json
import logging
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from featcache.corpora._images import START, begins_like_image, called, has_suffix, may_be_image
from featcache.disk.durable import whole_file
from featcache.disk.home import temporary_home, writable_home
from featcache.disk.urls import asking_service, file_state, read_file, reads_ranges
from featcache.inputs.images import known_formats

INDEX_VERSION = 3
SUFFIX = re.compile(r"\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$")
HEADER = tarfile.BLOCKSIZE

log = logging.getLogger("featcache")
_MAGIC = 6  # bytes
_PACKINGS = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd"}
_ZEROS = 1 << 16  # bytes
_LABEL = 1 << 16  # bytes; longer ones are none
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
        if self.filesystem:
            return file_state(self.filesystem, self.path)
        if not os.path.isfile(self.path) and not os.path.isdir(self.path):  # a pipe, say
            raise FileNotFoundError(self.path)
        return _state(os.stat(self.path))


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of one shard lie: in `tar`, an unpacked local copy, or, if that is empty, in the shard itself."""

    tar: str
    tar_state: list[int | str | None]
    keys: list[str]
    offsets: list[int]
    sizes: list[int]
    headers: list[int]  # CRC-32 of the tar header before each image
    labels: list[str | None]
    faults: dict[str, str]  # why an image cannot be read, by key
    passed_over: dict[str, int]


class Wanted(NamedTuple):
    """Which member of a sample is which, by what follows the first dot of its name.

    Attributes:
        image: "png", "left.jpg"; "" is the member that is an image.
        label: "cls", "txt", or of a JSON object "json.NAME"; "" is none.
    """

    image: str = ""
    label: str = "cls"

    def is_label(self, extension: str) -> bool:
        return bool(self.label) and extension.lower() == (
            "json" if self.label.startswith("json.") else self.label.lower()
        )


class _Member(NamedTuple):
    extension: str
    offset: int
    size: int
    header: int
    fault: str = ""
    content: bytes = b""  # as far as it decides what the member is, or is a label


class Shard:
    """The images of one tar file in order of appearance: `keys`, `labels` (what their `.cls` members say), `read`.

    Links stand for what they lead to. Archives written one after another into one file are read as one. `passed_over`
    counts what is no sample's image, by kind.

    The index is kept under $FEATCACHE_HOME/shards. Of a plain shard at a URL no more is transferred for it than the
    headers and what lies within 1 MiB between them. A shard that cannot be read from the middle, which is a compressed
    one or one on a web server without ranges, is copied there, unpacked.

    Raises:
        ValueError: the shard is damaged, or there is no room for its copy.
        ConnectionError: the service that a URL names cannot be asked.
    """

    def __init__(self, source: Place, state: list[int | str | None], wanted: Wanted):
        self._source, self._index = source, _open(source, state, wanted)
        self.keys, self.labels, self.passed_over = self._index.keys, self._index.labels, self._index.passed_over

    def read(self, row: int) -> bytes:
        """The image in `row`.

        Raises:
            ValueError: it is a link to nothing, or not stored in one piece.
            OSError: ESTALE, the shard has changed or gone since it was opened.
            ConnectionError: the service cannot be asked.
        """
        index = self._index
        if index.keys[row] in index.faults:
            raise ValueError(f"{self._source.name}: {index.keys[row]} is {index.faults[index.keys[row]]}")
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


def _open(source: Place, state: list[int | str | None], wanted: Wanted) -> ShardIndex:
    """The index of one shard: the kept one if it is of this very file, else made and kept."""
    try:
        return _open_under(writable_home("shards"), source, state, wanted)
    except PermissionError:  # a file there that is another user's; if it is the shard itself, it is refused again
        return _open_under(temporary_home() / "shards", source, state, wanted)


def _open_under(folder: Path, source: Place, state: list[int | str | None], wanted: Wanted) -> ShardIndex:
    named = source.name if source.filesystem else source.path
    key = _short(named if wanted == Wanted() else json.dumps([named, *wanted]))
    stem = f"{posixpath.basename(source.path)[:80]}-{key}"
    kept = folder / f"{stem}-{_short(json.dumps([INDEX_VERSION, known_formats(), *state]))}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(kept.parent / f"{stem}.lock"):  # of several processes, one makes it and the others wait
        index = _kept_index(kept)
        if index is not None:
            return index
        for stale in kept.parent.glob(f"{glob.escape(stem)}-*"):
            with contextlib.suppress(PermissionError):  # another user's
                stale.unlink(missing_ok=True)
        copy = _copy(source, state, kept.with_suffix(".tar"))
        try:
            with _opened(source, state[0]) if copy is None else open(copy, "rb") as file:
                members = _members(file, source.name, wanted)
        except ValueError:
            if copy is not None:
                copy.unlink()
            raise
        if source.state() != state:
            raise ValueError(f"{source.name}: changed while it was read; wait until it is complete")
        index = ShardIndex(str(copy or ""), _state(copy.stat()) if copy else state, *members)
        try:
            with whole_file(kept) as file:
                file.write(json.dumps(asdict(index)).encode())
        except OSError as error:
            log.warning("%s: its index is made again next time, because it cannot be kept: %s", source.name, error)
    return index


def _kept_index(kept: Path) -> ShardIndex | None:
    """The index in the file `kept`; None when there is none, or it is damaged, or its copy of the shard is."""
    try:
        index = ShardIndex(**json.loads(kept.read_text(encoding="utf-8")))
        return index if not index.tar or _state(os.stat(index.tar)) == index.tar_state else None
    except (OSError, ValueError, TypeError):
        return None


@dataclass
class _Contents:
    """What `tarfile` tells of a tar file: its plain members and its links, by path, in order."""

    wanted: Wanted
    members: dict[str, list[_Member]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)  # path → path that it leads to
    passed: Counter[str] = field(default_factory=Counter)

    def add(self, member: tarfile.TarInfo, path: str, file: Any) -> None:
        stem, _, extension = posixpath.basename(path).partition(".")
        if not stem:
            self.passed["hidden files and folders"] += 1
        elif member.issym() or member.islnk():
            folder = posixpath.dirname(path) if member.issym() else ""
            self.links[path] = _normal(posixpath.join(folder, member.linkname))
            self.members.setdefault(path, [])
        elif member.isreg():
            file.seek(member.offset_data - HEADER)
            header = zlib.crc32(file.read(HEADER))
            fault = "stored sparse; write the shard again without --sparse" if member.issparse() else ""
            count = _LABEL + 1 if self.wanted.is_label(extension) else START if may_be_image(path) else 0
            content = file.read(min(count, member.size))
            found = _Member(extension.lower(), member.offset_data, member.size, header, fault, content)
            self.members.setdefault(path, []).append(found)
        elif not member.isdir():
            self.passed["pipes, sockets and devices"] += 1

    def at(self, path: str) -> list[_Member]:
        """The members of this path; of a link those that it leads to, under its own extension."""
        target, seen = path, {path}
        while target in self.links and not self.members.get(target):
            target = self.links[target]
            if target in seen:
                break
            seen.add(target)
        extension = posixpath.basename(path).partition(".")[2].lower()
        found = [member._replace(extension=extension) for member in self.members.get(target, [])]
        return found or [_Member(extension, -1, 0, 0, "a link to nothing in this shard; put its target there")]

    def is_image(self, path: str, member: _Member) -> bool:
        if self.wanted.image:
            return member.extension == self.wanted.image.lower()
        if not may_be_image(path):
            return has_suffix(path)
        return begins_like_image(member.content) or has_suffix(self.links.get(path, ""))


def _members(file: Any, name: str, wanted: Wanted) -> tuple[Any, ...]:
    """What `ShardIndex` holds from `keys` on, of the tar `file`, which errors call `name`."""
    contents = _contents(file, name, wanted)
    images: dict[str, list[_Member]] = {}
    labels: dict[str, str] = {}
    others: list[tuple[str, str]] = []  # key and name of what is neither
    for path in contents.members:
        folder, base = posixpath.split(path)
        key = posixpath.join(folder, base.partition(".")[0])
        for member in contents.at(path):
            if contents.is_image(path, member):
                images.setdefault(key, []).append(member)
            elif wanted.is_label(member.extension):
                labels[key] = _label(member.content, wanted.label, f"{name}: {path}")
            else:
                others.append((key, base))
    chosen = [_the_image(name, key, members) for key, members in images.items()]
    for key, base in others:
        if key not in images or has_suffix(base):
            contents.passed[called(base) if key not in images else "further images of a sample"] += 1
    for members in images.values():
        contents.passed["further images of a sample"] += len(members) - 1
    return (
        list(images),
        [image.offset for image in chosen],
        [image.size for image in chosen],
        [image.header for image in chosen],
        [labels.get(key) for key in images],
        {key: image.fault for key, image in zip(images, chosen, strict=True) if image.fault},
        dict(+contents.passed),
    )


def _contents(file: Any, name: str, wanted: Wanted) -> _Contents:
    """All members of the tar `file`, and of the archives after its end mark, which `tarfile` itself does not look at."""
    contents = _Contents(wanted)
    start: int | None = 0
    try:
        while start is not None:
            file.seek(start)
            # backslashreplace: of names that are not UTF-8
            with tarfile.open(fileobj=file, mode="r:", errors="backslashreplace") as archive:
                for member in archive:
                    contents.add(member, _normal(member.name), file)
                end = archive.offset
            file.seek(end)
            if file.read(HEADER) != bytes(HEADER):  # tarfile itself takes this for the end
                raise tarfile.ReadError("no end-of-archive mark")
            start = _next_archive(file, end)
    except tarfile.TarError as error:
        raise ValueError(f"{name}: damaged or cut short ({error}); copy or write this shard again") from None
    return contents


def _next_archive(file: Any, at: int) -> int | None:
    """Where the zeros after an end mark end; None where the file does first."""
    file.seek(at)
    while block := file.read(_ZEROS):
        rest = block.lstrip(b"\0")
        if rest:
            return at + (len(block) - len(rest)) // HEADER * HEADER
        at += len(block)
    return None


def _normal(path: str) -> str:
    return posixpath.normpath(path).lstrip("/")


def _the_image(name: str, key: str, images: list[_Member]) -> _Member:
    """The one image of a sample: `KEY.jpg` before `KEY.mask.png`."""
    plain = [image for image in images if "." not in image.extension] or images
    if len(plain) > 1:
        extensions = ", ".join(f".{image.extension}" for image in plain)
        choose = (
            f", or choose one with @image={plain[0].extension}" if len({image.extension for image in plain}) > 1 else ""
        )
        raise ValueError(
            f"{name}: {key} has several images ({extensions}); write one image a key (a key ends at the first dot){choose}"
        )
    return plain[0]


def _label(content: bytes, wanted: str, where: str) -> str:
    """What a label's member says; of a JSON object, the entry that `wanted` names after the dot."""
    if len(content) > _LABEL:
        raise ValueError(f"{where} holds more than {_LABEL} bytes, which is no label; choose another with @label=")
    text, entry = content.decode("utf-8", "backslashreplace").strip(), wanted.partition(".")[2]
    if not entry:
        return text
    try:
        value = json.loads(text).get(entry)
    except (ValueError, AttributeError):
        raise ValueError(f"{where} holds no JSON object; write the shard again, or choose another label") from None
    if isinstance(value, list | dict):
        raise ValueError(
            f"{where}: {entry} is a {type(value).__name__}, which is no label; choose another with @label="
        )
    return "" if value is None else str(value)


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
    size = state[0]
    assert not isinstance(size, str)
    if not source.filesystem:
        with open(source.path, "rb") as file:
            kind = _packing(file.read(_MAGIC))
        return _unpack(Path(source.path), source.name, kind, tar) if kind else None
    if reads_ranges(source.filesystem, source.path, size) and not _packing(
        read_file(source.filesystem, source.path, 0, min(_MAGIC, size or 0))
    ):
        return None
    _require_room(size or 0, source.name, tar.parent)
    download = tar.with_suffix(".download")
    try:
        with asking_service(source.path):
            source.filesystem.get_file(source.path, str(download))
        with open(download, "rb") as file:
            kind = _packing(file.read(_MAGIC))
        if kind:
            return _unpack(download, source.name, kind, tar)
        os.replace(download, tar)
        return tar
    finally:
        download.unlink(missing_ok=True)


def _packing(start: bytes) -> str:
    """How a file is compressed that starts so, whatever it is called; "" for a plain one."""
    return next((kind for kind, magic in _PACKINGS.items() if start.startswith(magic)), "")


def _unpacking(packed: Path, kind: str, name: str) -> Any:
    """The unpacked content, as a file."""
    if kind != "zstd":
        return {"gzip": gzip, "bzip2": bz2, "xz": lzma}[kind].open(packed, "rb")
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{name}: unpacking zstd needs a package: pip install zstandard, or unpack it: zstd -d"
        ) from None
    return zstandard.open(packed, "rb")


def _unpack(packed: Path, name: str, kind: str, tar: Path) -> Path:
    """Decompress `packed` to `tar`."""
    with open(packed, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if kind == "gzip":  # it ends with the unpacked size, modulo 4 GiB
            file.seek(max(0, size - 4))
            size = max(size, int.from_bytes(file.read(4), "little"))
    remedy = _require_room(size, name, tar.parent)
    try:
        with _unpacking(packed, kind, name) as content, whole_file(tar) as file:
            shutil.copyfileobj(content, file, 1 << 20)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{name}: {error.strerror}; {remedy}") from None
        of_zstd = type(error).__module__ == "zstandard.backend_c" or type(error).__name__ == "ZstdError"
        if not (
            of_zstd or isinstance(error, EOFError | OSError | zlib.error | lzma.LZMAError)
        ):  # of gzip and bz2: OSError
            raise
        raise ValueError(f"{name}: damaged or cut short ({error}); copy or write this shard again") from None
    return tar


def _require_room(needed: int, name: str, folder: Path) -> str:
    """What to do if there is less room than `needed` bytes; raises ValueError if that shows already."""
    room = shutil.disk_usage(folder).free
    remedy = f"unpacking it under {folder} needs at least {needed / 1e9:.2f} GB; free some, or set FEATCACHE_HOME"
    if room < needed:
        raise ValueError(f"{name}: {room / 1e9:.2f} GB free; {remedy}")
    return remedy


def _state(stat: os.stat_result) -> list[int | str | None]:
    return [stat.st_size, stat.st_mtime_ns]


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

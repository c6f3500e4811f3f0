"""A directory of images, local or at a URL; its first-level sub-folders, if any, are the classes."""

import errno
import functools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from featcache.corpora import Listed, in_words
from featcache.corpora._images import START, called, has_suffix, is_image, may_be_image, suffixes
from featcache.corpora._labels import from_folders
from featcache.disk.plain import entries, read_plain, unlisted
from featcache.disk.urls import cannot_be_read, is_url, listed, local_path, open_filesystem, read_file, read_starts

SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

_HIDDEN = "hidden files and folders"
_SYSTEM = ("lost+found", "System Volume Information", "$RECYCLE.BIN", "__MACOSX")

log = logging.getLogger("featcache")


class Folder(Listed):
    """Images under `root`, any depth, sorted by relative path, which is also the sample id.

    Bytes of a file name that are not UTF-8 are backslash-escaped in the id: `bad\\xff.jpg`. Links are followed, but no
    folder is entered again from inside itself.

    `root` is a local directory, or the URL of one (`s3://bucket/photos`), listed once, when it is opened.
    The label is the first-level sub-folder; images directly in `root` have none (-1).
    An image is what has the suffix of a format that can be decoded here, and, where the suffix says nothing, what begins
    like one. Everything else is passed over: `passed_over` counts it by kind.

    Raises:
        ValueError: no such folder, no images in it, or two files or classes whose escaped names are the same.
        OSError: a folder in it cannot be listed, or a file that may be an image not be looked at.
    """

    def __init__(self, root: str):
        self.spec = str(root)
        self._root = local_path(self.spec) or self.spec
        self._remote = open_filesystem(self.spec) if is_url(self._root) else None
        found = _images_at(self.spec, *self._remote) if self._remote else _images_under(self._root)
        paths, self.passed_over = found[0], dict(found[1].most_common())
        _refuse_same_names(paths, self.spec)
        self._paths = sorted(paths, key=_utf8)
        self.ids = [_utf8(path) for path in self._paths]
        if not self.ids:
            raise ValueError(f"{root}: {_no_images(self._root, self.passed_over)}")
        self.labels, self.class_names = from_folders(self.ids)

    def read(self, i: int) -> bytes:
        if self._remote:
            filesystem, root = self._remote
            return read_file(filesystem, f"{root.rstrip('/')}/{self._paths[i]}" if root else self._paths[i])
        return read_plain(os.path.join(self._root, self._paths[i]))


def _images_under(root: str) -> tuple[list[str], Counter[str]]:
    """Paths of the images, and how many files of which kind were passed over."""
    if not os.path.isdir(root):
        raise ValueError(f"{root}: {_no_folder(root, os.path.lexists(root))}")
    found: list[str] = []
    passed: Counter[str] = Counter()
    # Folders to look into, and their own real path and those of the folders that led to each.
    ahead: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while ahead:
        folder, above = ahead.pop()
        for entry in entries(os.path.join(root, folder)):
            path = os.path.join(folder, entry.name)
            if not _is_visible(entry.name):
                passed[_HIDDEN] += 1
            elif (kind := _kind(entry)) == "folder":
                real = os.path.realpath(entry.path)
                if real in above:
                    _warn_of_loop(entry.path, real)
                    passed["links back to a folder above"] += 1
                else:
                    ahead.append((path, (*above, real)))
            elif kind == "device":
                passed["pipes, sockets and devices"] += 1
            elif is_image(entry.name, functools.partial(_start, entry)):
                found.append(Path(path).as_posix())
            else:
                passed[called(entry.name)] += 1
        if folder and os.path.dirname(folder) == "":
            passed["class folders without images"] += 1
    classes = {path.split("/", 1)[0] for path in found if "/" in path}
    passed["class folders without images"] -= len(classes)
    return found, +passed


def _kind(entry: os.DirEntry[str]) -> str:
    """A "folder", "device" (a pipe or socket, too) or "file" (a link to nothing or to itself, too)."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or not os.path.exists(entry.path) else "device"
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return "file"
        raise unlisted(entry.path, error) from error


def _start(entry: os.DirEntry[str]) -> bytes:
    try:
        return read_plain(entry.path, START)
    except FileNotFoundError:  # a link to nothing
        return b""
    except OSError as error:
        if error.errno == errno.ELOOP:
            return b""
        raise OSError(
            error.errno,
            f"{_utf8(entry.path)}: cannot be read ({error.strerror}), and its name does not say whether it is an image; "
            "make it readable, or move it away",
        ) from error


@functools.cache  # a command opens its corpus more than once
def _warn_of_loop(path: str, real: str) -> None:
    log.warning("%s: leads back to %s, inside which it lies; it is not entered again", _utf8(path), _utf8(real))


def _images_at(url: str, filesystem: Any, root: str) -> tuple[list[str], Counter[str]]:
    try:
        found = listed(filesystem, root)
    except Exception as error:  # every service raises its own kinds; to the user they are one
        raise ValueError(f"{url}: {cannot_be_read(error, 'listed')}") from None
    if not found or list(found) == [root]:
        said = (
            _no_folder(url, True)
            if found
            else "no such folder, or an empty one; give the address of a directory of images"
        )
        raise ValueError(f"{url}: {said}")
    prefix = f"{root.rstrip('/')}/" if root else ""
    paths = {path.removeprefix(prefix): path for path in found}
    visible = [path for path in paths if all(_is_visible(part) for part in path.split("/"))]
    unclear = [path for path in visible if may_be_image(path)]
    starts = _starts(filesystem, {path: found[paths[path]] for path in unclear}, prefix)
    images = [path for path in visible if is_image(path, lambda path=path: starts.get(path, b""))]  # type: ignore[misc]
    passed = Counter(map(called, set(visible) - set(images)))
    passed[_HIDDEN] += len(paths) - len(visible)
    return images, +passed


def _starts(filesystem: Any, sizes: Mapping[str, int | None], prefix: str) -> dict[str, bytes]:
    """How files begin that are of these sizes."""
    paths = [path for path, size in sizes.items() if size != 0]
    counts = [min(START, sizes[path] or START) for path in paths]
    return dict(zip(paths, read_starts(filesystem, [prefix + path for path in paths], counts), strict=True))


def _no_images(root: str, passed_over: Mapping[str, int]) -> str:
    """What to say of a folder without images."""
    said = f"no images in this folder (looked for {', '.join(sorted(suffixes()))})"
    if not is_url(root) and os.path.exists(os.path.join(root, "zarr.json")):
        return f"{said}; it is a store: the images that it keeps are store:{root}"
    files = [f"*{suffix}" for suffix in SHARDS if passed_over.get(called(f"x{suffix}"))]
    if files:
        return f"{said}, but shards: open them as 'wds:{root.rstrip('/')}/{files[0]}'"
    tables = [kind.split()[0] for kind in (".parquet files", ".arrow files") if kind in passed_over]
    if tables:
        return f"{said}, but {tables[0]} files: open them as hf:{root}, or each by its own path"
    return f"{said}; passed over: {in_words(passed_over)}" if passed_over else said


def _no_folder(path: str, is_there: bool) -> str:
    """What to say of a path that is no folder, but perhaps a file."""
    name = path.lower()
    if name.endswith(SHARDS):
        return f"no such folder; open it as wds:{path}"
    if not is_there:
        return "no such folder; give a directory of images"
    if name.endswith((".zip", ".7z", ".rar")):
        return "an archive; unpack it and give the folder, or write it as a .tar and open that as wds:FILE.tar"
    if has_suffix(name):
        return "a single image; give the folder that it lies in, or a .csv with the column path"
    if name.endswith(".arrow"):
        return f"one file of a Hugging Face data set; open its folder as hf:{os.path.dirname(path) or '.'}"
    return "no folder; give a directory of images, a .csv, .tsv or .parquet with the column path, or wds:FILE.tar"


def _refuse_same_names(paths: Iterable[str], root: str) -> None:
    """Raises ValueError where two paths, or two class folders, would be written the same."""
    seen: dict[str, str] = {}
    for path in paths:
        for name in (path, path.split("/", 1)[0]):
            if seen.setdefault(_utf8(name), name) != name:
                raise ValueError(f"{root}: two names in it would both be written {_utf8(name)}; rename one of them")


def _utf8(name: str) -> str:
    """`name` with the bytes that are not UTF-8, which Python keeps as surrogates, backslash-escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in _SYSTEM


open_corpus = Folder


def named_files(rest: str) -> list[str] | None:
    return None if is_url(rest) else [os.path.join(rest, path) for path in Folder(rest)._paths]

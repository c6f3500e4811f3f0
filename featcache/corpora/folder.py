"""A directory of images, local or at a URL; its first-level sub-folders, if any, are the classes."""

import functools
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from featcache.corpora._labels import from_folders
from featcache.corpora._urls import is_url, open_filesystem, read_file

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})

log = logging.getLogger("featcache")


class Folder:
    """Images under `root`, any depth, sorted by relative path, which is also the sample id.

    Bytes of a file name that are not UTF-8 are backslash-escaped in the id: `bad\\xff.jpg`. Links are followed, but no
    folder is entered again from inside itself.

    `root` is a local directory, or the URL of one (`s3://bucket/photos`), listed once, when it is opened.
    The label is the first-level sub-folder; images directly in `root` have none (-1).
    Files with other extensions and hidden files are not images and are passed over.

    Raises:
        ValueError: no such folder, no images in it, or two files or classes whose escaped names are the same.
    """

    def __init__(self, root: str):
        self.spec = str(root)
        self._remote = open_filesystem(self.spec) if is_url(self.spec) else None
        paths = _images_at(self.spec, *self._remote) if self._remote else _images_under(self.spec)
        _refuse_same_names(paths, self.spec)
        self._paths = sorted(paths, key=_utf8)
        self.ids = [_utf8(path) for path in self._paths]
        if not self.ids:
            raise ValueError(f"{root}: no images in this folder (looked for {', '.join(sorted(EXTENSIONS))})")
        self._labels, self.class_names = from_folders(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        if self._remote:
            filesystem, root = self._remote
            return read_file(filesystem, f"{root.rstrip('/')}/{self._paths[i]}" if root else self._paths[i])
        return Path(self.spec, self._paths[i]).read_bytes()

    def label(self, i: int) -> int:
        return self._labels[i]


def _images_under(root: str) -> list[str]:
    if not Path(root).is_dir():
        remedy = (
            f"open it as wds:{root}" if root.endswith((".tar", ".tar.gz", ".tgz")) else "give a directory of images"
        )
        raise ValueError(f"{root}: no such folder; {remedy}")
    found = []
    # Folder → its own real path and those of the folders that led to it.
    entered: dict[str, tuple[str, ...]] = {root: (os.path.realpath(root),)}
    for directory, folders, files in os.walk(root, followlinks=True):
        above, inside = entered.pop(directory), []
        for name in filter(_is_visible, folders):
            path = os.path.join(directory, name)
            real = os.path.realpath(path)
            if real in above:
                _warn_of_loop(path, real)
            else:
                inside.append(name)
                entered[path] = (*above, real)
        folders[:] = inside
        relative = Path(directory).relative_to(root)
        found += [(relative / name).as_posix() for name in files if _is_visible(name) and _is_image(name)]
    return found


@functools.cache  # a command opens its corpus more than once
def _warn_of_loop(path: str, real: str) -> None:
    log.warning("%s: leads back to %s, inside which it lies; it is not entered again", _utf8(path), _utf8(real))


def _images_at(url: str, filesystem: Any, root: str) -> list[str]:
    try:
        found = filesystem.find(root)
    except Exception as error:  # every service raises its own kinds; to the user they are one
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{url}: cannot be listed ({type(error).__name__}: {reason}); check the address, the network and credentials"
        ) from None
    if not found:
        raise ValueError(f"{url}: no such folder, or an empty one; give the address of a directory of images")
    prefix = f"{root.rstrip('/')}/" if root else ""
    relative = [path.removeprefix(prefix) for path in found]
    return [path for path in relative if all(_is_visible(part) for part in path.split("/")) and _is_image(path)]


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


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


open_corpus = Folder

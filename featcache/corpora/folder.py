"""A directory of images, local or at a URL; its first-level sub-folders, if any, are the classes."""

import os
from pathlib import Path
from typing import Any

from featcache.corpora._labels import from_folders
from featcache.corpora._urls import is_url, open_filesystem, read_file

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})


class Folder:
    """Images under `root`, any depth, sorted by relative path, which is also the sample id.

    `root` is a local directory, or the URL of one (`s3://bucket/photos`), listed once, when it is opened.
    The label is the first-level sub-folder; images directly in `root` have none (-1).
    Files with other extensions and hidden files are not images and are passed over.
    """

    def __init__(self, root: str):
        self.spec = str(root)
        self._remote = open_filesystem(self.spec) if is_url(self.spec) else None
        self.ids = sorted(_images_at(self.spec, *self._remote) if self._remote else _images_under(self.spec))
        if not self.ids:
            raise ValueError(f"{root}: no images in this folder (looked for {', '.join(sorted(EXTENSIONS))})")
        self._labels, self.class_names = from_folders(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        if self._remote:
            filesystem, root = self._remote
            return read_file(filesystem, f"{root.rstrip('/')}/{self.ids[i]}" if root else self.ids[i])
        return Path(self.spec, self.ids[i]).read_bytes()

    def label(self, i: int) -> int:
        return self._labels[i]


def _images_under(root: str) -> list[str]:
    if not Path(root).is_dir():
        remedy = (
            f"open it as wds:{root}" if root.endswith((".tar", ".tar.gz", ".tgz")) else "give a directory of images"
        )
        raise ValueError(f"{root}: no such folder; {remedy}")
    found = []
    for directory, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if _is_visible(name)]
        relative = Path(directory).relative_to(root)
        found += [(relative / name).as_posix() for name in files if _is_visible(name) and _is_image(name)]
    return found


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


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def _is_visible(name: str) -> bool:
    return not name.startswith(".")


open_corpus = Folder

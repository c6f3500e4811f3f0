"""`masks:FOLDER`: images, and for some or all of them a mask with the class of every pixel."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from featcache.corpora import Listed
from featcache.corpora.folder import Folder
from featcache.disk.plain import read_plain
from featcache.disk.urls import is_url
from featcache.masks import MASK, MaskClasses
from featcache.plugins import suggest
from featcache.specs import options_in

OPTIONS = ("images", "masks", "list", "labelled", "classes", "ignore")
CLASSES = "background:0,foreground:255"


class Masked(Listed):
    """The images in `FOLDER/images`, with the masks of the same names (but for the suffix) in `FOLDER/masks`.

    Options follow, paths relative to FOLDER: `@images=`, `@masks=` are other folders than these; `@list=FILE` names the images
    that there are, one a line, by their ids, with or without the suffix; `@labelled=FILE` likewise those whose masks are known:
    no other mask is ever opened. Without it, images have a mask where there is one.

    `@classes=background:0,foreground:255` says what the values of masks mean; these are the default. `@ignore=VALUE,…` are values
    of pixels without a class. A sample's id is the image's path in its folder; samples have no label.

    Attributes:
        mask_classes: what the values of the masks mean.

    Raises:
        ValueError: no such folder, list or option; a list names what is not there, or something twice; there is no mask, or two of one name.
    """

    def __init__(self, rest: str):
        self.spec = f"masks:{rest}"
        self.root, options = _split(rest)
        if is_url(self.root):
            raise ValueError(f"{self.spec}: masks are read from local folders; copy them, and give their folder")
        images, masks = (os.path.join(self.root, options.get(part, part)) for part in ("images", "masks"))
        folder = Folder(images)
        self.files = [os.path.join(self.root, options[name]) for name in ("list", "labelled") if name in options]
        kept = _listed(self.files[0], folder.ids) if "list" in options else range(len(folder.ids))
        self.ids = [folder.ids[i] for i in kept]
        self.labels, self.class_names = [-1] * len(self.ids), None
        self.passed_over = folder.passed_over
        self.mask_classes = _classes(self.spec, options)
        self._folder, self._kept = folder, list(kept)
        found = _masks_in(masks)
        self._masks = [found.get(_stem(name)) for name in self.ids]
        if "labelled" in options:
            self._hide_all_but(_listed(self.files[-1], self.ids), self.files[-1])
        if not any(self._masks):
            raise ValueError(
                f"{masks}: no mask has the name of an image in {images}; name NAME.jpg's NAME.png, in the same sub-folder"
            )

    def _hide_all_but(self, labelled: Sequence[int], file: str) -> None:
        missing = [self.ids[i] for i in labelled if self._masks[i] is None]
        if missing:
            raise ValueError(f"{file}: names {missing[0]}, which has no mask; take it from the list, or add its mask")
        self._masks = [path if i in set(labelled) else None for i, path in enumerate(self._masks)]

    def read(self, i: int) -> bytes:
        return self._folder.read(self._kept[i])

    def target(self, i: int, name: str) -> bytes | None:
        if name != MASK:
            raise ValueError(f"{self.spec}: has no {name}; it has: {MASK}")
        path = self._masks[i]
        return None if path is None else read_plain(path)

    def has_target(self, i: int, name: str) -> bool:
        return name == MASK and self._masks[i] is not None


def _split(rest: str) -> tuple[str, dict[str, str]]:
    """The folder, and the options behind it, whose values may be paths."""
    if os.path.exists(rest):  # a name that looks like options
        return rest, {}
    at = re.search(r"@\w+=", rest)
    return (rest[: at.start()], options_in(rest[at.start() :], f"masks:{rest}", OPTIONS)) if at else (rest, {})


def _classes(spec: str, options: dict[str, str]) -> MaskClasses:
    parts = [part.rpartition(":") for part in options.get("classes", CLASSES).split(",")]
    ignored = [value for value in options.get("ignore", "").split(",") if value]
    if not all(value.isdecimal() for value in (*(value for _, _, value in parts), *ignored)):
        raise ValueError(
            f"{spec}: give classes as @classes=NAME:VALUE,NAME:VALUE and ignored values as @ignore=VALUE,…"
        )
    try:
        return MaskClasses(
            names=tuple(name for name, _, _ in parts),
            values=tuple(int(value) for _, _, value in parts),
            ignored=tuple(map(int, ignored)),
        )
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _masks_in(folder: str) -> dict[str, str]:
    """The file of each mask by its image's id without suffix."""
    if not os.path.isdir(folder):
        raise ValueError(
            f"{folder}: no such folder of masks; give the one that lies beside the images as @masks=FOLDER"
        )
    found: dict[str, str] = {}
    for name in Folder(folder).ids:
        if _stem(name) in found:
            raise ValueError(f"{folder}: holds two masks of one image, {_stem(name)}; keep one")
        found[_stem(name)] = os.path.join(folder, name)
    return found


def _listed(file: str, ids: Sequence[str]) -> list[int]:
    """Numbers among `ids` of those that a file names, in the order of `ids`."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as a list ({error}); give a text file of one id a line") from None
    known = {_stem(name): i for i, name in enumerate(ids)} | {name: i for i, name in enumerate(ids)}
    found: set[int] = set()
    for number, line in enumerate(lines, 1):
        if not (name := line.strip()):
            continue
        if name not in known:
            raise ValueError(f"{file}, line {number}: {name} is none of the images; {suggest(name, ids)}")
        if known[name] in found:
            raise ValueError(f"{file}, line {number}: {name} is named twice; name each image once")
        found.add(known[name])
    if not found:
        raise ValueError(f"{file}: names no image; write one id a line")
    return sorted(found)


open_corpus = Masked


def named_files(rest: str) -> list[str]:
    corpus = Masked(rest)
    return [*corpus.files, *(os.path.join(corpus._folder.spec, name) for name in corpus.ids)]

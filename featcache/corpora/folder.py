"""A directory of images; its first-level sub-folders, if any, are the classes."""

import os
from pathlib import Path

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})


class Folder:
    """Images under `root`, any depth, sorted by relative path, which is also the sample id.

    The label is the first-level sub-folder; images directly in `root` have none (-1).
    Files with other extensions and hidden files are not images and are passed over.
    """

    def __init__(self, root: str):
        if not Path(root).is_dir():
            raise ValueError(f"{root}: no such folder; give a directory of images")
        self.spec = str(root)
        self._root = Path(root)
        self.ids = sorted(_images_under(self._root))
        if not self.ids:
            raise ValueError(f"{root}: no images in this folder (looked for {', '.join(sorted(EXTENSIONS))})")
        folders = [sample_id.split("/", 1)[0] if "/" in sample_id else None for sample_id in self.ids]
        self.class_names = sorted({name for name in folders if name}) or None
        index = {name: i for i, name in enumerate(self.class_names or [])}
        self._labels = [index[name] if name else -1 for name in folders]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        return (self._root / self.ids[i]).read_bytes()

    def label(self, i: int) -> int:
        return self._labels[i]


def _images_under(root: Path) -> list[str]:
    found = []
    for directory, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(directory).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    return found


open_corpus = Folder

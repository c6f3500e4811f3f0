"""Image folders for `featcache demo`: real scans and real photographs that come with scikit-learn."""

from pathlib import Path

import numpy as np
from PIL import Image

from featcache.corpora.digits import Digits

ID_CLASSES = range(8)
PER_CLASS = {"id-train": 80, "id-test": 30, "near": 60}
PATCH, FAR = 32, 120


def write_demo_images(root: Path) -> dict[str, int]:
    """Write the folders id-train, id-test (digits 0–7), near (8 and 9) and far (patches of photographs).

    Returns:
        Images in each. Files already there are kept.
    """
    train, test = Digits("train"), Digits("test")
    for name, corpus, classes in (
        ("id-train", train, ID_CLASSES),
        ("id-test", test, ID_CLASSES),
        ("near", train, (8, 9)),
    ):
        for label in classes:
            rows = [i for i in range(len(corpus)) if corpus.label(i) == label][: PER_CLASS[name]]
            for i in rows:
                _write(root / name / str(label) / f"{Path(corpus.ids[i]).name}.png", corpus.read(i))

    from sklearn.datasets import load_sample_images

    for photo, name in zip(load_sample_images().images, ("china", "flower"), strict=True):
        rng = np.random.default_rng(0)
        for i in range(FAR // 2):
            top, left = (int(rng.integers(side - PATCH)) for side in photo.shape[:2])
            path = root / "far" / name / f"{i:04d}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(photo[top : top + PATCH, left : left + PATCH]).save(path)
    return {name: sum(1 for _ in (root / name).rglob("*.png")) for name in (*PER_CLASS, "far")}


def _write(path: Path, data: bytes) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

"""A folder of small photographs, stores of made-up embeddings of them, and what every evaluator says of these."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hashed import with_images
from PIL import Image

import evalsuite
from featcache.corpora.folder import Folder
from featcache.store.from_arrays import write_store

HOSTILE_CLASS = '<img src=x onerror=alert(3)>, "c"'
CLASSES = ("ant", "bee", HOSTILE_CLASS)
SECRET = "taken at home by me"
SETS = {"bank": 10, "test": 12, "near": 9}
"""Images a class."""


def colour_of(number: int) -> tuple[int, int, int]:
    """Far from that of any other of some hundred numbers."""
    return (number * 97 % 256, number * 41 % 256, number * 151 % 256)


def write_photos(root: Path) -> dict[str, Folder]:
    """A folder a set, in which every image is of one colour of its own, larger than what is shown, and has EXIF data."""
    number, found = 0, {}
    for name, count in SETS.items():
        for of_class in CLASSES:
            for i in range(count):
                path = root / name / of_class / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                exif = Image.Exif()
                exif[0x010E] = SECRET
                Image.new("RGB", (120, 80), colour_of(number)).save(path, quality=95, exif=exif)
                number += 1
        found[name] = Folder(str(root / name))
    return found


@dataclass
class World:
    """Photographs by set, embeddings by (encoder, set), and the files of results."""

    photos: dict[str, Folder]
    embeddings: dict[tuple[str, str], np.ndarray]
    results: list[Path]

    @property
    def images(self) -> list[str]:
        return [corpus.spec for corpus in self.photos.values()]


def make_world(root: Path, hashed: bool = True) -> World:
    """Two encoders; the student is the teacher with noise. Classes overlap, OOD rows lie beside them."""
    rng = np.random.default_rng(0)
    photos, embeddings = write_photos(root / "photos"), {}
    centres, beside = rng.normal(size=(3, 8)), rng.normal(size=8)
    for name, corpus in photos.items():
        rows = centres[corpus.labels] + 0.8 * rng.normal(size=(len(corpus), 8)) + (name == "near") * beside
        for encoder, noise in (("vit", 0.0), ("small", 0.7)):
            embedding = rows + noise * rng.normal(size=rows.shape)
            store = write_store(
                root / f"{encoder}-{name}.zarr", embedding, labels=corpus.labels, sample_ids=corpus.ids,
                class_names=corpus.class_names, encoder_name=encoder, fingerprint=encoder, dtype="float32",
            )  # fmt: skip
            if hashed:
                with_images(store, [corpus.read(i) for i in range(len(corpus))])
            embeddings[encoder, name] = embedding.astype(np.float32).astype(np.float64)
    return World(photos, embeddings, list(_results(root)))


def _results(root: Path) -> Sequence[Path]:
    made = []
    for encoder in ("vit", "small"):
        bank, test, near = (root / f"{encoder}-{name}.zarr" for name in SETS)
        made.append(evalsuite.knn(bank, test, k=[5]).write(root / f"{encoder}-knn.json"))
        ood = evalsuite.ood(id_train=bank, id_test=test, near={"moths": near}, detectors=["knn:k=3"])
        made.append(ood.write(root / f"{encoder}-ood.json"))
    fidelity = evalsuite.fidelity(root / "vit-test.zarr", root / "small-test.zarr", k=4)
    return [*made, fidelity.write(root / "small-fidelity.json")]


def pixels(source: str) -> np.ndarray:
    """Of a data URL."""
    import base64

    encoded = base64.b64decode(source.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))

"""A student in a run folder, pictures of three colours and their stores: what detectors are deployed with in tests."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import featcache
from featcache.inputs.images import Preprocess
from featcache.student import make_student

LIKE = Preprocess(resize=40, crop=36, size=36, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}


def write_student(folder: Path, weights: int = 0, classes: list[str] | None = None) -> Path:
    """A run folder, as `distill fit` leaves it, of a tiny student with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(weights)
        student, _, record = make_student("tiny", LIKE, embedding_dim=10, classes=classes)
    folder.mkdir(parents=True)
    (folder / "student.json").write_text(json.dumps(record))
    save_file(student.state_dict(), folder / "student.safetensors")
    return folder


def write_pictures(folder: Path, count: int, colours: dict[str, tuple[int, int, int]], seed: int = 0) -> Path:
    """So many pictures of each colour, noisy, of several sizes, in a folder a class."""
    rng = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(36, 70, 2)
            small = np.clip(np.array(colour) + rng.normal(0, 40, (5, 5, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(small).resize((int(width), int(height))).save(folder / name / f"{i:03d}.png")
    return folder


class World:
    """Images and stores under one folder: `id/` and `more/` of the three colours, `grey/` of none."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = f"run:{write_student(root / 'run')}"
        self.id = write_pictures(root / "id", 40, COLOURS)
        self.more = write_pictures(root / "more", 30, COLOURS, seed=1)
        self.grey = write_pictures(root / "grey", 20, {"grey": (128, 128, 128)}, seed=2)
        self.train, self.test, self.far = (
            featcache.extract(
                str(images), self.run, root / f"{images.name}.zarr", precision="fp32", device="cpu", dtype="float32"
            )
            for images in (self.id, self.more, self.grey)
        )

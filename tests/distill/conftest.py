"""Small images, a teacher of one convolution, and the paper's formula in plain loops."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
from fit_cases import BATCH, EPOCHS, STUDENT
from PIL import Image
from torch import Tensor, nn

from distill.training.config import METHOD
from distill.training.fit import fit
from featcache.corpora import open_corpus
from featcache.encoder import Encoder
from featcache.extraction.extract import extract
from featcache.inputs.images import Preprocess
from featcache.store import FeatureStore
from featcache.store.from_arrays import write_store
from featcache.student import make_student


class OneConvolution(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.convolution = nn.Conv2d(3, dim, 5, stride=3)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.convolution(images).abs().mean(dim=(2, 3))}


class RecordingEncoder(Encoder):
    """An encoder that keeps every image it is given, in order, in `seen`."""

    def encode(self, pixels: Tensor, fields: Sequence[str] | None = None) -> dict[str, Tensor]:
        self.__dict__.setdefault("seen", []).extend(pixels.numpy().copy())
        return super().encode(pixels, fields)


def make_teacher(dim: int = 12) -> RecordingEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = OneConvolution(dim)
    return RecordingEncoder(
        name="test/one_convolution",
        module=module,
        preprocess=Preprocess(resize=18, crop=16, size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
        fields={"embedding": dim},
        output="mean of magnitudes",
    )


def make_images(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` PNG files of smooth noise with a colour of their own, 24 × 20 px and 20 × 28 px in turn."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = rng.normal(rng.uniform(0, 255, 3), 60, (4, 4, 3)).clip(0, 255).astype(np.uint8)
        size = (24, 20) if i % 2 else (20, 28)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 PNG files; tests only read them."""
    return make_images(tmp_path_factory.mktemp("corpus") / "images", 64)


@pytest.fixture(scope="session")
def store(images: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Three views of `images`, seen by the teacher; tests only read it."""
    out = tmp_path_factory.mktemp("store") / "teacher.zarr"
    return extract(
        open_corpus(str(images)), make_teacher(), out, views=3, augment="rrc", device="cpu", precision="fp32"
    )


@pytest.fixture(scope="module")
def train(store, images):
    """`train(out, ...)`: a small fit into `out`, fields and arguments as given."""

    def train(out: Path, **given):
        few = (
            {"mapping_steps": 3, "mapping_batch_size": 16}
            if given.get("method", METHOD) in ("tintem", "landmarks", "centred")
            else {}
        )
        arguments = {
            "student": "tiny",
            "embedding_dim": STUDENT,
            "image_size": 16,
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "method_options": few,
            "device": "cpu",
            **given,
        }
        return fit(store, str(images), out=out, **arguments)

    return train


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """One run with the student that it trained and the progress it told; tests only read it."""
    told, made = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "distill.training.setup.make_student", lambda *a, **k: made.append(make_student(*a, **k)) or made[-1]
        )
        run = train(tmp_path_factory.mktemp("run") / "a", progress=told.append)
    return SimpleNamespace(run=run, path=run.path, told=told, student=made[0][0], preprocess=made[0][1])


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., FeatureStore]:
    """`make_store(name, embedding, ...)` writes a sealed store under the test's own folder."""

    def make(name: str, embedding: np.ndarray, **given: object) -> FeatureStore:
        return write_store(tmp_path / f"{name}.zarr", embedding, **given)

    return make


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks that only run under pytest: what users get for an argument of the wrong kind."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def slow_relation_kl(
    target: np.ndarray, output: np.ndarray, temperatures: Sequence[float], symmetric: bool, mask_diagonal: bool
) -> float:
    """Section 3 of the paper, one pair at a time, in float64."""
    losses = []
    for temperature in temperatures:
        p, q = (_neighbours(s, temperature, symmetric, mask_diagonal) for s in (target, output))
        rows, columns = p.shape
        terms = [p[i, j] * math.log(p[i, j] / q[i, j]) for i in range(rows) for j in range(columns) if p[i, j] > 0]
        losses.append(math.fsum(terms) / (1 if symmetric else rows))
    return math.fsum(losses) / len(losses)


def _neighbours(similarity: np.ndarray, temperature: float, symmetric: bool, mask_diagonal: bool) -> np.ndarray:
    rows, columns = similarity.shape
    p = np.zeros((rows, columns))
    for i in range(rows):
        others = [j for j in range(columns) if j != i or not mask_diagonal]
        top = max(float(similarity[i, j]) for j in others)
        weight = {j: math.exp((float(similarity[i, j]) - top) / temperature) for j in others}
        for j in others:
            p[i, j] = weight[j] / math.fsum(weight.values())
    if not symmetric:
        return p
    joint = np.array([[p[i, j] + p[j, i] for j in range(columns)] for i in range(rows)])
    return joint / joint.sum()


@pytest.fixture(name="slow_relation_kl")
def slow_relation_kl_fixture() -> Callable[..., float]:
    return slow_relation_kl


@pytest.fixture(name="make_teacher")
def make_teacher_fixture() -> Callable[..., RecordingEncoder]:
    return make_teacher


@pytest.fixture(name="make_images")
def make_images_fixture() -> Callable[..., Path]:
    return make_images

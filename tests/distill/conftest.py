"""A store of small images, short fits on it, and the paper's formula in plain loops."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
from fit_cases import BATCH, EPOCHS, STUDENT
from small_world import RecordingEncoder, make_images, make_teacher

from distill.training.config import METHOD
from distill.training.fit import fit
from featcache.corpora import open_corpus
from featcache.extraction.extract import extract
from featcache.store import FeatureStore
from featcache.store.from_arrays import write_store
from featcache.student import make_student


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

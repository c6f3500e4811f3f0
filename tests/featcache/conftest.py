"""A tiny encoder, small image folders and a few real photographs, shared by the tests of stage one."""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import nn

from featcache.encoder import Encoder
from featcache.preprocess import Preprocess

settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("seeded")

SHARED = Path(__file__).parents[3] / "shared" / "data"


class TinyModule(nn.Module):
    """One convolution and a head; remembers how many images it saw and a hash of each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, 4)
        self.head = nn.Linear(6, 3)
        self.calls = 0
        self.seen: list[str] = []

    def forward(self, images):
        self.calls += 1
        self.seen += [hash_of(image) for image in images]
        embedding = self.conv(images).relu().mean((2, 3)) + 0.1
        return {"embedding": embedding, "logits": self.head(embedding)}


def hash_of(image: torch.Tensor) -> str:
    """Of one normalised image; the same however it lies in memory."""
    return hashlib.sha256(image.float().contiguous().numpy().tobytes()).hexdigest()


def tiny_encoder(weights: int = 0, resize: int = 18) -> Encoder:
    """16 px, 6-dimensional embedding, 3 logits; `weights` seeds them."""
    with torch.random.fork_rng():
        torch.manual_seed(weights)
        module = TinyModule()
    return Encoder(
        name="tiny",
        module=module,
        preprocess=Preprocess(resize=resize, crop=16, size=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)),
        fields={"embedding": 6, "logits": 3},
        output="mean pool",
    )


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other on more; on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoder() -> Encoder:
    return tiny_encoder()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def make_images(tmp_path: Path, rng: np.random.Generator) -> Callable[[int], str]:
    """`make_images(n)`: a folder of n different small PNG files in classes ant, bee and cat; returns its path."""

    def make(count: int) -> str:
        for i in range(count):
            path = tmp_path / "images" / ("ant", "bee", "cat")[i % 3] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = rng.integers(17, 40, 2)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        return str(tmp_path / "images")

    return make


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks that only run under pytest: what users get for an argument of the wrong kind."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def photographs() -> list[tuple[str, bytes]]:
    """(class folder, JPEG bytes) of the first 12 ImageNet photographs."""
    archive = SHARED / "imagenet-samples-250.tar"
    if not archive.exists():
        pytest.skip("needs ../shared/data/imagenet-samples-250.tar")
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.lower().endswith((".jpeg", ".jpg")):
                found.append((member.name.split("/")[-2], tar.extractfile(member).read()))
            if len(found) == 12:
                return found
    raise AssertionError("fewer photographs than expected")

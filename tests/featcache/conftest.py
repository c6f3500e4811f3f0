"""A tiny encoder, small image folders and a few real photographs, shared by the tests of stage one."""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_encoder

from featcache.encoder import Encoder

SHARED = Path(__file__).parents[3] / "shared" / "data"


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

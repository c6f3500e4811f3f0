"""A tiny encoder, small image folders and a few real photographs, shared by the tests of stage one."""

import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
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
def s3_server() -> Iterator[str]:
    """Address of an S3 server on loopback that speaks the real protocol; all tests of a run share it."""
    pytest.importorskip("s3fs", reason="needs featcache[s3]")
    server = pytest.importorskip("moto.server", reason="needs moto").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


_bucket_numbers = itertools.count()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket of this test's own; the environment alone leads to its server, as for users."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()  # one made under another environment would be taken for this one
    name = f"bucket-{next(_bucket_numbers)}"
    fsspec.filesystem("s3").mkdir(name)
    yield f"s3://{name}"
    kind.clear_instance_cache()


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

import os

# Before torch is imported, and for every process that a test starts: tests run side by side, one a core, and OpenMP
# threads that wait for each other on busy cores make all of them several times slower.
os.environ["OMP_NUM_THREADS"] = "1"

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("seeded")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small only wait for each other on more threads; on a busy machine for long."""
    torch.set_num_threads(1)


os.environ["FEATCACHE_HOME"] = tempfile.mkdtemp(prefix="featcache-tests-")


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds another's rows."""
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the photograph archives; the test is skipped where they are missing."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real photographs (../shared/data) are not here")
    return folder

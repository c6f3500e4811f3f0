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


LONGEST = ("test_photographs.py", "test_demo.py", "test_killed_fit.py", "test_killed.py", "test_export.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process waits for one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


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

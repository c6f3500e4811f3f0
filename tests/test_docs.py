"""The site of the docs builds, offline, without a warning; a dead link is one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocs", reason="docs is an extra")


def test_the_site_builds_without_a_warning(tmp_path):
    import distill
    import evalsuite
    import featcache

    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    page = (tmp_path / "site" / "python.html").read_text(encoding="utf-8")
    for package in (featcache, distill, evalsuite):
        missing = [
            name
            for name in package.__all__
            if not any(
                f'id="{at}"' in page for at in (f"{package.__name__}.{name}", f"{package.__name__}.{name}.{name}")
            )
        ]
        assert not missing, f"{package.__name__}: {missing}"

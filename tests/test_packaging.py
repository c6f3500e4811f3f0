"""What is installed: a wheel built from this tree, looked into and run from an empty folder."""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("featcache", "distill", "evalsuite", "featcache_cli")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"  # setuptools writes beside the sources
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py", "Makefile"):
        shutil.copy(ROOT / name, tree)
    for name in ("tests", "benchmarks", "docs"):
        (tree / name).mkdir()
        (tree / name / "__init__.py").touch()
    built = subprocess.run([sys.executable, "-c", BUILD, folder], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_every_file_of_the_four_packages_is_in_the_wheel_and_nothing_else(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    here = {path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    here = {path.relative_to(ROOT).as_posix() for path in here if path.parent.name != "__pycache__"}
    assert packed == here
    assert {f"{name}/py.typed" for name in PACKAGES} <= packed


def test_metadata_names_licence_interpreters_extras_and_programs(wheel):
    content = zipfile.ZipFile(wheel)
    (folder,) = {name.split("/")[0] for name in content.namelist() if ".dist-info/" in name}
    metadata = email.message_from_string(content.read(f"{folder}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{folder}/licenses/LICENSE" in content.namelist()
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"cpu", "gpu", "demo", "hf", "onnx", "parquet", "s3"} <= set(metadata.get_all("Provides-Extra"))
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    programs = content.read(f"{folder}/entry_points.txt").decode().split()
    assert sorted(word for word in programs if word.startswith("featcache_cli")) == [
        f"featcache_cli.programs:run_{name}" for name in ("distill", "evalsuite", "featcache")
    ]


def test_it_runs_from_an_empty_folder(wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", installed, wheel], check=True, capture_output=True)
    alone = {**os.environ, "PYTHONPATH": str(installed), "FEATCACHE_HOME": str(tmp_path / "home")}

    def said(*command: str | Path) -> str:
        ran = subprocess.run(command, cwd=elsewhere, env=alone, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    where = f"from importlib.util import find_spec; print(*[find_spec(name).origin for name in {PACKAGES}])"
    found = said(sys.executable, "-c", where)
    assert all(Path(place).is_relative_to(installed) for place in found.split())
    assert said(installed / "bin/featcache", "--version").startswith("featcache ")
    assert "landmarks" in said(installed / "bin/distill", "methods")
    assert "--bank" in said(installed / "bin/evalsuite", "knn", "--help")

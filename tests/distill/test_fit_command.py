"""`distill fit` at the command line: several stores, what it says, and settings that are not flags."""

import json
import sys
from types import SimpleNamespace

import pytest

import cli
import commands.screen
from distill.run import Run
from featcache.extract import extract


@pytest.fixture
def stores(tmp_path, make_images, make_teacher):
    """Two folders of 12 and 8 images, one of them broken, and their stores: flags for `distill fit`."""
    flags = []
    for name, count in (("a", 12), ("b", 8)):
        folder = make_images(tmp_path / name, count, seed=count)
        if name == "b":
            (folder / "003.png").write_bytes(b"no image")
        extract(str(folder), make_teacher(), tmp_path / f"{name}.zarr", device="cpu", precision="fp32")
        flags.append(f"--store {tmp_path / name}.zarr --corpus {folder}")
    return " ".join(flags)


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setattr(commands.screen.screen, "width", 400)
    yield lambda line: _run(line, monkeypatch, capsys)
    commands.screen.screen.quiet = False


def _run(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as stopped:
        cli.run_distill()
    out, err = capsys.readouterr()
    return SimpleNamespace(code=stopped.value.code or 0, out=out, err=err)


def test_stores_repeat_with_their_corpora(stores, command, tmp_path):
    settings = "--epochs 2 --batch-size 5 --set holdout=0.25 --set method=proteus --set views=student"
    done = command(f"distill fit {stores} --student tiny --out {tmp_path / 'run'} {settings} --json -")
    assert done.code == 0, done.err
    assert "14 samples, 1 failed rows left out, 5 held out for evaluation" in done.err
    assert "the teacher's plain view against views of the student's own (colours changed, nothing moved)" in done.err
    assert "4 steps" in done.err
    assert "held-out samples: gram_pearson" in done.err
    said = json.loads(done.out)
    assert said["config"]["store"] == [str(tmp_path / f"{name}.zarr") for name in "ab"]
    assert said["config"]["views"] == "student"
    again = command(f"distill fit --config {tmp_path / 'run' / 'config.toml'} --out {tmp_path / 'again'}")
    assert again.code == 0, again.err
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_settings_of_the_process_are_not_of_the_run(stores, command, tmp_path):
    line = f"distill fit {stores} --student tiny --out {tmp_path / 'run'} --method proteus --epochs 1 --batch-size 5"
    done = command(f"{line} --set checkpoint_minutes=0.5")
    assert done.code == 0, done.err
    assert "checkpoint_minutes" not in Run(tmp_path / "run").config
    refused = command(f"{line} --set checkpoint_minute=1")
    assert refused.code == 2
    assert "did you mean checkpoint_minutes" in refused.err
    refused = command(f"{line} --set trackers=nowhere")
    assert refused.code == 2
    assert "unknown tracker 'nowhere'" in refused.err


def test_another_process_of_the_group_says_nothing(stores, command, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "run"
    done = command(
        f"distill fit {stores} --student tiny --out {out} --method proteus --epochs 1 --batch-size 5 --json -"
    )
    assert (done.code, done.out, done.err) == (0, "", "")

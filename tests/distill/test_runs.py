"""Where runs stand, by their folders; `distill ls` and `distill watch`."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import tomli_w
import torch
from fit_cases import files
from safetensors.torch import save_file
from torch import nn
from warm import python_path

from distill.training.run import Run
from distill.training.runs import runs, state_of, watch
from featcache_cli import programs
from featcache_cli.runs import spark
from featcache_cli.screen import duration

CONFIG = {"student": "tiny", "method": "centred", "epochs": 4, "batch_size": 8, "seed": 3, "store": "t.zarr"}


def record(epoch: int, loss: float, **figures: float) -> dict:
    return {"epoch": epoch, "step": 10 * epoch, "loss": loss} | {f"holdout/{k}": v for k, v in figures.items()}


def make_run(folder: Path, *records: dict, finished: bool = False, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "config.toml").write_text(tomli_w.dumps(CONFIG | config))
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    if finished:
        save_file({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, folder / "student.safetensors")
        (folder / "student.json").write_text("{}")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    def command(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as ended:
            programs.run_distill()
        return ended.value.code or 0, *capsys.readouterr()

    return command


def test_states(tmp_path):
    make_run(tmp_path / "a", record(1, 0.5, cosine=0.1), {"step": 15, "loss": 0.4}, finished=True)
    make_run(tmp_path / "b", record(1, 0.5))
    make_run(tmp_path / "c")
    make_run(tmp_path / "d", record(2, 0.5))
    (tmp_path / "d" / "failed.json").write_text('{"reason": "the loss became nan"}')
    with filelock.FileLock(make_run(tmp_path / "deep" / "er" / "e", record(1, 0.5)) / ".lock"):
        before = files(tmp_path)
        found = {run.path.name: run for run in runs(tmp_path)}
        assert files(tmp_path) == before
    assert {name: run.state for name, run in found.items()} == {
        "a": "finished", "b": "interrupted", "c": "interrupted", "d": "failed", "e": "running",
    }  # fmt: skip
    assert found["d"].reason == "the loss became nan"
    a = found["a"]
    assert (a.method, a.student, a.seed, a.epochs, a.done, a.step, a.loss) == ("centred", "tiny", 3, 4, 1, 15, 0.4)
    assert a.held_out == {"cosine": 0.1}
    assert a.curve("loss") == [0.4]
    assert a.curve("holdout/cosine") == [0.1]
    assert (
        state_of(tmp_path / "deep" / "er" / "e").state == "interrupted"
    )  # its process is gone, the lock's file is not


def test_damaged_runs_say_why(tmp_path):
    (make_run(tmp_path / "toml") / "config.toml").write_text("student = ")
    (make_run(tmp_path / "none", record(1, 0.5)) / "config.toml").unlink()
    (make_run(tmp_path / "lacks") / "config.toml").write_text('student = "tiny"\nmethod = "mse"\nstore = "t.zarr"')
    (make_run(tmp_path / "metrics", record(1, 0.5)) / "metrics.jsonl").write_text('{"epoch": 1, "st')
    (make_run(tmp_path / "list") / "metrics.jsonl").write_text("[1]\n")
    make_run(tmp_path / "lossless", {"epoch": 1, "step": 1})
    weights = make_run(tmp_path / "cut", finished=True) / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    make_run(tmp_path / "gone", finished=True).joinpath("student.safetensors").unlink()
    found = {run.path.name: run for run in runs(tmp_path)}
    assert {run.state for run in found.values()} == {"damaged"}
    for name, said in {
        "toml": "config.toml: Invalid value", "none": "config.toml is missing", "lacks": "does not name epochs, batch_size",
        "metrics": "metrics.jsonl: ", "list": "metrics.jsonl: a line is no record", "lossless": "a line is no record of a step; remove it", "cut": "student.safetensors: it is cut",
        "gone": "student.safetensors: ",
    }.items():  # fmt: skip
        assert said in found[name].reason, name


def test_what_is_no_run_is_not_listed(tmp_path):
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "store.zarr" / "zarr.json").write_text("{}")
    make_run(tmp_path / "store.zarr" / "inside")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.toml").write_text("[site]\n")
    assert runs(tmp_path) == []
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        runs(tmp_path / "nowhere")


def test_a_run_named_twice_is_one(tmp_path):
    assert len(runs(make_run(tmp_path / "a"), tmp_path)) == 1


def test_parameters_are_those_of_the_module(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    folder = make_run(tmp_path / "a", finished=True)
    save_file(module.state_dict(), folder / "student.safetensors")
    assert state_of(folder).parameters == sum(weight.numel() for weight in module.parameters()) == 130


def test_time_left_is_of_the_newest_two_checkpoints(tmp_path):
    folder, now = make_run(tmp_path / "a", record(1, 0.5), record(2, 0.4)), time.time()
    for step, ago in ((10, 130.0), (20, 30.0)):
        file = folder / "checkpoints" / f"step-{step:08d}.pt"
        file.touch()
        os.utime(file, (now - ago, now - ago))
    with filelock.FileLock(folder / ".lock"):
        left = state_of(folder).seconds_left
    assert left == pytest.approx(
        20 * 10.0 - 30, abs=20
    )  # 20 steps of 10 s are left, for 30 s the next has been under way
    assert state_of(folder).seconds_left is None


def test_watching_ends_with_the_last_run(tmp_path):
    folder = make_run(tmp_path / "a", record(1, 0.5))
    lock = filelock.FileLock(folder / ".lock")
    lock.acquire()

    def meanwhile(seconds: float) -> None:
        assert seconds == 7
        epoch = len((folder / "metrics.jsonl").read_text().splitlines()) + 1
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record(epoch, 0.5 / epoch)) + "\n")
        if epoch == 4:
            lock.release()

    seen = [[run.done for run in now] for now in watch(tmp_path, every=7.0, sleep=meanwhile)]
    assert seen == [[1], [2], [3], [4]]
    with pytest.raises(ValueError, match="no run is there"):
        next(watch(make_run(tmp_path / "b") / "checkpoints"))


def test_a_run_that_ends_while_it_is_looked_at_has_finished(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a", record(3, 0.5))
    lock = filelock.FileLock(folder / ".lock")
    lock.acquire()
    exists = Path.exists

    def ends_first(path: Path, **given) -> bool:
        if path.name == "student.json" and lock.is_locked:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record(4, 0.4)) + "\n")
            save_file({"weight": torch.zeros(3)}, folder / "student.safetensors")
            (folder / "student.json").write_text("{}")
            lock.release()
        return exists(path, **given)

    monkeypatch.setattr(Path, "exists", ends_first)
    now = state_of(folder)
    assert (now.state, now.done, now.loss) == ("finished", 4, 0.4)


def test_a_run_that_fails_leaves_its_reason_until_it_goes_on(tmp_path):
    def trained(error: BaseException | None, resume: bool) -> None:
        with Run(tmp_path / "a") as run:
            run.open(CONFIG, resume=resume)
            run.begun = True
            if error:
                raise error

    for error, state in (
        (RuntimeError("the loss became nan\nby step 7"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError(28, "No space left"), "failed"),
    ):
        with pytest.raises(type(error)):
            trained(error, resume=True)
        assert state_of(tmp_path / "a").state == state
    assert "No space left" in state_of(tmp_path / "a").reason
    trained(None, resume=True)
    assert state_of(tmp_path / "a").state == "interrupted"


def test_ls_lists_and_sorts(tmp_path, command):
    make_run(tmp_path / "a", record(4, 0.5, gram_pearson=0.2), finished=True)
    make_run(tmp_path / "b", record(4, 0.4, gram_pearson=0.7, nll=2.0), finished=True, seed=1)
    make_run(tmp_path / "c\nd", seed=2)
    code, out, err = command(f"distill ls {tmp_path} --sort gram_pearson --json -")
    assert code == 0
    listed = json.loads(out)["runs"]
    assert [Path(run["path"]).name for run in listed] == ["b", "a", "c\nd"]
    assert listed[0]["held_out"] == {"gram_pearson": 0.7, "nll": 2.0}
    assert listed[0]["parameters"] == 18
    code, out, err = command(f"distill ls {tmp_path} --sort seed")
    assert code == 0
    assert "c\\nd" in out.replace(" ", "").replace("│", "").replace("\n", "")
    code, out, err = command(f"distill ls {tmp_path} --sort nothing")
    assert code == 2
    assert "--sort nothing: no such column" in err
    (tmp_path / "empty").mkdir()
    code, out, err = command(f"distill ls {tmp_path / 'empty'}")
    assert (code, out) == (0, "")
    assert "no runs in" in err


def test_watch_says_a_line_an_epoch_where_there_is_no_terminal(tmp_path, command):
    make_run(tmp_path / "a", record(1, 0.5, cosine=0.25), record(2, 0.25, cosine=0.5), finished=True)
    code, out, err = command(f"distill watch {tmp_path / 'a'}")
    assert code == 0
    assert out.splitlines() == [
        f"{tmp_path}/a: epoch 1/4 · loss 0.5000 · cosine 0.2500",
        f"{tmp_path}/a: epoch 2/4 · loss 0.2500 · cosine 0.5000",
        f"{tmp_path}/a: finished · 2 of 4 epochs",
    ]
    assert "tensorboard --logdir" in err
    make_run(tmp_path / "b", record(1, 0.5))
    code, out, err = command(f"distill watch {tmp_path} --json -")
    assert code == 1  # one of them did not finish
    assert [run["state"] for run in json.loads(out)["runs"]] == ["finished", "interrupted"]


def test_json_has_null_for_what_is_no_number(tmp_path, command):
    make_run(tmp_path / "a", record(1, math.nan, cosine=math.inf))
    for line in (f"distill ls {tmp_path} --json -", f"distill watch {tmp_path} --json -"):
        out = command(line)[1]
        (run,) = json.loads(out, parse_constant=lambda name: pytest.fail(name))["runs"]
        assert (run["loss"], run["held_out"]) == (None, {"cosine": None})


def test_curves_as_blocks():
    assert spark([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert spark([3, 3]) == "▁▁"
    assert spark([0, math.nan, 1]) == "▁?█"
    assert spark([0, 0, 1, 1, 2, 2], width=3) == "▁▅█"
    assert spark([]) == ""


def test_durations():
    assert [duration(each) for each in (3.21, 119, 600, 7200, 90_000, 200_000)] == [
        "3.2 s", "119 s", "10 min", "2 h", "25 h", "2.3 days",
    ]  # fmt: skip


def test_looking_at_runs_needs_no_torch(tmp_path):
    make_run(tmp_path / "a")
    code = "import sys, distill; print(distill.runs('.')[0].state, 'torch' in sys.modules)"
    environ = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environ, check=True
    )
    assert done.stdout.split() == ["interrupted", "False"]

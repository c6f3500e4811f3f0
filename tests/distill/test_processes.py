"""Two processes with gloo train as one does at the same global batch."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from warm import Warm

from distill.training.fit import fit
from distill.training.run import Run
from featcache.run_folder import snapshots

SCRIPT = Path(__file__).with_name("two_processes.py")
METHODS = ["proteus", "relation", "landmarks", "joint", "rkd", "lightly_v1"]


def launch(processes: int, store, images, out: Path) -> None:
    """What `torchrun --nproc-per-node PROCESSES` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in {**place, **address}.items()}}
        given = {"cwd": SCRIPT.parent, "env": environment if processes > 1 else None}
        started.append(Warm(SCRIPT.read_text(), store.path, images, out, *METHODS, **given))
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * processes, said


@pytest.fixture(scope="module")
def runs(store, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        launch(processes, store, images, folder / str(processes))
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_one_process(runs, name):
    one, two = (json.loads((runs / number / f"{name}.json").read_text()) for number in "12")
    assert len(one) == len(two) == 6  # two epochs of three batches of 16, of 48 samples
    for step, (alone, shared) in enumerate(zip(one, two, strict=True)):
        assert shared == pytest.approx(alone, rel=1e-5, abs=1e-5), f"step {step}"


@pytest.mark.parametrize("name", METHODS)
def test_weights_and_metrics_are_those_of_one_process(runs, name):
    one, two = (Run(runs / number / name) for number in "12")
    for mine, theirs in zip(one.metrics, two.metrics, strict=True):
        shared = {key: value for key, value in theirs.items() if key not in ("images_per_second", "wait_share")}
        assert shared == pytest.approx({key: mine[key] for key in shared}, rel=1e-4, abs=1e-4)
    mine, theirs = (load_file(run.path / "student.safetensors") for run in (one, two))
    for key, weight in mine.items():
        torch.testing.assert_close(theirs[key], weight, rtol=1e-3, atol=1e-4)


def test_students_kept_on_the_way_are_those_of_one_process(runs):
    one, two = (snapshots(runs / number / "rkd") for number in "12")
    assert [each.step for each in one] == [each.step for each in two] == [2, 4, 6]
    for mine, theirs in zip(one, two, strict=True):
        weights = load_file(theirs.path)
        for key, weight in load_file(mine.path).items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-3, atol=1e-4)


def test_only_one_process_writes(runs):
    events = list((runs / "2" / "proteus").glob("events.out.tfevents.*"))
    assert len(events) == 1


def test_batches_that_cannot_be_shared_are_refused(store, images, tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", 3)
    for given, message in (
        ({"batch_size": 16}, "batch_size 16 cannot be shared equally by 3 processes; choose a multiple of 3"),
        (
            {"batch_size": 20, "accumulate": 2},
            "batch_size 20 cannot be shared equally by 3 processes × 2 accumulated parts; choose a multiple of 6",
        ),
        ({"batch_size": 96}, "batch_size 96, shared by 3 processes, is more than the 64 samples; lower it"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(store, str(images), out=tmp_path / "run", device="cpu", student="tiny", **given)
    assert not (tmp_path / "run").exists()

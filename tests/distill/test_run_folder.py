"""What lies in a run folder: readable by whom it should be, whole on a full disk, written by one process, gone after a
start that failed."""

import errno
import io
import os
import pathlib

import pytest
import torch
import warm
from fit_cases import Interrupted, files, interrupt_at, without_speed
from safetensors.torch import load_file

from distill.exporting.export import export
from distill.training.run import Run
from featcache.encoder import load_encoder
from featcache.student import load_student


@pytest.fixture(scope="module")
def quick(train):
    """`quick(out, ...)`: four steps of a linear student in two epochs."""

    def quick(out, **given):
        plain = {
            "student": "odd_students:Plain",
            "method": "proteus",
            "embedding_dim": 0,
            "epochs": 2,
            "batch_size": 32,
        }
        return train(out, **{**plain, **given})

    return quick


# -- weights that share memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("student", ["Tied", "Shared"])
@pytest.mark.parametrize("settings", [{}, {"ema": 0.8}, {"optimizer": "lars"}], ids=str)
def test_weights_that_share_memory_are_saved_and_resumed(quick, tmp_path, student, settings):
    given = {"student": f"odd_students:{student}", **settings}
    made = []
    whole = quick(tmp_path / "whole", **given)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path / "run", **given, resume=stop > 1, progress=press_after(stop))
    run = quick(tmp_path / "run", **given, resume=True, progress=made.append)
    assert [at.done for at in made] == [4]
    weights = load_file(run.path / "student.safetensors")
    for name, weight in load_file(whole.path / "student.safetensors").items():
        assert torch.equal(weights[name], weight), name
    assert without_speed(run.metrics) == without_speed(whole.metrics)
    loaded = load_student(run.path, trust_code=True)[0].state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    one, other = (load_encoder(f"run:{path}", trust_code=True) for path in (run.path, whole.path))
    assert one.fingerprint == other.fingerprint
    assert export(run, tmp_path / "exported", trust_code=True).max_difference == 0


def press_after(step):
    def progress(at):
        if (at.stage, at.done) == ("training", step):
            raise KeyboardInterrupt

    return progress


# -- who may read them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_every_file_is_as_the_umask_says(quick, tmp_path, umask):
    was = os.umask(umask)
    try:
        run = quick(tmp_path / "run", method="landmarks", method_options={"mapping": "spectral"})
    finally:
        os.umask(was)
    modes = {path.name: path.stat().st_mode & 0o777 for path in run.path.rglob("*") if path.is_file()}
    assert {"student.safetensors", "mapping.safetensors", "step-00000004.pt", "metrics.jsonl"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}, modes


# -- a full disk ------------------------------------------------------------------------------------------


class FullDisk(io.FileIO):
    """Room for one write in part, and none for the rest."""

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full(monkeypatch):
    """`full(name)`: the disk is full for files of that name, until `full(None)`."""
    wanted, opened = [None], pathlib.Path.open

    def of(path, mode="r", *args, **given):
        if wanted[0] and path.name.startswith(wanted[0]) and "w" in mode:
            return FullDisk(path, "w")
        return opened(path, mode, *args, **given)

    monkeypatch.setattr(pathlib.Path, "open", of)
    return lambda name: wanted.__setitem__(0, name)


@pytest.mark.parametrize(
    "name",
    ["config.toml", "mapping.safetensors", "metrics.jsonl", "step-00000004.pt", "student.safetensors", "student.json"],
)
def test_a_full_disk_says_so_and_costs_nothing_that_was_saved(quick, tmp_path, full, name):
    whole = quick(tmp_path / "whole")
    full(name)
    before_training = name in ("config.toml", "mapping.safetensors")
    again = "run the same command again$" if before_training else "continue with `distill fit --out .*run --resume`"
    said = (
        rf"run/.*{name}: its disk is full \(No space left on device\): [\d,]+ bytes to write; make room, then {again}"
    )
    with pytest.raises(OSError, match=said) as told:
        quick(tmp_path / "run")
    assert told.value.errno == errno.ENOSPC
    assert not list(tmp_path.rglob("*.partial"))
    assert (tmp_path / "run").exists() != before_training
    full(None)
    run = quick(tmp_path / "run", resume=True)
    assert run.finished
    assert without_speed(run.metrics) == without_speed(whole.metrics)
    for file in ("student.safetensors", "mapping.safetensors"):
        assert (run.path / file).read_bytes() == (whole.path / file).read_bytes(), file


def test_tensorboard_on_a_full_disk_is_told_in_one_line(quick, tmp_path, monkeypatch, capfd):
    def refuse(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("distill.training.board.SummaryWriter.flush", refuse)
        with pytest.raises(OSError, match=r"run: TensorBoard's events: its disk is full \(No space left on device\)"):
            quick(tmp_path / "run")
    assert "Traceback" not in capfd.readouterr().err
    assert quick(tmp_path / "run", resume=True).finished


# -- one process ------------------------------------------------------------------------------------------


def test_a_second_process_in_the_same_folder_is_refused(quick, tmp_path):
    met = []

    def second(at):
        if at.done == 1:
            ran = in_another_process(tmp_path / "run")
            met.append(ran.stderr.splitlines()[-1])

    run = quick(tmp_path / "run", progress=second)
    assert met[0].startswith("ValueError: ")
    assert met[0].endswith("run: another process is training in it; wait for it, or choose another --out")
    assert run.finished
    assert not (run.path / ".lock").exists()


def in_another_process(folder):
    code = (
        "import sys; from distill.training.run import Run; run = Run(sys.argv[1])\n"
        "with run: run.open(run.config, resume=True)\nprint('claimed')"
    )
    return warm.run(code, folder)


def test_a_lock_that_a_killed_process_left_is_nobodys(quick, tmp_path):
    with pytest.raises(Interrupted):
        quick(tmp_path / "run", progress=interrupt_at("training", 3))
    run = Run(tmp_path / "run")
    code = (
        "import os, signal, sys; from distill.training.run import Run; run = Run(sys.argv[1])\n"
        "run.open(run.config, resume=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert warm.run(code, run.path).returncode == -9
    assert (run.path / ".lock").exists()
    assert quick(run.path, resume=True).finished


# -- a start that failed ----------------------------------------------------------------------------------


def test_a_start_that_fails_leaves_no_folder(quick, tmp_path, monkeypatch):
    """Whatever fails until the first step is done; parents that were made for it go too."""
    out = tmp_path / "sweep" / "runs" / "a"

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for wrong, error in (
        ({"student": "timm/resnet19"}, ValueError),
        ({"student": "timm/resnet18:gone.safetensors"}, ValueError),
        ({"student": "odd_students:Fails"}, RuntimeError),
        ({"method_options": {"head": "none"}, "method": "cosine"}, ValueError),
        ({"trackers": ["nonesuch"]}, ValueError),
        ({"method": "landmarks", "method_options": {"mapping": "sne", "mapping_start": "there"}}, ValueError),
    ):
        with pytest.raises(error):
            quick(out, **wrong)
        assert not out.parent.parent.exists(), wrong
    for what in (
        "distill.methods.proteus.Proteus.prepare",
        "distill.training.loop.Loop.__init__",
        "distill.training.fit._warn",
    ):
        for raised in (interrupted, lambda *a, **k: 1 / 0):
            with monkeypatch.context() as patch:
                patch.setattr(what, raised)
                with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
                    quick(out)
            assert not out.parent.parent.exists(), what
    assert quick(out).finished


def test_a_folder_that_was_there_stays(quick, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(RuntimeError):
        quick(tmp_path / "run", student="odd_students:Fails")
    assert files(tmp_path / "run") == {}
    assert (tmp_path / "run").is_dir()

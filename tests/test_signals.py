"""SIGTERM and SIGHUP, sent to real processes, stop them as Ctrl-C does: what is in hand is saved, one line says so."""

import os
import pty
import select
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from warm import PROGRAM, Warm

from distill.training.run import Run
from featcache.stop import Stopped, stoppable
from featcache.store import open_store

SLOW = '''
import time
import torch
from torch import nn
from featcache import Encoder, Preprocess


class Slow(nn.Module):
    """Takes a twentieth of a second; says in a file when it has begun."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 8)

    def forward(self, images):
        if len(images) > 1:
            open("begun", "a").write("x")
            time.sleep(0.05)
        return self.linear(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1))


class Teacher(Slow):
    def forward(self, images):
        return {"embedding": super().forward(images)}


def student():
    return Slow()


def teacher():
    torch.manual_seed(0)
    return Encoder(name="slow", module=Teacher(), preprocess=Preprocess(resize=16, crop=16, size=16),
                   fields={"embedding": 8}, output="linear")
'''  # fmt: skip
IN_A_TERMINAL = """
import fcntl, os, termios
os.setsid()
terminal = os.open({!r}, os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY)
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
"""
REHEARSAL = 3
"""Passes through the student by which a fit's plan tells how long it takes."""
FIT = "distill fit --store t.zarr --corpus photos --student slow:student --method proteus --batch-size 4 --epochs 100"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`photos/`, `slow.py` with a teacher and a student, and `t.zarr`."""
    folder = tmp_path_factory.mktemp("signals")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(200):
        Image.fromarray(rng.integers(0, 256, (2, 2, 3), np.uint8)).resize((16, 16)).save(folder / "photos" / f"{i}.png")
    (folder / "slow.py").write_text(SLOW)
    (folder / "sweep.toml").write_text(
        'store = "t.zarr"\ncorpus = "photos"\nout = "swept"\nmethods = ["proteus"]\nstudents = ["slow:student"]\n'
        "seeds = [0, 1]\n[common]\nepochs = 100\nbatch_size = 4\n"
    )
    extracting = start(folder, "featcache extract photos --teacher slow:teacher --out t.zarr --batch-size 50")
    said = extracting.communicate(timeout=300)[1]
    assert extracting.returncode == 0, said
    return folder


def start(folder: Path, command: str, before: str = "", **environment: str) -> Warm:
    """A real process that runs `before`, then the command."""
    return Warm(before + PROGRAM, *command.split(), cwd=folder, env=os.environ | environment)


def stopped(folder: Path, command: str, number: int, after: int = 5) -> tuple[int, str]:
    """Exit code and what was said, of a command that got the signal after so many batches."""
    (folder / "begun").unlink(missing_ok=True)
    process = start(folder, command)
    wait_for(folder, process, after + REHEARSAL * command.startswith("distill fit"))
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def wait_for(folder: Path, process: Warm, batches: int) -> None:
    while not (folder / "begun").exists() or (folder / "begun").stat().st_size < batches:
        assert process.returncode is None, process.said
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_an_extraction_saves_its_unit_and_goes_on_from_there(folder, number):
    command = (
        f"featcache extract photos --teacher slow:teacher --out {number.name}.zarr --batch-size 4 --precision fp32"
    )
    code, said = stopped(folder, command, number, after=20)
    assert code == 128 + number
    name = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert [line for line in said.splitlines() if name in line] == [
        f"{name}; what is done is kept, the same command (`distill fit`: with --resume) goes on from there"
    ]
    assert "Traceback" not in said
    assert (folder / f"{number.name}.zarr" / "unfinished.npz").exists()
    again = start(folder, command)
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0, said
    assert len(open_store(folder / f"{number.name}.zarr").ok) == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_fit_writes_a_checkpoint(folder, number):
    code, said = stopped(folder, f"{FIT} --out {number.name}", number)
    assert code == 128 + number
    assert f"stopped by {number.name}" in said
    assert "Traceback" not in said
    run = Run(folder / number.name)
    step = run.load_checkpoint()["step"]
    assert 4 <= step < 50  # in the first epoch
    if number == signal.SIGTERM:
        code, _ = stopped(folder, f"distill fit --out {number.name} --resume --trust-code", number, after=3)
        assert code == 128 + number
        assert run.load_checkpoint()["step"] > step


def test_a_sweep_stops_and_keeps_the_run_in_hand(folder):
    code, said = stopped(folder, "distill sweep sweep.toml --trust-code", signal.SIGTERM, after=60)
    assert code == 143
    assert "stopped by SIGTERM" in said
    assert "failed" not in said
    runs = [path.name for path in (folder / "swept" / "runs").iterdir()]
    assert runs == ["proteus-student-s0"] or len(runs) == 1
    assert Run(folder / "swept" / "runs" / runs[0]).load_checkpoint()["step"] > 0


def test_nohup_stays_nohup(folder):
    """A SIGHUP that is ignored goes by; SIGTERM then stops it."""
    (folder / "begun").unlink(missing_ok=True)
    process = start(folder, f"{FIT} --out nohup", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    wait_for(folder, process, 5 + REHEARSAL)
    process.send_signal(signal.SIGHUP)
    wait_for(folder, process, 12 + REHEARSAL)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143
    assert Run(folder / "nohup").load_checkpoint()["step"] >= 11


def test_processes_stop_at_the_same_step_and_the_first_saves(folder):
    """As `torchrun` ends them: SIGTERM to each, one after the other."""
    (folder / "begun").unlink(missing_ok=True)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [start(folder, f"{FIT} --out two --device cpu", **place, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    wait_for(folder, both[0], 8 + REHEARSAL)
    for process in both:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [143, 143], said
    assert Run(folder / "two").load_checkpoint()["step"] % 10 == 0


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_program_of_ones_own_gets_the_exception_and_its_handlers_back():
    def send(number):
        with stoppable():
            os.kill(os.getpid(), number)
            time.sleep(5)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    for number in (signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(Stopped) as caught:
            send(number)
        assert caught.value.signal == number
        assert isinstance(caught.value, KeyboardInterrupt)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_handler_of_ones_own_stays_and_other_threads_change_nothing():
    seen = []
    was = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        assert seen == ["mine"]
    finally:
        signal.signal(signal.SIGTERM, was)

    def elsewhere():
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen[-1] is was


def test_a_second_signal_does_not_disturb_the_saving():
    saved = []

    def run():
        with stoppable():
            try:
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
                saved.append(True)

    with pytest.raises(Stopped) as caught:
        run()
    assert (caught.value.signal, saved) == (signal.SIGHUP, [True])


def test_a_closed_terminal_ends_a_fit_with_a_checkpoint(folder):
    """The kernel sends SIGHUP, and every further write to the terminal fails."""
    (folder / "begun").unlink(missing_ok=True)
    ours, theirs = pty.openpty()
    process = start(folder, f"{FIT} --out closed", IN_A_TERMINAL.format(os.ttyname(theirs)))
    hung_up = threading.Event()
    terminal = threading.Thread(target=read_all, args=(ours, hung_up))
    terminal.start()
    wait_for(folder, process, 8 + REHEARSAL)
    os.close(theirs)
    hung_up.set()
    terminal.join()
    process.communicate()
    assert process.returncode == 129
    assert Run(folder / "closed").load_checkpoint()["step"] >= 7


def read_all(terminal: int, hung_up: threading.Event) -> None:
    """What a terminal shows, until somebody closes it."""
    while not hung_up.is_set():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)

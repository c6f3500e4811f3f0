"""Python in a process of its own that begins with torch, timm and zarr imported: to import them takes a process longer
than most of what tests ask of it.

A server without threads, started once, imports them and forks (`multiprocessing`'s forkserver). For what must be seen
from the first import on, a test takes `subprocess`.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; from featcache_cli import programs; getattr(programs, f'run_{sys.argv.pop(1)}')()"
"""Code of a process that runs the command that its arguments say."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["distill.training.fit", "featcache.extraction.extract", "scipy.stats"])


def python_path(*first: Any) -> str:
    """PYTHONPATH of a process of a test: these folders, the checkout, and behind it `tests/`, whose folders are named
    like the packages."""
    return os.pathsep.join(map(str, (*first, ROOT, ROOT / "tests")))


class Warm:
    """`python -c code arguments…` in the folder `cwd` with the environment `env`, as `subprocess.Popen` would start it.

    `path` comes first among the folders that modules are imported from.
    """

    def __init__(
        self, code: str, *arguments: Any, cwd: Any = None, env: Mapping[str, str] | None = None, path: Any = ()
    ) -> None:
        self._said = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        begun = {
            "arguments": ["-c", *map(str, arguments)],
            "cwd": str(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "path": python_path(*path).split(os.pathsep),
            "said": [file.name for file in self._said],
        }
        self._process = SERVER.Process(target=_run, args=(code, begun), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait_for(self, line: str) -> None:
        """Until it has written this line to stdout."""
        while line not in self.said[0].splitlines():
            assert self.returncode is None, self.said
            time.sleep(0.01)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it wrote to stdout and stderr until it ended."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self._process.name, timeout, *self.said)
        return self.said

    @property
    def said(self) -> tuple[str, str]:
        """What it wrote to stdout and stderr so far."""
        out, err = (Path(file.name).read_text(encoding="utf-8") for file in self._said)
        return out, err


def run(code: str, *arguments: Any, timeout: float = 300, **given: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `Warm(code, *arguments, **given)`."""
    process = Warm(code, *arguments, **given)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(code, process.returncode, out, err)


def _run(code: str, begun: dict[str, Any]) -> None:
    os.chdir(begun["cwd"])
    os.environ.clear()
    os.environ.update(begun["environment"])
    sys.argv = begun["arguments"]
    sys.path[:0] = [begun["cwd"], *begun["path"]]
    for number, name in enumerate(begun["said"], 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background and ignore it
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})

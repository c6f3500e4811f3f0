"""Processes that tests start find the checkout, and those of `warm` are what `subprocess` would start."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm

HERE = Path(__file__).parent
ALONE = {"test_packaging.py", "test_warm.py"}
"""Of their own: what is installed, and this."""
SEEN = """
import os, sys
import featcache, tiny
print(featcache.__file__, tiny.__file__, sys.argv[1:], os.getcwd(), os.environ.get("GIVEN"), os.environ.get("HOME"))
print("said", file=sys.stderr)
sys.exit(3)
"""


def test_who_sets_the_path_of_a_process_takes_the_one_order():
    """With `tests/` first, `tests/featcache` would be taken for the package, where featcache is not on PYTHONPATH before."""
    sets = re.compile(r"\bPYTHONPATH[\"']\s*[:,\]]")
    texts = {path.name: path.read_text(encoding="utf-8") for path in HERE.rglob("test_*.py") if path.name not in ALONE}
    lines = [(name, line) for name, text in texts.items() for line in text.splitlines() if sets.search(line)]
    assert len(lines) >= 5
    assert [found for found in lines if "python_path(" not in found[1]] == []


def test_a_process_of_the_one_order_finds_the_package_and_what_tests_share(tmp_path):
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": warm.python_path()}
    cold = subprocess.run(
        [sys.executable, "-c", SEEN, "a b", "1"],
        cwd=tmp_path,
        env=bare | {"GIVEN": "é"},
        capture_output=True,
        text=True,
    )
    expected = f"{warm.ROOT}/featcache/__init__.py {HERE}/tiny.py ['a b', '1'] {tmp_path} é {tmp_path}\n"
    assert (cold.returncode, cold.stdout, cold.stderr) == (3, expected, "said\n")
    same = warm.run(SEEN, "a b", 1, cwd=tmp_path, env=bare | {"GIVEN": "é"})
    assert (same.returncode, same.stdout, same.stderr) == (3, expected, "said\n")


def test_how_a_warm_process_ends_is_told():
    assert warm.run("import os; os.kill(os.getpid(), 9)").returncode == -9
    failed = warm.run("print('before'); {}['key']")
    assert (failed.returncode, failed.stdout) == (1, "before\n")
    assert failed.stderr.endswith("KeyError: 'key'\n")
    process = warm.Warm("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    process.wait_for("begun")
    assert process.returncode is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("begun\n", "")
    assert process.returncode == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run("import time; time.sleep(600)", timeout=0.2)

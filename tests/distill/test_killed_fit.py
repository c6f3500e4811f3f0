"""A real `kill -9`, at random instants of real runs."""

import subprocess
import sys
from pathlib import Path


def test_a_run_killed_at_any_instant_ends_with_the_same_weights():
    soak = Path(__file__).parents[2] / "benchmarks" / "kill_fit.py"
    ran = subprocess.run([sys.executable, soak, "--kills", "8"], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(ran.stdout.split()[0]) >= 8

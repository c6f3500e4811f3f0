"""A real `kill -9`, at random instants of real runs, of a convolutional network, a transformer and an encoder of texts."""

import subprocess
import sys
from pathlib import Path


def test_a_store_killed_at_any_instant_ends_byte_identical():
    soak = Path(__file__).parents[2] / "benchmarks" / "kill_soak.py"
    ran = subprocess.run(
        [sys.executable, soak, "--kills", "12", "--images", "24", "--precisions", "fp32,bf16+channels_last"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kills = int(ran.stdout.split()[0])
    assert kills >= 12

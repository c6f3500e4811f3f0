"""What `appearing` leaves: nothing, or what it was asked for; also after a kill."""

import subprocess
import sys

from featcache.disk.durable import appearing

KILLED = """
import os, sys
from pathlib import Path
from featcache.disk.durable import appearing
with appearing(Path(sys.argv[1]), folder=True) as out:
    out.mkdir()
    (out / "half").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_taken_away_by_the_next(tmp_path):
    out = tmp_path / "out[1]"
    assert subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    assert not out.exists()
    with appearing(out, folder=True) as building:
        building.mkdir()
        (building / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]"]
    assert [path.name for path in out.iterdir()] == ["whole"]


def test_what_another_is_writing_stays(tmp_path):
    with appearing(tmp_path / "out", folder=True) as mine:
        mine.mkdir()
        with appearing(tmp_path / "out", folder=True) as theirs:
            theirs.mkdir()
            (theirs / "theirs").write_text("")
            assert mine.exists()
        (mine / "mine").write_text("")
        (tmp_path / "out" / "theirs").unlink()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

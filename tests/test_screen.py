"""What a terminal shows while a command works."""

import io
import re

import pytest
from rich.console import Console

from featcache_cli import screen as module

REMARK = "loss 2.1234 · 1,234 images/s · waits 3% · direction 0.1234 + relation 1.2345 + landmarks 0.7655"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_count_and_eta_stay_on_screens_of_any_width(monkeypatch, width):
    shown = io.StringIO()
    monkeypatch.setattr(module, "screen", Console(file=shown, force_terminal=True, width=width, soft_wrap=True))
    with module.bar("fit", "steps") as update:
        update(0, 100_000, "", "training")
        update(12_345, 100_000, REMARK, "training")
        module.screen.file.truncate(0)
        update(12_346, 100_000, REMARK, "training")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in shown.getvalue().splitlines()]
    line = next(line for line in lines if "steps" in line)
    assert "training" in line
    assert "12346/100000 steps ETA" in " ".join(line.split())
    assert re.search(r"[━╸]{4}", line)
    assert len(line) <= width
    assert ("landmarks" in line) == (width >= 200)
    assert "loss" in line or width < 80


def test_a_bar_that_knows_no_total_yet_shows_no_count(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(module, "screen", Console(file=shown, force_terminal=True, width=80, soft_wrap=True))
    with module.bar("check", "rows") as update:
        first = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
        assert "check" in first
        assert "/" not in first
        assert "rows" not in first
        update(3, 7)
    assert "3/7 rows ETA" in shown.getvalue()


@pytest.mark.parametrize(
    ("a_second", "said"),
    [(1234.4, "1,234"), (12.3, "12"), (9.96, "10"), (9.94, "9.9"), (0.4, "0.4"), (0.0213, "0.021")],
)
def test_a_slow_rate_is_not_called_nothing(a_second, said):
    assert module.rate(a_second) == said

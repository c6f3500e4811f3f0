"""Somebody else's package adds an evaluator and a detector, each in one small file."""

import json
import shlex
import sys

import numpy as np
import pytest

from evalsuite import Result, compare
from featcache_cli import programs

LENGTH = '''
from collections.abc import Sequence
from dataclasses import dataclass

from evalsuite.evaluators import Evaluator, Store, option, store


@dataclass(frozen=True, kw_only=True)
class Length(Evaluator):
    """The share of rows that are longer than a limit."""

    summary = "How many rows are long."

    rows: Store = store("The rows.")
    limit: float = option(1.0, "What counts as long.", names=("--limit", "-l"))
    powers: Sequence[int] = (2,)
    strict: bool = False

    def __post_init__(self):
        if self.limit < 0:
            raise ValueError(f"--limit {self.limit}: no row is shorter than 0")

    def run(self):
        import numpy as np

        from evalsuite.intervals import share
        from evalsuite.result import Metric, Result
        from featcache.rows import Rows

        rows = Rows.of(self.rows)
        samples = {"sample_id": rows.sample_ids.astype(np.str_)}
        for power in self.powers:
            length = (np.abs(rows.take(np.arange(len(rows)))) ** power).sum(axis=1)
            samples[f"long@{power}"] = length > self.limit if self.strict else length >= self.limit
        metrics = {name: share(of).metric() for name, of in samples.items() if name != "sample_id"}
        remarks = [f"{len(rows)} rows were measured"]
        return Result("length", {"rows": rows.record()}, {"limit": self.limit}, metrics, {}, samples, remarks)

    @classmethod
    def headlines(cls, results):
        from evalsuite.charts import Axis, Headline

        return [Headline(metric="long@2", axis=Axis.of("long@2", "Long rows"))]

    @classmethod
    def charts(cls, results):
        from evalsuite.charts import Axis, Dots, Section

        dots = Dots(title="How many are long", axis=Axis.of("long@2"), rows={"squared": "long@2"})
        return [Section(key="length", short="Length", title="Lengths", about="Of rows.", charts=[dots])]
'''

FLAT = """
import numpy as np

from evalsuite.detectors import Detector


class Flat(Detector):
    level: float = 0.0

    def score(self, features):
        return np.full(len(features), self.level)
"""


@pytest.fixture
def evalsuite(tmp_path, monkeypatch, capsys):
    """Runs one line of the program where the package `theirs` is installed; gives exit code, stdout, stderr."""
    site = tmp_path / "site"
    for name, text in {
        "theirs/length.py": LENGTH,
        "theirs/flat.py": FLAT,
        "theirs/broken.py": "import nothing_of_this_name\n",
        "theirs-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n",
        "theirs-1.0.dist-info/entry_points.txt": (
            "[evalsuite.evaluators]\nlength = theirs.length\nbroken = theirs.broken\n[evalsuite.detectors]\nflat = theirs.flat\n"
        ),
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)

    def run(line):
        monkeypatch.setattr(sys, "argv", ["evalsuite", *shlex.split(line)])
        with pytest.raises(SystemExit) as stopped:
            programs.run_evalsuite()
        return stopped.value.code or 0, *(" ".join(text.split()) for text in capsys.readouterr())

    yield run
    for name in ("theirs", "theirs.length", "theirs.flat"):
        sys.modules.pop(name, None)


def test_an_evaluator_is_one_file(evalsuite, make_store, rng, tmp_path):
    rows = rng.normal(size=(40, 3))
    make_store("a", rows)
    make_store("b", rows / 3)
    with pytest.warns(RuntimeWarning, match="evaluator broken cannot be used: No module named"):
        assert "length How many rows are long." in evalsuite("--help")[1].replace("│", "")
    help_ = evalsuite("length --help")[1].replace("│", "")
    for flag in ("--rows STORE", "--limit -l", "--powers", "--strict", "--json", "What counts as long."):
        assert flag in help_
    code, out, err = evalsuite("length --rows a.zarr -l 2 --powers 1,2 --strict --json a.json")
    assert code == 0, err
    held = (np.float16(rows).astype(float) ** 2).sum(axis=1) > 2
    assert f"long@2 │ {held.mean():.4f}" in out
    assert "rows: rows 40" in out
    assert "note: 40 rows were measured" in err
    result = Result.read("a.json")
    assert result.metrics["long@2"].value == held.mean()
    assert result.samples["long@2"].tolist() == held.tolist()
    assert json.loads(evalsuite("length --rows a.zarr --json -")[1])["parameters"] == {"limit": 1.0}
    for line, said in (
        ("length", "Missing option '--rows'"),
        ("length --rows a.zarr --limit -1", "--limit -1.0: no row is shorter than 0"),
        ("length --rows a.zarr --powers x", "--powers x: give whole numbers, separated by commas"),
        ("lenght --rows a.zarr", "lenght"),
    ):
        code, _, err = evalsuite(line)
        assert (code, said in err) == (2, True), err

    evalsuite("length --rows b.zarr -l 2 --powers 2 --json b.json")
    assert compare("a.json", "b.json").parameters["verdicts"] == {"long@2": "A better"}
    code, out, err = evalsuite("compare a.json b.json")
    assert (code, "A better" in out) == (0, True), err
    code, _, err = evalsuite("report a.json --out page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert all(said in page for said in ("How many are long", "Lengths", "Long rows"))


def test_a_detector_is_one_file(evalsuite, make_store, rng):
    for name in ("train", "test", "far"):
        make_store(name, rng.normal(size=(20, 3)))
    assert ", flat," in evalsuite("ood --help")[1]
    line = "ood --id-train train.zarr --id-test test.zarr --far f=far.zarr --detector flat:level=2 --json r.json"
    with pytest.warns(RuntimeWarning, match="flat:level=2: scores saturate"):
        code, out, err = evalsuite(line)
    assert code == 0, err
    assert Result.read("r.json").metrics["flat:level=2/far/f/auroc"].value == 0.5
    assert "flat:level=2/far/f" in out
    assert "mean" not in out  # of one set

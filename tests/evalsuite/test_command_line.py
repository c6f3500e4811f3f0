"""The `evalsuite` commands as a user types them: what they refuse, and their tables in a narrow terminal."""

import json
import re
import shlex
import sys

import numpy as np
import pytest

import featcache_cli.screen
from evalsuite import Metric, Result, detectors
from featcache_cli import programs


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs one line in the test's own folder; gives exit code, stdout, stderr with its boxes and line breaks undone."""
    monkeypatch.chdir(tmp_path)

    def run(line):
        monkeypatch.setattr(sys, "argv", ["evalsuite", *shlex.split(line)])
        with pytest.raises(SystemExit) as stopped:
            programs.run_evalsuite()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())

    return run


@pytest.fixture
def stores(make_store, rng):
    labels = np.repeat(range(3), 8)
    for name in ("train", "test"):
        make_store(name, np.eye(8)[labels] + 0.1 * rng.normal(size=(24, 8)), labels=labels)
    make_store("far", rng.normal(size=(24, 8)))


KNN = "knn --bank train.zarr --query test.zarr"
OOD = "ood --id-train train.zarr --id-test test.zarr"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{OOD}", "no OOD set was given; give --near NAME=STORE or --far NAME=STORE"),
        ("ood --id-test t.zarr --near a=b", "give --id-train STORE and --id-test STORE, or --preset NAME and --stores"),
        ("ood --preset openood-cifar10", "--preset NAME and --stores FOLDER go together"),
        (f"{OOD} --preset openood-cifar10 --stores s", "go together, without --id-train, --id-test, --near and --far"),
        (f"{KNN} --k ''", "--k '': give whole numbers"),
        ("probe --train a --test b --c ''", "--c '': give numbers"),
        ("robustness --encoder e --corpus c --bank b --out o --pgd ''", "--pgd '': give numbers"),
        ("compare r.json .", "error: . is a folder; give result files (.json)"),
        ("report .", "error: . is a folder; give result files (.json)"),
        (f"{KNN} --json .", "error: cannot write . (it is a folder); give another --json path"),
        (
            f"{KNN} --json r.json/x.json",
            "error: cannot write r.json/x.json (Not a directory); give another --json path",
        ),
        ("probe --train a --test b --save .", "error: cannot write . (it is a folder); give another --save path"),
        ("report r.json --out .", "error: cannot write . (it is a folder); give another --out path"),
        (
            "report r.json --out r.json",
            "error: cannot write r.json (it is one of this command's other files); give another",
        ),
        (
            "report r.json --json r.json",
            "error: cannot write r.json (it is one of this command's other files); give another path",
        ),
        ("compare r.json r.json --json r.samples.npz", "(it is one of this command's other files); give another path"),
        ("compare r.json r.json --json r", "(it is one of this command's other files); give another path"),
        ("report r.json --out p.html --json p.html", "cannot write p.html (it is one of this command's other files)"),
        ("report A=r.json B=r.json --out p.html", "B=r.json: r.json is called A already; give each result one name"),
        ("probe --train a --test b --save h --json h", "cannot write h (it is one of this command's other files)"),
        (f"{OOD} --near n=n.zarr --head h --json h", "cannot write h (it is one of this command's other files)"),
        ("fidelity --teacher t --student s --mapping m --json m", "cannot write m (it is one of this command's other"),
        (
            "robustness --encoder e --corpus c --bank b --out o --reference r.json --json r.json",
            "cannot write r.json (it is one of this command's other files)",
        ),
        (f"{KNN} --seed -1", "Invalid value for '--seed'"),
    ],
)
def test_what_is_refused_is_said_in_the_words_of_the_command_line(command, tmp_path, line, said):
    metric = {"top1@1": Metric(1.0)}
    Result("knn", {}, {}, metric, {}, {"sample_id": np.array(["a", "b"]), "top1@1": np.ones(2, bool)}).write("r.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = command(line)
    assert code == 2
    assert said in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_result_is_written_into_a_store(command, stores, tmp_path):
    before = (tmp_path / "train.zarr" / "zarr.json").read_bytes()
    for place in ("train.zarr/zarr.json", "train.zarr/new/r.json"):
        code, _, err = command(f"{KNN} --k 1 --json {place}")
        assert code == 2
        assert f"cannot write {place} (it would lie inside a store); give another --json path" in err
    assert (tmp_path / "train.zarr" / "zarr.json").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{KNN} --k 1 --temperature inf", "temperature must be a positive, finite number, got inf"),
        (f"{OOD} --near n=far.zarr --detector gmm:reg=nan", "detector gmm: reg must be a finite number, got nan"),
    ],
)
def test_numbers_that_no_result_file_can_hold_are_refused(command, stores, line, said):
    code, _, err = command(f"{line} --json r.json")
    assert code == 2
    assert said in err


def test_a_full_disk_costs_the_file_and_not_the_table(command, stores, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    code, out, err = command(f"{KNN} --k 1 --json r.json")
    assert code == 1
    assert "top1@1" in out
    assert err == "error: cannot write r.samples.npz (No space left on device); give another path"


@pytest.mark.parametrize("width", [80, 130])
def test_names_stay_whole_and_intervals_come_where_there_is_room(command, stores, monkeypatch, width):
    monkeypatch.setattr(featcache_cli.screen.results, "width", width)
    given = "--near n=far.zarr --detector mahalanobis_pp --detector energy --detector knn --k 3 --resamples 20 --seed 5"
    with pytest.warns(RuntimeWarning, match="detector energy failed"):
        _, out, _ = command(f"{OOD} {given} --json r.json")
    result = Result.read("r.json")
    assert "mahalanobis_pp; energy temperature=1.0 (failed); knn k=3 mean=False" in out
    low, high = result.metrics["knn/near/n/auroc"].ci95
    assert (f"{low:.4f}–{high:.4f}" in out) == (width == 130)
    assert ("95 % intervals are in the JSON" in out) == (width == 80)
    _, compared, _ = command("compare r.json r.json --resamples 10 --seed 2")  # both without effect, for older scripts
    for table in (out, compared):
        assert max(map(len, table.splitlines())) <= width
        assert "mean/" not in table, "the mean of the only near set, and of the only far one, repeats it"
        cells = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
        assert all(re.fullmatch(r"(mahalanobis_pp|knn|near|n|mean|[a-z]+\d*_?[a-z]*|/)+", cell) for cell in cells)
        pieces = {piece for cell in cells for piece in cell.split("/") if piece}
        assert pieces <= {piece for name in result.metrics for piece in name.split("/")}


def test_the_help_names_every_detector(command):
    _, out, _ = command("ood --help")
    listed = " ".join(out.split()).partition("Detectors: ")[2].rstrip(".").split(", ")
    assert listed == detectors.names()


def test_probe_says_what_it_is_doing(command, stores, monkeypatch):
    said = []

    class Clock:
        at = 0.0

        def monotonic(self):
            self.at += 60
            return self.at

    monkeypatch.setattr(featcache_cli.screen, "time", Clock())
    monkeypatch.setattr(featcache_cli.screen.screen, "print", lambda text, **_: said.append(text))
    command("probe --train train.zarr --test test.zarr --c 0.1,1")
    lines = [line.split(" · ")[:2] for line in said if "fits" in line]
    assert lines == [
        ["probe 1/3 fits", "choosing C"],
        ["probe 2/3 fits", "with the chosen C"],
        ["probe 3/3 fits", "with the chosen C"],
    ]


def test_what_is_left_out_is_on_the_screen(command, make_store, rng):
    """40 failed rows and 65 without a label in the bank, 20 failed queries."""
    labels = np.repeat(range(4), 50)
    x = np.eye(8)[labels] + 0.1 * rng.normal(size=(200, 8))
    failed = {row: "truncated" for row in range(0, 200, 5)}
    partly = np.where(np.arange(200) % 5 == 1, -1, labels)
    partly[np.flatnonzero(np.arange(200) % 5 == 2)[:25]] = -1
    make_store("bank", x, labels=partly, failed=failed)
    make_store(
        "query",
        x + 0.1 * rng.normal(size=x.shape),
        labels=np.where(np.arange(200) < 195, labels, 9),
        failed=dict(list(failed.items())[:20]),
    )
    code, out, err = command("knn --bank bank.zarr --query query.zarr --k 5 --json r.json")
    assert code == 0
    assert "note: bank bank.zarr: left out of 200 rows: 40 failed, 65 without a label" in err
    assert "note: query query.zarr: left out of 200 rows: 20 failed" in err
    assert "note: query query.zarr: 5 of 180 rows are of classes without a row in bank.zarr (9): they can never" in err
    remarks = Result.read("r.json").remarks
    assert len(remarks) == 3
    assert all(f"note: {remark}" in err for remark in remarks)
    _, out, err = command("knn --bank bank.zarr --query query.zarr --k 5 --json -")
    assert json.loads(out)["remarks"] == remarks
    assert all(f"note: {remark}" in err for remark in remarks)


@pytest.mark.parametrize("line", ["knn --bank {0} --query {1} --k 1", "probe --train {0} --test {1} --c 1"])
def test_classes_that_do_not_match_end_a_command(command, make_store, rng, line):
    x = np.repeat(np.eye(8), 3, axis=0)
    labels = np.repeat(range(8), 3)
    make_store("numbers", x, labels=labels)
    make_store("others", x, labels=100 + labels)
    make_store("named", x, labels=labels, class_names=list("abcdefgh"))
    for query, said in (
        (
            "others.zarr",
            "others.zarr and numbers.zarr have no class in common (100, 101, 102, … (8 in all) against 0, 1, 2",
        ),
        ("named.zarr", "named.zarr has class names (a, b, c, … (8 in all)), numbers.zarr only numbers (0, 1, 2, …"),
    ):
        code, out, err = command(line.format("numbers.zarr", query))
        assert (code, out) == (2, "")
        assert said in err
        assert err.startswith("error: ")


def test_a_detector_argument_in_another_unit_ends_the_command(command, stores):
    code, out, err = command(f"{OOD} --near n=far.zarr --detector knn --k 3 --detector react:percentile=0.9")
    assert (code, out) == (2, "")
    assert err == "error: react:percentile=0.9 is in percent; for the quantile 0.9 give 90"

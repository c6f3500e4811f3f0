import json
import subprocess
import sys

import numpy as np
import pytest

from evalsuite import Metric, Result
from evalsuite.result import refuse_inputs, versions
from featcache.disk.refusals import require_writable


@pytest.fixture
def result():
    return Result(
        "knn",
        {"bank": {"path": "photos-é.zarr", "rows": 3}},
        {"k": [1], "temperature": 0.07},
        {"top1@1": Metric(0.1 + 0.2, (0.25, 1 / 3)), "gram_pearson": Metric(-1.0)},
        versions(),
    )


def test_json_follows_the_contract(result):
    record = json.loads(result.to_json())
    assert list(record) == ["command", "inputs", "parameters", "metrics", "versions", "remarks"]
    assert record["metrics"]["top1@1"] == {"value": 0.1 + 0.2, "ci95": [0.25, 1 / 3]}
    assert record["metrics"]["gram_pearson"] == {"value": -1.0, "ci95": None}
    assert {"python", "numpy"} <= record["versions"].keys()


def test_write_and_read_are_inverse(result, tmp_path):
    path = result.write(tmp_path / "new" / "folder" / "r.json")
    assert Result.read(path) == result
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_remarks_are_kept_and_older_results_have_none(result, tmp_path):
    result.remarks = ["3 of 5 query rows are images that the bank has too", "é"]
    path = result.write(tmp_path / "r.json")
    assert Result.read(path) == result
    record = json.loads(path.read_text())
    for remarks in ("text", [1], {"a": 1}, None):
        path.write_text(json.dumps(record | {"remarks": remarks}))
        with pytest.raises(ValueError, match="is not a result file"):
            Result.read(path)
    del record["remarks"]
    path.write_text(json.dumps(record))
    assert Result.read(path).remarks == []


def test_samples_lie_beside_the_json(result, tmp_path):
    result.command, result.metrics = "ood", {"knn:k=1/near/tin/auroc": Metric(0.5)}
    result.samples = {
        "sample_id/near/tin": np.array(["a/1.jpg", "é"]),
        "score/knn:k=1/near/tin": np.array([0.5, -np.inf]),
    }
    path = result.write(tmp_path / "r.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.samples.npz"]
    read = Result.read(path).samples
    assert read.keys() == result.samples.keys()
    assert all((read[name] == values).all() for name, values in result.samples.items())
    result.samples = {}
    result.write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"], (
        "samples of an older result would be taken for this one's"
    )


def test_every_name_of_a_result_has_samples_of_its_own(result, tmp_path):
    result.metrics = {"top1@1": Metric(1.0)}
    for name, right in (("r.teacher", True), ("r.student", False)):
        result.samples = {"sample_id": np.array(["a"]), "top1@1": np.array([right])}
        result.write(tmp_path / name)
    assert Result.read(tmp_path / "r.teacher").samples["top1@1"].tolist() == [True]
    assert Result.read(tmp_path / "r.student").samples["top1@1"].tolist() == [False]


def test_samples_of_another_result_are_noticed_though_names_and_rows_fit(result, tmp_path):
    result.metrics = {"top1@1": Metric(1.0)}
    for name, right in (("a", True), ("b", False)):
        result.samples = {"sample_id": np.array(["x"]), "top1@1": np.array([right])}
        result.write(tmp_path / f"{name}.json")
    (tmp_path / "b.samples.npz").replace(tmp_path / "a.samples.npz")
    with pytest.raises(ValueError, match=r"a\.samples\.npz does not fit .*a\.json: it is of another result"):
        Result.read(tmp_path / "a.json")


def test_damaged_samples_are_named(result, tmp_path):
    result.samples = {"sample_id": np.array(["a"])}
    path = result.write(tmp_path / "r.json")
    (tmp_path / "r.samples.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"r\.samples\.npz is damaged"):
        Result.read(path)


def test_a_failed_write_leaves_the_old_file(result, tmp_path, monkeypatch):
    path = result.write(tmp_path / "r.json")
    before = path.read_bytes()
    result.command = "other"

    def fail(*_):
        raise OSError(28, "disk full", ".r.json.partial")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match=r"^cannot write .*/r\.json \(disk full\); give another path$"):
        result.write(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_what_cannot_be_written_is_named_before_anything_is(result, tmp_path):
    result.samples = {"sample_id": np.array(["a"])}
    (tmp_path / "folder").mkdir()
    file = result.write(tmp_path / "r.json")
    for target, reason in (
        (tmp_path / "folder", "it is a folder"),
        (file / "under" / "x.json", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ValueError, match=f"cannot write {target} \\({reason}\\); give another path"):
            result.write(target)
        with pytest.raises(ValueError, match=f"{reason}.*; give another --json path"):
            require_writable(target, "--json path")
    for target in (file, tmp_path / "r.samples.npz"):
        with pytest.raises(ValueError, match="it is one of this command's other files"):
            refuse_inputs(target, ["other.json", file])
    refuse_inputs(tmp_path / "new" / "x.json", [file])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "r.json", "r.samples.npz"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(result, bad):
    with pytest.raises(ValueError, match="finite"):
        Metric(bad)
    with pytest.raises(ValueError, match="finite"):
        Metric(0.5, (0.1, bad))
    result.parameters["temperature"] = bad
    with pytest.raises(ValueError, match="not JSON compliant"):
        result.to_json()


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"command": "knn", "metrics": {"a": 1}}', '{"metrics": []}'),
        '{"command": "knn", "inputs": [], "parameters": {}, "metrics": {}, "versions": {}}',
    ],
)
def test_other_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a result file"):
        Result.read(path)


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ('"ci95": [', '"ci95": [0.0, ', "too many values to unpack"),
        ('"parameters": {', '"parameters": {"detectors": 5, ', "detectors is no dict"),
        ('"parameters": {', '"parameters": {"detectors": {"knn": 5}, ', "a detector's arguments are no dict"),
        ('"parameters": {', '"parameters": {"chance": 0.1, ', "chance is no dict"),
        ('"parameters": {', '"parameters": {"temperature": NaN, ', "NaN is no JSON"),
    ],
)
def test_a_result_file_with_other_contents_gets_one_line(result, tmp_path, was, now, said):
    path = result.write(tmp_path / "r.json")
    text = path.read_text()
    assert was in text
    path.write_text(text.replace(was, now, 1))
    with pytest.raises(ValueError, match=rf"r\.json is not a result file \(.*{said}"):
        Result.read(path)


def test_what_is_no_file_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder; give result files \(\.json\)"):
        Result.read(tmp_path)
    with pytest.raises(ValueError, match=r"none\.json does not exist; write it with `evalsuite COMMAND"):
        Result.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    "imports",
    [
        "import evalsuite",
        "import evalsuite.evaluators.knn, evalsuite.evaluators.ood, evalsuite.evaluators.fidelity",
        "from evalsuite.evaluators.ood import ood",
    ],
)
def test_functions_are_exported_in_any_import_order_and_nothing_heavy_is_loaded(imports):
    check = (
        f"{imports}\nimport sys\nimport evalsuite\nfrom evalsuite.evaluators.knn import knn\n"
        "assert evalsuite.knn is knn and callable(evalsuite.ood) and callable(evalsuite.fidelity)\n"
        "slow = {'torch', 'faiss', 'zarr', 'sklearn', 'distill', 'rich', 'typer'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""What a report page holds, read without a browser."""

import base64
import hashlib
import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from report_cases import (
    BREAKOUT,
    Page,
    fidelity_result,
    knn_result,
    ood_result,
    robustness_result,
    study,
)
from sklearn.metrics import roc_auc_score, roc_curve
from typer.testing import CliRunner

from evalsuite import Metric, Result, report
from featcache_cli import programs


def test_histograms_count_every_score(tmp_path: Path) -> None:
    result = ood_result("f", "vit")
    result.samples["score/knn/near/tin"][:3] = [np.inf, -np.inf, 1e9]  # beyond the axis, not lost
    drawn = Page(report([result], tmp_path / "r.html")).data["histograms"]
    assert [(each["encoder"], each["detector"]) for each in drawn] == [(0, "knn"), (0, "rmd")]
    keys = ("id_test", "near/tin", "far/svhn")
    pooled = np.concatenate([result.samples[f"score/knn/{key}"] for key in keys])
    finite = np.sort(pooled[np.isfinite(pooled)])
    assert drawn[0]["low"] == pytest.approx(np.percentile(finite, 0.5))
    assert drawn[0]["high"] == pytest.approx(np.percentile(finite, 99.5))
    width = (drawn[0]["high"] - drawn[0]["low"]) / 48
    for key, of_set in zip(keys, drawn[0]["sets"], strict=True):
        expected = [0] * 48
        for score in result.samples[f"score/knn/{key}"]:
            at = (score - drawn[0]["low"]) / width
            expected[0 if at < 0 else 47 if at >= 48 else math.floor(at)] += 1
        assert of_set["counts"] == expected
        assert of_set["rows"] == sum(expected) == len(result.samples[f"score/knn/{key}"])
    assert [(each["group"], each["name"]) for each in drawn[0]["sets"]] == [
        ("id", "test"),
        ("near", "tin"),
        ("far", "svhn"),
    ]


def test_many_results_make_a_page_under_3_mb(tmp_path: Path) -> None:
    """Curves and maps get coarser, and stay curves and maps."""
    detectors = tuple(f"detector{number}" for number in range(25))
    results = [ood_result(f"f{n}", f"vit{n}", n, rows=1000, detectors=detectors) for n in range(20)]
    page = report(results, tmp_path / "r.html")
    assert page.stat().st_size < 3_000_000
    data = Page(page).data
    assert len(data["rocs"]) == 20 * 25 * 2
    for curve in data["rocs"]:
        assert len(curve["fpr"]) >= 16
        assert (curve["fpr"][0], curve["tpr"][0], curve["fpr"][-1], curve["tpr"][-1]) == (0, 0, 1, 1)
    assert all(len(of_set["x"]) >= 50 for drawn in data["maps"] for of_set in drawn["sets"])
    one = Page(report(results[:1], tmp_path / "one.html")).data
    assert max(len(curve["fpr"]) for curve in one["rocs"]) > 100, "of few, all there is"


def test_a_page_too_large_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["evalsuite.report"], "_MOST_BYTES", 1000)
    with pytest.warns(RuntimeWarning, match=r"r\.html has 0\.\d MB, a lot to open or send; report fewer results"):
        report([ood_result("f", "vit")], tmp_path / "r.html")


def test_equal_scores_have_a_histogram(tmp_path: Path) -> None:
    result = ood_result("f", "vit", detectors=("knn",))
    for key in ("id_test", "near/tin", "far/svhn"):
        result.samples[f"score/knn/{key}"][:] = 3e7
    data = Page(report([result], tmp_path / "r.html")).data
    assert [sum(each["counts"]) for each in data["histograms"][0]["sets"]] == [300, 301, 302]
    assert data["histograms"][0]["low"] < 3e7 < data["histograms"][0]["high"]
    assert [(each["fpr"], each["tpr"]) for each in data["rocs"]] == [([0, 1], [0, 1])] * 2


@pytest.mark.parametrize("decimals", [1, 12])
def test_roc_curves_are_scikit_learns(tmp_path: Path, decimals: int) -> None:
    result = ood_result("f", "vit", rows=5000)
    for key, values in result.samples.items():
        if key.startswith("score/"):
            np.round(values, decimals, out=values)  # one decimal: most scores are tied
    curves = Page(report([result], tmp_path / "r.html")).data["rocs"]
    assert len(curves) == 4
    for drawn in curves:
        id_scores = result.samples[f"score/{drawn['detector']}/id_test"]
        ood_scores = result.samples[f"score/{drawn['detector']}/{drawn['group']}/{drawn['name']}"]
        truth = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
        pooled = np.concatenate([id_scores, ood_scores])
        fpr, tpr, _ = roc_curve(truth, pooled, drop_intermediate=False)
        corners = set(zip(np.round(fpr, 5), np.round(tpr, 5), strict=True))
        points = list(zip(drawn["fpr"], drawn["tpr"], strict=True))
        assert set(points) <= corners
        assert points[0] == (0, 0)
        assert points[-1] == (1, 1)
        assert len(points) <= 161
        assert drawn["auroc"] == pytest.approx(roc_auc_score(truth, pooled), abs=1e-12)
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
        assert area == pytest.approx(drawn["auroc"], abs=1e-3)


def test_maps_hold_places_evenly_spread_over_the_rows(tmp_path: Path) -> None:
    result = ood_result("f", "vit", rows=5000)
    result.samples["map/far/svhn"] = result.samples["map/far/svhn"][:7]
    (drawn,) = Page(report([result], tmp_path / "r.html")).data["maps"]
    assert [(len(each["x"]), each["rows"]) for each in drawn["sets"]] == [(2000, 5000), (2000, 5001), (7, 7)]
    step = (np.array(drawn["high"]) - drawn["low"]) / drawn["steps"]
    for key, of_set in zip(("id_test", "near/tin", "far/svhn"), drawn["sets"], strict=True):
        rows = result.samples[f"map/{key}"]
        shown = drawn["low"] + np.stack([of_set["x"], of_set["y"]], axis=1) * step
        wanted = [round(i * (len(rows) - 1) / (len(shown) - 1)) for i in range(len(shown))]
        assert np.abs(shown - rows[wanted]).max() <= step.max()


def test_shifted_id_sets_are_drawn_but_are_no_ood(tmp_path: Path) -> None:
    result = ood_result("f", "vit", detectors=("knn",))
    result.samples["score/knn/csid/snow"] = np.zeros(5)
    result.samples["map/csid/snow"] = np.zeros((5, 2), np.float32)
    data = Page(report([result], tmp_path / "r.html")).data
    groups = ["id", "csid", "near", "far"]
    assert [each["group"] for each in data["histograms"][0]["sets"]] == groups
    assert [each["group"] for each in data["maps"][0]["sets"]] == groups
    assert [each["group"] for each in data["rocs"]] == ["near", "far"]


def test_robustness_lines_and_their_mean(tmp_path: Path) -> None:
    drawn = Page(report([robustness_result("f", "vit")], tmp_path / "r.html")).data["robustness"]
    top1, auroc = drawn
    assert (top1["metric"], auroc["metric"]) == ("top1@20", "knn/near/tin/auroc")
    assert top1["clean"] == [0.9]
    assert auroc["clean"] is None
    assert [line[0] for line in top1["lines"]["fog"]] == [1, 3, 5]
    assert top1["lines"]["fog"][1] == pytest.approx([3, 0.6, 0.58, 0.62])
    assert top1["mean"] == pytest.approx(np.array([[1, 0.825], [3, 0.675], [5, 0.525]]))


def test_one_row_an_encoder(tmp_path: Path) -> None:
    results = study()
    data = Page(report(results, tmp_path / "r.html")).data
    assert [(each["fingerprint"], each["teacher"], each["taught_by"]) for each in data["encoders"]] == [
        ("f0", True, None),
        ("f1", False, 0),
        ("f2", False, 0),
    ]
    assert [each["encoder"] for each in data["results"]] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, None]
    assert data["encoders"][1]["name"] == "script><!--", "a run is called by its folder"
    for each, result in zip(data["results"], results, strict=True):
        kept = {name: [metric.value, *(metric.ci95 or ())] for name, metric in result.metrics.items()}
        assert each["metrics"] == kept, "bit for bit"


def test_names_by_file_fingerprint_or_encoder(tmp_path: Path) -> None:
    paths = [
        str(knn_result("f1", "run:a/student", 0.5).write(tmp_path / "one.json")),
        str(fidelity_result("f0", "f1", "run:b/student", 0.5).write(tmp_path / "two.json")),
        str(knn_result("f2", "run:c/student", 0.6).write(tmp_path / "three.json")),
        str(knn_result("f3", "run:d/student", 0.6).write(tmp_path / "four.json")),
        str(knn_result("f4", "timm/x", 0.6).write(tmp_path / "five.json")),
    ]

    def names(given: dict[str, str]) -> list[str]:
        return [each["name"] for each in Page(report(paths, tmp_path / "r.html", names=given)).data["encoders"]]

    assert names({paths[0]: "mine", "timm/x": "big", "f2": "c"}) == ["mine", "c", "student", "big"]
    assert names({paths[0]: "knn", paths[1]: "gram"})[:2] == ["knn", "gram"], "two names, two rows"
    assert names({}) == ["run:a/student (f1)", "run:c/student (f2)", "run:d/student (f3)", "timm/x"]
    data = Page(report(paths, tmp_path / "r.html", names={"f4": "teacher"})).data
    assert [(each["name"], each["teacher"], each["taught_by"]) for each in data["encoders"]] == [
        ("teacher", True, None),
        ("run:a/student (f1)", False, 0),
        ("run:c/student (f2)", False, 0),
        ("run:d/student (f3)", False, 0),
    ]
    with pytest.raises(ValueError, match=r"x names two encoders, run:a/student and run:c/student \(of .*three\.json"):
        report(paths, tmp_path / "r.html", names={paths[0]: "x", paths[2]: "x"})


def test_a_later_value_wins_and_the_page_says_so(tmp_path: Path) -> None:
    first = knn_result("f", "vit", 0.5).write(tmp_path / "a.json")
    same = knn_result("f", "vit", 0.5).write(tmp_path / "same.json")
    other = knn_result("f", "vit", 0.75).write(tmp_path / "b.json")
    assert Page(report([first, same], tmp_path / "r.html")).data["notices"] == []
    with pytest.warns(RuntimeWarning, match="two values") as warned:
        page = Page(report([first, same, other], tmp_path / "r.html"))
    assert len(warned) == 2
    assert page.data["notices"][0] == (
        f"vit has two values for top1@20: 0.5 in {same} and 0.75 in {other}; the latter counts"
    )


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    with pytest.raises(ValueError, match="no result was given"):
        report([], out)
    with pytest.raises(ValueError, match=r"none\.json does not exist"):
        report([tmp_path / "none.json"], out)
    for text in ("{", "[]", '{"command": "knn"}', "\x00"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json is not a result file"):
            report([tmp_path / "bad.json"], out)
    wrong = {"command": "knn", "inputs": [], "parameters": {}, "metrics": {}, "versions": {}}
    (tmp_path / "bad.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"bad\.json is not a result file"):
        report([tmp_path / "bad.json"], out)
    assert not out.exists()


def test_no_result_is_overwritten_by_the_page(tmp_path: Path) -> None:
    result = ood_result("f", "vit").write(tmp_path / "r.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for out in (result, tmp_path / "r.samples.npz"):
        with pytest.raises(ValueError, match="it is one of this command's other files"):
            report([result], out)
    with pytest.raises(ValueError, match=r"cannot write .* \(it is a folder\)"):
        report([result], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_result_without_metrics_is_said(tmp_path: Path) -> None:
    empty = Result("knn", {}, {}, {}).write(tmp_path / "e.json")
    with pytest.warns(RuntimeWarning, match=r"e\.json has no metrics"):
        page = Page(report([empty, knn_result("f", "vit", 0.5)], tmp_path / "r.html"))
    assert page.data["notices"] == [f"{empty} has no metrics"]


def test_remarks_of_results_are_on_the_page_once_each(tmp_path):
    one, other = knn_result("f1", "vit", 0.5), knn_result("f2", "<i>", 0.6)
    one.remarks, other.remarks = ["both sides are one", "only here"], ["both sides are one"]
    page = Page(report([one, other], tmp_path / "r.html"))
    assert page.data["notices"] == ["both sides are one (result 1, result 2)", "only here (result 1)"]
    assert [each["remarks"] for each in page.data["results"]] == [one.remarks, other.remarks]


def test_an_old_page_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.html"
    assert report([knn_result("f", "vit", 0.5)], out) == out
    assert "A &lt;b&gt; title" in report([knn_result("f", "vit", 0.5)], out, title="A <b> title").read_text()
    assert os.listdir(out.parent) == ["r.html"]


def test_no_name_becomes_markup(tmp_path: Path) -> None:
    hostile = Page(report(study(), tmp_path / "hostile.html", title=BREAKOUT))
    plain = Page(report([knn_result("f", "vit", 0.5)], tmp_path / "plain.html"))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert hostile.texts["title"] == BREAKOUT
    assert all("<" not in text and text.isascii() for text in [hostile.texts["application/json"]])
    assert "<img" not in hostile.source
    assert "alert(2)</script>" not in hostile.source
    assert not [name for _, attributes in hostile.elements for name in attributes if name.startswith("on")]


def test_the_policy_allows_this_script_and_style_only(tmp_path: Path) -> None:
    page = Page(report([knn_result("f", "vit", 0.5)], tmp_path / "r.html"))
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(" ", 1) for rule in str(policy).split("; "))

    def hashed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    assert rules == {
        "default-src": "'none'",
        "script-src": hashed(page.texts["script"]),
        "style-src": hashed(page.texts["style"]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not [a for tag, a in page.elements if "src" in a or (tag != "a" and "href" in a)]


def test_a_large_page_is_under_3_mb(tmp_path: Path) -> None:
    detectors = tuple(f"detector-{i}" for i in range(10))
    results = [
        ood_result(f"f{i}", f"encoder-{i}", i, rows=10_000, detectors=detectors, measured=False) for i in range(10)
    ]
    for result in results:
        for name in [
            f"{each}/{group}/{name}/m{i}"
            for each in detectors
            for group in ("near", "far")
            for name in "ab"
            for i in range(7)
        ]:
            result.metrics[name] = Metric(1 / 3, (1 / 7, 2 / 3))
    path = report(results, tmp_path / "r.html")
    assert len(Page(path).data["rocs"]) == 200
    assert path.stat().st_size < 3e6


def test_command_line(tmp_path: Path) -> None:
    odd = knn_result("f0", "vit", 0.5).write(tmp_path / "a=b.json")
    other = knn_result("f1", "run:x", 0.5).write(tmp_path / "c.json")
    line = ["report", str(odd), f"mine={other}", "--out", str(tmp_path / "r.html"), "--title", "T", "--json", "-"]
    ran = CliRunner().invoke(programs.APPS["evalsuite"], line, catch_exceptions=False)
    assert ran.exit_code == 0
    summary = json.loads(ran.stdout[ran.stdout.index("{") : ran.stdout.rindex("}") + 1])
    assert summary["bytes"] == (tmp_path / "r.html").stat().st_size
    data = Page(tmp_path / "r.html").data
    assert (data["title"], [each["name"] for each in data["encoders"]]) == ("T", ["vit", "mine"])
    for wrong in ([], ["=c.json"], ["mine="]):
        assert CliRunner().invoke(programs.APPS["evalsuite"], ["report", *wrong]).exit_code == 2

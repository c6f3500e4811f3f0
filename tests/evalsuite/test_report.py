"""What a report page holds, read without a browser."""

import base64
import hashlib
import importlib
import json
import math
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from report_cases import (
    BREAKOUT,
    Page,
    compare_result,
    fidelity_result,
    knn_result,
    ood_result,
    robustness_result,
    study,
)
from sklearn.metrics import roc_auc_score, roc_curve
from typer.testing import CliRunner

from evalsuite import Metric, Result, report
from evalsuite.charts import Axis, Histogram, repeated_means
from evalsuite.report.render import bundled
from featcache_cli import programs

SETS = {"id_test": "ID test", "near/tin": "near-OOD: tin", "far/svhn": "far-OOD: svhn"}


def test_histograms_count_every_score(tmp_path: Path) -> None:
    result = ood_result("f", "vit")
    result.samples["score/knn/near/tin"][:3] = [np.inf, -np.inf, 1e9]  # beyond the axis, not lost
    drawn = Page(report([result], tmp_path / "r.html")).charts("scores")
    assert [(each["title"], each["where"]) for each in drawn] == [
        ("vit", {"Detector": "knn"}),
        ("vit", {"Detector": "rmd"}),
    ]
    low, high = drawn[0]["low"], drawn[0]["high"]
    assert [each["name"] for each in drawn[0]["sets"]] == list(SETS.values())
    for key, of_set in zip(SETS, drawn[0]["sets"], strict=True):
        bins, beyond = [0] * 48, [0, 0]
        for score in result.samples[f"score/knn/{key}"]:
            if low <= score <= high:
                bins[min(47, math.floor((score - low) / (high - low) * 48))] += 1
            else:
                beyond[int(score > high)] += 1
        assert of_set["counts"] == bins
        assert [of_set["below"], of_set["above"]] == beyond
        assert of_set["rows"] == sum(bins) + sum(beyond) == len(result.samples[f"score/knn/{key}"])


def test_how_far_scores_follow_the_teachers_is_shown(tmp_path: Path) -> None:
    results = [fidelity_result("f0", "f1", "small", 0.8), knn_result("f1", "small", 0.5)]
    for detector in ("rmd", "knn"):
        for name in ("id", "tin", "all"):
            for what in ("spearman", "agreement"):
                results[0].metrics[f"scores/{detector}/{name}/{what}"] = Metric(0.9, (0.8, 0.95))
    page = Page(report(results, tmp_path / "r.html"))
    drawn = page.charts("followed")
    assert [each["where"] for each in drawn] == [
        {"Measure": measure, "Rows": rows}
        for measure in ("rank correlation", "agreement")
        for rows in ("ID and OOD", "ID", "tin")
    ]
    assert drawn[2]["rows"] == {detector: f"scores/{detector}/tin/spearman" for detector in ("knn", "rmd")}
    columns = [each for each in page.data["headlines"] if each["metric"].startswith("scores/")]
    assert [each["where"] for each in columns] == [{"OOD detector": detector} for detector in ("knn", "rmd")]
    assert "scores/knn/all/spearman" in page.charts("tradeoff")[0]["x"]
    assert not Page(report([fidelity_result("f0", "f1", "small", 0.8)], tmp_path / "r.html")).charts("followed")


@pytest.mark.parametrize("side", [1, -1])
def test_far_scores_do_not_squash_a_histogram(side: int) -> None:
    rng = np.random.default_rng(0)
    values = {"bulk": rng.normal(size=5000), "tailed": side * np.abs(rng.standard_cauchy(5000)) * 3}
    drawn = Histogram.of(values, {}, title="", axis=Axis(name=""))
    assert drawn.high - drawn.low < 30, "of values up to some thousands"
    assert sum(np.array(drawn.sets[0].counts) > 0) > 15, "the bulk is spread over many bins"
    beyond = drawn.sets[1].above if side > 0 else drawn.sets[1].below
    assert 0 < beyond == (side * values["tailed"] > max(side * drawn.low, side * drawn.high)).sum()
    plain = Histogram.of({"a": rng.normal(size=1000)}, {}, title="", axis=Axis(name=""))
    assert plain.sets[0].below == plain.sets[0].above == 5, "of what has no tails, half a percent at each end"


def test_many_results_make_a_page_under_3_mb(tmp_path: Path) -> None:
    """Curves and maps get coarser, and stay curves and maps."""
    detectors = tuple(f"detector{number}" for number in range(25))
    results = [ood_result(f"f{n}", f"vit{n}", n, rows=1000, detectors=detectors) for n in range(20)]
    page = report(results, tmp_path / "r.html")
    assert page.stat().st_size < 3_000_000
    curves = [line for chart in Page(page).charts("roc") for line in chart["series"]]
    assert len(curves) == 20 * 25 * 2
    for curve in curves:
        assert len(curve["x"]) >= 16
        assert (curve["x"][0], curve["y"][0], curve["x"][-1], curve["y"][-1]) == (0, 0, 1, 1)
    assert all(len(of_set["x"]) >= 50 for drawn in Page(page).charts("map") for of_set in drawn["sets"])
    few = Page(report(results[:1], tmp_path / "one.html")).charts("roc")
    assert max(len(line["x"]) for chart in few for line in chart["series"]) > 100, "of few, all there is"


def test_a_page_too_large_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("evalsuite.report.write"), "_MOST_BYTES", 1000)
    with pytest.warns(RuntimeWarning, match=r"r\.html has 0\.\d MB, a lot to open or send; report fewer results"):
        report([ood_result("f", "vit")], tmp_path / "r.html")


def test_equal_scores_have_a_histogram(tmp_path: Path) -> None:
    result = ood_result("f", "vit", detectors=("knn",))
    for key in SETS:
        result.samples[f"score/knn/{key}"][:] = 3e7
    page = Page(report([result], tmp_path / "r.html"))
    (drawn,) = page.charts("scores")
    assert [sum(each["counts"]) for each in drawn["sets"]] == [300, 301, 302]
    assert drawn["low"] < 3e7 < drawn["high"]
    assert [(line["x"], line["y"]) for chart in page.charts("roc") for line in chart["series"]] == [
        ([0, 1], [0, 1])
    ] * 2


@pytest.mark.parametrize("decimals", [1, 12])
def test_roc_curves_are_scikit_learns(tmp_path: Path, decimals: int) -> None:
    result = ood_result("f", "vit", rows=5000)
    for key, values in result.samples.items():
        if key.startswith("score/"):
            np.round(values, decimals, out=values)  # one decimal: most scores are tied
    curves = Page(report([result], tmp_path / "r.html")).charts("roc")
    assert len(curves) == 4
    for chart in curves:
        detector, (line,) = chart["where"]["Detector"], chart["series"]
        key = next(key for key, title in SETS.items() if title == chart["where"]["OOD set"])
        of_id, of_ood = (result.samples[f"score/{detector}/{each}"] for each in ("id_test", key))
        truth = np.repeat([0, 1], [len(of_id), len(of_ood)])
        pooled = np.concatenate([of_id, of_ood])
        fpr, tpr, _ = roc_curve(truth, pooled, drop_intermediate=False)
        points = list(zip(line["x"], line["y"], strict=True))
        assert set(points) <= set(zip(np.round(fpr, 5), np.round(tpr, 5), strict=True))
        assert (points[0], points[-1]) == ((0, 0), (1, 1))
        assert len(points) <= 161
        assert line["note"] == f"AUROC {roc_auc_score(truth, pooled):.3f}"
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))
        assert area == pytest.approx(roc_auc_score(truth, pooled), abs=1e-3)


def test_maps_hold_places_evenly_spread_over_the_rows(tmp_path: Path) -> None:
    result = ood_result("f", "vit", rows=5000)
    result.samples["map/far/svhn"] = result.samples["map/far/svhn"][:7]
    (drawn,) = Page(report([result], tmp_path / "r.html")).charts("map")
    assert [(len(each["x"]), each["rows"]) for each in drawn["sets"]] == [(2000, 5000), (2000, 5001), (7, 7)]
    step = (np.array(drawn["high"]) - drawn["low"]) / drawn["steps"]
    for key, of_set in zip(SETS, drawn["sets"], strict=True):
        rows = result.samples[f"map/{key}"]
        shown = drawn["low"] + np.stack([of_set["x"], of_set["y"]], axis=1) * step
        wanted = [round(i * (len(rows) - 1) / (len(shown) - 1)) for i in range(len(shown))]
        assert np.abs(shown - rows[wanted]).max() <= step.max()


def test_figures_stand_in_the_order_of_the_rows(tmp_path: Path) -> None:
    results = [ood_result("f1", "student"), fidelity_result("f0", "f1", "student", 0.5), ood_result("f0", "vit")]
    page = Page(report(results, tmp_path / "r.html"))
    assert [each["title"] for each in page.charts("map")] == ["vit", "student"], "the teacher first"


def test_shifted_id_sets_are_drawn_but_are_no_ood(tmp_path: Path) -> None:
    result = ood_result("f", "vit", detectors=("knn",))
    result.samples["score/knn/csid/snow"] = np.zeros(5)
    result.samples["map/csid/snow"] = np.zeros((5, 2), np.float32)
    page = Page(report([result], tmp_path / "r.html"))
    for key in ("scores", "map"):
        assert [each["tone"] for each in page.charts(key)[0]["sets"]] == ["id", "csid", "near", "far"]
    assert [each["where"]["OOD set"] for each in page.charts("roc")] == ["near-OOD: tin", "far-OOD: svhn"]


def test_robustness_lines_and_their_mean(tmp_path: Path) -> None:
    drawn = Page(report([robustness_result("f", "vit")], tmp_path / "r.html")).charts("robustness")
    top1, one, auroc, _ = drawn
    assert [each["where"]["Metric"] for each in drawn] == ["top1@20"] * 2 + ["knn/near/tin/auroc"] * 2
    assert top1["series"][0]["x"] == [0, 1, 3, 5], "0: the clean images"
    assert top1["series"][0]["y"] == pytest.approx([0.9, 0.825, 0.675, 0.525])
    fog = one["series"][0]
    assert (fog["name"], fog["x"]) == ("fog", [0, 1, 3, 5])
    assert (fog["y"][2], fog["low"][2], fog["high"][2]) == pytest.approx((0.6, 0.58, 0.62))
    assert auroc["series"][0]["x"] == [1, 3, 5], "no clean AUROC was measured"


def test_axes_say_what_values_can_be_and_where_chance_is() -> None:
    top1, auroc = Axis.of("clean/top1@20"), Axis.of("knn/near/tin/auroc")
    assert (top1.share, top1.better, top1.least, top1.most, top1.line) == (True, "higher", 0, 1, None)
    assert (auroc.name, auroc.share, auroc.least, auroc.most, auroc.line) == ("AUROC", False, 0, 1, 0.5)
    lower = ("knn/far/fpr95_id", "procrustes", "mce", "relative_mce", "fog/ce")
    assert {Axis.of(name).better for name in lower} == {"lower"}
    assert Axis.of("mce").most is None


def test_means_of_one_set_are_known() -> None:
    one, other = Metric(0.5), Metric(0.25)
    assert repeated_means({"knn/near/tin/auroc": one, "knn/near/mean/auroc": one}) == {"knn/near/mean/auroc"}
    assert repeated_means({"knn/near/a/auroc": one, "knn/near/b/auroc": one, "knn/near/mean/auroc": one}) == set()
    assert repeated_means({"fog/3/top1@20": one, "fog/mean/top1@20": one, "mean/top1@20": one}) == {"fog/mean/top1@20"}
    assert repeated_means({"knn/near/tin/auroc": other, "knn/near/mean/auroc": one}) == set()


def test_detectors_show_each_set_once_with_its_rows(tmp_path: Path) -> None:
    results = [ood_result(f"f{n}", f"vit{n}") for n in range(2)]
    for n, each in enumerate(results):
        each.inputs |= {"id_test": {"rows": 300}, "near": {"tin": {"rows": 1301 + n}}, "far": {"svhn": {"rows": 302}}}
    page = Page(report(results, tmp_path / "r.html"))
    aurocs = [each for each in page.charts("ood") if each["where"]["Metric"] == "AUROC"]
    assert {each["where"]["OOD set"]: each.get("note") for each in aurocs} == {
        "near-OOD: tin": "300 ID and 1,301 to 1,302 OOD rows",
        "far-OOD: svhn": "300 ID and 302 OOD rows",
        "near-OOD, full spectrum, mean of sets": "300 ID and 1,301 to 1,302 OOD rows",
    }
    assert aurocs[0]["rows"] == {"knn": "knn/near/tin/auroc", "rmd": "rmd/near/tin/auroc"}
    assert "knn/near/mean/auroc" in page.data["repeated"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.9, 0.5, 0.7], 2),  # the first is the teacher
        ([0.9, 0.7, 0.5], 1),
        ([0.9, 0.7, 0.685], None),  # intervals, 0.02 wide, overlap
    ],
)
def test_the_best_is_marked_where_intervals_tell(tmp_path: Path, values: list[float], expected: int | None) -> None:
    results = [knn_result(f"f{n}", f"vit{n}", value) for n, value in enumerate(values)]
    data = Page(report(results, tmp_path / "r.html", names={"f0": "teacher"})).data
    assert (data["headlines"][0]["metric"], data["best"][0]) == ("top1@20", expected)
    errors = [
        Result("robustness", each.inputs, {}, {"mce": Metric(v, (v - 0.1, v + 0.1))})
        for each, v in zip(results, (1.0, 2.0, 3.0), strict=True)
    ]
    assert Page(report(errors, tmp_path / "r.html", names={"f0": "teacher"})).data["best"] == [1], "the lower"
    results[2].metrics["top1@20"] = Metric(0.1)
    assert Page(report(results, tmp_path / "r.html")).data["best"] == [None], "one has no interval"


def test_comparisons_are_titled_by_encoder_and_store(tmp_path: Path) -> None:
    result = compare_result()
    result.inputs["b"] |= {
        "bank": {},
        "query": {"encoder": "run:runs/mine", "fingerprint": "f1", "path": "x/test.zarr"},
    }
    result.metrics |= {name: Metric(0.5) for name in ("knn/near/tin/auroc", "knn/near/mean/auroc")}
    (table,) = Page(report([result, knn_result("f0", "vit", 0.5)], tmp_path / "r.html", names={"f0": "shown"})).charts(
        "comparisons"
    )
    assert table["title"] == "A: shown\nB: mine on test"
    assert table["note"] == "A: a.json\nB: b.json\nresult 1"
    assert [row[0] for row in table["rows"]] == ["top1@20", "knn/near/tin/auroc"], "the mean repeats its only set"


def test_modules_are_one_script_in_the_order_of_their_imports(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text('// a\nimport { b } from "./b.js";\nimport { c, d } from "./c.js";\n\nb(c);\n')
    (tmp_path / "b.js").write_text('import { c } from "./c.js";\nexport const b = (x) => x + c;\n')
    (tmp_path / "c.js").write_text("export let c = 1;\nexport function d() {}\n")
    assert bundled(tmp_path / "a.js").splitlines() == [
        '"use strict";',
        *("let c = 1;", "function d() {}", "const b = (x) => x + c;", "// a", "", "b(c);"),
    ]
    (tmp_path / "c.js").write_text('import { b } from "./b.js";\n')
    with pytest.raises(ValueError, match=r"import each other: a\.js → b\.js → c\.js → b\.js"):
        bundled(tmp_path / "a.js")


def test_every_module_of_the_page_is_in_its_script() -> None:
    """And what each imports is exported where it says."""
    page = Path(sys.modules["evalsuite.report.render"].__file__ or "").with_name("page")
    script = bundled(page / "page.js")
    assert not re.search(r"^(import|export) ", script, re.MULTILINE)
    for module in page.glob("*.js"):
        text = module.read_text()
        assert text.splitlines()[0] in script
        for names, source in re.findall(r'^import \{([^}]*)\} from "\./([\w.-]+)";', text, re.MULTILINE):
            exported = re.findall(
                r"^export (?:const|let|function) (?:\{ ([^}]*) \}|(\w+))", (page / source).read_text(), re.MULTILINE
            )
            assert {name.strip() for name in names.split(",") if name.strip()} <= {
                name for several, one in exported for name in (several.split(", ") if several else [one])
            }, module.name


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
    assert sum(len(chart["series"]) for chart in Page(path).charts("roc")) == 200
    assert path.stat().st_size < 3e6


def test_command_line(tmp_path: Path) -> None:
    odd = knn_result("f0", "vit", 0.5).write(tmp_path / "a=b.json")
    other = knn_result("f1", "run:x", 0.5).write(tmp_path / "c.json")
    line = ["report", str(odd), f"mine={other}", "--out", str(tmp_path / "r.html"), "--title", "T", "--json", "-"]
    ran = CliRunner().invoke(programs.app("evalsuite"), line, catch_exceptions=False)
    assert ran.exit_code == 0
    summary = json.loads(ran.stdout[ran.stdout.index("{") : ran.stdout.rindex("}") + 1])
    assert summary["bytes"] == (tmp_path / "r.html").stat().st_size
    data = Page(tmp_path / "r.html").data
    assert (data["title"], [each["name"] for each in data["encoders"]]) == ("T", ["vit", "mine"])
    for wrong in ([], ["=c.json"], ["mine="]):
        assert CliRunner().invoke(programs.app("evalsuite"), ["report", *wrong]).exit_code == 2

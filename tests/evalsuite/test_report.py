import base64
import csv
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve
from typer.testing import CliRunner

import cli
from evalsuite import Metric, Result, report
from evalsuite.metrics import ood_metrics

HOSTILE = "<img src=x onerror=alert(1)>.zarr"
BREAKOUT = "</script><script>alert(2)</script><!--"
FORMULA = '=HYPERLINK("http://127.0.0.1/x"),1'


def record(fingerprint: str, name: str) -> dict[str, object]:
    return {"path": f"{name}.zarr", "encoder": name, "fingerprint": fingerprint, "rows": 9, "failed": 0}


def knn_result(fingerprint: str, name: str, value: float, k: int = 20) -> Result:
    inputs = {"bank": record(fingerprint, name), "query": record(fingerprint, name)}
    metrics = {f"top1@{k}": Metric(value, (value - 0.01, value + 0.01)), f"top5@{k}": Metric(min(1.0, value + 0.2))}
    return Result("knn", inputs, {"k": [k]}, metrics, {"python": "3"})


def fidelity_result(teacher: str, fingerprint: str, name: str, value: float) -> Result:
    inputs = {"teacher": record(teacher, "vit"), "student": record(fingerprint, name), "joined": 9}
    metrics = {"gram_pearson": Metric(value), "mutual_knn@10": Metric(value / 3, (value / 4, value / 2))}
    return Result("fidelity", inputs, {"k": 10}, metrics)


def ood_result(
    fingerprint: str,
    name: str,
    seed: int = 0,
    rows: int = 300,
    detectors: tuple[str, ...] = ("knn", "rmd"),
    near: str = "tin",
    far: str = "svhn",
    measured: bool = True,
) -> Result:
    rng = np.random.default_rng(seed)
    sets = {"id_test": 0.0, f"near/{near}": 0.7, f"far/{far}": 2.0}
    metrics, samples = {}, {}
    for detector in detectors:
        scores = {key: rng.normal(shift, size=rows + i) for i, (key, shift) in enumerate(sets.items())}
        samples |= {f"score/{detector}/{key}": values for key, values in scores.items()}
        for key in list(sets)[1:] if measured else ():
            for metric, value in ood_metrics(scores["id_test"], scores[key]).items():
                metrics[f"{detector}/{key}/{metric}"] = Metric(value, (value * 0.99, value))
                metrics[f"{detector}/{key.split('/')[0]}/mean/{metric}"] = Metric(value, (value * 0.99, value))
    if measured:
        metrics["knn/near_fs/mean/auroc"] = Metric(0.5)
    for i, (key, shift) in enumerate(sets.items()):
        samples[f"map/{key}"] = rng.normal(shift, size=(rows + i, 2)).astype(np.float32)
        samples[f"sample_id/{key}"] = np.arange(rows + i).astype(np.str_)
    inputs = {"id_train": record(fingerprint, name), "id_test": record(fingerprint, name), "near": {}, "far": {}}
    return Result("ood", inputs, {"detectors": {each: {} for each in detectors}}, metrics, {}, samples)


def robustness_result(fingerprint: str, name: str) -> Result:
    metrics = {
        "clean/top1@20": Metric(0.9),
        "mean/top1@20": Metric(0.55),
        "mce": Metric(1.2),
        "pgd/4/top1": Metric(0.1),
    }
    for corruption, drop in (("fog", 0.1), ("gaussian_noise", 0.05)):
        for severity in (1, 3, 5):
            value = 0.9 - drop * severity
            metrics[f"{corruption}/{severity}/top1@20"] = Metric(value, (value - 0.02, value + 0.02))
            metrics[f"{corruption}/{severity}/knn/near/tin/auroc"] = Metric(value / 1.1)
    return Result("robustness", {"bank": record(fingerprint, name)}, {"encoder": name}, metrics)


def compare_result() -> Result:
    parameters = {"a": {"top1@20": 0.5}, "b": {"top1@20": 0.625}, "verdicts": {"top1@20": "B better"}}
    sides = {side: {"path": f"{side}.json", "bank": record("f0", "vit")} for side in "ab"}
    return Result("compare", sides, parameters, {"top1@20": Metric(0.125, (0.0625, 0.1875))})


def study() -> list[Result]:
    """A teacher and two students, measured by every command; every name is hostile."""
    results = []
    for i, (fingerprint, name) in enumerate((("f0", "vit"), ("f1", f"run:runs/{BREAKOUT}"), ("f2", HOSTILE))):
        results.append(knn_result(fingerprint, name, 0.9 - i / 10))
        results.append(ood_result(fingerprint, name, i, detectors=("knn", HOSTILE), near=FORMULA, far="<b>svhn"))
        results.append(robustness_result(fingerprint, name))
        if i:
            results.append(fidelity_result("f0", fingerprint, name, 0.8 - i / 10))
    results[0].metrics[f"per_class/{BREAKOUT}/top1@20"] = Metric(1 / 3)
    results[0].inputs["bank"]["path"] = BREAKOUT  # type: ignore[index]
    results[0].parameters[HOSTILE] = [HOSTILE, {"a": BREAKOUT}]
    return [*results, compare_result()]


class Page(HTMLParser):
    """A page's elements with their attributes, and the text of its scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.inside: str | None = None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.data = json.loads(self.texts["application/json"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = str(dict(attrs).get("type", tag))

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


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
    ran = CliRunner().invoke(cli.evalsuite.app, line, catch_exceptions=False)
    assert ran.exit_code == 0
    summary = json.loads(ran.stdout[ran.stdout.index("{") : ran.stdout.rindex("}") + 1])
    assert summary["bytes"] == (tmp_path / "r.html").stat().st_size
    data = Page(tmp_path / "r.html").data
    assert (data["title"], [each["name"] for each in data["encoders"]]) == ("T", ["vit", "mine"])
    for wrong in ([], ["=c.json"], ["mine="]):
        assert CliRunner().invoke(cli.evalsuite.app, ["report", *wrong]).exit_code == 2


# -- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page in the browser; whatever goes wrong in it, or is asked for from elsewhere, is in `wrong`."""

    def __init__(self, browser, path: Path, width: int = 1280, colours: str = "light") -> None:
        self.wrong: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=colours)
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.route("**/*", lambda route: self._route(route, path.as_uri()))
        self.page.goto(path.as_uri())
        self.page.wait_for_function("document.querySelectorAll('details').length > 0")

    def _route(self, route, own: str) -> None:
        if route.request.url == own:
            route.continue_()
        else:
            self.wrong.append(f"asked for {route.request.url}")
            route.abort()


@pytest.fixture(scope="module")
def page_of_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(study(), tmp_path_factory.mktemp("report") / "report.html", title=HOSTILE)


@pytest.fixture(scope="module")
def wide(chromium, page_of_study: Path) -> Iterator[Opened]:
    opened = Opened(chromium, page_of_study)
    yield opened
    assert opened.wrong == []
    opened.page.close()


def test_every_value_is_on_the_page(wide: Opened) -> None:
    columns = ["vit", "script><!--", HOSTILE]
    cells = wide.page.evaluate("""() => {
      const table = document.getElementById("metrics-table");
      const heads = [...table.tHead.rows[0].cells].slice(1).map((cell) => cell.textContent);
      return [...table.tBodies[0].rows].flatMap((row) => [...row.cells].slice(1).map((cell, n) =>
        [row.cells[0].textContent, heads[n], [...cell.querySelectorAll("data")].map((each) => each.value)]));
    }""")
    shown = {(metric, encoder): [float(value) for value in values] for metric, encoder, values in cells if values}
    encoder_of = {"f0": columns[0], "f1": columns[1], "f2": columns[2]}
    expected = {}
    for result in study()[:-1]:
        first = result.inputs.get("student") or result.inputs.get("query") or result.inputs.get("id_test")
        fingerprint = (first or result.inputs["bank"])["fingerprint"]
        expected |= {(name, encoder_of[fingerprint]): [metric.value] for name, metric in result.metrics.items()}
    assert shown == expected
    compared = wide.page.eval_on_selector_all("#comparisons data", "all => all.map(each => Number(each.value))")
    assert compared == [0.5, 0.625, 0.125]


def test_every_part_is_drawn(wide: Opened) -> None:
    parts = wide.page.eval_on_selector_all("main > section", "all => all.map(each => each.id)")
    assert parts == [
        *("summary", "tradeoff", "ood", "scores", "roc", "robustness", "map", "comparisons", "metrics", "provenance")
    ]
    empty = wide.page.eval_on_selector_all(
        ".plot", "all => all.filter(each => !each.querySelector('svg, canvas')).length"
    )
    assert empty == 0
    assert wide.page.locator("#scores .plot").count() == 3
    assert wide.page.locator("#robustness .plot").count() == 4
    inks = wide.page.evaluate("""() => { const canvas = document.querySelector("#map canvas");
      const bytes = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      return bytes.filter((byte, n) => n % 4 === 3 && byte).length; }""")
    assert inks > 1000, "the map shows its points"


def test_hostile_names_are_text(wide: Opened) -> None:
    assert wide.page.locator("img, b, iframe, object, embed").count() == 0
    assert wide.page.locator("script").count() == 2
    assert wide.page.locator("h1").inner_text() == HOSTILE
    assert HOSTILE in wide.page.locator("#summary-table").inner_text()
    assert BREAKOUT in wide.page.locator("#metrics-table").text_content()
    handlers = "all => all.flatMap(each => each.getAttributeNames()).filter(name => name.startsWith('on'))"
    assert wide.page.eval_on_selector_all("*", handlers) == []
    assert wide.page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s); s.remove(); return window.ran === undefined; }"
    ), "the policy stops scripts that come later"
    assert "Content Security Policy" in wide.wrong.pop()


def test_summary_sorts_and_marks_the_best_student(wide: Opened) -> None:
    head = wide.page.locator('#summary-table th[data-metric="top1@20"]')

    def values() -> list[float]:
        column = "all => all.map(row => Number(row.cells[1].querySelector('data').value))"
        return wide.page.eval_on_selector_all("#summary-table tbody tr", column)

    assert head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    assert (values(), head.get_attribute("aria-sort")) == (sorted(values(), reverse=True), "descending")
    wide.page.keyboard.press("Enter")  # the button keeps the focus
    assert (values(), head.get_attribute("aria-sort")) == (sorted(values()), "ascending")
    best = wide.page.locator("#summary-table td:nth-child(2).best")
    assert float(best.locator("data").get_attribute("value")) == 0.8, "the teacher's 0.9 is no student's"
    assert "−10.0 pp" in best.inner_text()
    assert "79.0–81.0 %" in best.inner_text()


def test_tables_and_figures_can_be_saved(wide: Opened) -> None:
    def saved(part: str, kind: str) -> str:
        wide.page.wait_for_timeout(110)  # ms: Chromium drops what a page saves beyond ten files a second
        with wide.page.expect_download() as download:
            wide.page.locator(f"#{part} .save button", has_text=kind).first.click()
        return Path(download.value.path()).read_text(encoding="utf-8")

    rows = list(csv.DictReader(saved("metrics", "CSV").splitlines()))
    assert len(rows) == sum(len(result.metrics) for result in study())
    assert {"encoder": "vit", "metric": "top1@20", "value": "0.9"}.items() <= rows[0].items()
    assert json.loads(saved("metrics", "JSON"))[0]["ci95_low"] == study()[0].metrics["top1@20"].ci95[0]  # type: ignore[index]
    scores = list(csv.DictReader(saved("scores", "CSV").splitlines()))
    assert sum(int(row["count"]) for row in scores if row["group"] == "id") == 300
    assert next(row["set"] for row in scores if row["group"] == "near") == f"'{FORMULA}", "no formula for spreadsheets"
    curve = json.loads(saved("roc", "JSON"))
    assert (curve[0]["id_flagged"], curve[0]["ood_flagged"]) == (0, 0)
    for part in ("summary", "tradeoff", "ood", "robustness", "map", "comparisons", "provenance"):
        table = json.loads(saved(part, "JSON"))
        assert table
        read = list(csv.reader(saved(part, "CSV").splitlines()))
        assert read[0] == list(table[0])
        assert len(read) == len(table) + 1


def test_values_are_read_by_pointer_and_by_keys(wide: Opened) -> None:
    for part in ("tradeoff", "ood", "scores", "roc", "robustness", "map"):
        drawn = wide.page.locator(f"#{part} .plot").first
        drawn.focus()
        wide.page.keyboard.press("ArrowRight")
        assert wide.page.locator("#tip").is_visible()
        assert wide.page.locator("#said").inner_text().strip()
        box, ring = drawn.bounding_box(), drawn.locator(".ring")
        x, y = (float(ring.get_attribute(name)) for name in ("cx", "cy"))
        wide.page.keyboard.press("Escape")
        assert wide.page.locator("#tip").is_hidden()
        wide.page.mouse.move(box["x"] + x, box["y"] + y)
        assert wide.page.locator("#tip").is_visible()


def test_controls_change_what_is_drawn(wide: Opened) -> None:
    wide.page.locator("#ood select").nth(1).select_option(label="near-OOD, full spectrum, mean of sets")
    assert wide.page.locator("#ood .plot path").count() == 3
    figure = wide.page.locator("#roc .plot path").first
    before = figure.get_attribute("d")
    wide.page.locator("#roc select").first.select_option(HOSTILE)
    assert figure.get_attribute("d") != before
    assert wide.page.locator("#roc .plot path").count() == 3
    wide.page.locator("#roc .legend button").first.click()
    assert wide.page.locator("#roc .plot path").count() == 2
    assert wide.page.locator("#metrics-table th", has_text="per_class").is_hidden()
    wide.page.get_by_label("single classes too").check()
    assert wide.page.locator("#metrics-table th", has_text="per_class").is_visible()
    wide.page.locator("#metrics input[type=search]").fill("knn far fpr95_id")
    shown = wide.page.locator("#metrics-table tbody tr:visible th").all_inner_texts()
    assert shown
    assert all("far" in name and "fpr95_id" in name for name in shown)
    wide.page.locator("#metrics input[type=search]").fill("")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(chromium, page_of_study: Path, colours: str) -> None:
    opened = Opened(chromium, page_of_study, 375, colours)
    page = opened.page
    page.eval_on_selector_all("details", "all => all.forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.evaluate("scrollTo(50, 0)")
    assert page.evaluate("scrollX") == 0

    def background() -> int:
        return sum(
            int(x) for x in page.evaluate("getComputedStyle(document.documentElement).backgroundColor")[4:-1].split(",")
        )

    dark = background() < 200
    assert dark == (colours == "dark")
    page.get_by_role("button", name="Light" if dark else "Dark").click()
    assert (background() < 200) != dark
    page.get_by_role("button", name="Auto").click()
    assert (background() < 200) == dark
    assert opened.wrong == []
    page.close()


def test_results_without_samples_make_a_page(chromium, tmp_path: Path) -> None:
    bare = ood_result("f", "vit")
    bare.samples = {}
    path = report([bare, knn_result("f", "vit", 0.5)], tmp_path / "r.html")
    opened = Opened(chromium, path)
    parts = opened.page.eval_on_selector_all("main > section", "all => all.map(each => each.id)")
    assert parts == ["summary", "ood", "metrics", "provenance"]
    opened.page.close()
    nothing = Opened(chromium, report([Result("knn", {}, {}, {})], tmp_path / "n.html"))
    only = Opened(chromium, report([compare_result()], tmp_path / "c.html"))
    assert (opened.wrong, nothing.wrong, only.wrong) == ([], [], [])
    nothing.page.close()
    only.page.close()

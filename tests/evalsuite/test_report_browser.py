"""The report in headless Chromium."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from photo_cases import HOSTILE_CLASS, make_world
from report_cases import (
    BREAKOUT,
    FORMULA,
    HOSTILE,
    compare_result,
    fidelity_result,
    knn_result,
    ood_result,
    robustness_result,
    study,
)

from evalsuite import Metric, Result, report
from evalsuite.charts import Axis, Cloud, Dots, Headline, Histogram, Lines, Scatter, Section, Series, Table
from evalsuite.evaluators import Evaluator


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
        *("summary", "tradeoff", "ood", "scores", "roc", "map", "robustness", "comparisons", "metrics", "provenance")
    ]
    empty = wide.page.eval_on_selector_all(".plot", "all => all.filter(each => !each.querySelector('svg')).length")
    assert empty == 0
    assert wide.page.locator("#scores .plot").count() == 3
    assert wide.page.locator("#robustness .plot").count() == 4
    places = (
        wide.page.locator("#map .plot")
        .first.locator("path.places")
        .evaluate_all("all => all.map(e => e.getAttribute('d'))")
    )
    assert sum(each.count("M") for each in places) == 300 + 301 + 302, "a mark a row"
    assert "one scale for both axes, and each encoder has its own" in wide.page.locator("#map .about").inner_text()


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
    assert {(row["encoder"], row["detector"]) for row in scores} == {("vit", "knn")}
    assert sum(int(row["count"]) for row in scores if row["set"] == "ID test") == 300
    curve = json.loads(saved("roc", "JSON"))
    assert (curve[0]["encoder"], curve[0]["detector"], curve[0]["ood_set"]) == ("vit", "knn", f"near-OOD: {FORMULA}")
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


def test_a_spreadsheet_runs_no_name(chromium, tmp_path: Path) -> None:
    opened = Opened(chromium, report([knn_result("f", FORMULA, 0.5)], tmp_path / "r.html"))
    with opened.page.expect_download() as download:
        opened.page.locator("#metrics .save button", has_text="CSV").click()
    rows = list(csv.DictReader(Path(download.value.path()).read_text(encoding="utf-8").splitlines()))
    assert {row["encoder"] for row in rows} == {f"'{FORMULA}"}
    opened.page.close()


def test_controls_change_what_is_drawn(wide: Opened) -> None:
    from playwright.sync_api import expect  # which waits for what is drawn

    wide.page.locator("#ood select").nth(1).select_option(label="near-OOD, full spectrum, mean of sets")
    expect(wide.page.locator("#ood .plot path")).to_have_count(3)
    expect(wide.page.locator("#ood h3 small")).to_have_text("AUROC · near-OOD, full spectrum, mean of sets")
    wide.page.locator("#ood select").first.select_option(label="FPR95_id")
    expect(wide.page.locator("#ood .figures")).to_have_text("No result has this.")
    figure = wide.page.locator("#roc .plot path").first
    before = figure.get_attribute("d")
    wide.page.locator("#roc select").first.select_option(HOSTILE)
    expect(figure).not_to_have_attribute("d", before)
    expect(wide.page.locator("#roc .plot path")).to_have_count(3)
    wide.page.locator("#roc .legend button").first.click()
    expect(wide.page.locator("#roc .plot path")).to_have_count(2)
    assert wide.page.locator("#metrics-table th", has_text="per_class").is_hidden()
    mean = wide.page.locator("#metrics-table th", has_text="knn/far/mean/auroc")
    assert mean.is_hidden(), "it repeats the only set"
    wide.page.get_by_label("single classes and means of one set too").check()
    assert wide.page.locator("#metrics-table th", has_text="per_class").is_visible()
    assert mean.is_visible()
    wide.page.locator("#metrics input[type=search]").fill("knn far fpr95_id")
    shown = wide.page.locator("#metrics-table tbody tr:visible th").all_inner_texts()
    assert shown
    assert all("far" in name and "fpr95_id" in name for name in shown)
    wide.page.locator("#metrics input[type=search]").fill("")


SPECS = (
    "timm/vit_small_patch14_dinov2.lvd142m:pool=avg,size=224,",
    "run:runs/tintem-resnet18-cifar10-seed0-lr3e-4-wd0.05-",
)


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_long_names_stay_off_the_numbers(chromium, tmp_path: Path, width: int) -> None:
    results = [knn_result("t", "vit", 0.99)]
    for n in range(6):
        name = (*SPECS, "x" * 90)[n % 3] + str(n)
        results += [knn_result(f"f{n}", name, 0.5 + n / 20), fidelity_result("t", f"f{n}", name, 0.9 - n / 50)]
    opened = Opened(chromium, report(results, tmp_path / "r.html"), width)
    overlapping = opened.page.evaluate("""() => {
      const box = (node) => node.getBoundingClientRect();
      const apart = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1 || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
      const numbers = [...document.querySelectorAll("#tradeoff svg text")].filter((each) => /^[\\d.]+$/.test(each.textContent));
      const names = [...document.querySelectorAll("#tradeoff svg text.name")].slice(2);
      const rows = [...document.querySelectorAll("#summary-table tbody tr")];
      const cells = rows.flatMap((row) => [[row.querySelector(".who"), row.cells[1]]]);
      return [...names.flatMap((a) => numbers.map((b) => [a, b])), ...cells]
        .filter(([a, b]) => !apart(box(a), box(b))).map(([a, b]) => `${a.textContent} over ${b.textContent}`);
    }""")
    assert overlapping == []
    opened.page.close()


def test_axes_end_where_values_can(chromium, tmp_path: Path) -> None:
    near_one = [knn_result(f"f{n}", f"vit{n}", 0.99 - n / 500) for n in range(3)]
    kept = [fidelity_result("f0", f"f{n}", f"vit{n}", 0.999) for n in (1, 2)]
    ood = ood_result("f0", "vit0", detectors=("knn",))
    opened = Opened(chromium, report([*near_one, *kept, ood], tmp_path / "r.html"))
    numbers = "all => all.map(e => Number(e.textContent)).filter(n => !Number.isNaN(n))"
    assert max(opened.page.eval_on_selector_all("#tradeoff svg text", numbers)) <= 100
    at = "all => all.map(e => e.getAttribute('x1') === e.getAttribute('x2'))"
    assert opened.page.eval_on_selector_all("#ood svg line.reference", at) == [True], "chance, in a chart of AUROCs"
    assert 0.5 in opened.page.eval_on_selector_all("#ood svg text", numbers)
    opened.page.locator("#ood select").first.select_option(label="FPR95_id")
    assert opened.page.eval_on_selector_all("#ood svg line.reference", at) == []
    opened.page.close()


def test_its_teacher_is_named_once(chromium, tmp_path: Path) -> None:
    results = [knn_result("f0", "vit", 0.9), knn_result("f1", "a", 0.8), knn_result("f2", "b", 0.7)]
    for name, expected in (
        ("teacher", "against its teacher."),
        ("big", "Best encoder by kNN top‑1 (k = 20): big with 90.0 %."),
    ):
        opened = Opened(chromium, report(results, tmp_path / "r.html", names={"f0": name}))
        assert opened.page.locator("#lead").inner_text().endswith(expected)
        opened.page.close()


def test_paper_has_whole_tables_and_says_what_figures_show(chromium, tmp_path: Path) -> None:
    """The page's own preparation for print, and the layout that follows: nothing is wider than the paper."""
    results = [
        each
        for n in range(9)
        for each in (knn_result(f"f{n}", f"{SPECS[n % 2]}{n}", 0.5), ood_result(f"f{n}", f"{SPECS[n % 2]}{n}", n))
    ]
    opened = Opened(chromium, report(results, tmp_path / "r.html"), 600)
    assert opened.page.pdf(path=tmp_path / "r.pdf", prefer_css_page_size=True)
    opened.page.emulate_media(media="print")
    opened.page.set_viewport_size({"width": 961, "height": 600})
    tables = opened.page.eval_on_selector_all("table", "all => all.map(e => e.getBoundingClientRect().right)")
    assert max(tables) <= 962, "as the event before printing left them"
    assert opened.page.eval_on_selector_all(".scroll", "all => all.every(e => e.scrollHeight <= e.clientHeight + 1)")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 962
    assert opened.page.locator(".controls:visible").count() == 0
    assert opened.page.locator("#ood h3 small").inner_text() == "AUROC · near-OOD: tin"
    assert opened.page.locator("#roc h3 small").inner_text() == "knn · near-OOD: tin"
    assert opened.page.locator("#scores h3 small").first.inner_text() == "knn"
    opened.page.close()


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


def test_a_wide_table_shows_that_it_goes_on(chromium, page_of_study: Path) -> None:
    for colours in ("light", "dark"):
        opened = Opened(chromium, page_of_study, 390, colours)
        table = opened.page.locator("#summary .scroll")

        def ends(table=table) -> list[bytes]:
            """The few columns at the table's left and right edge, between its rows' text."""
            table.evaluate(
                "e => { e.querySelectorAll('table *').forEach(each => { each.style.visibility = 'hidden'; }); }"
            )
            box = table.bounding_box()
            clips = [
                {"x": x, "y": box["y"] + 4, "width": 6, "height": 20} for x in (box["x"], box["x"] + box["width"] - 6)
            ]
            return [table.page.screenshot(clip=clip, full_page=True) for clip in clips]

        none, more = ends()
        assert none != more, "there is more on the right only"
        table.evaluate("e => { e.scrollLeft = 1e5; }")
        assert ends()[1] == none
        table.evaluate("e => { e.scrollLeft = 40; }")
        assert ends()[1] == more
        assert ends()[0] != none
        opened.page.close()


def test_names_in_the_scatter_stand_above_its_lines(wide: Opened) -> None:
    order = wide.page.eval_on_selector_all(
        "#tradeoff .plot svg > *", "all => all.map(each => each.matches('text.name') ? 'name' : each.tagName)"
    )
    names = [n for n, what in enumerate(order) if what == "name"]
    lines = [n for n, what in enumerate(order) if what == "line"]
    assert names[-1] > names[-2] > lines[-1]
    name = wide.page.locator("#tradeoff .plot text.name").last
    assert name.evaluate("e => getComputedStyle(e).paintOrder").startswith("stroke")
    assert name.evaluate("e => getComputedStyle(e).stroke") == wide.page.locator("#tradeoff .card").evaluate(
        "e => getComputedStyle(e).backgroundColor"
    )


def test_a_mean_over_corruptions_says_over_what(chromium, tmp_path: Path) -> None:
    result = robustness_result("f", "vit")
    result.inputs["clean"] = {"rows": 10_000}
    opened = Opened(chromium, report([result], tmp_path / "r.html"))
    feet = opened.page.locator("#summary .foot").all_inner_texts()
    assert "Corrupted top‑1, mean over 2 corruptions at severities 1, 3, 5; mCE: 10,000 images." in feet
    assert opened.wrong == []
    opened.page.close()


def test_a_comparison_says_what_differs_and_what_it_leaves_out(chromium, tmp_path: Path) -> None:
    result = compare_result()
    result.parameters |= {"differing": ["knn k 50 against 1"], "not_compared": ["macro_top1@20"]}
    opened = Opened(chromium, report([result], tmp_path / "r.html"))
    (foot,) = opened.page.locator("#comparisons .foot").all_inner_texts()
    assert foot.split("\n") == [
        *(
            "A and B differ in: knn k 50 against 1.",
            "Not compared: macro_top1@20.",
            "A: a.json",
            "B: b.json",
            "result 1",
        )
    ]
    opened.page.close()


def test_an_evaluator_of_another_package_is_drawn(chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of chart from its record alone: no script knows the evaluator, its metrics or its sets."""
    iou = Axis(name="IoU", share=True, better="higher", least=0.0, most=1.0)
    rng = np.random.default_rng(0)

    def headlines(results):
        return [Headline(metric="miou", axis=iou, note="19 classes", rows="5 images")]

    def charts(results):
        (one,) = results
        line = Series(name=one.encoder, x=[1, 2, 4], y=[0.5, 0.7, 0.75], low=[0.4, 0.6, 0.7], high=[0.6, 0.8, 0.8])
        values = {"road": rng.normal(size=50), "sky": rng.normal(size=60)}
        of = [
            Dots(title="Classes", axis=iou, rows={"road": "iou/road", "sky": "iou/sky"}, label="class"),
            Scatter(title="Road against all", x={"iou/road": iou}),
            Lines(title="By scale", x=Axis(name="scale"), y=iou, series=[line], ticks=[1, 2, 4], marked=True),
            Histogram.of(values, {"sky": "far"}, title="Margins", axis=Axis(name="margin")),
            Cloud.of({"road": rng.normal(size=(9, 2))}, {}, 9, title="Pixels", x=Axis(name="u"), y=Axis(name="v")),
            Table(
                title="Confusion",
                columns=["class", "taken for", "pixels", "share"],
                rows=[["road", "sky", 12, Metric(0.25)]],
            ),
        ]
        return [Section("segmentation", "Segmentation", "Segmentation", "Of pixels.", of)]

    segmentation = type("Segmentation", (Evaluator,), {"headlines": headlines, "charts": charts})
    monkeypatch.setattr("evalsuite.evaluators.names", lambda: ["segmentation"])
    monkeypatch.setattr("evalsuite.evaluators.load", lambda name: segmentation)
    metrics = {"miou": Metric(0.7, (0.6, 0.8)), "iou/road": Metric(0.9), "iou/sky": Metric(0.5, (0.4, 0.6))}
    result = Result("segmentation", {"test": {"encoder": "vit", "fingerprint": "f"}}, {}, metrics)
    opened = Opened(chromium, report([result], tmp_path / "r.html"))
    assert opened.page.locator("#summary-table td data").inner_text() == "70.0 %"
    figures = opened.page.locator("#segmentation figure")
    assert figures.locator("h3").all_inner_texts() == [
        *("Classes", "Road against all", "By scale", "Margins", "Pixels", "Confusion")
    ]
    read = []
    for n in range(5):
        figures.nth(n).locator(".plot").focus()
        opened.page.keyboard.press("End")
        read.append((opened.page.locator("#said").text_content() or "").split("\n"))
    assert read[0] == ["vit", "sky", "IoU 50.0 %", "95 % interval 40.0–60.0 %"]
    assert read[1] == ["vit", "IoU 70.0 %", "95 % interval 60.0–80.0 %", "IoU 90.0 %"]
    assert read[2] == ["vit", "scale 4", "IoU 75.0 %", "95 % interval 70.0–80.0 %"]
    assert [line.split(":")[0] for line in read[3][1:]] == ["road", "sky"]
    assert read[4][0] == "road, 9 of 9 rows"
    assert figures.last.locator("td").all_inner_texts() == ["sky", "12", "0.2500"]
    assert opened.wrong == []
    opened.page.close()


def test_results_without_samples_make_a_page(chromium, tmp_path: Path) -> None:
    bare = ood_result("f", "vit")
    bare.samples = {}
    path = report([bare, knn_result("f", "vit", 0.5)], tmp_path / "r.html")
    opened = Opened(chromium, path)
    parts = opened.page.eval_on_selector_all("main > section", "all => all.map(each => each.id)")
    assert parts == ["summary", "ood", "metrics", "provenance"]
    opened.page.close()
    with pytest.warns(RuntimeWarning, match="result 1 has no metrics"):
        nothing = Opened(chromium, report([Result("knn", {}, {}, {})], tmp_path / "n.html"))
    assert "result 1 has no metrics" in nothing.page.locator("#notices").inner_text()
    only = Opened(chromium, report([compare_result()], tmp_path / "c.html"))
    assert (opened.wrong, nothing.wrong, only.wrong) == ([], [], [])
    nothing.page.close()
    only.page.close()


@pytest.fixture(scope="module")
def pictured(chromium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    world = make_world(tmp_path_factory.mktemp("world"))
    page = report(
        world.results, tmp_path_factory.mktemp("page") / "r.html", names={"vit": "teacher"}, images=world.images
    )
    opened = Opened(chromium, page)
    yield opened
    assert opened.wrong == [], "nothing is asked for from elsewhere, and the policy lets the pictures in"
    opened.page.close()


def test_pictures_are_shown_and_hostile_names_stay_text(pictured: Opened) -> None:
    sizes = "all => all.map(each => [each.naturalWidth, each.alt, each.src.slice(0, 23)])"
    found = pictured.page.eval_on_selector_all("main img", sizes)
    assert len(found) > 60
    assert {(width, source) for width, _, source in found} == {(64, "data:image/webp;base64,")}
    assert any(alt.startswith(f"{HOSTILE_CLASS}/") for _, alt, _ in found), "a name is alternative text"
    assert pictured.page.locator("main img[src=x], main b").count() == 0
    assert HOSTILE_CLASS in pictured.page.locator("#knn-classes").inner_text()
    count = pictured.page.evaluate("JSON.parse(document.getElementById('data').textContent).pictures.length")
    assert f"Pictures: {count} are shown." in pictured.page.locator("#provenance").inner_text()
    strips = pictured.page.locator("#neighbours .strip")
    assert strips.count() == 8
    for side in strips.first.locator(".group").all():
        assert side.locator("img").count() == 4
    left, right = (side.bounding_box() for side in strips.first.locator(".group").all())
    assert left["y"] == right["y"], "side by side"
    assert left["x"] + left["width"] <= right["x"]


def test_a_map_shows_pictures_by_pointer_and_by_keys(pictured: Opened) -> None:
    from playwright.sync_api import expect  # which waits for what is drawn

    drawn, tip = pictured.page.locator("#map .plot").first, pictured.page.locator("#tip")
    drawn.locator("svg").wait_for()
    drawn.focus()
    for _ in range(3):  # two sets' middles have none
        pictured.page.keyboard.press("ArrowRight")
    by_keys = tip.locator("img").get_attribute("alt")
    assert by_keys in (pictured.page.locator("#said").text_content() or "").split("\n")
    box, ring = drawn.bounding_box(), drawn.locator(".ring")
    x, y = (float(ring.get_attribute(name)) for name in ("cx", "cy"))
    pictured.page.keyboard.press("Escape")
    assert tip.is_hidden()
    pictured.page.mouse.move(box["x"] + x, box["y"] + y)
    assert tip.locator("img").get_attribute("alt") == by_keys
    assert tip.locator("img").evaluate("each => each.complete && each.naturalWidth") == 64
    pictured.page.keyboard.press("ArrowLeft")
    assert tip.inner_text().startswith("near-OOD: moths, 27 of 27 rows"), "a set's middle"
    assert tip.locator("img").count() == 0
    pictured.page.locator("#map select").select_option("ID against OOD")
    expect(pictured.page.locator("#map .plot").first).to_contain_text("from ID to OOD →")
    pictured.page.locator("#map select").select_option("by class")
    assert HOSTILE_CLASS in pictured.page.locator("#map .legend").inner_text()
    assert "63 of 63 places show their picture" in pictured.page.locator("#map .foot").first.inner_text()


def test_galleries_can_be_saved(pictured: Opened) -> None:
    with pictured.page.expect_download() as download:
        pictured.page.locator("#edges .save button", has_text="CSV").first.click()
    rows = list(csv.DictReader(Path(download.value.path()).read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 16
    assert rows[0].keys() == {"encoder", "detector", "strip", "of", "group", "place", "sample", "words"}
    assert (rows[0]["strip"], rows[0]["place"]) == ("near-OOD: moths", "1")
    alts = pictured.page.locator("#edges figure").first.locator("img").evaluate_all("all => all.map(each => each.alt)")
    assert [row["sample"] for row in rows] == alts


@pytest.mark.parametrize("width", [390, 1280])
def test_galleries_fit_and_print(chromium, pictured: Opened, width: int) -> None:
    path = Path(pictured.page.url.removeprefix("file://"))
    opened = Opened(chromium, path, width)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.page.locator("#map .plot svg").first.wait_for()
    opened.page.locator("#map .plot").first.focus()
    opened.page.keyboard.press("End")
    assert opened.page.locator("#tip img").is_visible()
    opened.page.emulate_media(media="print")
    assert opened.page.locator("#tip").is_hidden(), "it would lie on every sheet"
    cut = "all => all.filter(each => getComputedStyle(each).breakInside !== 'avoid').length"
    assert opened.page.eval_on_selector_all(".strip", cut) == 0
    assert opened.page.locator("#edges .save").first.is_hidden()
    assert opened.page.pdf(format="A4", landscape=True).startswith(b"%PDF")
    assert opened.wrong == []
    opened.page.close()

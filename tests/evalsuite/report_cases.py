"""Results of a made-up study whose every name is hostile, and a page read without a browser."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from evalsuite import Metric, Result
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

    def charts(self, key: str) -> list[dict[str, Any]]:
        return next((each["charts"] for each in self.data["sections"] if each["key"] == key), [])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = str(dict(attrs).get("type", tag))

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data

"""Texts, MiniLM's stores of them, students of a bag of tokens: what the benchmarks of texts share."""

import csv
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faithfulness import mean_sd
from photographs import arguments

import distill
import evalsuite
import featcache
from distill.training.run import Run

__all__ = ["TEACHER", "Texts", "against", "arguments", "mean_sd", "table"]

TEACHER = "builtin/minilm_l6"
EXACT: dict[str, Any] = {"precision": "fp32", "device": "cpu"}
BATCH = 128


class Texts:
    """Stores and runs of one work folder; made once.

    Args:
        steps: of every fit, about: whole epochs.
        student: a spec.
    """

    def __init__(self, work: Path, student: str, steps: int):
        self.work, self.student, self.steps = work, student, steps

    def store(self, name: str, corpus: str, encoder: str = TEACHER) -> featcache.FeatureStore:
        return featcache.extract(corpus, encoder, self.work / "stores" / f"{name}.zarr", **EXACT)

    def fit(
        self,
        name: str,
        stores: Mapping[str, str],
        method: str,
        options: Mapping[str, Any],
        seed: int,
        lr: float,
        **given: Any,
    ) -> Run:
        """Of stores by name, each with its corpus."""
        teachers = [self.store(each, corpus) for each, corpus in stores.items()]
        batch = given.setdefault("batch_size", min(BATCH, sum(map(len, teachers))))
        epochs = given.pop("epochs", 0) or max(1, round(self.steps * batch / sum(map(len, teachers))))
        out = self.work / "runs" / f"{name}-{self.student.replace('/', '')}-{self.steps}-{lr:g}-{seed}"
        return distill.fit(
            teachers, list(stores.values()), out=out, student=self.student, method=method, method_options=options, epochs=epochs,
            lr=lr, seed=seed, precision="fp32", device="cpu", resume=True, workers=1, **given,
        )  # fmt: skip

    def embedded(self, run: Run, name: str, corpus: str) -> featcache.FeatureStore:
        return self.store(f"{run.path.name}-{name}", corpus, f"run:{run.path}")


def nfcorpus(data: Path, work: Path, held_out: int = 300) -> Path:
    """A BEIR folder of NFCorpus titles, its training queries in two parts, `fit` and `tune`, drawn once."""
    folder = work / "nfcorpus"
    if folder.exists():
        return folder
    partial = folder.with_name("nfcorpus.partial")
    (partial / "qrels").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(data / "nfcorpus-titles.zip") as archive:
        for name in ("corpus", "queries-dev"):
            (partial / f"{name}.jsonl").write_bytes(archive.read(f"{name}.jsonl"))
        (partial / "qrels" / "dev.tsv").write_bytes(archive.read("qrels-dev.tsv"))
        queries = archive.read("queries-train.jsonl").decode().splitlines()
        header, *judged = archive.read("qrels-train.tsv").decode().splitlines()
    tuned = {int(each) for each in np.random.default_rng(0).permutation(len(queries))[:held_out]}
    for part in ("fit", "tune"):
        mine = [line for number, line in enumerate(queries) if (number in tuned) == (part == "tune")]
        ids = {json.loads(line)["_id"] for line in mine}
        (partial / f"queries-{part}.jsonl").write_text("\n".join(mine) + "\n", encoding="utf-8")
        lines = [header, *(line for line in judged if line.partition("\t")[0] in ids)]
        (partial / "qrels" / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.rename(folder)
    return folder


def sentences(data: Path, name: str) -> list[tuple[str, str]]:
    """(text, label) of a table of `sentences.zip`."""
    with zipfile.ZipFile(data / "sentences.zip") as archive:
        lines = archive.read(f"{name}.csv").decode().splitlines()
    return [(row["text"], row["label"]) for row in csv.DictReader(lines)]


def written(path: Path, rows: Sequence[tuple[str, str]], labels: bool = True) -> str:
    """The spec of a table of these texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return f"texts:{path}" + ("" if labels else "@label=")


def against(ours: Sequence[evalsuite.Result], theirs: Sequence[evalsuite.Result], metric: str) -> list[str]:
    """Mean difference of a metric, ours less theirs, paired by seed, ± its standard error; and in how many seeds the interval
    over the samples leaves out 0."""
    apart = [evalsuite.compare(b, a).metrics[metric] for a, b in zip(ours, theirs, strict=True)]
    of_seeds = np.array([each.value for each in apart])
    error = of_seeds.std(ddof=1) / np.sqrt(len(of_seeds)) if len(of_seeds) > 1 else float("nan")
    clear = sum(each.ci95 is not None and (each.ci95[0] > 0 or each.ci95[1] < 0) for each in apart)
    return [f"{of_seeds.mean():+.4f} ± {error:.4f}", f"{clear} of {len(apart)}"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"

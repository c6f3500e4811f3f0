"""Linear probe: logistic regression on cached features."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from evalsuite.evaluators import Headline, Named, OfStores, Result, Store, Table, function, option, store

CANDIDATES = tuple(10.0**e for e in range(-3, 6))
"""The C that are tried where none is given."""


@dataclass(frozen=True)
class Probe(OfStores):
    """How well a linear classifier fitted to `train`'s embeddings labels `test`'s rows.

    Multinomial logistic regression with scikit-learn's objective, ½‖W‖² + C Σ cross-entropy (bias not
    penalised), by L-BFGS in float64. Embeddings are centred and divided by one number, the root mean square of
    their length, so that C means the same for every encoder. Of several `c` the one is taken that is right
    most often (then: of the lowest cross-entropy) on a tenth of each class of *train*, drawn by `seed`; then
    all of *train* is fitted. `test` takes no part in it.

    Reports `probe/top1`, `probe/top5` and `probe/macro_top1` (mean over classes of the accuracy within each), in
    [0, 1] with 95 % intervals (`evalsuite.intervals`) over the test rows, the classifier taken as it is; `parameters`
    says the chosen C and how each did on the held-out rows. Labels are matched, rows left out remarked on and chance
    levels taken as in `evalsuite.knn`; test
    rows of a class without training rows are wrong, and counted as `unreachable`. The training rows are held in memory,
    many of them as float32.

    A test row whose image `train` has too is counted, as `inputs["test"]["identical"]`, and remarked on; `drop_identical`
    leaves such rows out. Images are known as in `evalsuite.knn`.

    A warning says when a fit stopped at its limit of steps, short of its tolerance (`parameters["unfinished"]` has its
    C), and when the C taken is the smallest or largest of three or more.

    `save` writes the classifier: `weight` (C, D) and `bias` (C,) in float64 with logits = embedding · weightᵀ +
    bias for embeddings as they are stored, and as metadata `class_names` and `labels` (JSON lists, one entry a
    row of `weight`), `fingerprint`, `encoder` and `c`. `progress` is called with (fits done, of how many).

    `resamples` has no effect: intervals are no longer drawn at random.

    Raises `ValueError` when the stores come from different encoders, are of different precisions (without
    `any_precision`) or are one, one has no labels or a value that is not finite, their classes cannot be matched or have
    none in common, `train` has one class, no C is positive, no class has a row to spare for choosing C, or `save` cannot
    be written.

    Objective and choice of C: Oquab et al. 2023, arXiv 2304.07193 (`log_regression.py`).
    """

    one_encoder = True
    order = 20
    summary = "Logistic regression on the kept embeddings."
    examples = ("evalsuite probe --train teacher.zarr --test teacher-test.zarr --save head.safetensors",)
    unit = "fits"
    outcomes = ("c", "steps", "held_out_rows", "held_out_top1", "held_out_cross_entropy", "head")

    train: Store = store("Labelled rows that the classifier is fitted to.")
    test: Store = store("Labelled rows held out.")
    _: KW_ONLY
    c: float | Sequence[float] = option(
        CANDIDATES,
        "Inverse strength of the penalty; of a comma list, the best on a tenth of --train is taken.",
        shown="0.001,0.01,…,100000",
    )
    save: str | os.PathLike[str] | None = option(
        None, "Keep the classifier, for detectors that need one.", metavar="HEAD.safetensors", file="written"
    )
    device: str = "auto"
    seed: int = option(0, "Of the rows that choose C.", least=0)
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if not self._candidates or not all(0 < each < math.inf for each in self._candidates):
            raise ValueError(f"c must hold positive numbers, got {self.c}")

    @property
    def _candidates(self) -> list[float]:
        return sorted({float(each) for each in ([self.c] if isinstance(self.c, float | int) else self.c)})

    def run(self) -> Result:
        import numpy as np

        from evalsuite.accuracy import accuracies
        from evalsuite.logistic import fit, place
        from evalsuite.result import Result, content_of, versions, whole_file
        from evalsuite.sides import Sides
        from featcache.classes import aligned_labels
        from featcache.disk.refusals import require_writable

        sides = Sides(self.any_precision, train=self.train, test=self.test)
        if sides.one_store:
            raise ValueError(f"{sides.names[1]} is both train and test; pass held-out images as test")
        train, test, _ = sides.take(self.drop_identical, "other images as test")
        truth = aligned_labels(train, test)
        if self.save is not None:
            require_writable(self.save, "file for the head")
        candidates = self._candidates
        fitted = fit(train, candidates, self.seed, self.device, self.progress or (lambda done, of: None))
        fitted.warn(candidates)
        metrics, samples, chance = accuracies(place(fitted.head, test, truth), truth, fitted.head.labels, "probe/{}")
        if self.save is not None:
            Path(self.save).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(Path(self.save)) as file:
                file.write(fitted.head.to_bytes(encoder=train.record()["encoder"], c=repr(fitted.c)))
        return Result(
            "probe",
            sides.record(truth),
            {
                "c": fitted.c,
                "candidates": candidates,
                "held_out_rows": fitted.held_out,
                "held_out_top1": [accuracy for accuracy, _ in fitted.tried],
                "held_out_cross_entropy": [cross_entropy for _, cross_entropy in fitted.tried],
                "normalisation": "centred, divided by the root mean square length",
                "steps": fitted.steps,
                "unfinished": fitted.unfinished,
                "head": None if self.save is None else os.fspath(self.save),
                **self.comparing(sides.same.by),
                "seed": self.seed,
                "chance": chance,
            },
            metrics,
            versions("torch"),
            {"sample_id": test.sample_ids.astype(np.str_), "content": content_of(test)} | samples,
            remarks=sides.remarks(truth, "of train", "the classifier was fitted to them"),
        )

    @staticmethod
    def step(done: int, of: int) -> str:
        return "choosing C" if done < of - 1 else "with the chosen C"

    @classmethod
    def table(cls, result: Result) -> Table:
        from evalsuite.table import metric_table

        return metric_table(result, [f"C = {result.parameters['c']:g}, {result.parameters['steps']} steps"])

    @classmethod
    def headlines(cls, results: Sequence[Named]) -> list[Headline]:
        from evalsuite.charts import Axis, Headline, rows_of

        rows = rows_of(results, "test", "rows")
        return [Headline(metric="probe/top1", axis=Axis.of("probe/top1", "Probe top‑1"), note="linear", rows=rows)]


probe = function(Probe)

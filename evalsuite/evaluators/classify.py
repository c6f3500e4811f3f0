"""How good a classifier's answers are, and its probabilities."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from evalsuite.evaluators import Estimate, Evaluator, Result, Samples, Store, Table, function, option, store

if TYPE_CHECKING:
    from evalsuite.overlap import Overlap
    from evalsuite.probabilities import Classifier, Said
    from evalsuite.result import Metric
    from featcache.rows import Rows
else:
    Classifier = Metric = Overlap = Rows = Said = Any


@dataclass(frozen=True)
class Classify(Evaluator):
    """What a classifier says of `test`'s labelled rows: the store's own `logits`, or those that `head` makes of its embeddings.

    The classes of a head, or of an encoder that names those of its logits, are the store's by their names; stored logits without
    names are taken for the store's classes in the order of their numbers. All of the classifier's classes are in the softmax, with rows or without.

    With 95 % intervals (`evalsuite.intervals`) over the test rows, the classifier and its temperature taken as they are:

    - `classify/top1`, `classify/top5`, `classify/macro_top1` (mean over classes of the accuracy within each), in [0, 1];
      of equal logits the first class comes first.
    - `classify/nll`: mean −ln of the probability of the true class, in nats; **lower is better.**
    - `classify/ece`: the expected calibration error, in [0, 1], over `bins` bins of equal width of the top probability, (0, 1/bins]
      first: Σ (share of the rows) · |mean probability − accuracy| (Guo et al. 2017, arXiv 1706.04599). Noise counts as error: it is
      too high, the more so the fewer rows there are, for which its interval allows.
    - `classify/aurc`: the area under the risk-coverage curve, in [0, 1]: the share of errors among the k rows of the highest top
      probability, averaged over k = 1 … n (Geifman, Uziel and El-Yaniv 2019, arXiv 1805.08206); **lower is better.**
    - `classify/selective_top1@C`: for each C of `coverages` the accuracy on the ⌈C n⌉ rows of the highest top probability (Geifman
      and El-Yaniv 2017, arXiv 1705.08500). Of rows of equal probability here and in the AURC the mean over their orders counts.
    - `classify/calibrated/nll`, `classify/calibrated/ece`: the same of softmax(logits / T), T being the temperature of the least NLL
      on the labelled rows of `calibrate`, which are to be rows that the classifier was not fitted to; without `calibrate` there are
      none. `parameters["temperature"]` is T.
    - `per_class/CLASS/classify/top1`: the accuracy within each class.

    `parameters["confusion"]` holds by true class, by predicted class, how many rows there are (none where that is 0).
    `bins` and `coverages` set what is said above. A test row whose image `calibrate` has too is counted, as
    `inputs["test"]["identical"]`, and remarked on; `drop_identical` leaves such rows out. `any_precision` compares the two
    stores in whatever precision they were made.

    A comparison has all of these but the macro accuracy, single classes, and the ECE: noise raises that of a well calibrated
    classifier more than another's, so that a paired difference would not hold the truth (coverage 65 to 100 % by simulation).

    Raises `ValueError` when there are neither logits nor a head, the head is another encoder's, test rows have no labels or
    a class that the classifier lacks, stored logits without names are not as many as the store's classes, or `calibrate` is `test`.
    """

    order = 25
    summary = "How good a classifier's answers and probabilities are: accuracy, NLL, calibration, selection."
    examples = (
        "evalsuite classify --test student-test.zarr --head head.safetensors --json classify.json",
        "evalsuite classify --test student-test.zarr --head head.safetensors --calibrate held-out.zarr",
    )
    drawing = "evalsuite.evaluators._classify_charts"
    outcomes = ("temperature", "confusion", "classes_by")

    test: Store = store("Labelled rows to judge it on.")
    _: KW_ONLY
    head: str | os.PathLike[str] | None = option(
        None,
        "The classifier: `evalsuite probe`'s, or a run's head.safetensors.",
        shown="the store's logits",
        file="read",
    )
    calibrate: Store | None = store("Labelled rows, new to it, that a temperature is fitted to.", None)
    bins: int = option(15, "Of equal width, of the top probability, for the calibration error.", least=1)
    coverages: Sequence[float] = option(
        (0.8, 0.9, 0.95), "Shares of the rows, the surest, whose accuracy is told.", shown="0.8,0.9,0.95"
    )
    drop_identical: bool = option(False, "Leave out test rows whose image --calibrate has too.")
    any_precision: bool = option(False, "Take --calibrate in whatever precision it was made and kept.")

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, got {self.bins}")
        if not all(0 < each <= 1 for each in self.coverages):
            raise ValueError(f"coverages must be shares above 0, up to 1, got {list(self.coverages)}")
        if self.drop_identical and self.calibrate is None:
            raise ValueError("drop_identical: there is no other side that an image could be on; give calibrate too")

    def run(self) -> Result:
        import numpy as np

        from evalsuite.judged import Judged
        from evalsuite.probabilities import Classifier, fit_temperature, said
        from evalsuite.result import Result, content_of, versions
        from featcache.head import Head
        from featcache.rows import Rows, left_out_remarks

        head = None if self.head is None else Head.read(self.head)
        whole = {"test": Rows.of(self.test, head)}
        if self.calibrate is not None:
            whole["calibrate"] = Rows.of(self.calibrate, head)
        rows, same = self._apart(whole)
        classifier, temperature = Classifier(rows["test"]), None
        (truth, by), test = classifier.columns(rows["test"]), rows["test"]
        if "calibrate" in rows:
            Classifier(rows["calibrate"])
            temperature = fit_temperature(rows["calibrate"], classifier.columns(rows["calibrate"])[0])
        judged = Judged(test, test, "test")
        found = said(test, truth, (1.0,) if temperature is None else (1.0, temperature), judged.see)
        judged.record()  # warns where classes seem to be others
        metrics, samples, chance = self._measured(found, classifier)
        counts = {name: each.record() | {"unlabelled": whole[name].unlabelled} for name, each in rows.items()}
        so = "its temperature was fitted to them"
        return Result(
            "classify",
            counts | {"test": counts["test"] | {"identical": same.count}},
            {
                "head": None if self.head is None else os.fspath(self.head),
                "temperature": temperature,
                "bins": self.bins,
                "coverages": [float(each) for each in self.coverages],
                "classes_by": by,
                "confusion": _confusion(found[0], classifier),
                "drop_identical": self.drop_identical,
                "any_precision": self.any_precision,
                "identical_by": same.by,
                "chance": chance,
            },
            metrics,
            versions("torch"),
            {"sample_id": test.sample_ids.astype(np.str_), "content": content_of(test)} | samples,
            remarks=[
                *same.remarks("test rows", "of calibrate", so, self.drop_identical),
                *(line for name, each in whole.items() for line in left_out_remarks(name, each, each.unlabelled)),
            ],
        )

    def _apart(self, whole: Mapping[str, Rows]) -> tuple[dict[str, Rows], Overlap]:
        """The labelled rows, and which of the test rows `calibrate` has too; with `drop_identical` without these."""
        from evalsuite.overlap import overlap

        rows = {name: each.labelled() for name, each in whole.items()}
        test, others = rows["test"], [rows[name] for name in rows if name == "calibrate"]
        for other in others:
            if os.path.realpath(other.name) == os.path.realpath(test.name):
                raise ValueError(f"{test.name} is both test and calibrate; give other labelled rows as calibrate")
            other.require_same_encoder(test, self.any_precision)
        same = overlap(test, others)
        if self.drop_identical:
            rows["test"] = same.without(test, others[0].name, "other images as test")
        return rows, same

    def _measured(
        self, found: Sequence[Said], classifier: Classifier
    ) -> tuple[dict[str, Metric], dict[str, Any], dict[str, float]]:
        """Metrics, samples and chance levels, of what is said as it is, and calibrated."""
        import numpy as np

        from evalsuite.accuracy import accuracies
        from evalsuite.intervals import aurc, calibration_error, nll, selective_accuracy, share, surest

        plain, right = found[0], found[0].place == 0
        metrics, samples, chance = accuracies(plain.place, plain.truth, classifier.classes.numbers, "classify/{}")
        for name, each in zip(("classify", "classify/calibrated"), found, strict=False):
            metrics[f"{name}/nll"] = nll(each.nll).metric()
            metrics[f"{name}/ece"] = calibration_error(each.confidence, right, self.bins).metric()
            samples |= {f"{name}/nll": each.nll, f"{name}/ece": each.confidence}
        metrics["classify/aurc"] = aurc(plain.confidence, right).metric()
        for coverage in self.coverages:
            name = f"classify/selective_top1@{coverage:g}"
            metrics[name] = selective_accuracy(plain.confidence, right, coverage).metric()
            samples[name] = surest(plain.confidence, coverage)
        for column in np.unique(plain.truth):
            name = f"per_class/{classifier.classes.distinct_name(int(column))}/classify/top1"
            metrics[name] = share(right[plain.truth == column]).metric()
        return metrics, samples, chance

    @classmethod
    def compared(cls, a: Samples, b: Samples) -> dict[str, tuple[Estimate, Estimate]]:
        from evalsuite.intervals import aurc, nll, selective_accuracy, share

        found: dict[str, tuple[Estimate, Estimate]] = {}
        for name in [name for name in a if name in b]:
            if name in ("classify/top1", "classify/top5"):
                found[name] = share(a[name]), share(b[name])
            elif name.endswith("/nll"):
                found[name] = nll(a[name]), nll(b[name])
            elif name == "classify/ece":
                of_a, of_b = ((each[name], each["classify/top1"]) for each in (a, b))
                found["classify/aurc"] = aurc(*of_a), aurc(*of_b)
            elif name.startswith("classify/selective_top1@"):
                coverage = float(name.partition("@")[2])
                of_a, of_b = ((each["classify/ece"], each["classify/top1"]) for each in (a, b))
                found[name] = selective_accuracy(*of_a, coverage), selective_accuracy(*of_b, coverage)
        return found

    @classmethod
    def table(cls, result: Result) -> Table:
        from evalsuite.table import metric_table

        given = result.parameters
        fitted = f"T = {given['temperature']:.4g}" if given["temperature"] else "no --calibrate: no temperature fitted"
        return metric_table(result, [f"ece: {given['bins']} bins of equal width; {fitted}"])


def _confusion(found: Said, classifier: Classifier) -> dict[str, dict[str, int]]:
    """By true class, by predicted class, how many rows; the most frequent first."""
    import numpy as np

    pairs, counts = np.unique(np.stack([found.truth, found.predicted], axis=1), axis=0, return_counts=True)
    matrix: dict[str, dict[str, int]] = {}
    for at in np.lexsort((-counts, pairs[:, 0])).tolist():
        true, predicted = (classifier.classes.distinct_name(number) for number in pairs[at].tolist())
        matrix.setdefault(true, {})[predicted] = int(counts[at])
    return matrix


classify = function(Classify)

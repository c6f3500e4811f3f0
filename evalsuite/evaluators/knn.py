"""k-nearest-neighbour classification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from evalsuite.evaluators import OfStores, Result, Store, function, option, store

PRESETS: dict[str, dict[str, Any]] = {
    "dinov2": {"k": (10, 20, 100, 200), "temperature": 0.07},
    "cospress": {"k": (10,), "temperature": 0.07},
}
"""Settings of published protocols, by name."""


@dataclass(frozen=True)
class Knn(OfStores):
    """Classify the query's rows by a vote of their k nearest bank rows.

    Cosine similarity; each neighbour votes for its label with weight softmax(similarity / temperature).
    Reports, for every K in `k`, `top1@K`, `top5@K` and `macro_top1@K` (mean over classes of the accuracy
    within each), in [0, 1] with 95 % intervals (`evalsuite.intervals`) over the query's rows, the bank and its
    few-shot draw taken as they are. A class nobody voted for
    never counts as among the top five, and equal votes go to the lower label. When bank and query are the
    same store a row is not its own neighbour. `parameters["chance"]` holds what the best answer reaches that is the
    same for every row: the share of the most frequent class of the query that the bank has (top5: of the five most
    frequent, or K where that is less), and 1/K of K classes for the mean over classes.

    `preset` is one of `PRESETS` and stands for a published protocol's `k` and `temperature`, where these are
    left out: DINOv2's, or the only K of CosPress. `shots` leaves that many bank rows a class, drawn by `seed`;
    the draw of fewer shots is part of the draw of more.

    `index` is `exact`, or FAISS's factory string of an approximate index for banks where that takes too long,
    with search parameters after a semicolon: `HNSW32`, `IVF4096,Flat;nprobe=16`. Neighbours keep their exact
    similarities; some are missed. The metric `recall@K` is the share, in [0, 1], of the K neighbours found that
    are at least as similar as the K-th of an exact search, over 1,000 evenly spread queries (all, where there are
    no more).

    A query row whose image the bank has too (under another id, where both are one store) has itself for a neighbour, which
    says nothing of images that are new. Such rows are counted, as `inputs["query"]["identical"]`, and remarked on;
    `drop_identical` leaves them out, whether or not `shots` draws their copies, and of one store all but the first row
    of each image, on both sides. Images are known by the hashes that stores keep, and where one side keeps none, rows by
    all of their embedding: `parameters["identical_by"]` says which.

    Labels are matched by class name, by number where neither store has names (see `featcache.classes.match`). Failed
    and unlabelled rows are left out, counted and remarked on; so are query rows whose class has no bank row, which are
    kept (and wrong): `unreachable`.

    `resamples` has no effect: intervals are no longer drawn at random.

    Raises `ValueError` when the stores come from different encoders or, without `any_precision`, were made in
    different precisions, one has no labels or a value that is not finite,
    one has class names and the other only numbers, the query has a class the bank does not know or none that it has, a
    class has fewer bank rows than `shots`, k is no whole number or exceeds the bank, FAISS cannot make the index of this
    bank, or the index finds fewer than k neighbours.

    Oquab et al. 2023, arXiv 2304.07193; Wu et al. 2018, arXiv 1805.01978;
    CosPress: arXiv 2411.15239.
    """

    one_encoder = True
    order = 10
    summary = "k-nearest-neighbour classification: micro (top1, top5) and macro accuracy."
    examples = ("evalsuite knn --bank train.zarr --query test.zarr --k 10,20 --json knn.json",)
    doing = "searching"
    drawing = "evalsuite.evaluators._knn_charts"
    outcomes = ("preset", "k")

    bank: Store = store("Labelled rows that vote.")
    query: Store = store("Rows to classify.")
    k: Sequence[int] | None = option(None, "Comma list of neighbours.", shown="the preset's")
    temperature: float | None = option(None, "Of the softmax over cosines that weighs the votes.", shown="the preset's")
    _: KW_ONLY
    preset: str = option(
        "dinov2",
        "Whose k and temperature: DINOv2's (10, 20, 100, 200; 0.07) or CosPress's (10; 0.07).",
        choices=tuple(PRESETS),
    )
    shots: int | None = option(None, "Bank rows a class, drawn by --seed.", least=1, shown="all")
    index: str = option(
        "exact", "exact, or a FAISS index: HNSW32, 'IVF4096,Flat;nprobe=16' (quoted), …", metavar="SPEC"
    )
    seed: int = option(0, "Of the few-shot draw.", least=0)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; use {' or '.join(PRESETS)}")
        if self.shots is not None and (not isinstance(self.shots, int) or self.shots < 1):
            raise ValueError(f"shots must be at least 1, a whole number, got {self.shots}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive, finite number, got {self.temperature}")

    def run(self) -> Result:
        from evalsuite.neighbours.index import Index
        from evalsuite.result import Result, versions
        from evalsuite.sides import Sides
        from evalsuite.votes import checked_k, classify
        from featcache.classes import aligned_labels

        preset = PRESETS[self.preset]
        temperature = preset["temperature"] if self.temperature is None else self.temperature
        sides = Sides(self.any_precision, bank=self.bank, query=self.query)
        instead = "other images as query, or one store as both, so that no row votes for itself"
        bank, query, own = sides.take(self.drop_identical, instead, self.shots, self.seed)
        ks = checked_k(preset["k"] if self.k is None else self.k, bank, sides.one_store)
        truth = aligned_labels(bank, query)
        approximate = None if self.index == "exact" else Index(bank, self.index)
        metrics, samples, chance = classify(bank, query, truth, ks, temperature, own, approximate)
        where = "of the same store, under another id" if sides.one_store else "of the bank"
        return Result(
            "knn",
            sides.record(truth),
            {
                "preset": self.preset,
                "k": list(ks),
                "temperature": temperature,
                "normalisation": "l2",
                "exclude_self": sides.one_store,
                "shots": self.shots,
                "index": self.index,
                **self.comparing(sides.same.by),
                "seed": self.seed,
                "chance": chance,
            },
            metrics,
            versions("faiss-cpu", "faiss-gpu", "torch"),
            samples,
            remarks=sides.remarks(truth, where, "they are among their own neighbours"),
        )


knn = function(Knn)

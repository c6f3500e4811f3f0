"""How much of the teacher's geometry a student kept."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from evalsuite.evaluators import OfStores, Result, Store, function, named_stores, option, python_only, store

if TYPE_CHECKING:
    from evalsuite.following import Followed
    from evalsuite.gram import LinearMap
    from evalsuite.pairs import Paired
    from evalsuite.result import Metric


@dataclass(frozen=True)
class Fidelity(OfStores):
    """Agreement between two stores' embeddings of the same samples; dimensions and encoders may differ.

    Rows are joined by sample id where both are ok (the count is `inputs["joined"]`; `remarks` say what is left out).
    Over all pairs of rows,
    exact in float64 in two passes over the stores, without intervals (pairs of rows are not independent):

    - `gram_pearson`: Pearson correlation of the off-diagonal entries of the two cosine-similarity matrices,
      in [-1, 1];
    - `gram_pearson_centred`: the same after subtracting the mean of the unit embeddings and normalising
      again. Most embeddings share a large mean direction; this leaves it out;
    - `cka_debiased`: linear CKA of the raw embeddings with the unbiased HSIC estimator, at most 1, near 0
      (possibly below) for unrelated spaces whatever their dimensions;
    - `cka_debiased_unit`: the same of the unit embeddings. A student trained with a cosine loss may have any
      lengths; only the raw CKA counts them against it;
    - `procrustes`: the share of the unit embeddings' variance, in [0, 1], that is left after the best shift,
      scaling and rotation of one space onto the other (the smaller padded with zeros). **Lower is better.**

    Over the nearest rows by cosine, the row itself left out, for `queries` rows drawn by `seed` (all, where
    there are no more), with 95 % intervals over them (`evalsuite.intervals`):

    - `mutual_knn@K`: share of a row's k nearest rows that both spaces have in common, in [0, 1];
    - `agreement/top1`: share of rows that a vote of the k nearest labelled rows (as in `evalsuite.knn`,
      temperature 0.07) puts in the same class in both spaces, right or wrong. The other joined rows vote, or,
      given both banks, the rows these have in common. Left out where nothing is labelled;
    - `agreement/kappa`: Cohen's kappa of the same votes, at most 1; 0 for votes that agree no more than how
      often each class wins makes them. Left out where one class wins every vote.

    With `mapping`, the `mapping.safetensors` of the student's run:

    - `cosine_mapped`: mean cosine between the student's and the mapped teacher's rows, in [-1, 1], over all
      rows, with an interval over them.

    With `detectors` (specs as in `evalsuite.ood`), how well the student's OOD scores follow the teacher's, row by row. Each
    detector is fitted twice, to the rows that both banks have in each space (labels are the teacher's), and scores the
    compared rows, which are ID, and those of the OOD sets that both sides give under the same names, joined like these. SET
    is `id`, a set's name, or `all`, these rows together:

    - `scores/DETECTOR/SET/spearman`: Spearman's rank correlation of the two spaces' scores, in [-1, 1]. That of `all` is high
      as soon as both tell ID from OOD, that of one set only where they order its rows alike. Left out, with a remark, where
      a space gives all rows one score;
    - `scores/DETECTOR/SET/agreement`: share of rows that both take for ID or both for OOD, each by the threshold of its own
      `fpr95_id`: the strictest that accepts 95 % of the ID rows;
    - `scores/DETECTOR/SET/kappa`: Cohen's kappa of these decisions. Left out where both decide the same of every row.

    `per_class/CLASS/METRIC` is the mean over one class's rows of `mutual_knn@K`, `agreement/top1` and
    `cosine_mapped`. `parameters["chance"]` holds for each of the others what unrelated embeddings would
    reach: for `procrustes` what is left when every pair of rows gets a random sign, for `cosine_mapped` the
    mean over all pairs of different rows, for `scores/…/agreement` what the shares of rows taken for OOD give by chance.

    A detector that fails, on either side, warns, is recorded under `parameters["failed_detectors"]`, and the others' results
    stand; it needs what stores hold: embeddings or logits, no head.

    Rows of an image that other rows have too, under other ids or in the banks, are each other's neighbours in any space.
    They are counted, as `inputs["identical"]` and `inputs["identical_in_bank"]`, and remarked on; `drop_identical` leaves
    out those that are in the banks, and all but the first of each image. Rows of OOD sets that are images of ID ones are
    counted in the set's record, remarked on and left out likewise. Images are known as in `evalsuite.knn`, by the
    teacher's store or, where that keeps no hashes, the student's.

    `resamples` has no effect: intervals are no longer drawn at random.

    Raises `ValueError` when a store repeats a sample id, fewer than 4 rows join, the stores hold different
    images under one id, all rows of a store are alike, a value is not finite, k is not below the number of
    rows (or exceeds the voters), the banks do not suit (they are in
    the rows' precision, unless `any_precision` will do), the mapping does not fit the stores, detectors are given without
    banks or OOD sets without detectors, sets do not suit (as banks; or are named otherwise on the other side, or ID), or
    every detector failed.

    Kornblith et al. 2019, arXiv 1905.00414 (CKA); Song et al. 2012, "Feature Selection via Dependence
    Maximization", JMLR 13 (unbiased HSIC); Huh et al. 2024, arXiv 2405.07987 (mutual kNN); Cohen 1960, "A
    Coefficient of Agreement for Nominal Scales" (kappa); Spearman 1904, "The Proof and Measurement of Association between Two
    Things".
    """

    order = 30
    summary = (
        "How faithfully a student keeps the teacher's angles between images, its neighbours, votes and OOD scores."
    )
    examples = (
        "evalsuite fidelity --teacher teacher.zarr --student student.zarr --mapping runs/a/mapping.safetensors",
        "evalsuite fidelity --teacher t.zarr --student s.zarr --teacher-bank t-bank.zarr --student-bank s-bank.zarr "
        "--teacher-ood tin=t-tin.zarr --student-ood tin=s-tin.zarr --detector knn",
    )
    doing = "comparing"
    per_sample = False
    drawing = "evalsuite.evaluators._fidelity_charts"
    outcomes = ("failed_detectors",)

    teacher: Store = store("The teacher's rows.")
    student: Store = store("The student's rows of the same samples.")
    _: KW_ONLY
    k: int = option(10, "Neighbours that are compared, and that vote.", least=1)
    teacher_bank: Store | None = store(
        "Labelled rows that vote, and that detectors are fitted to.", default=None, shown="the compared rows themselves"
    )
    student_bank: Store | None = store("The same samples of the student.", default=None)
    mapping: str | os.PathLike[str] | None = option(
        None,
        "Also measure the cosine to the teacher, mapped as in training.",
        metavar="RUN/mapping.safetensors",
        file="read",
    )
    detectors: Sequence[str] | str = option(
        (),
        "Also measure how far the student's OOD scores follow the teacher's: detectors as of `evalsuite ood`, fitted to both "
        "banks; repeat for more. None that needs a head.",
        names=("--detector",),
        metavar="NAME",
    )
    teacher_ood: Mapping[str, Store] | None = named_stores("An OOD set whose scores are compared too; repeat for more.")
    student_ood: Mapping[str, Store] | None = named_stores("The same samples of the student, under the same name.")
    queries: int = python_only(10_000)
    seed: int = option(0, "Of the sample of rows and of the chance levels.", least=0)

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {self.queries}")
        if (self.teacher_bank is None) != (self.student_bank is None):
            raise ValueError("only one bank is given; give both --teacher-bank and --student-bank, or neither")
        if self.detectors and self.teacher_bank is None:
            raise ValueError("--detector is fitted to banks; give both --teacher-bank STORE and --student-bank STORE")
        named = [set(of or {}) for of in (self.teacher_ood, self.student_ood)]
        if named[0] != named[1]:
            only = ", ".join(sorted(named[0] ^ named[1]))
            raise ValueError(
                f"OOD set {only}: give it as --teacher-ood NAME=STORE and as --student-ood NAME=STORE, by one name"
            )
        if named[0] and not self.detectors:
            raise ValueError("OOD sets are scored by detectors; give --detector NAME too (knn, say)")

    def run(self) -> Result:
        from evalsuite import pairs
        from evalsuite.agreement import TEMPERATURE
        from evalsuite.collapse import collapse_remarks
        from evalsuite.gram import LinearMap
        from evalsuite.result import Result, versions

        found = pairs.Paired.of(
            (self.teacher, self.student), (self.teacher_bank, self.student_bank),
            drop_identical=self.drop_identical, any_precision=self.any_precision,
        )  # fmt: skip
        (x, y), n = found.pair, len(found.pair[0])
        if not 1 <= self.k < n:
            raise ValueError(
                f"k={self.k} does not suit the {n} rows that {x.name} and {y.name} share; use k from 1 to {n - 1}"
            )
        linear = None if self.mapping is None else LinearMap.read(self.mapping, x, y)
        followed = self._followed(found)
        metrics, chance = self._measured(found, linear)
        return Result(
            "fidelity",
            found.record() | followed.inputs,
            {
                "normalisation": "none for cka_debiased, l2 for the others",
                "k": self.k,
                "temperature": TEMPERATURE,
                "mapping": None if self.mapping is None else os.fspath(self.mapping),
                "queries": min(n, self.queries),
                "drop_identical": self.drop_identical,
                "any_precision": self.any_precision,
                "identical_by": (found.same | found.in_bank).by,
                "seed": self.seed,
                "chance": chance | followed.chance,
                **followed.parameters,
            },
            metrics | followed.metrics,
            versions("faiss-cpu", "faiss-gpu", "torch"),
            remarks=[
                *found.identical_remarks(self.drop_identical),
                *collapse_remarks("teacher", x),
                *collapse_remarks("student", y),
                *found.remarks(),
                *pairs.left_out_of_banks_remarks(self.teacher_bank, self.student_bank, found.banks),
                *followed.remarks,
            ],
        )

    def _followed(self, found: Paired) -> Followed:
        """Whether OOD scores follow, where detectors are asked for."""
        from evalsuite.following import Followed, follow, ood_sets

        if found.banks is None or not self.detectors:
            return Followed()
        ood = ood_sets(
            self.teacher_ood or {}, self.student_ood or {}, found.pair, found.banks,
            side=found.side, drop_identical=self.drop_identical, any_precision=self.any_precision,
        )  # fmt: skip
        return follow(self.detectors, found.pair, found.banks, ood)

    def _measured(self, found: Paired, linear: LinearMap | None) -> tuple[dict[str, Metric], dict[str, float]]:
        """Metrics over all pairs of rows and over rows, and what unrelated embeddings would reach."""
        import numpy as np

        from evalsuite.agreement import over_rows
        from evalsuite.gram import blocks, over_all_pairs
        from evalsuite.result import Metric

        x, y = found.pair
        try:
            values, chance = over_all_pairs(lambda: blocks(x, y), seed=self.seed)
        except ValueError as error:
            raise ValueError(f"cannot compare {x.name} with {y.name}: {error}") from error
        drawn = np.arange(len(x))
        if len(x) > self.queries:
            drawn = np.sort(np.random.default_rng(self.seed).choice(len(x), self.queries, replace=False))
        cosines = None if linear is None else linear.cosines(lambda: blocks(x, y))
        of_rows, by_chance = over_rows(found.pair, found.banks, found.labelled, drawn, self.k, cosines)
        why = "pairs of rows are not independent"
        return {name: Metric(value, no_ci95=why) for name, value in values.items()} | of_rows, chance | by_chance


fidelity = function(Fidelity)

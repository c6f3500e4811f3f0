"""Out-of-distribution detection from stores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evalsuite.evaluators import (
    Estimate,
    OfStores,
    Result,
    Samples,
    Store,
    Table,
    function,
    named_stores,
    option,
    store,
)


@dataclass(frozen=True, kw_only=True)
class Ood(OfStores):
    """How well detectors fitted on `id_train` tell `id_test` from each near and far OOD set.

    Metrics are `DETECTOR/near|far/NAME/METRIC` and `DETECTOR/near|far/mean/METRIC` (unweighted mean over the
    group's sets), METRIC as in `evalsuite.metrics`, with 95 % intervals (`evalsuite.intervals`) over the rows of
    `id_test` and of the OOD sets, detectors and sets taken as they are. DETECTOR is the spec as given, without spaces:
    `knn`, or `knn:k=1`
    to set an argument; of an argument with a slash, a path, the file's name. `k` is the k of every detector that
    has one and whose spec does not set it; None leaves each its own default. `head` is a classifier saved by
    `evalsuite.probe`, for the detectors that need one; with it, logits are the classifier's even where stores have
    some. How often it is right on `id_test`'s labelled rows (where there are none, on some of `id_train`'s; without a
    head, of
    stored logits of as many classes as the labels) is `parameters["head_accuracy"]` and a remark; next to chance, or
    with classes exchanged, warns. Failed rows are left out,
    counted and remarked on.

    `csid` names sets of ID classes under covariate shift. With it everything is measured a second time, full
    spectrum: their rows and `id_test`'s are pooled as ID, as OpenOOD pools them (so that a larger set weighs more),
    and the groups are `near_fs` and `far_fs`.

    `preset` is one of `evalsuite.presets.PRESETS`, an OpenOOD v1.5 benchmark, and stands for all of these: its sets
    are the stores `NAME.zarr` in the folder `stores`, under OpenOOD's names (`cifar10_train`, `cifar10_test`, `tin`,
    …). Full spectrum is measured where its covariate-shifted sets are there, or with the `csid` that is given instead.

    `parameters["tied"]` holds, for each detector and OOD set, the share of rows whose score equals that of another
    row of `id_test` or this set. A detector warns that its scores saturate when, in one of the sets, more than a
    tenth of the rows share their score with a row of *other* embedding: duplicated images never count.

    Every OOD store and `id_test` are read once, whatever the number of detectors (once more where one keeps no
    hashes). A detector that fails warns, is
    recorded under `parameters["failed_detectors"]`, and the others' results stand.

    Rows of `id_test` whose image `id_train` has too, and rows of a near, far or csid set whose image an ID store has, are
    counted, as `identical` in the set's record of `inputs`, and remarked on; `drop_identical` leaves them out. Images
    are known as in `evalsuite.knn`.

    Raises `ValueError` when stores come from different encoders or, without `any_precision`, were made in different
    precisions, one is both ID and OOD, nine tenths of an OOD set's
    images are ID ones, by their hashes, and not left out, a set is empty or misnamed or
    has a row that is not finite, a spec cannot be read, a preset lacks a store, or every detector failed. A store that
    is two OOD sets warns.

    `resamples` and `seed` have no effect: nothing is drawn at random any more.

    Yang et al. 2022, "OpenOOD", arXiv 2210.07242; full spectrum: Zhang et al. 2023, arXiv 2306.09301.
    """

    one_encoder = True
    order = 40
    summary = "How well detectors tell ID images from others. AUROC 0.5 is chance, 1 is perfect."
    examples = (
        "evalsuite ood --id-train train.zarr --id-test test.zarr --near tin=tin.zarr --detector knn --detector rmd",
        "evalsuite ood --preset openood-cifar10 --stores stores/ --detector knn",
    )
    doing = "scoring"
    drawing = "evalsuite.evaluators._ood_charts"
    outcomes = ("tied", "failed_detectors", "head_accuracy", "preset")

    id_train: Store | None = store("ID rows that detectors are fitted on.", default=None)
    id_test: Store | None = store("ID rows held out.", default=None)
    near: Mapping[str, Store] | None = named_stores("A near-OOD set; repeat for more.")
    far: Mapping[str, Store] | None = named_stores("A far-OOD set; repeat for more.")
    csid: Mapping[str, Store] | None = named_stores(
        "ID classes under covariate shift: also measure with these rows as ID (near_fs, far_fs)."
    )
    preset: str | None = option(
        None,
        "openood-cifar10, -cifar100, -imagenet200 or -imagenet: all sets, from the folder --stores.",
        metavar="NAME",
    )
    stores: str | os.PathLike[str] | None = option(
        None, "Where a preset's stores are: tin.zarr, cifar10_train.zarr, …", metavar="FOLDER"
    )
    detectors: Sequence[str] | str = option(
        ("knn",),
        "Repeat for more; NAME:k=1 sets an argument, mcm:text=names.npy the class names' embeddings. Names: below.",
        names=("--detector",),
        metavar="NAME",
        shown="knn",
    )
    k: int | None = option(None, "Neighbours, for detectors that use them.", least=1, shown="50")
    head: str | os.PathLike[str] | None = option(
        None, "A classifier, for detectors that need one: `evalsuite probe`'s.", metavar="FILE", file="read"
    )
    resamples: int = option(1000, "No effect: intervals are no longer drawn at random.", least=1, hidden=True)
    seed: int = option(0, "No effect, as --resamples.", least=0, hidden=True)

    def __post_init__(self) -> None:
        given = [each is not None for each in (self.id_train, self.id_test)]
        if self.preset is None and self.stores is None:
            if not all(given):
                raise ValueError(
                    "give --id-train STORE and --id-test STORE, or --preset NAME and --stores FOLDER (both id_train and id_test)"
                )
            if not (self.near or self.far):
                raise ValueError(
                    "no OOD set was given; give --near NAME=STORE or --far NAME=STORE (near={'NAME': store})"
                )
        elif self.preset is None or self.stores is None or any(given) or self.near or self.far:
            raise ValueError(
                "--preset NAME and --stores FOLDER go together, without --id-train, --id-test, --near and --far"
            )

    def run(self) -> Result:
        from evalsuite import scores, sets
        from evalsuite.collapse import collapse_remarks
        from evalsuite.detectors import choices
        from evalsuite.judged import Judged
        from evalsuite.result import Result, versions
        from featcache.rows import left_out_remarks

        id_train, id_test, groups = self._sets()
        others = {"id_test": id_test} | sets.named_sets(**groups)
        train, whole = sets.opened("id_train", id_train, others, self.head, self.any_precision)
        built = scores.build_all(self.detectors, self.k)
        same = sets.overlaps(train, whole)
        rows = {key: sets.without_identical(key, of, same[key], self.drop_identical) for key, of in whole.items()}

        failures: dict[str, Exception] = {}
        fitted = scores.fit_all(built, train, list(rows.values()), failures)
        judged = Judged.on(train, rows["id_test"])
        metrics, samples, tied, saturated = scores.measure_sets(fitted, train, rows, judged, failures)
        failed = scores.warn_of_failed(failures)
        for spec, shares in saturated.items():
            scores.warn_of_saturated(spec, shares)
        accuracy, of_head = judged.record()
        return Result(
            "ood",
            {
                "id_train": train.record() | {"unlabelled": train.unlabelled},
                "id_test": rows["id_test"].record() | {"identical": same["id_test"].count},
                **{group: sets.records_of(group, rows, same) for group in groups},
            },
            {
                **choices(built, failed, self.head),
                "head_accuracy": accuracy,
                "preset": self.preset,
                **self.comparing({key: each.by for key, each in same.items()}),
                "tied": tied,
            },
            metrics,
            versions("faiss-cpu", "faiss-gpu", "torch"),
            samples,
            remarks=[
                *sets.remarks_on(same, self.drop_identical),
                *collapse_remarks("id_train", train),
                *(line for key, each in {"id_train": train, **whole}.items() for line in left_out_remarks(key, each)),
                *sets.unlabelled_remarks(train, "id_train"),
                *sets.few_distinct_remarks(train, "id_train"),
                *of_head,
            ],
        )

    def _sets(self) -> tuple[Store, Store, dict[str, Mapping[str, Store] | None]]:
        """`id_train`, `id_test` and the sets by group, of a preset those in its folder."""
        if self.preset is None or self.stores is None:
            assert self.id_train is not None
            assert self.id_test is not None
            return self.id_train, self.id_test, {"near": self.near, "far": self.far, "csid": self.csid}
        from evalsuite.presets import stores_of

        found = stores_of(self.preset, self.stores)
        (id_train,), (id_test,) = found["id_train"].values(), found["id_test"].values()
        return id_train, id_test, {"near": found["near"], "far": found["far"], "csid": self.csid or found["csid"]}

    @staticmethod
    def below_help() -> str:
        from featcache.plugins import plugin_names

        return f"Detectors: {', '.join(plugin_names('evalsuite.detectors'))}."

    @classmethod
    def compared(cls, a: Samples, b: Samples) -> dict[str, tuple[Estimate, Estimate]]:
        """Every metric of the detectors that both have, means included."""
        from evalsuite.scores import measured

        found: dict[str, tuple[Estimate, Estimate]] = {}
        for spec in _specs(a):
            if spec in _specs(b):
                ours, theirs = (
                    measured(
                        {
                            name.removeprefix(f"score/{spec}/"): of
                            for name, of in each.items()
                            if name.startswith(f"score/{spec}/")
                        }
                    )
                    for each in (a, b)
                )
                found |= {f"{spec}/{name}": (ours[name], theirs[name]) for name in ours}
        return found

    @classmethod
    def table(cls, result: Result) -> Table:
        """A row a detector and set, a column a metric, and the AUROC's interval where there is room."""
        from evalsuite.charts import Table
        from evalsuite.table import as_note, interval, rows_line

        rows: dict[str, dict[str, str]] = {}
        for name, metric in result.metrics.items():
            where, _, what = name.rpartition("/")
            rows.setdefault(where, {})[what] = f"{metric.value:.4f}"
            if what == "auroc":
                rows[where]["95 %_interval"] = interval(metric)
        settings = "; ".join(
            " ".join([spec, *(f"{name}={value}" for name, value in given.items())])
            + (" (failed)" if spec in result.parameters["failed_detectors"] else "")
            for spec, given in result.parameters["detectors"].items()
        )
        columns = ["ood", *(column.replace("_", "\n") for column in next(iter(rows.values())))]
        cells = [[where, *values.values()] for where, values in rows.items()]
        note = as_note(rows_line(result.inputs))
        return Table(title=settings, columns=columns, rows=cells, note=note, spare="95 %\ninterval")


def _specs(samples: Samples) -> list[str]:
    scored = (name.split("/", 2) for name in samples if name.startswith("score/"))
    return [spec for _, spec, key in scored if key == "id_test"]


ood = function(Ood)

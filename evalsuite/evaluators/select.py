"""Which of several encoders, checkpoints of one training say, is the best teacher, as far as their stores tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from evalsuite.evaluators import Estimate, Evaluator, Result, Store, Table, function, listed_stores, option, store

if TYPE_CHECKING:
    import numpy as np

    from featcache.rows import Rows
else:
    Rows = Any

CANDIDATES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""The C that are tried where none is given."""


@dataclass(frozen=True)
class Select(Evaluator):
    """Ranks `stores` of the same labelled training images as teachers, by what their features tell of the images and the labels.

    A tenth of each class of the images that all stores have, drawn by `seed`, is held out; on the others two linear maps of a
    store's embeddings (view 0) are fitted, and judged on it:

    - `NAME/probe_top1`: the accuracy, in [0, 1], of the logistic regression of `evalsuite.probe`, its C chosen on a tenth of the others.
    - `NAME/of_labels`: I(Y; F) ≥ H(Y) − the regression's cross-entropy, in nats; at most H(Y), the entropy of the labels' shares.
    - `NAME/of_inputs`: I(X; F) in nats for each dimension of the input, −½ ln(1 − R²): that of a Gaussian input and error whose
      share R² of the variance the embedding tells, by ridge regression (`evalsuite.reconstruction`); `NAME/inputs_r2` is R².
      Inputs are the kept images, whole, reduced to `pixels` × `pixels`, or the embeddings that the store `of` has of them.
    - `NAME/sum`: `weight` · I(X; F) + I(Y; F), which ranks the stores (`parameters["ranking"]`, the best first); and for every store
      but the best `NAME/behind_sum` and `NAME/behind_probe_top1`: the best one's less its own, paired on the same images, whose
      intervals leave out 0 where the two are told apart.

    All of them with 95 % intervals over the images held out, the fits taken as they are (`evalsuite.intervals`).

    The criterion I(X; F) + I(Y; F) is Checkpoint KD's (arXiv 2210.06458), by a decoder's reconstruction loss and a classifier's
    cross-entropy. Its decoders and the scale of its two terms are not known to us: linear maps, a mean over dimensions and
    `weight` are our choice, and a linear bound is below what is there. It leaves the student out of account.

    Raises `ValueError` for fewer than two stores, stores that share no images or label them differently, images that are not kept
    without `of`, and what `evalsuite.probe` refuses.
    """

    order = 60
    summary = "Ranks stores, of checkpoints say, as teachers: probe accuracy, I(X; F) + I(Y; F)."
    examples = (
        "evalsuite select epoch50.zarr epoch100.zarr --of teacher.zarr",
        "evalsuite select half=epoch50.zarr full=epoch100.zarr --json select.json",
    )
    unit = "fits"
    per_sample = False
    several = True
    drawing = "evalsuite.evaluators._select_charts"

    stores: Mapping[str, Store] = listed_stores("Two or more, of the same labelled training images.")
    _: KW_ONLY
    of: Store | None = store("The inputs by its embeddings, of the same images.", None, shown="the kept images")
    pixels: int = option(8, "Side of the kept images, reduced, that are reconstructed.", least=1, metavar="PX")
    weight: float = option(1.0, "Of I(X; F), beside I(Y; F).")
    c: Sequence[float] = option(CANDIDATES, "As `evalsuite probe`'s.", shown="0.01,0.1,1,10,100")
    seed: int = option(0, "Of the rows held out, and of those that choose C and the ridge's penalty.", least=0)
    device: str = "auto"
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if len(self.stores) < 2:
            raise ValueError("give two stores or more, to choose from")
        if not all(0 < each < math.inf for each in self.c) or not self.c:
            raise ValueError(f"c must hold positive numbers, got {list(self.c)}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be a number from 0, got {self.weight}")

    def run(self) -> Result:
        import numpy as np

        from evalsuite.intervals import difference
        from evalsuite.logistic import held_out
        from evalsuite.result import Result, versions
        from featcache.rows import Rows, left_out_remarks

        whole = {name: Rows.of(each) for name, each in self.stores.items()}
        reference = None if self.of is None else Rows.of(self.of)
        *rows, inputs = _shared([*whole.values(), *([reference] if reference else [])], reference is not None)
        classes = np.unique(rows[0].labels, return_inverse=True)[1]
        held = held_out(classes, self.seed)
        inputs_are, known = self._inputs(rows, inputs)
        found: dict[str, dict[str, Estimate]] = {}
        for number, (name, each) in enumerate(zip(whole, rows, strict=True)):
            found[name] = self._measured(each, known, held, classes, number * (len(self.c) + 1))
        ranking = sorted(found, key=lambda name: -found[name]["sum"].value)
        metrics = {f"{name}/{what}": of.metric() for name in ranking for what, of in found[name].items()}
        for name in ranking[1:]:
            for what in ("sum", "probe_top1"):
                metrics[f"{name}/behind_{what}"] = difference(found[name][what], found[ranking[0]][what]).metric()
        return Result(
            "select",
            {"stores": {name: each.record() for name, each in whole.items()}},
            {
                "ranking": ranking,
                "ranking_by_probe": sorted(found, key=lambda name: -found[name]["probe_top1"].value),
                "inputs": inputs_are,
                "weight": self.weight,
                "candidates": sorted(map(float, self.c)),
                "seed": self.seed,
                "rows": {"fitted": int((~held).sum()), "held_out": int(held.sum())},
            },
            metrics,
            versions("torch"),
            remarks=[line for name, each in whole.items() for line in left_out_remarks(name, each, each.unlabelled)],
        )

    def _inputs(self, rows: Sequence[Rows], reference: Rows | None) -> tuple[str, np.ndarray]:
        """What is reconstructed, in words and as (n, p) numbers."""
        import numpy as np

        from evalsuite.reconstruction import thumbnails

        if reference is not None:
            return f"embeddings of {reference.name}", np.concatenate(list(reference.blocks()))
        keeping = next((each for each in rows if each.stores[0].manifest.pixels), None)
        if keeping is None:
            raise ValueError(
                f"{rows[0].name} and the others keep no images that could be reconstructed; give --of STORE, of the same "
                "images by another encoder, or extract with --pixels SIZE"
            )
        return f"images of {keeping.name}, {self.pixels} px", thumbnails(keeping, self.pixels)

    def _measured(
        self, rows: Rows, inputs: np.ndarray, held: np.ndarray, classes: np.ndarray, fits: int
    ) -> dict[str, Estimate]:
        """Of one store; `fits` have been done before."""
        import numpy as np

        from evalsuite.intervals import Estimate, Part, by_influence, nll, share
        from evalsuite.logistic import fit
        from evalsuite.probabilities import Classifier, said
        from evalsuite.reconstruction import reconstruct
        from featcache.rows import Rows

        total, at = len(self.stores) * (len(self.c) + 1), np.flatnonzero(held)

        def told(done: int, of: int) -> None:
            if self.progress:
                self.progress(fits + done, total)

        train, test = rows.pick(np.flatnonzero(~held)), rows.pick(at)
        head = fit(train, sorted(map(float, self.c)), self.seed, self.device, told).head
        judged = Rows(test.stores, np.zeros(len(at), np.int64), test.index, head)
        (answers,) = said(judged, Classifier(judged).columns(judged)[0])
        shares = np.bincount(classes) / len(classes)
        entropy, loss = float(-(shares * np.log(shares)).sum()), nll(answers.nll)
        parts = {source: Part(part.up, part.down, -part.influence) for source, part in loss.parts.items()}
        of_labels = Estimate(entropy - loss.value, parts, loss.none, -math.inf, entropy)
        features = np.concatenate(list(rows.blocks()))
        told_of = reconstruct(features, inputs, held, classes, self.seed)
        spread, error = told_of.spread / told_of.spread.mean(), told_of.error / told_of.error.mean()
        left = float(told_of.error.mean() / told_of.spread.mean())
        of_inputs = by_influence(-math.log(left) / 2, (spread - error) / 2)
        both = self.weight * of_inputs.value + of_labels.value
        return {
            "probe_top1": share(answers.place == 0),
            "of_labels": of_labels,
            "inputs_r2": by_influence(1 - left, left * (spread - error), most=1.0),
            "of_inputs": of_inputs,
            "sum": by_influence(both, self.weight * (spread - error) / 2 - answers.nll),
        }

    @classmethod
    def table(cls, result: Result) -> Table:
        """A row a store, the best first."""
        from evalsuite.charts import Table
        from evalsuite.table import as_note

        given, columns = result.parameters, ("sum", "of_labels", "of_inputs", "inputs_r2", "probe_top1", "behind_sum")
        rows = [[name, *(result.metrics.get(f"{name}/{what}") for what in columns)] for name in given["ranking"]]
        counts = given["rows"]
        note = [
            f"sum = {given['weight']:g} · I(X; F) + I(Y; F), nats; behind: the best one's sum less its own, on the same images",
            f"X: {given['inputs']}; rows: {counts['fitted']:,} fitted, {counts['held_out']:,} held out",
            f"by probe accuracy: {', '.join(given['ranking_by_probe'])}",
        ]
        heads = ["store", "sum", "I(Y; F)", "I(X; F)", "R² of X", "probe top-1", "behind"]
        return Table(title="select", columns=heads, rows=rows, note=as_note(note), spare="R² of X")


def _shared(given: Sequence[Rows], with_reference: bool) -> list[Any]:
    """The labelled samples that all have, in one order; last the reference, None where the last one is none. Raises `ValueError`
    where samples are labelled differently."""
    from evalsuite.pairs import differing_labels_remarks, joined

    first, *others = given
    common = first.labelled()
    for other in others:
        common, _ = joined(common, other)
    rows = [common, *(joined(common, other)[1] for other in others)]
    for other in rows[1 : len(rows) - with_reference]:
        if (other.labels < 0).any() or differing_labels_remarks(common, other):
            raise ValueError(
                f"{other.name} labels the samples of {common.name} otherwise; give stores of one labelled corpus"
            )
    return rows if with_reference else [*rows, None]


select = function(Select)

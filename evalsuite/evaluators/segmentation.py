"""Masks: how well dense maps tell which class each pixel is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from evalsuite.evaluators import (
    Estimate,
    Evaluator,
    Headline,
    Named,
    Result,
    Samples,
    Store,
    Table,
    function,
    option,
    store,
)

if TYPE_CHECKING:
    import numpy as np

    from evalsuite.segmented import Masked
    from featcache.corpora import Corpus
else:
    Corpus = Masked = np = Any

_COUNTS = "/segmentation/iou"


@dataclass(frozen=True)
class Segmentation(Evaluator):
    """What `test`'s dense logits (its field `dense`, one map a class) say of the pixels of its images' masks.

    A map is laid over the square of the image that the encoder saw (its plain view) and brought to the mask's own pixels there:
    its logits bilinearly, each between the centres of cells, then the class of the highest (of equal ones the first). Pixels of
    the mask without a class, and those outside the square, count for nothing. All pixels of all images go into one confusion
    matrix; by class, in [0, 1]:

    - `per_class/CLASS/segmentation/iou`: intersection over union, TP / (TP + FP + FN), the Jaccard index;
    - `per_class/CLASS/segmentation/f1`: 2 TP / (2 TP + FP + FN), the Dice coefficient;
    - `per_class/CLASS/segmentation/accuracy`: TP / (TP + FN), the share of the class's pixels that are found;
    - `segmentation/iou`, `segmentation/f1`, `segmentation/accuracy`: their unweighted means over the classes that there are (mIoU,
      mean F1, mean class accuracy); `segmentation/pixel_accuracy`: the share of all pixels that are right.

    All with 95 % intervals over the images: percentiles of 1,000 bootstrap samples of whole images
    (`evalsuite.intervals.ratio_of_sums`), none for fewer than 5. `parameters["confusion"]` has how many pixels there are by true
    class, by predicted class; `parameters["chance"]` what naming the most frequent class everywhere would reach.

    `masks` is the corpus that has the masks of the store's images, joined by their ids; by default the one that the store was
    extracted from. Classes are matched by name where the encoder knows its own, as students do, else taken in order. Images
    without a mask are left out and remarked on. `progress` is called with (images done, of how many).

    Raises `ValueError` where the store has no field `dense` or its classes are others than the masks', the corpus has no masks or
    lacks images, an image has changed, or a mask has another size than its image or a value of no class.
    """

    order = 25
    summary = "Dense maps against masks: IoU, F1 and accuracy, by class."
    examples = (
        "evalsuite segmentation --test student-test.zarr --json segmentation.json",
        "evalsuite segmentation --test student-test.zarr --masks masks:roads/@labelled=validation.txt@classes=field:0,road:255",
    )
    unit = "images"
    outcomes = ("confusion",)

    test: Store = store("Dense logits of images that have masks.")
    _: KW_ONLY
    masks: Corpus | str | None = option(
        None, "The corpus with the masks, masks:FOLDER…", metavar="CORPUS", shown="the store's own"
    )
    progress: Callable[[int, int], None] | None = None

    def run(self) -> Result:
        from evalsuite.segmented import Masked
        from featcache.rows import Rows, left_out_remarks

        rows = Rows.of(self.test)
        rows.require_field("dense")
        masked = Masked(rows, self.masks)
        columns = masked.columns(rows.shape_of("dense")[0], rows.logit_classes)

        def logits(position: int) -> Any:
            return masked.rows.take(_one(position), "dense")[0][columns]

        remarks = left_out_remarks("test", rows)
        return result(
            "segmentation", masked, masked.confusion(logits, self.progress), {"test": rows.record()}, remarks, {}
        )

    @classmethod
    def compared(cls, a: Samples, b: Samples) -> dict[str, tuple[Estimate, Estimate]]:
        from evalsuite.segmented import estimates

        names = [name for name in a if name in b and name.endswith(_COUNTS)]
        both = [{name.split("/", 1)[1].removesuffix(_COUNTS): each[name] for name in names} for each in (a, b)]
        ours, theirs = map(estimates, both)
        return {name: (ours[name], theirs[name]) for name in ours if name in theirs}

    @classmethod
    def table(cls, result: Result) -> Table:
        from evalsuite.table import metric_table

        return metric_table(
            result, ["maps bilinearly to the masks' own pixels, then the highest logit; intervals over images"]
        )

    @classmethod
    def headlines(cls, results: Sequence[Named]) -> list[Headline]:
        return headlines(results)


def _one(position: int) -> np.ndarray:
    import numpy as np

    return np.array([position])


def result(
    command: str,
    masked: Masked,
    confusion: np.ndarray,
    inputs: dict[str, Any],
    remarks: list[str],
    parameters: dict[str, Any],
) -> Result:
    """What a confusion matrix of each image comes to, of an evaluator of maps."""
    import numpy as np

    from evalsuite.result import Result, content_of, versions
    from evalsuite.segmented import estimates, sums

    names, every = list(masked.classes.names), sums(confusion)
    counts = {name: every[:, number] for number, name in enumerate(names)}
    matrix = confusion.sum(axis=0)
    if not matrix.any():
        raise ValueError(f"{masked.corpus.spec}: no pixel that the encoder sees has a class; give other masks")
    if absent := [name for number, name in enumerate(names) if not matrix[number].any()]:
        remarks = [*remarks, f"no pixel is of {', '.join(absent[:8])}"]
    if masked.without:
        remarks = [*remarks, f"test {masked.rows.name}: left out {masked.without:,} images without a mask"]
    most = np.zeros_like(confusion)
    most[:, :, int(matrix.sum(axis=1).argmax())] = confusion.sum(axis=2)
    guessed = estimates({name: sums(most)[:, number] for number, name in enumerate(names)})
    metrics = {name: estimate.metric() for name, estimate in estimates(counts).items()}
    return Result(
        command,
        inputs | {"masks": {"spec": masked.corpus.spec, "images": len(masked), "without": masked.without}},
        parameters
        | {
            "classes": {name: int(value) for name, value in zip(names, masked.classes.values, strict=True)},
            "ignored": list(masked.classes.ignored),
            "confusion": {
                of: {taken: int(count) for taken, count in zip(names, line, strict=True) if count}
                for of, line in zip(names, matrix.tolist(), strict=True)
            },
            "chance": {
                name: each.value for name, each in guessed.items() if name in metrics and "per_class" not in name
            },
        },
        metrics,
        versions(),
        {"sample_id": masked.rows.sample_ids.astype(np.str_), "content": content_of(masked.rows)}
        | {f"per_class/{name}{_COUNTS}": of for name, of in counts.items() if f"per_class/{name}{_COUNTS}" in metrics},
        remarks=remarks,
    )


def headlines(results: Sequence[Named], note: str = "mean over classes") -> list[Headline]:
    from evalsuite.charts import Axis, Headline, rows_of

    rows = rows_of(results, "test", "rows")
    return [Headline(metric="segmentation/iou", axis=Axis.of("segmentation/iou", "mIoU"), note=note, rows=rows)]


segmentation = function(Segmentation)

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
    from featcache.corpora import Corpus
else:
    Corpus = Any


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
        import numpy as np

        from evalsuite.segmented import Masked, result
        from featcache.rows import Rows, left_out_remarks

        rows = Rows.of(self.test)
        rows.require_field("dense")
        masked = Masked(rows, self.masks)
        columns = masked.columns(rows.shape_of("dense")[0], rows.logit_classes)

        def logits(position: int) -> Any:
            return masked.rows.take(np.array([position]), "dense")[0][columns]

        remarks = left_out_remarks("test", rows)
        found = masked.confusion(logits, self.progress)
        return result("segmentation", masked, found, {"test": rows.record()}, remarks)

    @classmethod
    def compared(cls, a: Samples, b: Samples) -> dict[str, tuple[Estimate, Estimate]]:
        from evalsuite.segmented import compared

        return compared("segmentation", a, b)

    @classmethod
    def table(cls, result: Result) -> Table:
        from evalsuite.table import metric_table

        return metric_table(
            result, ["maps bilinearly to the masks' own pixels, then the highest logit; intervals over images"]
        )

    @classmethod
    def headlines(cls, results: Sequence[Named]) -> list[Headline]:
        from evalsuite.charts import Axis, Headline, rows_of

        rows = rows_of(results, "test", "rows")
        axis = Axis.of("segmentation/iou", "mIoU")
        return [Headline(metric="segmentation/iou", axis=axis, note="mean over classes", rows=rows)]


segmentation = function(Segmentation)

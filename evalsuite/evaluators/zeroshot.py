"""Zero-shot classification: images by the embeddings of texts about their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evalsuite.evaluators import Evaluator, Headline, Named, Result, Store, Table, function, store

if TYPE_CHECKING:
    import numpy as np

    from featcache.rows import Rows
else:
    Rows = Any

_FLOATS = 2**24  # scores held at once


@dataclass(frozen=True)
class Zeroshot(Evaluator):
    """Classify the images of `test` by the class whose texts they are most similar to, as CLIP does (Radford et al. 2021, arXiv
    2103.00020).

    `prompts` is a store of texts, one or several of each class (`texts:prompts.csv`, columns text and label: "a photo of a cat", cat),
    by the text tower of the images' model. A class is the mean of its texts' embeddings of norm 1, scaled to norm 1 again; an
    image is of the class of the largest cosine, in float64; equal ones go to the lower class. Nothing is fitted.

    Reports `zeroshot/top1`, `zeroshot/top5`, `zeroshot/macro_top1` (mean over classes of the accuracy within each) and for each
    class `per_class/CLASS/zeroshot/top1`, in [0, 1] with 95 % intervals over the images (`evalsuite.intervals`), the texts taken as
    they are. `parameters["prompts"]` says how many texts a class has. `parameters["chance"]` is as `evalsuite knn`'s.

    Classes are matched by name (`featcache.classes.match`). Classes of prompts that no image has stay in the running; images of a
    class that the prompts name, and have no text of that did not fail, are kept, and wrong. Failed and unlabelled rows are left
    out and counted.

    The two encoders are two towers by design: that their embeddings share a space is for the user to know; they must be
    equally wide.

    Raises `ValueError` for stores of different widths, without labels, prompts of images, images of classes that prompts do not name, and where a class's texts cancel
    each other out.
    """

    order = 17
    summary = "Zero-shot classification, by text embeddings of class prompts."
    examples = ("evalsuite zeroshot --test photos.zarr --prompts prompts.zarr --json zeroshot.json",)
    doing = "classifying"
    outcomes = ("prompts",)

    test: Store = store("Labelled images.")
    prompts: Store = store("Texts, labelled with the classes they are about, by the images' model.")

    def run(self) -> Result:
        import numpy as np

        from evalsuite.accuracy import accuracies
        from evalsuite.intervals import share
        from evalsuite.result import Result, content_of, versions
        from featcache.classes import Classes, aligned_labels, unreachable_remarks
        from featcache.rows import Rows, left_out_remarks

        whole = {"test": Rows.of(self.test), "prompts": Rows.of(self.prompts)}
        test, prompts = (rows.labelled() for rows in whole.values())
        made_of = prompts.stores[0].manifest.encoder.preprocess  # nothing, of arrays
        if made_of and made_of.get("input") != "texts":
            raise ValueError(
                f"{prompts.name} is of images (by {prompts.stores[0].encoder_name}); give texts about the classes, or for the nearest "
                "class mean of images `evalsuite knn`"
            )
        if test.embedding_dim != prompts.embedding_dim:
            raise ValueError(
                f"{test.name} has {test.embedding_dim} dimensions, {prompts.name} {prompts.embedding_dim}; embed the prompts with the "
                "text tower of the images' model"
            )
        truth, known = aligned_labels(prompts, test), Classes.of(prompts)
        place = _places(
            test, class_embeddings(prompts), np.searchsorted(known.numbers, truth), np.isin(truth, known.numbers)
        )
        metrics, samples, chance = accuracies(place, truth, known.numbers, "zeroshot/{}")
        names = Classes(prompts.name, np.unique(truth), prompts.class_names)
        for number in names.numbers.tolist():
            within = share(place[truth == number] == 0).metric()
            metrics[f"per_class/{names.distinct_name(number)}/zeroshot/top1"] = within
        counts = np.unique(prompts.labels, return_counts=True)[1]
        return Result(
            "zeroshot",
            {
                name: rows.record() | {"unlabelled": whole[name].unlabelled}
                for name, rows in (("test", test), ("prompts", prompts))
            },
            {
                "classes": len(counts),
                "prompts": {"least": int(counts.min()), "most": int(counts.max())},
                "chance": chance,
            },
            metrics,
            versions("torch"),
            {"sample_id": test.sample_ids.astype(np.str_), "content": content_of(test)} | samples,
            remarks=[
                *(line for name, rows in whole.items() for line in left_out_remarks(name, rows, rows.unlabelled)),
                *unreachable_remarks(prompts, test, truth, "test"),
            ],
        )

    @classmethod
    def table(cls, result: Result) -> Table:
        from evalsuite.table import metric_table

        given = result.parameters["prompts"]
        texts = f"{given['least']:,}" if given["least"] == given["most"] else f"{given['least']:,} to {given['most']:,}"
        return metric_table(result, [f"{result.parameters['classes']:,} classes, texts of each: {texts}"])

    @classmethod
    def headlines(cls, results: Sequence[Named]) -> list[Headline]:
        from evalsuite.charts import Axis, Headline, rows_of

        axis = Axis.of("zeroshot/top1", "Zero-shot top‑1")
        return [Headline(metric="zeroshot/top1", axis=axis, rows=rows_of(results, "test", "images"))]


def class_embeddings(prompts: Rows) -> np.ndarray:
    """(C, D) in float64, of norm 1, in the order of the labels' numbers: the mean of the unit embeddings of each class's texts.
    Raises `ValueError` where a text's embedding is zero, or a class's mean is."""
    import numpy as np

    from featcache.geometry import unit

    classes, number = np.unique(prompts.labels, return_inverse=True)
    sums = np.zeros((len(classes), prompts.embedding_dim))
    start = 0
    for block in prompts.blocks():
        if not block.any(axis=1).all():
            where = prompts.sample_ids[start + int((~block.any(axis=1)).argmax())]
            raise ValueError(f"{prompts.name}: the embedding of {where} is zero; leave that text out")
        np.add.at(sums, number[start : start + len(block)], unit(block.astype(np.float64)))
        start += len(block)
    means = sums / np.bincount(number)[:, None]
    length = np.linalg.norm(means, axis=1)
    if not (length > 1e-6).all():
        which = int(classes[int(length.argmin())])
        raise ValueError(f"{prompts.name}: the texts of class {which} cancel each other out; leave some of them out")
    return means / length[:, None]


def _places(test: Rows, weight: np.ndarray, column: np.ndarray, reachable: np.ndarray) -> np.ndarray:
    """How many classes are nearer to each image than its own, or as near and before it; the number of classes where it has none."""
    import numpy as np

    from featcache.geometry import unit

    place, start = np.full(len(test), len(weight)), 0
    for block in test.blocks(max(1, _FLOATS // max(weight.shape))):
        part = slice(start, start + len(block))
        score = unit(block.astype(np.float64)) @ weight.T
        at = np.where(reachable[part], column[part], 0)[:, None]
        own = np.take_along_axis(score, at, axis=1)
        before = (score > own) | ((score == own) & (np.arange(len(weight)) < at))
        place[part] = np.where(reachable[part], before.sum(axis=1), len(weight))
        start += len(block)
    return place


zeroshot = function(Zeroshot)

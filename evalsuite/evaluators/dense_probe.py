"""Dense linear probe: which class each pixel is of, by logistic regression on patch tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from evalsuite.evaluators import Estimate, Evaluator, Result, Samples, Store, Table, function, option, store

if TYPE_CHECKING:
    import numpy as np

    from evalsuite.segmented import Masked
    from featcache.corpora import Corpus
else:
    Corpus = Masked = np = Any

CANDIDATES = tuple(10.0**e for e in range(-2, 3))
UNSEEN = -1e4  # logit of classes that no patch is of


@dataclass(frozen=True)
class DenseProbe(Evaluator):
    """How well a linear classifier of `train`'s patch tokens (field `tokens`, of a square grid) tells the classes of `test`'s pixels.

    Multinomial logistic regression, as `evalsuite.probe` fits it, on at most `patches` patches, drawn by `seed`; a patch is of the
    class that most of its mask's pixels are of (of equally many the first), and left out where none has a class. Of several `c` the
    one is taken that is right most often on a tenth of each class's patches. On `test`'s images its logits are a map a class, which
    is brought to the masks' pixels and measured as in `evalsuite.segmentation`: `dense_probe/iou`, `dense_probe/f1`,
    `dense_probe/accuracy`, `dense_probe/pixel_accuracy` and `per_class/CLASS/dense_probe/…`, with intervals over the test images.

    This is the linear protocol of DINOv2's dense tasks, a linear layer on frozen patch tokens whose logits are enlarged bilinearly
    (Oquab et al. 2023, arXiv 2304.07193, section 7.4), but that they fit it to pixels by steps of AdamW, here it is fitted to patches
    to the end. Tokens that a store holds of other layers, or beside the class token, are no part of it.

    `train_masks` and `test_masks` are as `masks` of `evalsuite.segmentation`. `progress` is called with (images done, of how many).

    Raises `ValueError` as `evalsuite.segmentation` does, and where the stores are of different encoders or precisions (without
    `any_precision`), a grid of tokens is no square, or the patches are of one class.
    """

    one_encoder = True
    order = 26
    summary = "A linear classifier of patch tokens against masks: IoU, F1 and accuracy, by class."
    examples = (
        "evalsuite dense_probe --train teacher.zarr --test teacher-test.zarr --test-masks masks:roads/@list=validation.txt",
    )
    unit = "images"
    outcomes = ("confusion", "c", "fitted_patches")

    train: Store = store("Tokens of images that have masks, to be fitted to.")
    test: Store = store("Tokens of other images that have masks.")
    _: KW_ONLY
    train_masks: Corpus | str | None = option(
        None, "The corpus with train's masks.", metavar="CORPUS", shown="the store's"
    )
    test_masks: Corpus | str | None = option(
        None, "The corpus with test's masks.", metavar="CORPUS", shown="the store's"
    )
    c: float | Sequence[float] = option(
        CANDIDATES, "Inverse strength of the penalty; of a comma list, the best is taken.", shown="0.01,0.1,1,10,100"
    )
    patches: int = option(100_000, "Most patches that are fitted to.", least=1)
    any_precision: bool = option(False, "Compare stores in whatever precision they were made and kept.")
    device: str = "auto"
    seed: int = option(0, "Of the patches that are drawn, and of those that choose C.", least=0)
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if not self._candidates or not all(0 < each < math.inf for each in self._candidates):
            raise ValueError(f"c must hold positive numbers, got {self.c}")
        if self.patches < 1:
            raise ValueError(f"patches must be at least 1, got {self.patches}")

    @property
    def _candidates(self) -> list[float]:
        return sorted({float(each) for each in ([self.c] if isinstance(self.c, float | int) else self.c)})

    def run(self) -> Result:
        import numpy as np

        from evalsuite.logistic import fit
        from evalsuite.segmented import Masked, result
        from featcache.rows import Rows, left_out_remarks

        train, test = Rows.of(self.train), Rows.of(self.test)
        train.require_same_encoder(test, self.any_precision)
        for rows in (train, test):
            rows.require_field("tokens")
        fitted_to, masked = Masked(train, self.train_masks), Masked(test, self.test_masks)
        if list(fitted_to.classes.names) != list(masked.classes.names):
            raise ValueError(
                f"{fitted_to.corpus.spec} and {masked.corpus.spec} have masks of other classes; name them alike"
            )
        side = math.isqrt(train.shape_of("tokens")[0])
        if side**2 != train.shape_of("tokens")[0]:
            raise ValueError(
                f"{train.name}: its {train.shape_of('tokens')[0]} tokens are of no square grid; extract squares"
            )
        images = len(fitted_to) + len(masked)
        tokens, classes = self._patches(fitted_to, side, lambda done, of: self.progress and self.progress(done, images))
        if len(np.unique(classes)) < 2:
            raise ValueError(
                f"{fitted_to.corpus.spec}: its patches are of less than two classes, by most of their pixels; give more images, or tokens "
                "of a finer grid"
            )
        fitted = fit(
            Rows.from_arrays(tokens, classes, train.name),
            self._candidates,
            self.seed,
            self.device,
            lambda done, of: None,
        )
        fitted.warn(self._candidates)
        names, head = list(masked.classes.names), fitted.head

        def logits(position: int) -> np.ndarray:
            found = np.full((len(names), side, side), UNSEEN, np.float32)
            at = masked.rows.take(np.array([position]), "tokens")[0]
            found[head.labels] = head.logits(at).T.reshape(-1, side, side)
            return found

        confusion = masked.confusion(
            logits, lambda done, of: self.progress and self.progress(len(fitted_to) + done, images)
        )
        return result(
            "dense_probe",
            masked,
            confusion,
            {"train": fitted_to.rows.record() | {"masks": fitted_to.corpus.spec}, "test": masked.rows.record()},
            [*left_out_remarks("train", train), *left_out_remarks("test", test)],
            {
                "c": fitted.c,
                "candidates": self._candidates,
                "fitted_patches": len(tokens),
                "grid": side,
                "any_precision": self.any_precision,
                "seed": self.seed,
            },
        )

    def _patches(self, masked: Masked, side: int, told: Callable[[int, int], Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of patches that have a class, and these; of each image as many at most."""
        import numpy as np

        from evalsuite.segmented import classes_of_cells

        rng, each = np.random.default_rng(self.seed), max(1, self.patches // len(masked))
        tokens, classes = [], []
        for position in range(len(masked)):
            of = classes_of_cells(*masked.of(position), side, len(masked.classes.names))
            known = np.flatnonzero(of >= 0)
            some = np.sort(rng.permutation(known)[:each])
            tokens.append(masked.rows.take(np.array([position]), "tokens")[0][some])
            classes.append(of[some])
            told(position + 1, len(masked))
        return np.concatenate(tokens), np.concatenate(classes)

    @classmethod
    def compared(cls, a: Samples, b: Samples) -> dict[str, tuple[Estimate, Estimate]]:
        from evalsuite.segmented import compared

        return compared("dense_probe", a, b)

    @classmethod
    def table(cls, result: Result) -> Table:
        from evalsuite.table import metric_table

        given = result.parameters
        caption = f"C = {given['c']:g}, fitted to {given['fitted_patches']:,} patches of {given['grid']} × {given['grid']} an image"
        return metric_table(result, [caption])


dense_probe = function(DenseProbe)

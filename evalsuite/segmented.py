"""Dense logits and masks of the same images, pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8

from evalsuite.intervals import Estimate, ratio_of_sums
from evalsuite.result import Result, content_of, versions
from featcache.corpora import Corpus, has_target, open_corpus, target
from featcache.extraction.samples import content_hash
from featcache.inputs import Views
from featcache.inputs.images import Preprocess, image_input
from featcache.maps import bilinear
from featcache.masks import MASK, MaskClasses, refuse_other_size
from featcache.rows import Rows

_BLOCK_FLOATS = 2**24  # logits at once, in pixels of the mask


class Masked:
    """The rows of stores whose images have masks, and those masks.

    Args:
        rows: of one encoder, which records how it crops.
        given: the corpus, or its spec; that of the (first) store when None.

    Attributes:
        rows: those that have a mask; `without` is how many have none.
        classes: of the masks.

    Raises:
        ValueError: the corpus has no masks, lacks some of the rows, or none of the rows has a mask.
    """

    def __init__(self, rows: Rows, given: Corpus | str | None = None):
        manifest = rows.stores[0].manifest
        spec = given if given is not None else manifest.corpus.spec
        if spec is None:
            raise ValueError(
                f"{rows.name}: does not say which images it is of; give their masks as --masks masks:FOLDER"
            )
        self.corpus = open_corpus(spec) if isinstance(spec, str) else spec
        classes = getattr(self.corpus, "mask_classes", None)
        if classes is None:
            raise ValueError(
                f"{self.corpus.spec}: has no masks; give --masks masks:FOLDER, with FOLDER/images and FOLDER/masks"
            )
        self.classes: MaskClasses = classes
        if not manifest.encoder.preprocess:
            raise ValueError(
                f"{rows.name}: does not record how its images were cropped, so no mask can be laid over its maps; extract it with "
                "featcache"
            )
        self._preprocess: Preprocess = image_input(manifest.encoder.preprocess)
        number = {sample_id: i for i, sample_id in enumerate(self.corpus.ids)}
        samples = np.array([number.get(str(sample_id), -1) for sample_id in rows.sample_ids])
        if (samples < 0).any():
            first = rows.sample_ids[(samples < 0).argmax()]
            raise ValueError(
                f"{self.corpus.spec}: lacks {(samples < 0).sum():,} of the {len(rows):,} images of {rows.name} (first: {first}); give "
                "the masks of these images"
            )
        known = np.array([has_target(self.corpus, i, MASK) for i in samples.tolist()])
        if not known.any():
            raise ValueError(f"{self.corpus.spec}: has a mask of none of the images of {rows.name}; give one that has")
        self.rows, self.without = rows.pick(np.flatnonzero(known)), int((~known).sum())
        self._samples: Int64[np.ndarray, " n"] = samples[known]

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, position: int) -> tuple[UInt8[np.ndarray, "height width"], tuple[float, float, float, float]]:
        """The coded mask of a row, and in px of it the square that the encoder sees in the plain view.

        Raises:
            ValueError: the image is no longer the one that the encoder saw, or the mask is none of its classes and size.
        """
        i = int(self._samples[position])
        name, encoded = self.corpus.ids[i], self.corpus.read(i)
        seen = self.rows.content[position]
        if seen.any() and content_hash(encoded) != seen.tobytes():
            raise ValueError(
                f"{name}: has changed since {self.rows.name} was extracted; put the image back, or extract again"
            )
        size = self._preprocess.decode(encoded, seen=True).size
        file = target(self.corpus, i, MASK)
        assert file is not None
        try:
            mask = self.classes.decode(file)
        except Exception as error:  # Pillow's own kinds, of a file that is no image
            raise ValueError(f"{name}: its mask {error}") from None
        refuse_other_size(name, mask, size)
        return mask, self._preprocess.draw(size, Views(), name, 0).box

    def columns(self, width: int, names: Sequence[str] | None) -> Int64[np.ndarray, " classes"]:
        """Which of a map's `width` columns each class of the masks is: by name where the map's are known, else in order.

        Raises:
            ValueError: it has other classes.
        """
        wanted = list(self.classes.names)
        if names is None and width == len(wanted):
            return np.arange(width)
        if names is None or sorted(names) != sorted(wanted):
            said = f"of {', '.join(names[:5])}" if names else f"of {width} classes"
            raise ValueError(
                f"{self.rows.name}: its maps are {said}, the masks of {', '.join(wanted[:5])} (in all {len(wanted)}); name the masks' "
                "classes as the student's with @classes=NAME:VALUE,…"
            )
        return np.array([list(names).index(name) for name in wanted])

    def confusion(
        self,
        logits: Callable[[int], Float[np.ndarray, "c h w"]],
        progress: Callable[[int, int], None] | None = None,
    ) -> Int64[np.ndarray, "n c c"]:
        """By image, true class and predicted class: how many pixels, of those with a class that the encoder sees.

        Args:
            logits: of the row at a position, in the masks' order of classes; finite.
        """
        found, classes = [], len(self.classes.names)
        for position in range(len(self)):
            mask, box = self.of(position)
            counts = np.zeros((classes, classes), np.int64)
            for truth, predicted in _at_pixels(mask, box, logits(position)):
                known = truth > 0
                pairs = (truth[known].astype(np.int64) - 1) * classes + predicted[known]
                counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
            found.append(counts)
            if progress:
                progress(position + 1, len(self))
        return np.stack(found)


def _at_pixels(
    mask: UInt8[np.ndarray, "height width"], box: tuple[float, float, float, float], logits: Float[np.ndarray, "c h w"]
) -> Iterator[tuple[UInt8[np.ndarray, "r s"], Int64[np.ndarray, "r s"]]]:
    """The mask and the class of the highest logit, a band of lines of the square after the other: maps are resampled bilinearly
    to the mask's own pixels whose centres lie in the square (as `interpolate(mode="bilinear", align_corners=False)` does of a
    square of whole px), then the first class of the highest value is taken."""
    left, top, right, bottom = box
    down, across = (
        _cells(side, start, stop, cells)
        for side, start, stop, cells in zip(mask.shape, (top, left), (bottom, right), logits.shape[1:], strict=True)
    )
    (rows, lines), (columns, weights) = down, across
    step = max(1, _BLOCK_FLOATS // (len(logits) * max(1, len(columns))))
    wide = logits.astype(np.float32) @ weights.T
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        yield mask[rows[part]][:, columns], np.einsum("rh,chs->crs", lines[part], wide, optimize=True).argmax(axis=0)


def _cells(
    side: int, start: float, stop: float, cells: int
) -> tuple[Int64[np.ndarray, " pixels"], Float[np.ndarray, "pixels cells"]]:
    """The pixels of a side whose centres lie between `start` and `stop`, and how each is made of so many cells in between."""
    centre = np.arange(side) + 0.5
    pixels = np.flatnonzero((centre >= start) & (centre < stop))
    return pixels, bilinear((centre[pixels] - start) * cells / (stop - start) - 0.5, cells)


def classes_of_cells(
    mask: UInt8[np.ndarray, "height width"], box: tuple[float, float, float, float], side: int, classes: int
) -> Int64[np.ndarray, " cells"]:
    """Of each cell of a grid over the square, row by row, the class that most of its pixels are of, of equally many the first; −1
    where none has one."""
    left, top, right, bottom = box
    down, across = (
        np.floor((np.arange(length) + 0.5 - start) * side / (stop - start)).astype(np.int64)
        for length, start, stop in zip(mask.shape, (top, left), (bottom, right), strict=True)
    )
    cell = down[:, None] * side + across
    inside = (mask > 0) & ((down >= 0) & (down < side))[:, None] & ((across >= 0) & (across < side))
    counts = np.zeros((side * side, classes), np.int64)
    np.add.at(counts, (cell[inside], mask[inside].astype(np.int64) - 1), 1)
    found: np.ndarray = np.where(counts.any(axis=1), counts.argmax(axis=1), -1)
    return found


def sums(confusion: Int64[np.ndarray, "n c c"]) -> Int64[np.ndarray, "n c 3"]:
    """By image and class: pixels that are of it and taken for it, taken for it, and of it."""
    return np.stack([np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=1), confusion.sum(axis=2)], axis=2)


def estimates(command: str, counts: Mapping[str, Int64[np.ndarray, "n 3"]]) -> dict[str, Estimate]:
    """Of `sums` by class: the metrics of each class that there is, `per_class/CLASS/COMMAND/…`, and `COMMAND/…` of all.

    A class that no pixel is of, or is taken for, has no IoU and no F1, and none that no pixel is of an accuracy.
    """
    names, every = list(counts), np.stack(list(counts.values()), axis=1)
    right, taken, of = (every[..., i] for i in range(3))
    ratios = {"iou": (right, taken + of - right), "f1": (2 * right, taken + of), "accuracy": (right, of)}
    found: dict[str, Estimate] = {}
    for metric, (part, whole) in ratios.items():
        there = np.flatnonzero(whole.sum(axis=0) > 0)
        found[f"{command}/{metric}"] = ratio_of_sums(part[:, there], whole[:, there])
    found[f"{command}/pixel_accuracy"] = ratio_of_sums(right.sum(axis=1)[:, None], of.sum(axis=1)[:, None])
    for number, name in enumerate(names):
        for metric, (part, whole) in ratios.items():
            if whole[:, number].any():
                estimate = ratio_of_sums(part[:, [number]], whole[:, [number]])
                found[f"per_class/{name}/{command}/{metric}"] = estimate
    return found


def compared(
    command: str, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]
) -> dict[str, tuple[Estimate, Estimate]]:
    """The estimates of two results again, of the counts among their samples."""
    ending = f"/{command}/iou"
    names = [name for name in a if name in b and name.endswith(ending)]
    ours, theirs = (
        estimates(command, {name.removeprefix("per_class/").removesuffix(ending): each[name] for name in names})
        for each in (a, b)
    )
    return {name: (ours[name], theirs[name]) for name in ours if name in theirs}


def result(
    command: str,
    masked: Masked,
    confusion: Int64[np.ndarray, "n c c"],
    inputs: dict[str, Any],
    remarks: list[str],
    parameters: Mapping[str, Any] = MappingProxyType({}),
) -> Result:
    """What the confusion matrices of the images come to.

    Raises:
        ValueError: no pixel has a class.
    """
    names, every, matrix = list(masked.classes.names), sums(confusion), confusion.sum(axis=0)
    counts = {name: every[:, number] for number, name in enumerate(names)}
    if not matrix.any():
        raise ValueError(f"{masked.corpus.spec}: no pixel that the encoder sees has a class; give other masks")
    if absent := [name for name, pixels in zip(names, matrix.sum(axis=1), strict=True) if not pixels]:
        remarks = [*remarks, f"no pixel is of {', '.join(absent[:8])}"]
    if masked.without:
        remarks = [*remarks, f"test {masked.rows.name}: left out {masked.without:,} images without a mask"]
    most = np.zeros_like(confusion)
    most[:, :, int(matrix.sum(axis=1).argmax())] = confusion.sum(axis=2)
    guessed = estimates(command, {name: sums(most)[:, number] for number, name in enumerate(names)})
    metrics = {name: estimate.metric() for name, estimate in estimates(command, counts).items()}
    samples = {f"per_class/{name}/{command}/iou": of for name, of in counts.items()}
    return Result(
        command,
        inputs | {"masks": {"spec": masked.corpus.spec, "images": len(masked), "without": masked.without}},
        {
            **parameters,
            "classes": dict(zip(names, map(int, masked.classes.values), strict=True)),
            "ignored": list(masked.classes.ignored),
            "confusion": {
                of: {taken: int(count) for taken, count in zip(names, line, strict=True) if count}
                for of, line in zip(names, matrix.tolist(), strict=True)
            },
            "chance": {name: each.value for name, each in guessed.items() if "per_class" not in name},
        },
        metrics,
        versions(),
        {"sample_id": masked.rows.sample_ids.astype(np.str_), "content": content_of(masked.rows)}
        | {name: of for name, of in samples.items() if name in metrics},
        remarks=remarks,
    )

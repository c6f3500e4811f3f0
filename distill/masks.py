"""The masks of the images that train, beside their pixels."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from featcache.corpora import Corpus, has_target, target
from featcache.masks import MASK, MaskClasses, refuse_other_size
from featcache.rows import Rows

KEPT_BYTES = 2**28
"""Of decoded masks that stay in memory."""


def shared_classes(corpora: Sequence[Corpus]) -> MaskClasses | None:
    """What the masks of all corpora tell apart; None where no corpus has masks.

    Raises:
        ValueError: only some have, or their classes differ.
    """
    found: list[MaskClasses | None] = [getattr(corpus, "mask_classes", None) for corpus in corpora]
    first = next(filter(None, found), None)
    for corpus, classes in zip(corpora, found, strict=True):
        if first and (classes is None or list(classes.names) != list(first.names)):
            has = "has none" if classes is None else f"of {', '.join(classes.names[:5])}"
            raise ValueError(
                f"{corpus.spec} {has}, where other masks are of {', '.join(first.names[:5])}; give each store a corpus with masks of "
                "the same classes, in one order"
            )
    return first


def masked(rows: Rows, corpora: Sequence[Corpus]) -> Bool[np.ndarray, " n"]:
    """Which rows have a mask in the corpus of their store."""
    numbers = [{str(sample_id): i for i, sample_id in enumerate(corpus.ids)} for corpus in corpora]
    found = np.zeros(len(rows), bool)
    for index, sample_id in enumerate(rows.sample_ids.tolist()):
        store, _ = rows.locate(index)
        sample = numbers[store].get(str(sample_id))
        found[index] = sample is not None and has_target(corpora[store], sample, MASK)
    return found


class Masks:
    """Masks of samples, decoded once where memory allows.

    Args:
        corpora: with masks.
        number, sample: of each of the samples, which of the corpora it is of, and which of that corpus's.

    Attributes:
        known: which samples have a mask. Those of others are never opened.
    """

    def __init__(self, corpora: Sequence[Corpus], number: Int64[np.ndarray, " n"], sample: Int64[np.ndarray, " n"]):
        self._corpora, self._number, self._sample = corpora, number, sample
        pairs = zip(number.tolist(), sample.tolist(), strict=True)
        self.known: Bool[np.ndarray, " n"] = np.array([has_target(corpora[n], i, MASK) for n, i in pairs], bool)
        self._decoded: dict[int, UInt8[np.ndarray, "height width"]] = {}

    def of(self, index: int) -> UInt8[np.ndarray, "height width"]:
        """The coded mask of a sample that has one.

        Raises:
            ValueError: it is no mask of these classes.
        """
        if index in self._decoded:
            return self._decoded[index]
        corpus, sample = self._corpora[self._number[index]], int(self._sample[index])
        encoded = target(corpus, sample, MASK)
        assert encoded is not None
        try:
            mask: np.ndarray = corpus.mask_classes.decode(encoded)
        except Exception as error:  # Pillow's own kinds, of a file that is no image
            raise ValueError(f"{corpus.ids[sample]}: its mask {error}") from None
        if mask.nbytes * (len(self._decoded) + 1) <= KEPT_BYTES:
            self._decoded[index] = mask
        return mask

    def check(self, size_of: Callable[[int], tuple[int, int]]) -> None:
        """Raises ValueError unless every mask is one, of the size of its image in px."""
        for index in np.flatnonzero(self.known).tolist():
            name = self._corpora[self._number[index]].ids[int(self._sample[index])]
            refuse_other_size(name, self.of(index), size_of(index))

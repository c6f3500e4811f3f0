"""The same samples in two stores, row by row, and what is left out of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from evalsuite.overlap import Overlap, overlap, repeated
from featcache.classes import Classes
from featcache.rows import Rows, Store, left_out_remarks

LEAST_ROWS = 4  # the debiased estimator of HSIC divides by n − 3


@dataclass(frozen=True)
class Paired:
    """The samples that a teacher's and a student's store share, those of their banks, and images that are there twice.

    Attributes:
        whole: all rows of both.
        pair: the shared ones, in the same order.
        banks: shared rows of the banks, where there are some.
        side: whose hashes of the images are asked, 0 the teacher's.
        same, in_bank: shared rows that are another one's image, or one of the bank's.
    """

    whole: tuple[Rows, Rows]
    pair: tuple[Rows, Rows]
    banks: tuple[Rows, Rows] | None
    side: int
    same: Overlap
    in_bank: Overlap

    @classmethod
    def of(
        cls,
        stores: tuple[Store, Store],
        banks: tuple[Store | None, Store | None],
        *,
        drop_identical: bool,
        any_precision: bool,
    ) -> Paired:
        """Raises ValueError where samples, images, encoders or precisions do not match."""
        whole = Rows.of(stores[0]), Rows.of(stores[1])
        x, y = joined(*whole)
        of_banks = joined_banks(*banks, *whole, any_precision)
        side = 0 if x.hashed or not y.hashed else 1
        images = (x, y)[side]
        same = repeated(images) if drop_identical else overlap(images, [images], np.arange(len(x)))
        in_bank = overlap(images, [] if of_banks is None else [of_banks[side]])
        if drop_identical:
            keep = np.flatnonzero(~(same.rows | in_bank.rows))
            x, y = x.pick(keep), y.pick(keep)
        return cls(whole, (x, y), of_banks, side, same, in_bank)

    @property
    def labelled(self) -> Rows:
        """The one of the pair whose labels count."""
        return self.pair[0] if (self.pair[0].labels >= 0).any() else self.pair[1]

    def record(self) -> dict[str, object]:
        """Of the rows, as results keep it."""
        roles = {"teacher": self.whole[0], "student": self.whole[1]}
        if self.banks is not None:
            roles |= {"teacher_bank": self.banks[0], "student_bank": self.banks[1]}
        counts = {"joined": len(self.pair[0]), "identical": self.same.count}
        if self.banks is not None:
            counts["identical_in_bank"] = self.in_bank.count
        return {**{role: rows.record() for role, rows in roles.items()}, **counts}

    def identical_remarks(self, dropped: bool) -> list[str]:
        return [
            *self.same.remarks("joined rows", "of another row", "each is the nearest of the other", dropped),
            *self.in_bank.remarks("joined rows", "of the banks", "they vote for themselves", dropped),
        ]

    def remarks(self) -> list[str]:
        """On samples and labels that only one side has."""
        return [
            *unpaired_remarks({"teacher": self.whole[0], "student": self.whole[1]}, len(self.same.rows)),
            *differing_labels_remarks(*self.pair),
            *without_vote_remarks(self.pair[0], self.labelled.labels, self.banks),
        ]


def joined(x: Rows, y: Rows) -> tuple[Rows, Rows]:
    """The rows of the samples that both have, in `x`'s order."""
    for rows in (x, y):
        if len(np.unique(rows.sample_ids)) < len(rows):
            raise ValueError(f"{rows.name} repeats a sample id; give each sample its own and extract again")
    _, left, right = np.intersect1d(x.sample_ids, y.sample_ids, assume_unique=True, return_indices=True)
    order = np.argsort(left)
    left, right = left[order], right[order]
    if len(left) < LEAST_ROWS:
        raise ValueError(
            f"{x.name} and {y.name} share {len(left)} sample ids, at least {LEAST_ROWS} are needed; "
            "extract both from the same corpus"
        )
    x_content, y_content = x.content[left], y.content[right]
    known = x_content.any(axis=1) & y_content.any(axis=1)  # stores made from arrays have no images to hash
    different = int((known & (x_content != y_content).any(axis=1)).sum())
    if different:
        raise ValueError(
            f"{x.name} and {y.name} hold different images under {different} of {len(left)} shared ids; "
            "extract both from the same corpus"
        )
    return x.pick(left), y.pick(right)


def joined_banks(
    teacher: Store | None, student: Store | None, x: Rows, y: Rows, any_precision: bool
) -> tuple[Rows, Rows] | None:
    """The rows the two banks have in common, labelled in the teacher's."""
    if teacher is None and student is None:
        return None
    if teacher is None or student is None:
        raise ValueError("only one bank is given; give both --teacher-bank and --student-bank, or neither")
    banks = Rows.of(teacher), Rows.of(student)
    for bank, rows in zip(banks, (x, y), strict=True):
        rows.require_same_encoder(bank, any_precision)
        if os.path.realpath(bank.name) == os.path.realpath(rows.name):
            raise ValueError(f"{bank.name} is its own bank; leave out the banks, and its rows vote for each other")
    left, right = joined(banks[0].labelled(), banks[1])
    right.labels, right.class_names = left.labels, left.class_names  # votes and detectors know the same of both
    return left, right


def unpaired_remarks(rows: Mapping[str, Rows], joined: int, unlabelled: int = 0) -> list[str]:
    """What failed in each of two stores, by their roles, and how many of their rows are not among the `joined` ones for
    want of a partner; of the first, `unlabelled` rows have been left out before."""
    (one, x), (other, y) = rows.items()
    lines = left_out_remarks(one, x, unlabelled) + left_out_remarks(other, y)
    for role, each, partner, usable in ((one, x, y, len(x) - unlabelled), (other, y, x, len(y))):
        if usable > joined:
            lines.append(
                f"{role} {each.name}: {usable - joined:,} of {usable:,} rows are not in {partner.name}: left out"
            )
    return lines


def left_out_of_banks_remarks(
    teacher: Store | None, student: Store | None, banks: tuple[Rows, Rows] | None
) -> list[str]:
    if teacher is None or student is None or banks is None:
        return []
    x = Rows.of(teacher)
    rows = {"teacher bank": x, "student bank": Rows.of(student)}
    return unpaired_remarks(rows, len(banks[0]), unlabelled=len(x) - len(x.labelled()))


def without_vote_remarks(x: Rows, labels: Int[np.ndarray, " n"], banks: tuple[Rows, Rows] | None) -> list[str]:
    unlabelled = int((labels < 0).sum())
    if banks is not None or not 0 < unlabelled < len(labels):
        return []
    return [
        f"{x.name}: {unlabelled:,} of {len(labels):,} joined rows have no label: they neither vote nor are voted on"
    ]


def differing_labels_remarks(x: Rows, y: Rows) -> list[str]:
    """One line where the stores say different classes of the same rows; their numbers are compared where neither has names."""
    classes = Classes.of(x), Classes.of(y)
    if (classes[0].names is None) != (classes[1].names is None):
        return []
    known = np.flatnonzero((x.labels >= 0) & (y.labels >= 0))
    said = ([of.name(int(label)) for label in rows.labels[known]] for of, rows in zip(classes, (x, y), strict=True))
    differing = sum(a != b for a, b in zip(*said, strict=True))
    if not differing:
        return []
    return [
        f"{x.name} and {y.name} have different labels for {differing:,} of {len(known):,} rows: those of {x.name} are taken"
    ]

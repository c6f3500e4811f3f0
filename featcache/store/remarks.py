"""What follows from what `featcache.check` found: a line for each thing to know, and whether it falsifies numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from featcache.store.comparable import FAITHFUL, difference, kept_differently, unfaithful
from featcache.store.manifest import ExtractionRecord

MOST_IDENTICAL = 0.01
"""Share of rows, of images that are there again, from which they falsify: beyond, no accuracy of single rows moves by more."""
MOST_NEAR = 0.1
"""The same of rows that only look alike."""
MOST_FAILED = 0.1
LEAST_RANK = 0.05
"""Effective rank over the most there can be, below which only some directions are left."""
IMBALANCED = 10
"""Times that the largest class may have the smallest one's rows without a remark."""
_SHOWN = 3
TOLD_APART = 0.2
"""An encoder tells images apart where the 90 % quantile of the distances to the nearest is at least so much of the median over
pairs: 0.67 for EfficientNet-Lite0; 0.09 for a student of three short epochs, to which seven images of ten are
near-identical to another.
"""


@dataclass
class Checked:
    """What was found of one store. None: not known, or not defined of so few rows.

    Attributes:
        precision, cosine: how the encoder computed, and its worst cosine to fp32; `extraction`: all that the manifest
        says of it.
        failures: reason → how many rows failed for it, the most frequent first.
        dtypes: field → what it is kept in.
        pending: rows that extraction has not come to.
        identical: rows of an image that an earlier row is; where hashes of images are not kept (`images_known` false), of the
            very same embedding.
        sampled: rows that `near_identical` (a share, in 0…1, with a near-identical row of another image) is of.
        nearest, nearest_90: median over them of 1 − cosine to the nearest row of another image, and its 90 % quantile;
            `apart`: median over pairs of them.
        effective_rank: of `ranked` sampled rows of norm 1; see `featcache.geometry.effective_rank`.
        classes: class → rows, of the classes that have rows.
    """

    store: str
    encoder: str
    fingerprint: str
    sealed: bool
    precision: str | None
    cosine: float | None
    extraction: ExtractionRecord
    rows: int
    failed: int
    pending: int
    failures: dict[str, int]
    dtypes: dict[str, str]
    dimensions: int
    images_known: bool
    identical: int
    sampled: int
    near_identical: float | None
    nearest: float | None
    nearest_90: float | None
    apart: float | None
    effective_rank: float | None
    ranked: int
    zero_rows: int
    not_finite: int
    zero_dimensions: int
    constant_dimensions: int
    unlabelled: int
    classes: dict[str, int]
    class_names: bool

    @property
    def usable(self) -> int:
        return self.rows - self.failed - self.pending

    @property
    def tells_apart(self) -> bool:
        """Whether most images have no other near them, as the encoder sees them: else those that have need not be copies."""
        return self.apart is not None and self.nearest_90 is not None and self.nearest_90 >= TOLD_APART * self.apart


@dataclass
class Pair:
    """What two stores of one encoder have in common: rows of `a` and of `b` whose image the other has, shares of their
    sampled rows that are near-identical to a row of another image of the other, and classes, by name."""

    a: str
    b: str
    images_known: bool
    identical_a: int
    identical_b: int
    near_a: float | None
    near_b: float | None
    classes: list[str]


@dataclass(frozen=True)
class Remark:
    """What to know, in a line; `falsifies` where an evaluation with these stores would be wrong."""

    text: str
    falsifies: bool = False


def remarks_on_stores(stores: Sequence[Checked]) -> Iterator[Remark]:
    for store in stores:
        for remark in _on_store(store):
            yield Remark(f"{store.store}: {remark.text}", remark.falsifies)
    if len({store.fingerprint for store in stores}) > 1:
        names = ", ".join(dict.fromkeys(f"{store.encoder} ({store.fingerprint[:12]})" for store in stores))
        yield Remark(f"stores of different encoders ({names}): only `evalsuite fidelity` compares these")
    for _, group in groupby(sorted(stores, key=lambda each: each.fingerprint), key=lambda each: each.fingerprint):
        first, *others = group
        for other in others:
            if differing := difference(first.extraction, other.extraction):
                yield Remark(
                    f"{other.store} is in {differing[1]}, {first.store} in {differing[0]}: detectors tell the precisions of one "
                    "encoder apart, not the images; extract one again like the other",
                    falsifies=True,
                )
            elif other.dimensions == first.dimensions and (kept := kept_differently(first.dtypes, other.dtypes)):
                yield Remark(
                    f"{other.store} keeps {kept[1]}, {first.store} {kept[0]}: detectors may tell apart what is rounded "
                    "differently; make both with one --dtype",
                    falsifies=True,
                )


def _on_store(store: Checked) -> Iterator[Remark]:
    if not store.sealed:
        yield Remark(
            f"extraction has not finished ({store.pending:,} of {store.rows:,} rows are missing); run the same `featcache "
            "extract` command again",
            falsifies=True,
        )
    if store.failed:
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in list(store.failures.items())[:_SHOWN])
        more = "; …" if len(store.failures) > _SHOWN else ""
        yield Remark(
            f"{_part(store.failed, store.rows)} rows failed ({reasons}{more}): numbers are of the others",
            falsifies=store.failed >= MOST_FAILED * store.rows,
        )
    if not store.usable:
        yield Remark("not one row can be used", falsifies=True)
        return
    if said := unfaithful(store.extraction):
        yield Remark(said)
    if store.not_finite:
        yield Remark(
            f"{_part(store.not_finite, store.usable)} rows hold a NaN or an infinity: evaluators refuse the store; extract it "
            "again with --dtype float32",
            falsifies=True,
        )
    if store.zero_rows:
        yield Remark(
            f"{_part(store.zero_rows, store.usable)} rows are all zeros: they have no angle to any other",
            falsifies=store.zero_rows >= MOST_IDENTICAL * store.usable,
        )
    yield from _on_images(store)
    yield from _on_geometry(store)
    yield from _on_labels(store)


def _on_images(store: Checked) -> Iterator[Remark]:
    what = "are images that earlier rows are" if store.images_known else "have the very embedding of an earlier row"
    if store.identical:
        yield Remark(
            f"{_part(store.identical, store.usable)} rows {what}: they are neighbours of themselves, and count twice",
            falsifies=store.identical >= MOST_IDENTICAL * store.usable,
        )
    if store.near_identical:
        yield Remark(
            f"{_estimate(store.near_identical, store)} rows are near-identical to one of another image{_doubt(store)}",
            falsifies=store.near_identical >= MOST_NEAR and store.tells_apart,
        )
    if not store.images_known:
        yield Remark("keeps no hashes of its images: whether others have the same images is known by embeddings alone")


def _on_geometry(store: Checked) -> Iterator[Remark]:
    if store.usable > 1 and store.constant_dimensions:
        yield Remark(
            f"{store.constant_dimensions:,} of {store.dimensions:,} dimensions have one value in all rows"
            + (f" ({store.zero_dimensions:,} are 0)" if store.zero_dimensions else ""),
            falsifies=store.constant_dimensions == store.dimensions,
        )
    if store.nearest is not None and store.nearest < 1 - FAITHFUL:
        yield Remark(
            f"collapsed: the median distance (1 − cosine) from an image to the nearest other is {store.nearest:.2g}, less than "
            f"the {1 - FAITHFUL:.3f} that precision may change; neighbours and OOD scores are noise",
            falsifies=True,
        )
    most = min(store.ranked - 1, store.dimensions)
    if store.effective_rank is not None and most > 3 and store.effective_rank < max(LEAST_RANK * most, 1.5):
        yield Remark(
            f"collapsed to few directions: effective rank {store.effective_rank:.1f} of at most {most:,}",
            falsifies=True,
        )


def _on_labels(store: Checked) -> Iterator[Remark]:
    counts = sorted(store.classes.values())
    if not counts:
        yield Remark("no row has a label: knn and probe cannot use it")
        return
    if store.unlabelled:
        yield Remark(f"{_part(store.unlabelled, store.usable)} rows have no label: knn and probe leave them out")
    if len(counts) == 1:
        yield Remark("all labelled rows are of one class")
    if single := [name for name, count in store.classes.items() if count == 1]:
        yield Remark(
            f"{len(single):,} of {len(counts):,} classes have one row ({_some(single)}): accuracy within them is 0 or 1"
        )
    if counts[-1] >= IMBALANCED * counts[0]:
        yield Remark(
            f"classes are of {counts[0]:,} to {counts[-1]:,} rows; naming the largest is right in "
            f"{counts[-1] / sum(counts):.1%}: look at macro accuracies"
        )


def remarks_on_pairs(stores: Sequence[Checked], pairs: Sequence[Pair]) -> Iterator[Remark]:
    of = {store.store: store for store in stores}
    for pair in pairs:
        a, b = of[pair.a], of[pair.b]
        sides = (a, b, pair.identical_a, pair.near_a), (b, a, pair.identical_b, pair.near_b)
        for one, other, identical, near in sides:
            what = "images of" if pair.images_known else "embeddings of"
            if identical:
                yield Remark(
                    f"{one.store}: {_part(identical, one.usable)} rows are {what} {other.store} too: use them on one side of an "
                    "evaluation, or leave them out with --drop-identical",
                    falsifies=identical >= MOST_IDENTICAL * one.usable,
                )
            if near:
                yield Remark(
                    f"{one.store}: {_estimate(near, one)} rows are near-identical to one of another image of {other.store}"
                    + _doubt(one),
                    falsifies=near >= MOST_NEAR and one.tells_apart,
                )
        if a.classes and b.classes:
            yield from _on_common_classes(a, b, pair)


def _on_common_classes(a: Checked, b: Checked, pair: Pair) -> Iterator[Remark]:
    if a.class_names != b.class_names:
        named, numbered = (a, b) if a.class_names else (b, a)
        yield Remark(f"{named.store} names its classes, {numbered.store} only numbers them")
    if not pair.classes:
        yield Remark(f"{a.store} and {b.store} have no class in common: one can be OOD to the other, and not its bank")
        return
    for one, other in ((a, b), (b, a)):
        lacking = [name for name in one.classes if name not in pair.classes]
        if lacking:
            yield Remark(
                f"{len(lacking):,} of {len(one.classes):,} classes of {one.store} are not in {other.store} ({_some(lacking)})"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _part(count: int, of: int) -> str:
    return f"{count:,} of {of:,} ({count / of:.1%})"


def _doubt(store: Checked) -> str:
    return "" if store.tells_apart else ", as far as this encoder tells images apart, which is not far"


def _estimate(share: float, store: Checked) -> str:
    sampled = f" ({store.sampled:,} were sampled)" if store.usable > store.sampled else ""
    return f"{'about ' if sampled else ''}{share:.1%} of {store.usable:,}{sampled}"

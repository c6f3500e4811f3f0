"""Which stores hold features that may be compared: what precision they were computed in, how far that is from fp32, and what
dtype they are kept in.

Reads manifests, mostly their record `extraction`. Nothing here imports PyTorch.
"""

from collections.abc import Mapping

from featcache.store.manifest import ExtractionRecord, Manifest

NAMES = (
    *("fp32", "fp32+channels_last", "bf16+channels_last", "bf16-autocast+channels_last"),
    "fp16+channels_last",
)
SHORT = {"bf16": "bf16+channels_last", "fp16": "fp16+channels_last"}
"""Names that stand for another: always the same one, whatever the clock says."""
FAITHFUL = 0.999
"""Smallest cosine to the fp32 embedding allowed, of any image."""


def exact_name(requested: str) -> str:
    """The precision that `requested` names.

    Raises:
        ValueError: none.
    """
    name = SHORT.get(requested, requested)
    if name not in NAMES:
        raise ValueError(f"unknown precision {requested!r}; known: auto, {', '.join((*NAMES, *SHORT))}")
    return name


def is_half(name: str) -> bool:
    """Whether anything is computed in less than fp32."""
    return not name.startswith("fp32")


def difference(one: ExtractionRecord, other: ExtractionRecord) -> tuple[str, str] | None:
    """In what features with these two records are not comparable, of the one and of the other; None when they are.

    What is computed in half precision has the same bits on one kind of machine and in one batch size only. A record
    that lacks something, of features that another program made, is not doubted.
    """
    first, second = one.precision, other.precision
    if not (first and second):
        return None
    if first != second:
        return first, second
    of_half = [("on", one.machine, other.machine), ("in batches of", one.batch_size, other.batch_size)]
    for how, mine, theirs in of_half if is_half(first) else ():
        if mine and theirs and mine != theirs:
            return f"{first} {how} {mine}", f"{second} {how} {theirs}"
    return None


def kept_differently(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, str] | None:
    """Which of what evaluators read is kept in another dtype, of field → dtype of the one and of the other; None when
    nothing is.

    Rounding to float16 moves rows as half precision does: of a collapsed encoder, detectors tell the one from the other.
    """
    for field in ("embedding", "logits"):
        if field in one and field in other and one[field] != other[field]:
            return f"{field} in {one[field]}", f"{field} in {other[field]}"
    return None


def require_kept_alike(one: tuple[str, Manifest], other: tuple[str, Manifest]) -> None:
    """Raise `ValueError` unless two stores keep their features in the same dtype. Each is a path and a manifest."""
    if differing := kept_differently(one[1].field_dtypes, other[1].field_dtypes):
        raise ValueError(
            f"{other[0]} keeps {differing[1]}, {one[0]} {differing[0]}: what is rounded differently is not compared, as OOD "
            "detectors may tell it apart; make both with one --dtype (extract, import; write_store(dtype=…)), or allow it "
            "with --any-precision"
        )


def require_comparable(one: tuple[str, Manifest], other: tuple[str, Manifest]) -> None:
    """Raise `ValueError` unless two stores' features may be compared. Each is a path and a manifest."""
    (path, mine), (other_path, theirs) = one, other
    made, made_otherwise = mine.extraction, theirs.extraction
    if differing := difference(made, made_otherwise):
        raise ValueError(
            f"{other_path} is in {differing[1]}, {path} in {differing[0]}: features of two precisions are not "
            f"compared, as OOD detectors tell them apart; extract one again like the other ({_again(made)}, or "
            f"{_again(made_otherwise)}), or allow it with --any-precision"
        )


def _again(made: ExtractionRecord) -> str:
    batch = f" --batch-size {made.batch_size}" if is_half(str(made.precision)) and made.batch_size else ""
    return f"--precision {made.precision}{batch} --overwrite"


def unfaithful(extraction: ExtractionRecord) -> str:
    """What to say of features whose worst row differs too much from fp32; "" when none is known to."""
    worst = extraction.cosine
    if worst is None or worst >= FAITHFUL:
        return ""
    return (
        f"its features are in {extraction.precision}, with a cosine to fp32 of {worst:.5f} at worst (less than "
        f"{FAITHFUL}); extract again with --precision fp32 --overwrite"
    )

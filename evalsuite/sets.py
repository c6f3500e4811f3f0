"""ID and OOD sets: which stores they are, and which of their images are another set's too."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from evalsuite.overlap import Overlap, overlap
from featcache.head import Head
from featcache.rows import Rows, Store

_MOST_IDENTICAL = 0.9  # share of an OOD set's images that are ID ones, from which it is refused


def named_sets(**groups: Mapping[str, Store] | None) -> dict[str, Store]:
    """The stores of near, far and csid sets by `GROUP/NAME`. Raises `ValueError` for a name that cannot be one."""
    sets: dict[str, Store] = {}
    for group, given in groups.items():
        for name, store in (given or {}).items():
            if not name or "/" in name or name == "mean":
                raise ValueError(f"{name!r} cannot name a {group} set; use a name without '/' other than 'mean'")
            sets[f"{group}/{name}"] = store
    return sets


def require_apart(rows: Mapping[str, Rows]) -> None:
    """Raise `ValueError` for a store with two parts to play, by the keys of `rows`: ID and OOD, or two of ID. One that is
    two OOD sets, or two csid sets, warns."""
    seen: dict[str, str] = {}
    for key, each in rows.items():
        first = seen.setdefault(os.path.realpath(each.name), key)
        parts = {"OOD" if of in ("near", "far") else of for of in (first.partition("/")[0], key.partition("/")[0])}
        if len(parts) > 1:
            raise ValueError(f"{each.name} is both {first} and {key}; give other images as {key}")
        if first != key:
            warnings.warn(f"{each.name} is both {first} and {key}: it counts twice", UserWarning, stacklevel=4)


def opened(
    part: str, bank: Store, others: Mapping[str, Store], head: str | os.PathLike[str] | None, any_precision: bool
) -> tuple[Rows, dict[str, Rows]]:
    """The rows of the bank, which plays this part, and of the other sets, with the logits of a saved `head` where there is
    one. Raises `ValueError` as `require_apart`, and where they are not of one encoder."""
    classifier = None if head is None else Head.read(head)
    train = Rows.of(bank, classifier)
    rows = {key: Rows.of(store, classifier) for key, store in others.items()}
    require_apart({part: train} | rows)
    for each in rows.values():
        train.require_same_encoder(each, any_precision)
    return train, rows


def records_of(group: str, rows: Mapping[str, Rows], same: Mapping[str, Overlap]) -> dict[str, Any]:
    """What a result file says of the sets of one group, by name."""
    return {
        key.removeprefix(f"{group}/"): each.record() | {"identical": same[key].count}
        for key, each in rows.items()
        if key.startswith(f"{group}/")
    }


def overlaps(train: Rows, rows: Mapping[str, Rows]) -> dict[str, Overlap]:
    """Which rows of `id_test` are images that `train` has, and which of each other set, images that an ID set has: of a
    near or far set, a csid set too."""
    of_id = [train, rows["id_test"]] if "id_test" in rows else [train]
    shifted = [each for key, each in rows.items() if key.startswith("csid/")]
    of_group = {"id_test": [train], "csid": of_id, "near": [*of_id, *shifted], "far": [*of_id, *shifted]}
    return {key: overlap(each, of_group[key.partition("/")[0]]) for key, each in rows.items()}


def remarks_on(same: Mapping[str, Overlap], dropped: bool) -> list[str]:
    """A line for each set that has rows of an image that an ID set has."""
    so = {
        "id_test": "detectors were fitted to them",
        "csid": "they are not shifted",
        "near": "they are ID",
        "far": "they are ID",
    }
    return [
        remark
        for key, each in same.items()
        for remark in each.remarks(
            f"{key} rows",
            "of id_train" if key == "id_test" else "of an ID set",
            so[key.partition("/")[0]],
            dropped,
        )
    ]


def without_identical(key: str, rows: Rows, same: Overlap, drop: bool) -> Rows:
    """The rows without those that ID sets have, or, where these are not to be dropped, all of them.

    Raises `ValueError` when no row is left, or an OOD set that is to stay as it is consists of ID images.
    """
    share = same.count / len(rows)
    others = "id_train" if key == "id_test" else "ID sets"
    if drop:
        return same.without(rows, others, f"other images as {key}")
    if share >= _MOST_IDENTICAL and not same.by_embedding and not key.startswith(("id_test", "csid/")):
        instead = ", or leave these out with --drop-identical" if share < 1 else ""
        raise ValueError(
            f"{same.count:,} of {len(rows):,} images of {rows.name} are in {others} too; give other images as {key}{instead}"
        )
    return rows


def unlabelled_remarks(bank: Rows, role: str) -> list[str]:
    """One line about rows without a label, where a detector has asked for the others; none where all have one."""
    if not (bank.asked_for_labels and bank.unlabelled):
        return []
    return [
        f"{role} {bank.name}: {bank.unlabelled:,} of {len(bank):,} rows have no label: detectors that need labels leave them out"
    ]


def few_distinct_remarks(bank: Rows, role: str) -> list[str]:
    """One line where a bank has more rows than dimensions, but no more that differ; reads it only as far as needed."""
    d, seen = bank.embedding_dim, set[bytes]()
    if len(bank) <= d:  # detectors warn of it
        return []
    for block in bank.blocks():
        for row in block:
            seen.add(row.tobytes())
            if len(seen) > d:
                return []
    return [
        f"{role} {bank.name}: only {len(seen):,} of {len(bank):,} rows differ, no more than the {d:,} dimensions: "
        "covariances of them are singular, and detectors that use one say little"
    ]

"""Whether a student's OOD scores follow its teacher's: the same rows scored in both spaces, by detectors fitted in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evalsuite import detectors as registry
from evalsuite import pairs, scores, sets
from evalsuite.agreement import Both
from evalsuite.intervals import decisions, spearman
from evalsuite.overlap import overlap
from evalsuite.result import Metric
from featcache.rows import Rows, Store

_ROLES = ("teacher", "student")
_TAKEN = ("id", "all")  # what metrics call the pair's rows, and these with all sets


@dataclass(frozen=True)
class Followed:
    """What a result says of it: parts of its inputs, parameters, metrics, chance levels and remarks."""

    inputs: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OODSet:
    """The rows of a set that both sides have, how many of them are images of ID rows too, and what to know."""

    rows: Both
    identical: int
    remarks: list[str]


def follow(specs: Sequence[str] | str, pair: Both, banks: Both, ood: Mapping[str, OODSet]) -> Followed:
    """Of each detector, fitted in either space to its bank, what `Fidelity` says under `scores/DETECTOR/SET/METRIC`: of
    the ID rows, which are the pair, of each OOD set, and of `all` of them.

    Every store is read once, whatever the number of detectors. One that fails, on either side, warns and is left out.
    Raises `ValueError` when every one failed.
    """
    rows, failures = {"id": pair} | {name: of.rows for name, of in ood.items()}, dict[str, Exception]()
    built = scores.build_all(specs)
    scored: list[dict[str, dict[str, np.ndarray]]] = []
    for at, bank in enumerate(banks):
        unfitted = {spec: each for spec, each in scores.build_all(specs).items() if spec not in failures}
        fitted = scores.fit_all(unfitted, bank, [both[at] for both in rows.values()], failures)
        scored.append({name: scores.score_all(fitted, both[at], failures) for name, both in rows.items()})
    scores.require_some(fitted, failures)
    found = Followed(remarks=[remark for of_set in ood.values() for remark in of_set.remarks])
    for spec in fitted:
        of = {name: (scored[0][name][spec], scored[1][name][spec]) for name in rows}
        measured = {name: decisions(of["id"], None if name == "id" else both) for name, both in of.items()}
        if ood:
            a, b = (np.concatenate([of[name][at] for name in ood]) for at in (0, 1))
            measured["all"] = decisions(of["id"], (a, b), together=True)
            of["all"] = np.append(of["id"][0], a), np.append(of["id"][1], b)
        for name, (estimates, by_chance) in measured.items():
            where = f"scores/{spec}/{name}"
            try:
                estimates = {"spearman": spearman(*of[name]), **estimates}
            except ValueError as error:
                found.remarks.append(f"{where}/spearman is left out: {error}")
            for what, each in estimates.items():
                found.metrics[f"{where}/{what}"] = each.metric()
                found.chance[f"{where}/{what}"] = by_chance if what == "agreement" else 0.0
    for at, role in enumerate(_ROLES if ood else ()):
        found.inputs[f"{role}_ood"] = {
            name: of_set.rows[at].record() | {"identical": of_set.identical} for name, of_set in ood.items()
        }
    found.parameters["detectors"] = {spec: registry.parameters(each) for spec, each in built.items()}
    found.parameters["failed_detectors"] = scores.warn_of_failed(failures)
    return found


def ood_sets(
    teacher: Mapping[str, Store],
    student: Mapping[str, Store],
    pair: Both,
    banks: Both,
    *,
    side: int,
    drop_identical: bool,
    any_precision: bool,
) -> dict[str, OODSet]:
    """The sets by name, which the sides give by the same names; `side` is the one whose hashes of images are asked.

    Raises `ValueError` when a name cannot be one, stores come from other encoders than the pair or, without
    `any_precision`, were made in other precisions, one has another part too, fewer than 4 rows join, two stores hold
    different images under one id, or nine tenths of the rows are images of ID rows and are to stay.
    """
    sets.named_sets(teacher_ood=teacher)
    if taken := [name for name in _TAKEN if name in teacher]:
        raise ValueError(f"{taken[0]!r} cannot name an OOD set; metrics call other rows so")
    whole = {name: (Rows.of(store), Rows.of(student[name])) for name, store in teacher.items()}
    for at, role in enumerate(_ROLES):
        parts = {f"{role}_ood/{name}": both[at] for name, both in whole.items()}
        for rows in parts.values():
            pair[at].require_same_encoder(rows, any_precision)
        sets.require_apart({role: pair[at], f"{role}_bank": banks[at], **parts})
    found = {}
    for name, both in whole.items():
        x, y = pairs.joined(*both)
        same = overlap((x, y)[side], [banks[side], pair[side]])
        sets.without_identical(f"{_ROLES[side]}_ood/{name}", (x, y)[side], same, drop_identical)
        roles = {f"{role} OOD {name}": each for role, each in zip(_ROLES, both, strict=True)}
        remarks = same.remarks(f"{name} rows", "of an ID set", "they are ID", drop_identical)
        remarks += pairs.unpaired_remarks(roles, len(x))
        if drop_identical:
            left = np.flatnonzero(~same.rows)
            x, y = x.pick(left), y.pick(left)
        found[name] = OODSet((x, y), same.count, remarks)
    return found

"""How much of the teacher's geometry a student kept.

Measures over all pairs of rows compare two n×n Gram matrices, yet none is formed: with rows x of one space and y
of the other, Σᵢⱼ(xᵢ·xⱼ)(yᵢ·yⱼ) = ‖XᵀY‖²_F, so sums over all pairs follow from sums over rows. Memory is O(d·d'),
time O(n·d·d'). Measures over neighbours search those of a sample of the rows, block by block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from evalsuite.classes import Classes
from evalsuite.collapse import collapse_remarks
from evalsuite.intervals import cosine_mean, kappa, share
from evalsuite.neighbours.exact import search
from evalsuite.overlap import overlap, repeated
from evalsuite.result import Metric, Result, versions
from featcache.geometry import GramSums, unit, vote_weights, winners
from featcache.rows import Rows, Store, left_out_remarks

Blocks = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
Neighbours = tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]

_BLOCK_ROWS = 8192
_QUERY_FLOATS = 2**24  # query embeddings held during one pass over the bank
_LEAST_ROWS = 4  # the debiased estimator divides by n − 3
_TEMPERATURE = 0.07  # of the votes: DINOv2's and CosPress's


def fidelity(
    teacher: Store,
    student: Store,
    *,
    k: int = 10,
    teacher_bank: Store | None = None,
    student_bank: Store | None = None,
    mapping: str | os.PathLike[str] | None = None,
    queries: int = 10_000,
    drop_identical: bool = False,
    any_precision: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """Agreement between two stores' embeddings of the same samples; dimensions and encoders may differ.

    Rows are joined by sample id where both are ok (the count is `inputs["joined"]`; `remarks` say what is left out). Over all pairs of rows,
    exact in float64 in two passes over the stores, without intervals (pairs of rows are not independent):

    - `gram_pearson`: Pearson correlation of the off-diagonal entries of the two cosine-similarity matrices,
      in [-1, 1];
    - `gram_pearson_centred`: the same after subtracting the mean of the unit embeddings and normalising
      again. Most embeddings share a large mean direction; this leaves it out;
    - `cka_debiased`: linear CKA of the raw embeddings with the unbiased HSIC estimator, at most 1, near 0
      (possibly below) for unrelated spaces whatever their dimensions;
    - `cka_debiased_unit`: the same of the unit embeddings. A student trained with a cosine loss may have any
      lengths; only the raw CKA counts them against it;
    - `procrustes`: the share of the unit embeddings' variance, in [0, 1], that is left after the best shift,
      scaling and rotation of one space onto the other (the smaller padded with zeros). **Lower is better.**

    Over the nearest rows by cosine, the row itself left out, for `queries` rows drawn by `seed` (all, where
    there are no more), with 95 % intervals over them (`evalsuite.intervals`):

    - `mutual_knn@K`: share of a row's k nearest rows that both spaces have in common, in [0, 1];
    - `agreement/top1`: share of rows that a vote of the k nearest labelled rows (as in `evalsuite.knn`,
      temperature 0.07) puts in the same class in both spaces, right or wrong. The other joined rows vote, or,
      given both banks, the rows these have in common. Left out where nothing is labelled;
    - `agreement/kappa`: Cohen's kappa of the same votes, at most 1; 0 for votes that agree no more than how
      often each class wins makes them. Left out where one class wins every vote.

    With `mapping`, the `mapping.safetensors` of the student's run:

    - `cosine_mapped`: mean cosine between the student's and the mapped teacher's rows, in [-1, 1], over all
      rows, with an interval over them.

    `per_class/CLASS/METRIC` is the mean over one class's rows of `mutual_knn@K`, `agreement/top1` and
    `cosine_mapped`. `parameters["chance"]` holds for each of the others what unrelated embeddings would
    reach: for `procrustes` what is left when every pair of rows gets a random sign, for `cosine_mapped` the
    mean over all pairs of different rows.

    Rows of an image that other rows have too, under other ids or in the banks, are each other's neighbours in any space.
    They are counted, as `inputs["identical"]` and `inputs["identical_in_bank"]`, and remarked on; `drop_identical` leaves
    out those that are in the banks, and all but the first of each image. Images are known as in `evalsuite.knn`, by the
    teacher's store or, where that keeps no hashes, the student's.

    `resamples` has no effect: intervals are no longer drawn at random.

    Raises `ValueError` when a store repeats a sample id, fewer than 4 rows join, the stores hold different
    images under one id, all rows of a store are alike, a value is not finite, k is not below the number of
    rows (or exceeds the voters), the banks do not suit (they are in
    the rows' precision, unless `any_precision` will do), or the mapping does not fit the stores.

    Kornblith et al. 2019, arXiv 1905.00414 (CKA); Song et al. 2012, "Feature Selection via Dependence
    Maximization", JMLR 13 (unbiased HSIC); Huh et al. 2024, arXiv 2405.07987 (mutual kNN); Cohen 1960, "A
    Coefficient of Agreement for Nominal Scales" (kappa).
    """
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    all_x, all_y = Rows.of(teacher), Rows.of(student)
    x, y = _joined(all_x, all_y)
    banks = _banks(teacher_bank, student_bank, all_x, all_y, any_precision)
    side = 0 if x.hashed or not y.hashed else 1  # whose hashes of the images are asked
    images = (x, y)[side]
    same = repeated(images) if drop_identical else overlap(images, [images], np.arange(len(x)))
    in_bank = overlap(images, [] if banks is None else [banks[side]])
    if drop_identical:
        keep = np.flatnonzero(~(same.rows | in_bank.rows))
        x, y = x.pick(keep), y.pick(keep)
    n = len(x)
    if not 1 <= k < n:
        raise ValueError(f"k={k} does not suit the {n} rows that {x.name} and {y.name} share; use k from 1 to {n - 1}")
    linear = None if mapping is None else _Mapping.read(mapping, x, y)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, n, _BLOCK_ROWS):
            part = np.arange(start, min(start + _BLOCK_ROWS, n))
            yield x.take(part), y.take(part)

    try:
        values, chance = compare(blocks, seed=seed)
    except ValueError as error:
        raise ValueError(f"cannot compare {x.name} with {y.name}: {error}") from error
    why = "pairs of rows are not independent"
    metrics = {name: Metric(value, no_ci95=why) for name, value in values.items()}
    of_rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # metric → positions of rows, their values

    drawn = np.arange(n)
    if n > queries:
        drawn = np.sort(np.random.default_rng(seed).choice(n, queries, replace=False))
    near = [_neighbours(rows, rows, k, drawn, drawn) for rows in (x, y)]
    of_rows[f"mutual_knn@{k}"] = drawn, _shared(near[0][1], near[1][1])
    chance[f"mutual_knn@{k}"] = k / (n - 1)

    labels = x.labels if (x.labels >= 0).any() else y.labels
    voted, voter_labels = drawn, labels
    if banks is not None:
        voter_labels = banks[0].labels
        _check_voters(k, len(voter_labels), f"{banks[0].name} and {banks[1].name} share")
        near = [_neighbours(bank, rows, k, drawn) for bank, rows in zip(banks, (x, y), strict=True)]
    elif (labels < 0).any():
        known = np.flatnonzero(labels >= 0)
        voted, voter_labels = drawn[labels[drawn] >= 0], labels[known]
        if len(voted):
            _check_voters(k, len(known) - 1, f"{x.name} and {y.name} share beside each")
            own = np.searchsorted(known, voted)
            near = [_neighbours(rows.pick(known), rows, k, voted, own) for rows in (x, y)]
    if len(voted):
        classes, numbers = np.unique(voter_labels, return_inverse=True)
        a, b = (winners(vote_weights(cosine, _TEMPERATURE), numbers[row], len(classes)) for cosine, row in near)
        of_rows["agreement/top1"] = voted, (a == b).astype(np.float64)

    if linear is not None:
        cosines, chance["cosine_mapped"] = linear.cosines(blocks)
        of_rows["cosine_mapped"] = np.arange(n), cosines

    for name, (_, measured) in of_rows.items():
        metrics[name] = _mean(name, measured)
        if name == "agreement/top1":
            chance[name] = _agreement_by_chance(a, b, len(classes))
            if chance[name] < 1:
                metrics["agreement/kappa"] = kappa(a, b, len(classes)).metric()
                chance["agreement/kappa"] = 0.0
    classes_of = Classes.of(x if labels is x.labels else y)
    for name, (rows, measured) in of_rows.items():
        for label in np.unique(labels[rows][labels[rows] >= 0]):
            shown = classes_of.distinct_name(int(label))
            metrics[f"per_class/{shown}/{name}"] = _mean(name, measured[labels[rows] == label])

    banks_record = {} if banks is None else {"teacher_bank": banks[0].record(), "student_bank": banks[1].record()}
    return Result(
        "fidelity",
        {"teacher": all_x.record(), "student": all_y.record(), **banks_record, "joined": n}
        | {"identical": same.count, **({} if banks is None else {"identical_in_bank": in_bank.count})},
        {
            "normalisation": "none for cka_debiased, l2 for the others",
            "k": k,
            "temperature": _TEMPERATURE,
            "mapping": None if mapping is None else os.fspath(mapping),
            "queries": len(drawn),
            "drop_identical": drop_identical,
            "any_precision": any_precision,
            "identical_by": (same | in_bank).by,
            "seed": seed,
            "chance": chance,
        },
        metrics,
        versions("faiss-cpu", "faiss-gpu", "torch"),
        remarks=[
            *same.remarks("joined rows", "of another row", "each is the nearest of the other", drop_identical),
            *in_bank.remarks("joined rows", "of the banks", "they vote for themselves", drop_identical),
            *collapse_remarks("teacher", x),
            *collapse_remarks("student", y),
            *_left_out({"teacher": all_x, "student": all_y}, len(same.rows)),
            *_differing_labels(x, y),
            *_without_vote(x, labels, banks),
            *_left_out_of_banks(teacher_bank, student_bank, banks),
        ],
    )


def compare(blocks: Blocks, *, seed: int = 0) -> tuple[dict[str, float], dict[str, float]]:
    """The measures of `fidelity` over all pairs by name, and their chance levels, on paired blocks of rows
    ((b, d), (b, d')); `blocks()` is called twice.

    Raises `ValueError` when there are fewer than 4 rows or all rows of one side are alike.
    """
    n, x_mean, y_mean, x_unit_mean, y_unit_mean = 0, 0.0, 0.0, 0.0, 0.0
    for x, y in blocks():
        x, y = x.astype(np.float64), y.astype(np.float64)
        n += len(x)
        x_mean, y_mean = x_mean + x.sum(axis=0), y_mean + y.sum(axis=0)
        x_unit_mean, y_unit_mean = x_unit_mean + unit(x).sum(axis=0), y_unit_mean + unit(y).sum(axis=0)
    if n < _LEAST_ROWS:
        raise ValueError(f"{n} rows were paired, at least {_LEAST_ROWS} are needed; extract both from one corpus")
    x_mean, y_mean, x_unit_mean, y_unit_mean = x_mean / n, y_mean / n, x_unit_mean / n, y_unit_mean / n

    cosine, centred, raw, units = GramSums(), GramSums(), GramSums(), GramSums()
    signed: Any = 0.0  # XᵀY with a random sign for each row: the pairing is lost, everything else is kept
    rng = np.random.default_rng(seed)
    for x, y in blocks():
        x, y = x.astype(np.float64), y.astype(np.float64)
        x_unit, y_unit = unit(x), unit(y)
        cosine.add(x_unit, y_unit)
        # Neither HSIC nor what Procrustes leaves changes when a space is shifted; centring first keeps a large
        # offset from eating the digits.
        raw.add(x - x_mean, y - y_mean)
        x_unit, y_unit = x_unit - x_unit_mean, y_unit - y_unit_mean
        units.add(x_unit, y_unit)
        centred.add(unit(x_unit), unit(y_unit))
        signed = signed + x_unit.T @ np.where(rng.random((len(x), 1)) < 0.5, -y_unit, y_unit)
    values = {
        "gram_pearson": cosine.pearson(),
        "gram_pearson_centred": centred.pearson(),
        "cka_debiased": raw.cka_debiased(),
        "cka_debiased_unit": units.cka_debiased(),
        "procrustes": units.procrustes(units.xy),
    }
    return values, dict.fromkeys(values, 0.0) | {"procrustes": units.procrustes(signed)}


@dataclass(frozen=True)
class _Mapping:
    """Linear map (up to a scale a row) from the teacher's space to the student's: weight · (embedding − mean)."""

    weight: Float[np.ndarray, "e d"]
    mean: Float[np.ndarray, " d"]

    @classmethod
    def read(cls, path: str | os.PathLike[str], x: Rows, y: Rows) -> _Mapping:
        """Raises `ValueError` when the file holds no linear mapping or one between other dimensions."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give mapping.safetensors of a run folder of `distill fit`")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error}); give mapping.safetensors of a run") from error
        found = sorted(name for name in tensors if name.startswith("mapping."))
        if "mapping.weight" not in found or not {*found} <= {"mapping.weight", "mapping.mean"}:
            raise ValueError(
                f"{path} holds {', '.join(found or sorted(tensors)) or 'nothing'}, not a linear mapping of the teacher "
                "(mapping.weight); leave the mapping out for this run"
            )
        weight = tensors["mapping.weight"].astype(np.float64)
        if weight.shape != (y.embedding_dim, x.embedding_dim):
            raise ValueError(
                f"{path} maps {weight.shape[-1]} dimensions to {weight.shape[0]}, but {x.name} has {x.embedding_dim} "
                f"and {y.name} {y.embedding_dim}; give the mapping of the student's own run"
            )
        return cls(weight, tensors.get("mapping.mean", np.zeros(x.embedding_dim)).astype(np.float64))

    def cosines(self, blocks: Blocks) -> tuple[Float[np.ndarray, " n"], float]:
        """Of each row, and their mean over all pairs of different rows."""
        parts, mapped_sum, student_sum = [], 0.0, 0.0
        for x, y in blocks():
            mapped, student = unit((x - self.mean) @ self.weight.T), unit(y.astype(np.float64))
            parts.append((mapped * student).sum(axis=1))
            mapped_sum, student_sum = mapped_sum + mapped.sum(axis=0), student_sum + student.sum(axis=0)
        cosines = np.concatenate(parts)
        pairs = float(np.dot(mapped_sum, student_sum)) - float(cosines.sum())
        return cosines, pairs / (len(cosines) * (len(cosines) - 1))


def _neighbours(
    bank: Rows, rows: Rows, k: int, positions: Int[np.ndarray, " q"], own: Int[np.ndarray, " q"] | None = None
) -> Neighbours:
    """Similarities and positions in `bank` of the k rows nearest to `rows` at `positions`, of which `own` are the
    same rows in `bank`."""
    step = max(1, _QUERY_FLOATS // rows.embedding_dim)
    found: list[Neighbours] = []
    for start in range(0, len(positions), step):
        part = slice(start, start + step)
        query = rows.take(positions[part])
        try:
            found.append(search(bank.blocks(), query, k, exclude_self=None if own is None else own[part]))
        except ValueError as error:
            raise ValueError(f"cannot search {bank.name}: {error}") from error
    return np.concatenate([cosine for cosine, _ in found]), np.concatenate([row for _, row in found])


def _shared(a: Int[np.ndarray, "q k"], b: Int[np.ndarray, "q k"]) -> Float[np.ndarray, " q"]:
    """Share of each row of `a` that the same row of `b` has too; a row repeats no number."""
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)
    return (both[:, 1:] == both[:, :-1]).sum(axis=1) / a.shape[1]


def _mean(metric: str, values: Float[np.ndarray, " n"]) -> Metric:
    return (cosine_mean(values) if metric == "cosine_mapped" else share(values)).metric()


def _agreement_by_chance(a: Int[np.ndarray, " q"], b: Int[np.ndarray, " q"], n_classes: int) -> float:
    """How often votes for as many rows of each class, dealt out at random, would agree."""
    return float(np.bincount(a, minlength=n_classes) @ np.bincount(b, minlength=n_classes)) / len(a) ** 2


def _check_voters(k: int, voters: int, whose: str) -> None:
    if k > voters:
        raise ValueError(f"k={k} exceeds the {voters} labelled rows that {whose}; use a smaller k or more labels")


def _banks(
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
    return _joined(banks[0].labelled(), banks[1])


def _joined(x: Rows, y: Rows) -> tuple[Rows, Rows]:
    """The rows of the samples that both have, in `x`'s order."""
    for rows in (x, y):
        if len(np.unique(rows.sample_ids)) < len(rows):
            raise ValueError(f"{rows.name} repeats a sample id; give each sample its own and extract again")
    _, left, right = np.intersect1d(x.sample_ids, y.sample_ids, assume_unique=True, return_indices=True)
    order = np.argsort(left)
    left, right = left[order], right[order]
    if len(left) < _LEAST_ROWS:
        raise ValueError(
            f"{x.name} and {y.name} share {len(left)} sample ids, at least {_LEAST_ROWS} are needed; "
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


def _left_out(rows: Mapping[str, Rows], joined: int, unlabelled: int = 0) -> list[str]:
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


def _left_out_of_banks(teacher: Store | None, student: Store | None, banks: tuple[Rows, Rows] | None) -> list[str]:
    if teacher is None or student is None or banks is None:
        return []
    x = Rows.of(teacher)
    rows = {"teacher bank": x, "student bank": Rows.of(student)}
    return _left_out(rows, len(banks[0]), unlabelled=len(x) - len(x.labelled()))


def _without_vote(x: Rows, labels: Int[np.ndarray, " n"], banks: tuple[Rows, Rows] | None) -> list[str]:
    unlabelled = int((labels < 0).sum())
    if banks is not None or not 0 < unlabelled < len(labels):
        return []
    return [
        f"{x.name}: {unlabelled:,} of {len(labels):,} joined rows have no label: they neither vote nor are voted on"
    ]


def _differing_labels(x: Rows, y: Rows) -> list[str]:
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

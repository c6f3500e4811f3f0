"""Out-of-distribution detection from stores."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from evalsuite import detectors as registry
from evalsuite.collapse import collapse_remarks
from evalsuite.intervals import Estimate, mean_of, ranking
from evalsuite.judged import Judged
from evalsuite.metrics import tied
from evalsuite.neighbours.index import evenly_spread
from evalsuite.overlap import Overlap, overlap
from evalsuite.presets import stores_of
from evalsuite.result import Metric, Result, content_of, versions
from featcache.head import Head
from featcache.rows import Rows, Store, left_out_remarks

_MOST_IDENTICAL = 0.9  # share of an OOD set's images that are ID ones, from which it is refused
_JUDGED = 10_000  # rows of id_train that a head is judged on, where id_test has no labels
_MOST_TIED = 0.1  # share of rows tied with others that differ, above which scores are said to saturate


def ood(
    *,
    id_train: Store | None = None,
    id_test: Store | None = None,
    near: Mapping[str, Store] | None = None,
    far: Mapping[str, Store] | None = None,
    csid: Mapping[str, Store] | None = None,
    preset: str | None = None,
    stores: str | os.PathLike[str] | None = None,
    detectors: Sequence[str] | str = ("knn",),
    k: int | None = None,
    head: str | os.PathLike[str] | None = None,
    drop_identical: bool = False,
    any_precision: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """How well detectors fitted on `id_train` tell `id_test` from each near and far OOD set.

    Metrics are `DETECTOR/near|far/NAME/METRIC` and `DETECTOR/near|far/mean/METRIC` (unweighted mean over the
    group's sets), METRIC as in `evalsuite.metrics`, with 95 % intervals (`evalsuite.intervals`) over the rows of
    `id_test` and of the OOD sets, detectors and sets taken as they are. DETECTOR is the spec as given, without spaces: `knn`, or `knn:k=1`
    to set an argument; of an argument with a slash, a path, the file's name. `k` is the k of every detector that
    has one and whose spec does not set it; None leaves each its own default. `head` is a classifier saved by
    `evalsuite.probe`, for the detectors that need one; with it, logits are the classifier's even where stores have
    some. How often it is right on `id_test`'s labelled rows (where there are none, on some of `id_train`'s; without a head, of
    stored logits of as many classes as the labels) is `parameters["head_accuracy"]` and a remark; next to chance, or with classes exchanged, warns. Failed rows are left out,
    counted and remarked on.

    `csid` names sets of ID classes under covariate shift. With it everything is measured a second time, full
    spectrum: their rows and `id_test`'s are pooled as ID, as OpenOOD pools them (so that a larger set weighs more),
    and the groups are `near_fs` and `far_fs`.

    `preset` is one of `evalsuite.presets.PRESETS`, an OpenOOD v1.5 benchmark, and stands for all of these: its sets
    are the stores `NAME.zarr` in the folder `stores`, under OpenOOD's names (`cifar10_train`, `cifar10_test`, `tin`,
    …). Full spectrum is measured where its covariate-shifted sets are there, or with the `csid` that is given instead.

    `parameters["tied"]` holds, for each detector and OOD set, the share of rows whose score equals that of another
    row of `id_test` or this set. A detector warns that its scores saturate when, in one of the sets, more than a
    tenth of the rows share their score with a row of *other* embedding: duplicated images never count.

    Every OOD store and `id_test` are read once, whatever the number of detectors (once more where one keeps no hashes). A detector that fails warns, is
    recorded under `parameters["failed_detectors"]`, and the others' results stand.

    Rows of `id_test` whose image `id_train` has too, and rows of a near, far or csid set whose image an ID store has, are
    counted, as `identical` in the set's record of `inputs`, and remarked on; `drop_identical` leaves them out. Images
    are known as in `evalsuite.knn`.

    Raises `ValueError` when stores come from different encoders or, without `any_precision`, were made in different precisions, one is both ID and OOD, nine tenths of an OOD set's
    images are ID ones, by their hashes, and not left out, a set is empty or misnamed or
    has a row that is not finite, a spec cannot be read, a preset lacks a store, or every detector failed. A store that
    is two OOD sets warns.

    `resamples` and `seed` have no effect: nothing is drawn at random any more.

    Yang et al. 2022, "OpenOOD", arXiv 2210.07242; full spectrum: Zhang et al. 2023, arXiv 2306.09301.
    """
    if preset is not None or stores is not None:
        if preset is None or stores is None or not (id_train is id_test is near is far is None):
            raise ValueError(
                "a preset stands for all stores; give preset and stores alone, or id_train, id_test, near, far"
            )
        chosen = stores_of(preset, stores)
        (id_train,), (id_test,) = chosen["id_train"].values(), chosen["id_test"].values()
        near, far, csid = chosen["near"], chosen["far"], csid or chosen["csid"]
    if id_train is None or id_test is None:
        raise ValueError("id_train and id_test are needed; give both, or a preset and the folder of its stores")
    if not (near or far):
        raise ValueError("no OOD set was given; pass at least one as near or far, e.g. near={'tin': 'tin.zarr'}")
    sets = named_sets(near=near, far=far, csid=csid)
    classifier = None if head is None else Head.read(head)
    train, test = Rows.of(id_train, classifier), Rows.of(id_test, classifier)
    rows = {"id_test": test} | {key: Rows.of(store, classifier) for key, store in sets.items()}
    require_apart({"id_train": train} | rows)
    for other in rows.values():
        train.require_same_encoder(other, any_precision)
    built = build_all(detectors, k)
    same = overlaps(train, rows)
    whole, rows = rows, {key: without_identical(key, each, same[key], drop_identical) for key, each in rows.items()}

    failures: dict[str, Exception] = {}
    fitted = fit_all(built, train, list(rows.values()), failures)
    where, judged = _Map(train), _judged(train, rows["id_test"])
    samples: dict[str, np.ndarray] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}
    alike: dict[str, np.ndarray] = {}
    for key, each in rows.items():
        seen = judged if judged.role == key else None
        scores[key], samples[f"map/{key}"], alike[key] = _scores(fitted, where, each, failures, seen)
    metrics: dict[str, Metric] = {}
    ties: dict[str, dict[str, float]] = {}
    saturated: dict[str, dict[str, float]] = {}
    for spec in fitted:
        with lost_alone(spec, failures):
            of_sets = {key: found[spec] for key, found in scores.items()}
            metrics |= {f"{spec}/{name}": found.metric() for name, found in measured(of_sets).items()}
            ties[spec], saturated[spec] = _ties(of_sets, alike)
            samples |= {f"score/{spec}/{key}": found for key, found in of_sets.items()}
    samples |= {f"sample_id/{key}": each.sample_ids.astype(np.str_) for key, each in rows.items()}
    samples |= {f"content/{key}": content_of(each) for key, each in rows.items()}
    if not metrics:
        reasons = "; ".join(f"{spec}: {error}" for spec, error in failures.items())
        raise ValueError(f"every detector failed ({reasons})") from next(iter(failures.values()))
    failed = warn_of_failed(failures)
    for spec, shares in saturated.items():
        worst = max(shares, key=lambda key: shares[key])
        if shares[worst] > _MOST_TIED:
            warnings.warn(
                f"detector {spec}: scores saturate: {shares[worst]:.0%} of the rows of id_test and {worst} have the "
                "score of a row with another embedding; believe ap_in and ap_out rather than aupr_in and aupr_out",
                RuntimeWarning,
                stacklevel=2,
            )

    accuracy, remarks = judged.record()

    def record(key: str) -> dict[str, Any]:
        return rows[key].record() | {"identical": same[key].count}

    return Result(
        "ood",
        {
            "id_train": train.record() | {"unlabelled": int((train.labels < 0).sum())},
            "id_test": record("id_test"),
            **{
                group: {name: record(f"{group}/{name}") for name in given or {}}
                for group, given in (("near", near), ("far", far), ("csid", csid))
            },
        },
        {
            "detectors": {spec: registry.parameters(detector) for spec, detector in built.items()},
            "failed_detectors": failed,
            "head": None if head is None else os.fspath(head),
            "head_accuracy": accuracy,
            "preset": preset,
            "drop_identical": drop_identical,
            "any_precision": any_precision,
            "identical_by": {key: each.by for key, each in same.items()},
            "tied": ties,
        },
        metrics,
        versions("faiss-cpu", "faiss-gpu", "torch"),
        samples,
        remarks=[
            *remarks_on(same, drop_identical),
            *collapse_remarks("id_train", train),
            *(line for key, each in {"id_train": train, **whole}.items() for line in left_out_remarks(key, each)),
            *unlabelled_remarks(train, "id_train"),
            *few_distinct_remarks(train, "id_train"),
            *remarks,
        ],
    )


def _judged(train: Rows, test: Rows) -> Judged:
    """Of `test`, while that is scored; where it has no labels and there is a head, of some labelled rows of `train`."""
    labelled = np.flatnonzero(train.labels >= 0)
    if (test.labels >= 0).any() or train.head is None or not len(labelled):
        return Judged(test, train, "id_test")
    some = train.pick(labelled[evenly_spread(len(labelled), _JUDGED)])
    judged = Judged(some, train, "id_train")
    for block in some.blocks_of(("embedding",)):
        judged.see(block)
    return judged


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
    if drop and share == 1:
        raise ValueError(f"every row of {rows.name} is in {others} too; give other images as {key}")
    if drop:
        return rows.pick(np.flatnonzero(~same.rows))
    if share >= _MOST_IDENTICAL and not same.by_embedding and key.startswith(("near/", "far/")):
        instead = ", or leave these out with --drop-identical" if share < 1 else ""
        raise ValueError(
            f"{same.count:,} of {len(rows):,} images of {rows.name} are in {others} too; give other images as {key}{instead}"
        )
    return rows


def measured(
    scores: Mapping[str, Float[np.ndarray, " _"]],
) -> dict[str, Estimate]:
    """Every metric from one detector's `scores` of `id_test` and of each `near/NAME`, `far/NAME` and `csid/NAME`: named
    `GROUP/NAME/METRIC`, GROUP one of `near`, `far`, `near_fs`, `far_fs`. Raises `ValueError` for NaN.
    """
    shifted = [of_set for key, of_set in scores.items() if key.startswith("csid/")]
    pools = {"": scores["id_test"]}
    if shifted:
        pools["_fs"] = np.concatenate([scores["id_test"], *shifted])
    found: dict[str, Estimate] = {}
    for suffix, id_scores in pools.items():
        groups: dict[str, list[str]] = {}
        for key in (key for key in scores if key.startswith(("near/", "far/"))):
            group, name = key.split("/")
            groups.setdefault(group + suffix, []).append(name)
            of_set = ranking(id_scores, scores[key], id_source=f"id{suffix}", ood_source=key)
            found |= {f"{group}{suffix}/{name}/{metric}": estimate for metric, estimate in of_set.items()}
        for group, names in groups.items():
            for metric in of_set:
                found[f"{group}/mean/{metric}"] = mean_of([found[f"{group}/{name}/{metric}"] for name in names])
    return found


def _ties(
    scores: Mapping[str, np.ndarray], alike: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, float]]:
    """For each OOD set the share of tied scores, in all and with rows that differ."""
    pools = {
        key: np.concatenate([scores["id_test"], scores[key]]) for key in scores if key.startswith(("near/", "far/"))
    }
    differing = {key: tied(pool, np.concatenate([alike["id_test"], alike[key]])) for key, pool in pools.items()}
    return {key: tied(pool) for key, pool in pools.items()}, differing


def unlabelled_remarks(bank: Rows, role: str) -> list[str]:
    """One line about rows without a label, where a detector has asked for the others; none where all have one."""
    unlabelled = int((bank.labels < 0).sum())
    if not (bank.asked_for_labels and unlabelled):
        return []
    return [
        f"{role} {bank.name}: {unlabelled:,} of {len(bank):,} rows have no label: detectors that need labels leave them out"
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


class _Map:
    """Two principal directions of the unit embeddings of `train`."""

    def __init__(self, train: Rows) -> None:
        moment, total = np.zeros((train.embedding_dim, train.embedding_dim)), np.zeros(train.embedding_dim)
        for block in train.blocks_of(("embedding",)):
            unit = _unit(block["embedding"])
            moment += unit.T @ unit
            total += unit.sum(axis=0)
        self._mean = total / len(train)
        covariance = moment / len(train) - np.outer(self._mean, self._mean)
        self._directions = np.linalg.eigh(covariance)[1][:, :-3:-1]

    def place(self, embedding: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
        return ((_unit(embedding) - self._mean) @ self._directions).astype(np.float32)


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))[:, None]
    return rows / np.maximum(length, np.finfo(np.float32).tiny)


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
            warnings.warn(f"{each.name} is both {first} and {key}: it counts twice", UserWarning, stacklevel=3)


def build_all(specs: Sequence[str] | str, k: int | None = None) -> dict[str, registry.Detector]:
    """The detectors by their spec as metrics have it, in the order given. Raises `ValueError` for a spec that cannot be
    read or is given twice, and when there is none."""
    built: dict[str, registry.Detector] = {}
    k_taken = False
    for spec in [specs] if isinstance(specs, str) else specs:
        short, spec, paths = _without_paths(spec)
        if short in built:
            raise ValueError(f"detector {short!r} is given twice; name it once")
        takes_k = k is not None and "k" in registry.arguments_of(spec)
        built[short] = registry.build(spec, **paths, **({"k": k} if takes_k else {}))
        k_taken |= takes_k
    if not built:
        raise ValueError(f"no detector was given; choose from {', '.join(registry.names())}")
    if k is not None and not k_taken:
        warnings.warn(f"k={k} is ignored: none of {', '.join(built)} takes it", UserWarning, stacklevel=3)
    return built


def _without_paths(spec: str) -> tuple[str, str, dict[str, str]]:
    """The spec as metrics have it: without spaces, and of a path the file's name; the spec without the arguments that
    are paths; and these. (Metric names are cut at slashes.)"""
    name, colon, tail = spec.partition(":")
    short, rest, paths = [], [], {}
    for part in tail.split(",") if colon else []:
        argument, _, text = (piece.strip() for piece in part.partition("="))
        if "/" in text and argument not in paths:
            paths[argument] = text
            short.append(f"{argument}={PurePath(text).name}")
        else:
            rest.append(part)
            short.append(part)
    bare = name + (colon + ",".join(rest) if rest or not paths else "")
    return "".join((name + colon + ",".join(short)).split()), "".join(bare.split()), paths


@contextmanager
def lost_alone(spec: str, failures: dict[str, Exception]) -> Iterator[None]:
    """What goes wrong inside is this detector's failure, and nobody else's."""
    try:
        yield
    except Exception as error:
        failures[spec] = error


def warn_of_failed(failures: Mapping[str, Exception]) -> dict[str, str]:
    """Why each detector failed, as result files have it, after a warning for each."""
    failed = {spec: f"{type(error).__name__}: {error}" for spec, error in failures.items()}
    for spec, reason in failed.items():
        warnings.warn(f"detector {spec} failed and is left out: {reason}", RuntimeWarning, stacklevel=3)
    return failed


def fit_all(
    built: Mapping[str, registry.Detector], train: Rows, scored: Sequence[Rows], failures: dict[str, Exception]
) -> dict[str, registry.Detector]:
    """The detectors that could be fitted and whose fields every store has."""
    fitted: dict[str, registry.Detector] = {}
    for spec, detector in built.items():
        with lost_alone(spec, failures):
            for rows in (train, *scored):
                for field in registry.needs(detector):
                    rows.require_field(field)
            fitted[spec] = detector.fit(train)
    return fitted


def score_all(
    fitted: dict[str, registry.Detector],
    rows: Rows,
    failures: dict[str, Exception],
    look: Callable[[Mapping[str, Float[np.ndarray, "_ d"]]], None] = lambda block: None,
) -> dict[str, Float[np.ndarray, " n"]]:
    """Each detector's scores from one pass over the rows, in which `look` sees every block too: the embeddings, and
    what other fields the detectors need.

    A detector that fails, or gives a score that is not finite, is taken out of `fitted`.
    """
    parts: dict[str, list[np.ndarray]] = {spec: [] for spec in fitted}
    fields = dict.fromkeys(field for detector in fitted.values() for field in registry.needs(detector))

    def lose(field: str, error: Exception) -> None:
        for spec in [spec for spec, detector in fitted.items() if field in registry.needs(detector)]:
            failures[spec] = error
            del fitted[spec]

    for block in rows.blocks_of(fields | {"embedding": None}, lose):
        look(block)
        for spec, detector in list(fitted.items()):
            with lost_alone(spec, failures):
                scores = detector.score(*(block[field] for field in registry.needs(detector)))
                wrong = int((~np.isfinite(scores)).sum())
                if wrong:
                    raise ValueError(
                        f"{wrong:,} scores of {rows.name} are NaN or infinite; use another detector for such rows"
                    )
                parts[spec].append(scores)
            if spec in failures:
                del fitted[spec]
    return {spec: np.concatenate(parts[spec]) for spec in fitted}


def _scores(
    fitted: dict[str, registry.Detector], where: _Map, rows: Rows, failures: dict[str, Exception], judged: Judged | None
) -> tuple[dict[str, Float[np.ndarray, " n"]], Float[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """`score_all`'s, the places on the map and a hash of each embedding, from the same pass over the rows, in which a
    classifier is judged too."""
    places: list[np.ndarray] = []
    hashes: list[int] = []

    def look(block: Mapping[str, Float[np.ndarray, "_ d"]]) -> None:
        places.append(where.place(block["embedding"]))
        hashes.extend(hash(row.tobytes()) for row in block["embedding"])
        if judged is not None:
            judged.see(block)

    return score_all(fitted, rows, failures, look), np.concatenate(places), np.array(hashes)

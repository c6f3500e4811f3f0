"""Out-of-distribution detection from stores."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from jaxtyping import Float

from evalsuite import detectors as registry
from evalsuite.head import Head
from evalsuite.metrics import bootstrap_ood_metrics, interval95, ood_metrics
from evalsuite.result import Metric, Result, versions
from evalsuite.rows import Rows, Store


def ood(
    *,
    id_train: Store,
    id_test: Store,
    near: Mapping[str, Store] | None = None,
    far: Mapping[str, Store] | None = None,
    detectors: Sequence[str] = ("knn",),
    k: int | None = None,
    head: str | os.PathLike[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """How well detectors fitted on `id_train` tell `id_test` from each near and far OOD set.

    Metrics are `DETECTOR/near|far/NAME/METRIC` and `DETECTOR/near|far/mean/METRIC` (unweighted mean over the
    group's sets), METRIC as in `evalsuite.metrics`, with bootstrap 95 % intervals; every set and detector
    sees the same resamples of `id_test`. DETECTOR is the spec as given, without spaces: `knn`, or `knn:k=1`
    to set an argument. `k` is the k of every detector that has one and whose spec does not set it; None
    leaves each its own default. `head` is a classifier saved by `evalsuite.probe`, for the detectors that need one;
    with it, logits are the classifier's even where stores have some. Failed rows are left out and counted.

    Every OOD store and `id_test` are read once, whatever the number of detectors. A detector that fails warns, is
    recorded under `parameters["failed_detectors"]`, and the others' results stand.

    Raises `ValueError` when stores come from different encoders, a set is empty or misnamed or has a row that
    is not finite, a spec cannot be read, or every detector failed.

    Yang et al. 2022, "OpenOOD", arXiv 2210.07242.
    """
    sets = _named_sets(near or {}, far or {})
    classifier = None if head is None else Head.read(head)
    train, test = Rows.of(id_train, classifier), Rows.of(id_test, classifier)
    if os.path.realpath(train.name) == os.path.realpath(test.name):
        raise ValueError(f"{test.name} is both id_train and id_test; pass held-out images as id_test")
    rows = {key: Rows.of(store, classifier) for key, store in sets.items()}
    for other in (test, *rows.values()):
        train.require_same_encoder(other)
    built = _built(detectors, k)

    failures: dict[str, Exception] = {}
    fitted = _fitted(built, train, (test, *rows.values()), failures)
    where = _Map(train)
    samples: dict[str, np.ndarray] = {}
    id_scores, samples["map/id_test"] = _scores(fitted, where, test, failures)
    scores: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for (group, name), ood_set in rows.items():
        scores[group, name], samples[f"map/{group}/{name}"] = _scores(fitted, where, ood_set, failures)
    metrics: dict[str, Metric] = {}
    for spec in fitted:
        with _lost_alone(spec, failures):
            of_sets = {key: of[spec] for key, of in scores.items()}
            metrics |= _measure(spec, id_scores[spec], of_sets, resamples, seed)
            samples[f"score/{spec}/id_test"] = id_scores[spec]
            samples |= {f"score/{spec}/{group}/{name}": found for (group, name), found in of_sets.items()}
    samples["sample_id/id_test"] = test.sample_ids.astype(np.str_)
    samples |= {f"sample_id/{group}/{name}": each.sample_ids.astype(np.str_) for (group, name), each in rows.items()}
    failed = {spec: f"{type(error).__name__}: {error}" for spec, error in failures.items()}
    for spec, reason in failed.items():
        warnings.warn(f"detector {spec} failed and is left out: {reason}", RuntimeWarning, stacklevel=2)
    if not metrics:
        reasons = "; ".join(f"{spec}: {error}" for spec, error in failures.items())
        raise ValueError(f"every detector failed ({reasons})") from next(iter(failures.values()))

    return Result(
        "ood",
        {
            "id_train": train.record(),
            "id_test": test.record(),
            "near": {name: rows["near", name].record() for name in near or {}},
            "far": {name: rows["far", name].record() for name in far or {}},
        },
        {
            "detectors": {spec: registry.parameters(detector) for spec, detector in built.items()},
            "failed_detectors": failed,
            "head": None if head is None else os.fspath(head),
            "resamples": resamples,
            "seed": seed,
        },
        metrics,
        versions("faiss-cpu", "faiss-gpu", "torch"),
        samples,
    )


class _Map:
    """Two principal directions of the unit embeddings of `train`."""

    def __init__(self, train: Rows) -> None:
        moment, total = np.zeros((train.embedding_dim, train.embedding_dim)), np.zeros(train.embedding_dim)
        for block in train.blocks():
            unit = _unit(block)
            moment += unit.T @ unit
            total += unit.sum(axis=0)
        self._mean = total / len(train)
        covariance = moment / len(train) - np.outer(self._mean, self._mean)
        self._directions = np.linalg.eigh(covariance)[1][:, :-3:-1]

    def place(self, embedding: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
        return ((_unit(embedding) - self._mean) @ self._directions).astype(np.float32)


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _named_sets(near: Mapping[str, Store], far: Mapping[str, Store]) -> dict[tuple[str, str], Store]:
    sets = {(group, name): store for group, given in (("near", near), ("far", far)) for name, store in given.items()}
    if not sets:
        raise ValueError("no OOD set was given; pass at least one as near or far, e.g. near={'tin': 'tin.zarr'}")
    for _, name in sets:
        if not name or "/" in name or name == "mean":
            raise ValueError(f"{name!r} cannot name an OOD set; use a name without '/' other than 'mean'")
    return sets


def _built(specs: Sequence[str], k: int | None) -> dict[str, registry.Detector]:
    """The detectors by their spec, in the order given."""
    built: dict[str, registry.Detector] = {}
    k_taken = False
    for spec in specs:
        spec = "".join(spec.split())
        if spec in built:
            raise ValueError(f"detector {spec!r} is given twice; name it once")
        takes_k = k is not None and "k" in registry.arguments_of(spec)
        built[spec] = registry.build(spec, **({"k": k} if takes_k else {}))
        k_taken |= takes_k
    if not built:
        raise ValueError(f"no detector was given; choose from {', '.join(registry.names())}")
    if k is not None and not k_taken:
        warnings.warn(f"k={k} is ignored: none of {', '.join(built)} takes it", UserWarning, stacklevel=3)
    return built


@contextmanager
def _lost_alone(spec: str, failures: dict[str, Exception]) -> Iterator[None]:
    """What goes wrong inside is this detector's failure, and nobody else's."""
    try:
        yield
    except Exception as error:
        failures[spec] = error


def _fitted(
    built: Mapping[str, registry.Detector], train: Rows, scored: Sequence[Rows], failures: dict[str, Exception]
) -> dict[str, registry.Detector]:
    """The detectors that could be fitted and whose fields every store has."""
    fitted: dict[str, registry.Detector] = {}
    for spec, detector in built.items():
        with _lost_alone(spec, failures):
            for rows in (train, *scored):
                for field in registry.needs(detector):
                    rows.require_field(field)
            fitted[spec] = detector.fit(train)
    return fitted


def _scores(
    fitted: dict[str, registry.Detector], where: _Map, rows: Rows, failures: dict[str, Exception]
) -> tuple[dict[str, Float[np.ndarray, " n"]], Float[np.ndarray, "n 2"]]:
    """Each detector's scores and the places on the map, from one pass over the rows.

    A detector that fails is taken out of `fitted`.
    """
    parts: dict[str, list[np.ndarray]] = {spec: [] for spec in fitted}
    places: list[np.ndarray] = []
    fields = dict.fromkeys(field for detector in fitted.values() for field in registry.needs(detector))
    for block in rows.blocks_of(fields | {"embedding": None}):
        places.append(where.place(block["embedding"]))
        for spec, detector in list(fitted.items()):
            with _lost_alone(spec, failures):
                parts[spec].append(detector.score(*(block[field] for field in registry.needs(detector))))
            if spec in failures:
                del fitted[spec]
    return {spec: np.concatenate(parts[spec]) for spec in fitted}, np.concatenate(places)


def _measure(
    spec: str,
    id_scores: Float[np.ndarray, " n"],
    scores: Mapping[tuple[str, str], Float[np.ndarray, " m"]],
    resamples: int,
    seed: int,
) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    values: dict[str, list[dict[str, float]]] = {"near": [], "far": []}
    samples: dict[str, list[dict[str, np.ndarray]]] = {"near": [], "far": []}
    for stream, ((group, name), ood_scores) in enumerate(scores.items()):
        values[group].append(ood_metrics(id_scores, ood_scores))
        samples[group].append(
            bootstrap_ood_metrics(id_scores, ood_scores, resamples=resamples, seed=seed, stream=stream)
        )
        for metric, value in values[group][-1].items():
            metrics[f"{spec}/{group}/{name}/{metric}"] = Metric(value, interval95(samples[group][-1][metric]))
    for group in values:
        for metric in values[group][0] if values[group] else ():
            value = float(np.mean([of_set[metric] for of_set in values[group]]))
            resampled = np.mean([of_set[metric] for of_set in samples[group]], axis=0)
            metrics[f"{spec}/{group}/mean/{metric}"] = Metric(value, interval95(resampled))
    return metrics

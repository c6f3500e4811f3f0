"""Detectors at work: built, fitted, every one's scores from one pass over the rows, and the metrics of these."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import PurePath

import numpy as np
from jaxtyping import Float, Int

from evalsuite import detectors as registry
from evalsuite.intervals import Estimate, mean_of, ranking
from evalsuite.judged import Judged
from evalsuite.metrics import tied
from evalsuite.result import Metric, content_of
from featcache.rows import Rows

_MOST_TIED = 0.1  # share of rows tied with others that differ, above which scores are said to saturate


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


def require_some(left: Sized, failures: Mapping[str, Exception]) -> None:
    """Raise `ValueError` when every detector failed, and nothing is left."""
    if not left:
        reasons = "; ".join(f"{spec}: {error}" for spec, error in failures.items())
        raise ValueError(f"every detector failed ({reasons})") from next(iter(failures.values()))


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
                for field in detector.needs:
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
    fields = dict.fromkeys(field for detector in fitted.values() for field in detector.needs)

    def lose(field: str, error: Exception) -> None:
        for spec in [spec for spec, detector in fitted.items() if field in detector.needs]:
            failures[spec] = error
            del fitted[spec]

    for block in rows.blocks_of(fields | {"embedding": None}, lose):
        look(block)
        for spec, detector in list(fitted.items()):
            with lost_alone(spec, failures):
                scores = detector.score(*(block[field] for field in detector.needs))
                wrong = int((~np.isfinite(scores)).sum())
                if wrong:
                    raise ValueError(
                        f"{wrong:,} scores of {rows.name} are NaN or infinite; use another detector for such rows"
                    )
                parts[spec].append(scores)
            if spec in failures:
                del fitted[spec]
    return {spec: np.concatenate(parts[spec]) for spec in fitted}


class Plane:
    """The two principal directions of the unit embeddings of `train`."""

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


def one_pass(
    fitted: dict[str, registry.Detector],
    plane: Plane,
    rows: Rows,
    failures: dict[str, Exception],
    judged: Judged | None,
) -> tuple[dict[str, Float[np.ndarray, " n"]], Float[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """`score_all`'s, the places on the map and a hash of each embedding, from the same pass over the rows, in which a
    classifier is judged too."""
    places: list[np.ndarray] = []
    hashes: list[int] = []

    def look(block: Mapping[str, Float[np.ndarray, "_ d"]]) -> None:
        places.append(plane.place(block["embedding"]))
        hashes.extend(hash(row.tobytes()) for row in block["embedding"])
        if judged is not None:
            judged.see(block)

    return score_all(fitted, rows, failures, look), np.concatenate(places), np.array(hashes)


def measure_sets(
    fitted: dict[str, registry.Detector],
    train: Rows,
    rows: Mapping[str, Rows],
    judged: Judged,
    failures: dict[str, Exception],
) -> tuple[dict[str, Metric], dict[str, np.ndarray], dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """What detectors fitted to `train` make of `id_test` and the other sets, each read once, `judged` seeing its own: metrics,
    samples as `evalsuite.ood` keeps them, and by detector and set the shares of scores tied, in all and with rows that
    differ. Raises `ValueError` when every detector failed.
    """
    plane = Plane(train)
    metrics: dict[str, Metric] = {}
    samples: dict[str, np.ndarray] = {}
    scores: dict[str, dict[str, np.ndarray]] = {}
    alike: dict[str, np.ndarray] = {}
    for key, each in rows.items():
        seen = judged if judged.role == key else None
        scores[key], samples[f"map/{key}"], alike[key] = one_pass(fitted, plane, each, failures, seen)
    of_ties: dict[str, dict[str, float]] = {}
    saturated: dict[str, dict[str, float]] = {}
    for spec in fitted:
        with lost_alone(spec, failures):
            of_sets = {key: found[spec] for key, found in scores.items()}
            metrics |= {f"{spec}/{name}": found.metric() for name, found in measured(of_sets).items()}
            of_ties[spec], saturated[spec] = ties(of_sets, alike)
            samples |= {f"score/{spec}/{key}": found for key, found in of_sets.items()}
    require_some(metrics, failures)
    samples |= {f"sample_id/{key}": each.sample_ids.astype(np.str_) for key, each in rows.items()}
    samples |= {f"content/{key}": content_of(each) for key, each in rows.items()}
    return metrics, samples, of_ties, saturated


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


def ties(
    scores: Mapping[str, np.ndarray], alike: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, float]]:
    """For each OOD set the share of tied scores, in all and with rows that differ."""
    pools = {
        key: np.concatenate([scores["id_test"], scores[key]]) for key in scores if key.startswith(("near/", "far/"))
    }
    differing = {key: tied(pool, np.concatenate([alike["id_test"], alike[key]])) for key, pool in pools.items()}
    return {key: tied(pool) for key, pool in pools.items()}, differing


def warn_of_saturated(spec: str, shares: Mapping[str, float]) -> None:
    """Where, in one of the sets, more than a tenth of the rows share their score with a row that differs."""
    worst = max(shares, key=lambda key: shares[key])
    if shares[worst] > _MOST_TIED:
        warnings.warn(
            f"detector {spec}: scores saturate: {shares[worst]:.0%} of the rows of id_test and {worst} have the "
            "score of a row with another embedding; believe ap_in and ap_out rather than aupr_in and aupr_out",
            RuntimeWarning,
            stacklevel=4,
        )

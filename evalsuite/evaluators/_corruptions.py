"""A corpus clean and under every corruption: its stores in one folder, and what is measured over them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from evalsuite.collapse import collapse_remarks
from evalsuite.evaluators.knn import knn
from evalsuite.intervals import Estimate, mean_of, ranking, share
from evalsuite.judged import Judged
from evalsuite.overlap import Overlap, overlap
from evalsuite.result import Metric, Result
from evalsuite.scores import build_all, fit_all, lost_alone, score_all
from evalsuite.sets import named_sets, opened, overlaps, records_of, remarks_on, unlabelled_remarks, without_identical
from featcache.classes import Classes, require_common
from featcache.rows import Rows, Store, left_out_remarks

if TYPE_CHECKING:
    from featcache import Corpus, Encoder, FeatureStore
else:  # `import featcache.encoder` brings torch: too slow for an annotation
    Corpus = Encoder = FeatureStore = Any

CLEAN = "clean"


def check_bank(encoder: Encoder, corpus: Corpus, bank: Rows, k: int) -> None:
    """Raise `ValueError` unless the bank is this encoder's, and of enough rows of the corpus's classes."""
    made, voters = bank.record(), bank.labelled()
    if made["fingerprint"] != encoder.fingerprint:
        raise ValueError(
            f"{made['path']} was made by encoder {made['encoder']} ({made['fingerprint']}), not {encoder.name} "
            f"({encoder.fingerprint}); extract the bank with this encoder"
        )
    labels = np.unique([corpus.label(i) for i in range(len(corpus))])
    require_common(Classes(corpus.spec, labels[labels >= 0], corpus.class_names), Classes.of(voters))
    if not 1 <= k <= len(voters):
        raise ValueError(f"k={k}: give 1 to {len(voters)}, the labelled rows of {voters.name}")


class CorruptedStores:
    """The stores of `corpus` and of each of `corrupted` (by CORRUPTION/SEVERITY) in the folder `folder`; `extract` makes
    the one at a path, of a corpus, in a precision, telling how many of its images are done. One that an earlier run finished stays."""

    def __init__(
        self,
        corpus: Corpus,
        corrupted: Mapping[str, Corpus],
        folder: str,
        size: int,
        extract: Callable[[Corpus, str, str, Callable[[Any], None]], FeatureStore],
        precision: str,
        overwrite: bool,
        progress: Callable[[int, str], None],
    ) -> None:
        self._corpora = {CLEAN: corpus, **corrupted}
        self._paths = {where: f"{folder}/{where.replace('/', '-')}@{size}.zarr" for where in corrupted}
        self._extract, self._precision, self._overwrite, self._progress = extract, precision, overwrite, progress
        if not (overwrite or _sealed(f"{folder}/{CLEAN}.zarr")):
            for where, path in self._paths.items():  # without clean ones they may be of other images than now
                if _sealed(path):
                    self._make(where, path)
        self.clean = self._make(CLEAN, f"{folder}/{CLEAN}.zarr")
        self._precision = str(self.clean.manifest.extraction.precision)  # "auto" is what the clean ones made of it

    def __len__(self) -> int:
        return len(self._corpora)

    def __iter__(self) -> Iterator[tuple[str, FeatureStore]]:
        """The clean store, then every other one, made where it is not there."""
        yield CLEAN, self.clean
        for where, path in self._paths.items():
            yield where, (None if self._overwrite else _finished(path, self.clean)) or self._make(where, path)

    def _make(self, where: str, path: str) -> FeatureStore:
        corpus = self._corpora[where]
        before = list(self._corpora).index(where) * len(corpus)
        return self._extract(corpus, path, self._precision, lambda at: self._progress(before + at.done, where))


class ScoredSets:
    """The near and far sets, scored once by detectors that are fitted once, to `bank`; without sets, no detector.

    `failures` holds the detectors that failed, as in `evalsuite.ood`; `same`, once `keep_apart` has been called, which rows of
    each set are ID.
    """

    def __init__(
        self,
        near: Mapping[str, Store],
        far: Mapping[str, Store],
        specs: Sequence[str],
        bank: Store,
        head: str | os.PathLike[str] | None,
        any_precision: bool,
    ) -> None:
        self.bank, self.sets = opened("bank", bank, named_sets(near=near, far=far), head, any_precision)
        self.failures: dict[str, Exception] = {}
        self.built = build_all(specs) if self.sets else {}
        self._fitted = fit_all(self.built, self.bank, list(self.sets.values()), self.failures)
        self._scores = {name: score_all(self._fitted, rows, self.failures) for name, rows in self.sets.items()}
        needed = {field for detector in self._fitted.values() for field in detector.needs}
        self.same: dict[str, Overlap] = {}
        self.fields = sorted({"embedding"} | needed - ({"logits"} if head is not None else set()))

    def keep_apart(self, clean: Rows, corpus: str, drop: bool) -> tuple[Overlap, Int[np.ndarray, " _"]]:
        """Which labelled images of `clean`, of this corpus, the bank has too, and the numbers of those that are to be left
        out of it. Rows that are images of the bank or of `clean` are taken out of the sets, or, where these are not to be
        dropped, only looked for.

        Raises `ValueError` as `evalsuite.ood` does, and when the bank has every image.
        """
        labelled, voters = clean.labelled(), self.bank.labelled()
        same_as_bank = overlap(labelled, [voters])
        if drop and same_as_bank.rows.all():
            raise ValueError(f"every image of {corpus} is in {voters.name} too; give another corpus or bank")
        of_id = {"id_test": clean} if self.sets else {}
        self.same = {key: of for key, of in overlaps(self.bank, of_id | self.sets).items() if key != "id_test"}
        for name, of in self.same.items():
            kept = without_identical(name, self.sets[name], of, drop)
            if drop:
                self.sets[name] = kept
                self._scores[name] = {spec: scores[~of.rows] for spec, scores in self._scores[name].items()}
        return same_as_bank, labelled.index[same_as_bank.rows] if drop else labelled.index[:0]

    def measure(self, rows: Rows, judged: Judged | None = None) -> dict[str, Estimate]:
        """`DETECTOR/near|far/NAME/auroc` with these rows as ID; `judged` sees them too."""
        found: dict[str, Estimate] = {}
        look = judged.see if judged is not None else lambda block: None
        scores = score_all(self._fitted, rows, self.failures, look) if self._fitted else {}
        for spec, of_id in scores.items():
            with lost_alone(spec, self.failures):
                for name, of_sets in self._scores.items():
                    found[f"{spec}/{name}/auroc"] = ranking(of_id, of_sets[spec], ood_source=name)["auroc"]
        return found


class Measured:
    """What was measured of the images of one store: accuracy, by `votes`, and the AUROCs with each image's influence on them."""

    def __init__(self, votes: Result, top1: str, aurocs: dict[str, Estimate]) -> None:
        self.votes, self.top1 = votes, top1
        self.ids, self.content = votes.samples["sample_id"], votes.samples["content"]
        self.correct = votes.samples[top1]
        self.chance: float = votes.parameters["chance"][top1]
        self.accuracy, self.aurocs = votes.metrics[top1], aurocs

    def forget(self, detectors: Mapping[str, Any]) -> None:
        """Leave out what these detectors gave."""
        self.aurocs = {name: of for name, of in self.aurocs.items() if name.partition("/")[0] not in detectors}

    @property
    def metrics(self) -> dict[str, Metric]:
        return {self.top1: self.accuracy} | {name: found.metric() for name, found in self.aurocs.items()}


def measure_all(
    stores: CorruptedStores, sets: ScoredSets, left_out: Int[np.ndarray, " _"], *, k: int, **options: Any
) -> tuple[dict[str, Measured], Judged]:
    """What votes (with these `options` of `evalsuite.knn`) and detectors make of every store's rows that are not `left_out`,
    store by store; and the head, judged on the clean ones."""
    measured: dict[str, Measured] = {}
    judged: Judged | None = None
    for where, store in stores:
        rows = Rows.of(store, sets.bank.head)
        rows = rows.pick(np.flatnonzero(~np.isin(rows.index, left_out)))
        votes = knn(sets.bank, rows, [k], **options)
        first = None if judged else Judged(rows, sets.bank, where)
        measured[where] = Measured(votes, f"top1@{k}", sets.measure(rows, first))
        judged = judged or first
    assert judged is not None
    return measured, judged


def with_means(
    measured: Mapping[str, Measured], names: Sequence[str], severities: Sequence[int]
) -> tuple[dict[str, Metric], dict[str, float]]:
    """Metrics and chance levels of every store, of each corruption's mean over severities and of the mean over all."""
    groups = {f"{name}/mean": [measured[f"{name}/{level}"] for level in severities] for name in names}
    groups["mean"] = [of for where, of in measured.items() if where != CLEAN]
    top1 = measured[CLEAN].top1
    metrics = {f"{where}/{what}": metric for where, of in measured.items() for what, metric in of.metrics.items()}
    chance = {f"{where}/{top1}": of.chance for where, of in measured.items()}
    for where, of in groups.items():
        metrics |= means(where, of)
        chance[f"{where}/{top1}"] = float(np.mean([each.chance for each in of]))
    return metrics, chance


def shared_means(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, tuple[Estimate, Estimate]]:
    """Mean accuracies, of A's samples and of B's, over the severities, and the corruptions too, where both have the same."""
    parts, other = _parts(a), _parts(b)
    means = {}
    for name, of in parts.items():
        if set(of) == set(other.get(name, ())):
            ours, theirs = (share(np.mean([each[part] for part in of], axis=0)) for each in (a, b))
            means[name] = ours, theirs
    return means


def _parts(samples: Iterable[str]) -> dict[str, list[str]]:
    """By mean accuracy the names of those that it is the mean of: every severity, and every corruption too."""
    parts: dict[str, list[str]] = {}
    corrupted = [found for name in samples if (found := re.fullmatch(r"([^/]+)/\d+/(top1@\d+)", name))]
    for found in corrupted:
        parts.setdefault(f"{found[1]}/mean/{found[2]}", []).append(found[0])
    for found in corrupted:
        parts.setdefault(f"mean/{found[2]}", []).append(found[0])
    return parts


def samples_of(measured: Mapping[str, Measured], attacked: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a result keeps of each image, where all stores hold the same ones."""
    if not same_images(list(measured.values())):
        return {}
    clean = measured[CLEAN]
    of_images = {f"{where}/{of.top1}": of.correct for where, of in measured.items()}
    return {"sample_id": clean.ids, "content": clean.content, **of_images, **attacked}


def records(measured: Mapping[str, Measured], same: Overlap, sets: ScoredSets) -> dict[str, Any]:
    """What a result file says of the images of every store, the `same` of the clean ones being the bank's, and of the sets."""
    found = {where: of.votes.inputs["query"] for where, of in measured.items()}
    found[CLEAN] |= {"identical": same.count}
    return found | {group: records_of(group, sets.sets, sets.same) for group in ("near", "far")}


def remarks(measured: Mapping[str, Measured], same: Overlap, sets: ScoredSets, dropped: bool) -> list[str]:
    """About images that are on both sides; what is left out of the bank and the sets, of the clean images and, in one line,
    of all corrupted ones; and what can never be right."""
    bank = sets.bank
    return [
        *same.remarks("images", "of the bank", "they vote for themselves, corrupted or not", dropped),
        *remarks_on(sets.same, dropped),
        *collapse_remarks("bank", bank),
        *left_out_remarks("bank", bank, bank.unlabelled),
        *unlabelled_remarks(bank, "bank")[: bool(sets.built)],
        *(line for name, rows in sets.sets.items() for line in left_out_remarks(name, rows)),
        *_remarks_of_votes({where: of.votes for where, of in measured.items()}),
    ]


def _remarks_of_votes(votes: Mapping[str, Result]) -> list[str]:
    said = [line.replace("query ", f"{CLEAN} ", 1) for line in votes[CLEAN].remarks if line.startswith("query ")]
    failed = {where: of.inputs["query"]["failed"] for where, of in votes.items() if where != CLEAN}
    if any(failed.values()):
        stores, rows = sum(map(bool, failed.values())), sum(failed.values())
        worst = max(failed, key=lambda where: failed[where])
        said.append(
            f"corrupted: {rows:,} rows failed in {stores:,} of {len(failed):,} stores, {failed[worst]:,} in {worst}: left out"
        )
    return said


def _sealed(path: str) -> bool:
    from featcache.store import FeatureStore
    from featcache.store.files import files_at

    return files_at(path).exists() and FeatureStore(path).sealed


def _finished(path: str, clean: FeatureStore) -> FeatureStore | None:
    """The store at `path` if an earlier run finished it.

    `clean` has just been found to be of the images as they are now, and was there before any corrupted store: so the
    images need not be corrupted again to know that nothing has changed.
    """
    from featcache.store import FeatureStore

    if not _sealed(path):
        return None
    store = FeatureStore(path)
    mine, theirs = store.manifest, clean.manifest
    same = (mine.encoder.fingerprint, mine.corpus.digest) == (theirs.encoder.fingerprint, theirs.corpus.digest)
    whole = same and len(store) == len(clean) and {*mine.fields} == {*theirs.fields}
    return store if whole and not store.verify() else None


def same_images(measured: Sequence[Measured]) -> bool:
    return all(np.array_equal(of.ids, measured[0].ids) for of in measured)


def means(where: str, measured: Sequence[Measured]) -> dict[str, Metric]:
    """Unweighted means; their intervals are over the images, each with all that was measured of it."""
    top1 = measured[0].top1
    if not same_images(measured):
        values = {top1: [float(of.correct.mean()) for of in measured]}
        values |= {name: [of.aurocs[name].value for of in measured] for name in measured[0].aurocs}
        why = "the corrupted stores hold different images: some failed"
        return {f"{where}/{name}": Metric(float(np.mean(of)), no_ci95=why) for name, of in values.items()}
    means = {top1: share(np.mean([of.correct for of in measured], axis=0))}
    means |= {name: mean_of([of.aurocs[name] for of in measured]) for name in measured[0].aurocs}
    return {f"{where}/{name}": mean.metric() for name, mean in means.items()}


def require_same_task(reference: Result, top1: str, wanted: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless `reference` has the clean accuracy and every corruption at the same severities."""
    if reference.command != "robustness":
        raise ValueError(f"the reference is a result of {reference.command}; give one of `evalsuite robustness`")
    corpus = reference.inputs.get("corpus")
    if not (isinstance(corpus, dict) and "digest" in corpus and "encoder" in reference.parameters):
        raise ValueError("the reference does not say which images or encoder it is of; measure it again")
    missing = [where for where in (CLEAN, *wanted) if f"{where}/{top1}" not in reference.metrics]
    if missing:
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ValueError(f"the reference has no {top1} for {some}; measure it with the same k, corruptions, severities")
    for name, value in parameters.items():
        if (theirs := reference.parameters.get(name, False)) != value:
            raise ValueError(f"the reference has {name} {theirs}, not {value}; give the same {name}")


def require_same_images(reference: Result, corpus: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless `reference` is of the corpus of this `spec` and `digest`."""
    if reference.inputs["corpus"]["digest"] != corpus["digest"]:
        raise ValueError(
            f"the reference is of other images or labels than {corpus['spec']}; measure it on the same corpus"
        )


def corruption_errors(
    metrics: Mapping[str, Metric],
    reference: Mapping[str, Metric],
    top1: str,
    names: Sequence[str],
    severities: Sequence[int],
) -> dict[str, Metric]:
    """Each corruption's error and added error over the reference's, and their means."""

    def errors(of: Mapping[str, Metric], name: str) -> tuple[float, float]:
        total = sum(1 - of[f"{name}/{level}/{top1}"].value for level in severities)
        return total, total - len(severities) * (1 - of[f"{CLEAN}/{top1}"].value)

    found: dict[str, Metric] = {}
    why = "a ratio of two encoders' errors on the same images"
    for which, (what, mean) in enumerate((("ce", "mce"), ("relative_ce", "relative_mce"))):
        ours, theirs = ([errors(of, name)[which] for name in names] for of in (metrics, reference))
        none = [name for name, error in zip(names, theirs, strict=True) if error <= 0]
        if none:
            adds = "adds no error to the clean one" if which else "makes no error at all"
            warnings.warn(
                f"{mean} is left out: under {', '.join(none)} the reference {adds}", RuntimeWarning, stacklevel=3
            )
            continue
        ratios = np.divide(ours, theirs)
        found |= {
            f"{name}/{what}": Metric(float(ratio), no_ci95=why) for name, ratio in zip(names, ratios, strict=True)
        }
        found[mean] = Metric(float(ratios.mean()), no_ci95=why)
    return found

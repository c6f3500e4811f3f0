"""Accuracy and OOD detection under common corruptions of the images, and accuracy under attack."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from evalsuite import detectors as registry
from evalsuite.attacks.adversarial import Pgd
from evalsuite.attacks.autoattack import AutoAttack
from evalsuite.classes import Classes, require_common
from evalsuite.collapse import collapse_remarks
from evalsuite.evaluators.knn import knn
from evalsuite.evaluators.ood import (
    build_all,
    fit_all,
    lost_alone,
    named_sets,
    overlaps,
    remarks_on,
    require_apart,
    score_all,
    unlabelled_remarks,
    warn_of_failed,
    without_identical,
)
from evalsuite.intervals import Estimate, mean_of, ranking, share
from evalsuite.judged import Judged, near_chance
from evalsuite.overlap import overlap
from evalsuite.result import Metric, Result, versions
from featcache.head import Head
from featcache.rows import Rows, Store, left_out_remarks

if TYPE_CHECKING:
    from featcache import Corpus, Encoder, FeatureStore
else:  # `import featcache.encoder` brings torch: too slow for an annotation
    Corpus = Encoder = FeatureStore = Any

CLEAN = "clean"


def robustness(
    encoder: Encoder | str,
    corpus: Corpus | str,
    bank: Store,
    out: str | os.PathLike[str],
    *,
    corruptions: Literal["all"] | Sequence[str] = "all",
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    size: int = 256,
    k: int = 20,
    temperature: float = 0.07,
    near: Mapping[str, Store] | None = None,
    far: Mapping[str, Store] | None = None,
    detectors: Sequence[str] = ("knn",),
    head: str | os.PathLike[str] | None = None,
    pgd: Sequence[float | int] = (),
    pgd_steps: int = 20,
    autoattack: Sequence[float | int] = (),
    reference: Result | str | os.PathLike[str] | None = None,
    drop_identical: bool = False,
    any_precision: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    overwrite: bool = False,
    trust_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Result:
    """How well `encoder` still labels, and tells from OOD, the images of `corpus` once they are corrupted.

    The corpus is extracted clean and under each corruption and severity (see `featcache/corpora/corrupted.py`), into
    one store each in the folder `out`, which may be a URL: a stopped run goes on where it stood, and a store that is
    finished is not made again. `bank` holds clean labelled rows of the same encoder: they vote as in `evalsuite.knn`,
    and detectors are fitted to them. `corruptions` are "all" 15 of the paper, or names. Images are corrupted at a
    shorter side of at most `size` px.

    Metrics, WHERE being `clean`, `CORRUPTION/SEVERITY`, `CORRUPTION/mean` (over severities) or `mean` (over all
    corruptions and severities), each with a 95 % interval over the images, and of the
    AUROCs over the OOD rows (`evalsuite.intervals`), encoder, bank and detectors taken as they are:

    - `WHERE/top1@K`: accuracy, in [0, 1].
    - `WHERE/DETECTOR/near|far/NAME/auroc`, where OOD stores are given (clean ones of the same encoder): how well the
      detector tells these images, as ID, from the OOD set; 0.5 is chance. DETECTOR is named, and one that fails warns
      and is recorded, as in `evalsuite.ood`; accuracies and the others' results stand.
    - `mce` and `relative_mce`, given a `reference`, which is another encoder's result (or its file) for the same
      images, severities, size and K. A corruption's error is Σ over severities of (1 − top1), over the reference's
      (`CORRUPTION/ce`); `mce` is the mean over corruptions: a ratio, ≥ 0, 1 for the reference itself, lower is better;
      the paper writes it in percent, of AlexNet. `CORRUPTION/relative_ce` and `relative_mce` are the same for the error
      that corruption adds to the clean one; a corruption that adds none to the reference leaves them out, with a warning.
    - `pgd/EPS/top1`, for each of `pgd` and for 0, where `pgd` is given: accuracy of `head` (saved by `evalsuite.probe`)
      on the clean images under an L∞ attack of at most EPS / 255 a pixel and `pgd_steps` steps, in [0, 1]; see
      `evalsuite/_adversarial.py`. It is measured anew in every run, `batch_size` images at a time.
    - `autoattack/EPS/top1`, the same under AutoAttack (see `evalsuite/_autoattack.py`), where `autoattack` is given.

    Images that the bank has too vote for themselves, corrupted or not, and OOD images that the bank or the corpus has are
    ID: they are counted, as `inputs["clean"]["identical"]` and in each set's record, and remarked on; `drop_identical`
    leaves them out, as `evalsuite.knn` and `evalsuite.ood` do.

    Rows that fail are left out and counted: an image with a side under 32 px cannot be corrupted. `progress` is called
    with (images done, of how many, what is being extracted). `batch_size`, `workers`, `device`, `precision` and
    `overwrite` are `featcache.extract`'s, `trust_code` is `featcache.load_encoder`'s; with "auto", the bank's precision
    and batch size serve all. Stores of another precision are refused, unless `any_precision` will do.

    `resamples` has no effect: intervals are no longer drawn at random.

    Raises `ValueError` when a corruption is unknown, a severity out of 1…5, the corpus unlabelled or of
    other classes than `bank`, `bank` or an OOD store another encoder's, k larger than the bank, an OOD set misnamed or the bank itself, a detector's spec cannot be
    read, the reference of something else, or an attack given without a head that knows the corpus's classes.

    Hendrycks & Dietterich 2019, arXiv 1903.12261; Madry et al. 2018, arXiv 1706.06083.
    """
    import featcache
    from featcache.corpora.corrupted import COMMON, Corrupted

    names = COMMON if corruptions == "all" else tuple(dict.fromkeys(corruptions))
    severities = tuple(sorted(dict.fromkeys(severities)))
    if not (names and severities):
        raise ValueError("give at least one corruption and one severity")
    corpus = featcache.open_corpus(corpus) if isinstance(corpus, str) else corpus
    corrupted = {f"{name}/{level}": Corrupted(corpus, name, level, size) for name in names for level in severities}
    if corpus.class_names is None:
        raise ValueError(f"{corpus.spec} has no labels; give a corpus with class sub-folders or a label column")
    encoder = featcache.load_encoder(encoder, trust_code=trust_code) if isinstance(encoder, str) else encoder
    sets = _OodSets(near or {}, far or {}, detectors, bank, head, any_precision)
    voters = sets.bank.labelled()
    if sets.bank.record()["fingerprint"] != encoder.fingerprint:
        made = sets.bank.record()
        raise ValueError(
            f"{made['path']} was made by encoder {made['encoder']} ({made['fingerprint']}), not {encoder.name} "
            f"({encoder.fingerprint}); extract the bank with this encoder"
        )
    labels = np.unique([corpus.label(i) for i in range(len(corpus))])
    require_common(Classes(corpus.spec, labels[labels >= 0], corpus.class_names), Classes.of(voters))
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive, finite number, got {temperature}")
    if not 1 <= k <= len(voters):
        raise ValueError(f"k={k}: give 1 to {len(voters)}, the labelled rows of {voters.name}")
    if precision == "auto":  # the bank's, and its batches: other rows would not be comparable
        precision = sets.bank.extraction.precision or "auto"
        batch_size = batch_size or sets.bank.extraction.batch_size
    attacks = [Pgd(pgd, pgd_steps, head, corpus)] if pgd else []
    attacks += [AutoAttack(autoattack, head, corpus)] if autoattack else []
    top1 = f"top1@{k}"
    if reference is not None:
        reference = reference if isinstance(reference, Result) else Result.read(reference)
        task = {"size": size, "temperature": temperature, "drop_identical": drop_identical}
        _require_same_task(reference, top1, list(corrupted), task)

    failed = warn_of_failed(sets.failures)
    images, folder = {CLEAN: corpus, **corrupted}, os.fspath(out).rstrip("/")
    total = (len(images) + sum(len(attack.epsilons) for attack in attacks)) * len(corpus)

    def extracted(where: str, path: str, precision: str) -> FeatureStore:
        before = list(images).index(where) * len(corpus)
        return featcache.extract(
            images[where],
            encoder,
            path,
            fields=sets.fields,
            batch_size=batch_size,
            workers=workers,
            device=device,
            precision=precision,
            overwrite=overwrite,
            progress=lambda at: progress(before + at.done, total, where) if progress else None,
        )

    paths = {where: f"{folder}/{where.replace('/', '-')}@{size}.zarr" for where in corrupted}
    if not (overwrite or _sealed(f"{folder}/{CLEAN}.zarr")):
        for where, path in paths.items():  # corrupted images without clean ones may be of other images than now
            if _sealed(path):
                extracted(where, path, precision)
    clean = extracted(CLEAN, f"{folder}/{CLEAN}.zarr", precision)
    digest = clean.manifest.corpus.digest
    if reference is not None and reference.inputs["corpus"]["digest"] != digest:
        raise ValueError(
            f"the reference is of other images or labels than {corpus.spec}; measure it on the same corpus"
        )
    cleaned = Rows.of(clean)
    sets.bank.require_same_encoder(cleaned, any_precision)
    labelled = cleaned.labelled()
    same = overlap(labelled, [voters])
    if drop_identical and same.rows.all():
        raise ValueError(f"every image of {corpus.spec} is in {voters.name} too; give another corpus or bank")
    left_out = labelled.index[same.rows] if drop_identical else labelled.index[:0]
    sets.keep_apart(clean, drop_identical)
    votes: dict[str, Result] = {}
    aurocs: dict[str, dict[str, Estimate]] = {}
    accuracy: dict[str, Any] | None = None
    of_head: list[str] = []
    inputs: dict[str, Any] = {"bank": voters.record(), "corpus": {"spec": corpus.spec, "digest": digest}}
    for where in images:
        store = clean
        if where != CLEAN:
            finished = None if overwrite else _finished(paths[where], clean)
            store = finished or extracted(where, paths[where], str(clean.manifest.extraction.precision))
        rows = Rows.of(store, sets.bank.head)
        rows = rows.pick(np.flatnonzero(~np.isin(rows.index, left_out)))
        votes[where] = knn(sets.bank, rows, [k], temperature, any_precision=any_precision, seed=seed)
        judged = Judged(rows, sets.bank, CLEAN) if where == CLEAN else None
        aurocs[where] = sets.measure(rows, judged)
        accuracy, of_head = judged.record() if judged is not None else (accuracy, of_head)
        inputs[where] = votes[where].inputs["query"]
    inputs[CLEAN] |= {"identical": same.count}
    failed |= warn_of_failed({spec: error for spec, error in sets.failures.items() if spec not in failed})
    measured = {
        where: _Measured(votes[where], top1, {n: of for n, of in found.items() if n.partition("/")[0] not in failed})
        for where, found in aurocs.items()
    }

    metrics = {f"{where}/{what}": metric for where, of in measured.items() for what, metric in of.metrics.items()}
    for name in names:
        metrics |= _means(f"{name}/mean", [measured[f"{name}/{level}"] for level in severities])
    metrics |= _means("mean", [measured[where] for where in corrupted])
    attacked: dict[str, np.ndarray] = {}
    attacked_rows = np.setdiff1d(labelled.index, left_out)
    done_before = len(images) * len(corpus)
    for attack in attacks:

        def told(done: int, name: str = attack.name, before: int = done_before) -> None:
            if progress:
                progress(before + done, total, name)

        attacked |= attack.measure(
            encoder,
            attacked_rows,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            device=device,
            progress=told,
        )
        done_before += len(attack.epsilons) * len(corpus)
    chance = dict.fromkeys(attacked, attacks[0].chance(attacked_rows) if attacks else 0.0)
    for attack in attacks[:1]:  # any other starts from the same
        clean_accuracy, by_chance = float(attacked[f"{attack.name}/0/top1"].mean()), attack.chance(attacked_rows)
        if near_chance(clean_accuracy, by_chance, len(attacked_rows)):
            of_head.append(
                f"head {attack.head.name}: right on {clean_accuracy:.4f} of the clean images, next to chance "
                f"({by_chance:.4f}): its classes, their order or its encoder seem to be others, and the attack says nothing"
            )
    metrics |= {name: share(correct).metric() for name, correct in attacked.items()}
    if reference is not None:
        metrics |= _corruption_errors(metrics, reference.metrics, top1, names, severities)

    chance |= {f"{where}/{top1}": of.chance for where, of in measured.items()}
    for name in names:
        chance[f"{name}/mean/{top1}"] = float(np.mean([measured[f"{name}/{level}"].chance for level in severities]))
    chance[f"mean/{top1}"] = float(np.mean([measured[where].chance for where in corrupted]))
    samples = {}
    if _same_images(list(measured.values())):
        samples = {"sample_id": measured[CLEAN].ids, "content": measured[CLEAN].content}
        samples |= {f"{where}/{top1}": of.correct for where, of in measured.items()}
        samples |= attacked
    return Result(
        "robustness",
        inputs | {"near": sets.record("near"), "far": sets.record("far")},
        {
            "encoder": encoder.name,
            "corruptions": list(names),
            "severities": list(severities),
            "size": size,
            "k": k,
            "temperature": temperature,
            "detectors": {spec: registry.parameters(detector) for spec, detector in sets.built.items()},
            "failed_detectors": failed,
            "head": None if head is None else os.fspath(head),
            "head_accuracy": accuracy,
            "pgd": None,
            "autoattack": None,
            **{attack.name: attack.record() for attack in attacks},
            "reference": None if reference is None else reference.parameters["encoder"],
            "drop_identical": drop_identical,
            "any_precision": any_precision,
            "identical_by": {"clean": same.by} | {name: each.by for name, each in sets.same.items()},
            "seed": seed,
            "chance": chance,
        },
        metrics,
        versions("imagecorruptions-imaug", "scikit-image", "opencv-python", "faiss-cpu", "faiss-gpu", "torch"),
        samples,
        remarks=[
            *same.remarks("images", "of the bank", "they vote for themselves, corrupted or not", drop_identical),
            *remarks_on(sets.same, drop_identical),
            *collapse_remarks("bank", sets.bank),
            *left_out_remarks("bank", sets.bank, len(sets.bank) - len(voters)),
            *unlabelled_remarks(sets.bank, "bank")[: bool(sets.built)],
            *sets.remarks(),
            *_remarks_of_votes(votes),
            *of_head,
        ],
    )


class _Measured:
    """What was measured of the images of one store: metrics, and the AUROCs with each image's influence on them."""

    def __init__(self, votes: Result, top1: str, aurocs: dict[str, Estimate]) -> None:
        self.top1 = top1
        self.ids, self.content = votes.samples["sample_id"], votes.samples["content"]
        self.correct = votes.samples[top1]
        self.chance: float = votes.parameters["chance"][top1]
        self.aurocs = aurocs
        self.metrics = {top1: votes.metrics[top1]} | {name: found.metric() for name, found in aurocs.items()}


class _OodSets:
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
        self.head = None if head is None else Head.read(head)
        self.bank = Rows.of(bank, self.head)
        self._sets = {name: Rows.of(store, self.head) for name, store in named_sets(near=near, far=far).items()}
        require_apart({"bank": self.bank} | self._sets)
        for rows in self._sets.values():
            self.bank.require_same_encoder(rows, any_precision)
        self.failures: dict[str, Exception] = {}
        self.built = build_all(specs) if self._sets else {}
        self._fitted = fit_all(self.built, self.bank, list(self._sets.values()), self.failures)
        self._scores = {name: score_all(self._fitted, rows, self.failures) for name, rows in self._sets.items()}
        needed = {field for detector in self._fitted.values() for field in registry.needs(detector)}
        self.fields = sorted({"embedding"} | needed - ({"logits"} if head is not None else set()))

    def record(self, group: str) -> dict[str, Any]:
        """What a result file says about the sets of one group, by name."""
        return {
            name.removeprefix(f"{group}/"): rows.record() | {"identical": self.same[name].count}
            for name, rows in self._sets.items()
            if name.startswith(f"{group}/")
        }

    def keep_apart(self, clean: FeatureStore, drop: bool) -> None:
        """Take rows that are images of the bank or of `clean` out of the sets, or, where these are not to be dropped,
        only look for them. Raises `ValueError` as `evalsuite.ood` does."""
        of_id = {"id_test": Rows.of(clean, self.head)} if self._sets else {}
        self.same = {key: of for key, of in overlaps(self.bank, of_id | self._sets).items() if key != "id_test"}
        for name, of in self.same.items():
            kept = without_identical(name, self._sets[name], of, drop)
            if drop:
                self._sets[name] = kept
                self._scores[name] = {spec: scores[~of.rows] for spec, scores in self._scores[name].items()}

    def remarks(self) -> list[str]:
        """About rows of the sets that are left out."""
        return [line for name, rows in self._sets.items() for line in left_out_remarks(name, rows)]

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


def _remarks_of_votes(votes: Mapping[str, Result]) -> list[str]:
    """What is left out of the clean images and, in one line, of all corrupted ones; and what can never be right."""
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


def _same_images(measured: Sequence[_Measured]) -> bool:
    return all(np.array_equal(of.ids, measured[0].ids) for of in measured)


def _means(where: str, measured: Sequence[_Measured]) -> dict[str, Metric]:
    """Unweighted means; their intervals are over the images, each with all that was measured of it."""
    top1 = measured[0].top1
    if not _same_images(measured):
        values = {top1: [float(of.correct.mean()) for of in measured]}
        values |= {name: [of.aurocs[name].value for of in measured] for name in measured[0].aurocs}
        why = "the corrupted stores hold different images: some failed"
        return {f"{where}/{name}": Metric(float(np.mean(of)), no_ci95=why) for name, of in values.items()}
    means = {top1: share(np.mean([of.correct for of in measured], axis=0))}
    means |= {name: mean_of([of.aurocs[name] for of in measured]) for name in measured[0].aurocs}
    return {f"{where}/{name}": mean.metric() for name, mean in means.items()}


def _require_same_task(reference: Result, top1: str, wanted: Sequence[str], parameters: Mapping[str, Any]) -> None:
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


def _corruption_errors(
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

"""Accuracy and OOD detection under common corruptions of the images, and accuracy under attack."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal

from evalsuite.evaluators import (
    Estimate,
    OfStores,
    Result,
    Samples,
    Store,
    Table,
    function,
    named_stores,
    numbers,
    option,
    python_only,
    store,
)

if TYPE_CHECKING:
    from evalsuite.attacks import Attacks
    from evalsuite.evaluators._corruptions import CorruptedStores, ScoredSets
    from featcache import Corpus, Encoder, FeatureStore
else:  # NumPy, torch: too slow for an annotation
    Attacks = CorruptedStores = Corpus = Encoder = FeatureStore = ScoredSets = Any


def _span(text: str) -> list[int]:
    """`1-5`, or a comma list."""
    if ends := re.fullmatch(r"(\d+)-(\d+)", text):
        return list(range(int(ends[1]), int(ends[2]) + 1))
    return numbers(text, int)


@dataclass(frozen=True)
class Robustness(OfStores):
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
      `evalsuite/attacks/adversarial.py`. It is measured anew in every run, `batch_size` images at a time.
    - `autoattack/EPS/top1`, the same under AutoAttack (see `evalsuite/attacks/autoattack.py`), where `autoattack` is given.

    Images that the bank has too vote for themselves, corrupted or not, and OOD images that the bank or the corpus has are
    ID: they are counted, as `inputs["clean"]["identical"]` and in each set's record, and remarked on; `drop_identical`
    leaves them out, as `evalsuite.knn` and `evalsuite.ood` do.

    Rows that fail are left out and counted: an image with a side under 32 px cannot be corrupted. `progress` is called
    with (images done, of how many, what is being extracted). `batch_size`, `workers`, `device`, `precision` and
    `overwrite` are `featcache.extract`'s, `trust_code` is `featcache.load_encoder`'s; with "auto", the bank's precision
    and batch size serve all. Stores of another precision are refused, unless `any_precision` will do.

    `resamples` has no effect: intervals are no longer drawn at random.

    Raises `ValueError` when a corruption is unknown, a severity out of 1…5, the corpus unlabelled or of
    other classes than `bank`, `bank` or an OOD store another encoder's, k larger than the bank, an OOD set misnamed or
    the bank itself, a detector's spec cannot be
    read, the reference of something else, or an attack given without a head that knows the corpus's classes.

    Hendrycks & Dietterich 2019, arXiv 1903.12261; Madry et al. 2018, arXiv 1706.06083.
    """

    order = 50
    summary = "Accuracy, and AUROC, on corrupted images. Run it again to resume: finished stores are not made again."
    examples = (
        "evalsuite robustness --encoder run:runs/a --corpus photos-test/ --bank student.zarr --out runs/a/corrupted",
    )
    unit = "images"
    drawing = "evalsuite.evaluators._robustness_charts"
    outcomes = ("k", "failed_detectors", "head_accuracy", "encoder", "reference", "autoattack")

    encoder: Encoder | str = option(
        help="A teacher, as for `featcache extract`, or run:PATH. Libraries: {featcache.models}.", metavar="SPEC"
    )
    corpus: Corpus | str = option(
        help="Labelled images, as for `featcache extract`. Kinds: {featcache.corpora}.", metavar="CORPUS"
    )
    bank: Store = store("The encoder's clean labelled rows, which vote.")
    out: str | os.PathLike[str] = option(help="Where a store for each corruption and severity goes.", metavar="FOLDER")
    _: KW_ONLY
    corruptions: Literal["all"] | Sequence[str] = option(
        "all",
        "'all' are ImageNet-C's 15; its 4 extra ones by name.",
        metavar="all|NAME,…",
        read=lambda text: text if text == "all" else text.split(","),
    )
    severities: Sequence[int] = option(
        (1, 2, 3, 4, 5),
        "A range or a comma list; 5 is the heaviest.",
        names=("--severity",),
        metavar="1-5",
        shown="1-5",
        read=_span,
    )
    size: int = option(256, "Larger images are reduced to this shorter side, then corrupted.", least=32, metavar="PX")
    k: int = option(20, "Neighbours that vote.", least=1)
    temperature: float = python_only(0.07)
    near: Mapping[str, Store] | None = named_stores("A near-OOD set, clean; repeat for more.")
    far: Mapping[str, Store] | None = named_stores("A far-OOD set, clean; repeat for more.")
    detectors: Sequence[str] = option(
        ("knn",),
        "Repeat for more; NAME:k=1 sets an argument. Names: {evalsuite.detectors}.",
        names=("--detector",),
        metavar="NAME",
        shown="knn",
    )
    head: str | os.PathLike[str] | None = option(
        None, "A classifier, for detectors and attacks: `evalsuite probe`'s.", metavar="FILE", file="read"
    )
    pgd: Sequence[float | int] = option(
        (), "Attack encoder and --head: at most so many 1/255ths a pixel, such as 4,8.", metavar="EPS,…"
    )
    pgd_steps: int | None = option(None, "Of each attack.", least=1, shown="20")
    autoattack: Sequence[float | int] = option(
        (), "The same with AutoAttack: stronger, and far slower.", metavar="EPS,…"
    )
    reference: Result | str | os.PathLike[str] | None = option(
        None, "Another encoder's result, that errors are relative to: mce.", metavar="RESULT.json", file="read"
    )
    seed: int = option(0, "Of where --pgd starts.", least=0)
    batch_size: int | None = python_only(None)
    workers: int | None = None
    device: str = "auto"
    precision: str = python_only("auto")
    overwrite: bool = option(False, "Make all stores in --out anew.")
    trust_code: bool = False
    progress: Callable[[int, int, str], None] | None = None

    def __post_init__(self) -> None:
        if self.pgd_steps is not None and not self.pgd:
            raise ValueError(f"--pgd-steps {self.pgd_steps}: nothing is attacked; give --pgd EPS too")
        if self.detectors and tuple(self.detectors) != ("knn",) and not (self.near or self.far):
            raise ValueError(
                f"--detector {self.detectors[0]}: there is no OOD set to tell apart; give --near or --far NAME=STORE too"
            )
        if not (self.corruptions and self.severities):
            raise ValueError("give at least one corruption and one severity")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive, finite number, got {self.temperature}")

    def run(self) -> Result:
        import featcache
        from evalsuite.attacks import Attacks
        from evalsuite.evaluators import _corruptions as under
        from featcache.corpora.corrupted import Corrupted

        names, levels = self._conditions
        corpus = featcache.open_corpus(self.corpus) if isinstance(self.corpus, str) else self.corpus
        corrupted = {f"{name}/{level}": Corrupted(corpus, name, level, self.size) for name in names for level in levels}
        if corpus.class_names is None:
            raise ValueError(f"{corpus.spec} has no labels; give a corpus with class sub-folders or a label column")
        encoder = self.encoder
        if isinstance(encoder, str):
            encoder = featcache.load_encoder(encoder, trust_code=self.trust_code)
        sets = under.ScoredSets(
            self.near or {}, self.far or {}, self.detectors, self.bank, self.head, self.any_precision
        )
        under.check_bank(encoder, corpus, sets.bank, self.k)
        pgd_steps = 20 if self.pgd_steps is None else self.pgd_steps
        attacks = Attacks(self.pgd, pgd_steps, self.autoattack, self.head, corpus)
        reference = self._reference(list(corrupted))
        total = (1 + len(corrupted)) * len(corpus) + len(attacks)

        def told(done: int, what: str) -> None:
            if self.progress:
                self.progress(done, total, what)

        return self._measured(encoder, corpus, corrupted, sets, attacks, reference, told)

    @property
    def _conditions(self) -> tuple[Sequence[str], Sequence[int]]:
        """The corruptions and the severities of each."""
        from featcache.corpora.corrupted import COMMON

        names = COMMON if self.corruptions == "all" else tuple(dict.fromkeys(self.corruptions))
        return names, tuple(sorted(dict.fromkeys(self.severities)))

    def _reference(self, corrupted: Sequence[str]) -> Result | None:
        from evalsuite.evaluators._corruptions import require_same_task
        from evalsuite.result import Result

        if self.reference is None:
            return None
        found = self.reference if isinstance(self.reference, Result) else Result.read(self.reference)
        task = {"size": self.size, "temperature": self.temperature, "drop_identical": self.drop_identical}
        require_same_task(found, f"top1@{self.k}", corrupted, task)
        return found

    def _stores(
        self,
        encoder: Encoder,
        corpus: Corpus,
        corrupted: Mapping[str, Corpus],
        sets: ScoredSets,
        told: Callable[..., None],
    ) -> tuple[CorruptedStores, int | None]:
        """The stores, and the batch size: the bank's, as its precision, unless others are asked for, as rows of others would
        not be comparable."""
        import featcache
        from evalsuite.evaluators._corruptions import CorruptedStores

        precision, batch_size = self.precision, self.batch_size
        if precision == "auto":
            precision = sets.bank.extraction.precision or "auto"
            batch_size = batch_size or sets.bank.extraction.batch_size

        def extract(images: Corpus, path: str, precision: str, progress: Callable[[Any], None]) -> FeatureStore:
            return featcache.extract(
                images, encoder, path, fields=sets.fields, batch_size=batch_size, workers=self.workers,
                device=self.device, precision=precision, overwrite=self.overwrite, progress=progress,
            )  # fmt: skip

        folder = os.fspath(self.out).rstrip("/")
        stores = CorruptedStores(corpus, corrupted, folder, self.size, extract, precision, self.overwrite, told)
        return stores, batch_size

    def _measured(
        self,
        encoder: Encoder,
        corpus: Corpus,
        corrupted: Mapping[str, Corpus],
        sets: ScoredSets,
        attacks: Attacks,
        reference: Result | None,
        told: Callable[[int, str], None],
    ) -> Result:
        import numpy as np

        from evalsuite.detectors import choices
        from evalsuite.evaluators import _corruptions as under
        from evalsuite.intervals import share
        from evalsuite.result import Result, versions
        from evalsuite.scores import warn_of_failed
        from featcache.rows import Rows

        (names, levels), voters, failed = self._conditions, sets.bank.labelled(), warn_of_failed(sets.failures)
        stores, batch_size = self._stores(encoder, corpus, corrupted, sets, told)
        images = {"spec": corpus.spec, "digest": stores.clean.manifest.corpus.digest}
        if reference is not None:
            under.require_same_images(reference, images)
        clean = Rows.of(stores.clean)
        sets.bank.require_same_encoder(clean, self.any_precision)
        same, left_out = sets.keep_apart(clean, corpus.spec, self.drop_identical)
        options = {"temperature": self.temperature, "any_precision": self.any_precision, "seed": self.seed}
        measured, judged = under.measure_all(stores, sets, left_out, k=self.k, **options)
        failed |= warn_of_failed({spec: error for spec, error in sets.failures.items() if spec not in failed})
        for each in measured.values():
            each.forget(failed)
        accuracy, of_head = judged.record()
        metrics, chance = under.with_means(measured, names, levels)
        done = len(stores) * len(corpus)
        attacked, by_chance, of_attacks = attacks.measure(
            encoder, np.setdiff1d(clean.labelled().index, left_out), lambda at, what: told(done + at, what),
            seed=self.seed, batch_size=batch_size, workers=self.workers, device=self.device,
        )  # fmt: skip
        metrics |= {name: share(correct).metric() for name, correct in attacked.items()}
        if reference is not None:
            metrics |= under.corruption_errors(metrics, reference.metrics, f"top1@{self.k}", names, levels)
        return Result(
            "robustness",
            {"bank": voters.record(), "corpus": images, **under.records(measured, same, sets)},
            {"encoder": encoder.name, "corruptions": list(names), "severities": list(levels)}
            | {"size": self.size, "k": self.k, "temperature": self.temperature}
            | choices(sets.built, failed, self.head)
            | {"head_accuracy": accuracy, "pgd": None, "autoattack": None, **attacks.records}
            | {"reference": None if reference is None else reference.parameters["encoder"]}
            | self.comparing({under.CLEAN: same.by} | {name: each.by for name, each in sets.same.items()})
            | {"seed": self.seed, "chance": by_chance | chance},
            metrics,
            versions("imagecorruptions-imaug", "scikit-image", "opencv-python", "faiss-cpu", "faiss-gpu", "torch"),
            under.samples_of(measured, attacked),
            remarks=[*under.remarks(measured, same, sets, self.drop_identical), *of_head, *of_attacks],
        )

    @classmethod
    def compared(cls, a: Samples, b: Samples) -> dict[str, tuple[Estimate, Estimate]]:
        """Accuracies, and their means over severities, and over corruptions too, where both have the same ones."""
        from evalsuite.evaluators._corruptions import shared_means

        return super().compared(a, b) | shared_means(a, b)

    @classmethod
    def settings(cls, parameters: Mapping[str, Any]) -> dict[str, Any]:
        found = super().settings(parameters)
        if pgd := found.pop("pgd", None):
            found["pgd steps"] = pgd["steps"]
        return found

    @classmethod
    def table(cls, result: Result) -> Table:
        """A row a metric and corruption, a column a severity; intervals are in the JSON."""
        from evalsuite.charts import Table
        from evalsuite.table import as_note, rows_line

        levels = [*map(str, result.parameters["severities"]), "mean"]
        rows: dict[str, dict[str, str]] = {}
        for name, metric in result.metrics.items():
            corruption, _, rest = name.partition("/")
            level, _, what = rest.partition("/")
            if corruption in ("pgd", "autoattack") or level not in levels:
                corruption, level, what = name, "mean", ""  # of the clean images, attacked, or a mean over all
            rows.setdefault(f"{corruption}/{what}".rstrip("/"), {})[level] = f"{metric.value:.4f}"
        cells = [[row, *(values.get(level, "") for level in levels)] for row, values in rows.items()]
        stores = {name: result.inputs.get(name) for name in ("bank", "clean", "near", "far")}
        return Table(title="robustness", columns=["", *levels], rows=cells, note=as_note(rows_line(stores)))


robustness = function(Robustness)

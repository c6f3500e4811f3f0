"""Does each system that learns a task earn its keep? Every one against what it has to beat, on CIFAR-10 (10,000 images).

Per system (--systems) a table: top-1 and NLL on test images, mean ± sd over seeds, and against each rival the paired
difference of top-1 with its standard error over seeds, and in how many seeds the interval of `evalsuite compare` leaves out 0.
Learning rate, then the method's own settings, are chosen for every arm alike on training images that no run learns from; the test
images are looked at once. Equal steps for all arms unless the arm's name says otherwise. Interrupted, it goes on where it was; processes
may work on different systems at once.

    python benchmarks/tasks.py --systems kd,ega,sskd,checkpoints,reffakd --seeds 0,1,2
"""

import os
import shutil
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faithfulness import mean_sd
from landmarks import first
from photographs import arguments, unpacked
from torch.nn import functional as F

import distill
import evalsuite
import featcache
from distill.training.progress import FitProgress
from distill.training.run import Run
from distill.training.schedule import make_optimizer
from featcache.student import open_student

EXACT: dict[str, Any] = {"precision": "fp32", "device": "cpu"}
VIEWS: dict[str, Any] = {"augment": "rrc", "views": 4, "crop_area": 0.6}
RATES = (1e-3, 3e-3, 1e-2)
CORRUPTIONS = ("gaussian_noise", "defocus_blur", "contrast", "jpeg_compression")
SHIFTED = {
    "automobile": ("n02814533", "n03100240", "n03670208", "n04285008"),
    "bird": ("n01855672", "n02002724", "n02056570", "n02058221"),
    "cat": ("n02123045", "n02123394", "n02124075"),
    "dog": ("n02085620", "n02094433", "n02099601", "n02099712", "n02106662", "n02113799"),
    "frog": ("n01641577", "n01644900"),
    "ship": ("n03662601",),
    "truck": ("n03796401",),
}
"""Tiny-ImageNet's classes by the class of CIFAR-10 that they belong to; airplanes, deer and horses it has none."""
Figures = dict[str, tuple[evalsuite.Result, str]]
"""By title, a result and which of its metrics is meant."""
CHOOSING = 1000
"""Seed of the runs by which settings are chosen."""


@dataclass(frozen=True)
class Arm:
    """One way to train a student.

    Attributes:
        stores: names of teacher stores, see `Bench.store`.
        tried: settings that are chosen among, after the learning rate.
        passes: epochs are multiplied with this.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    stores: Sequence[str] = ("lite0",)
    tried: Sequence[Mapping[str, Any]] = ({},)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[float] = RATES
    passes: float = 1


CE = Arm("ce", tried=({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.2}, {"mixup": 0.2}, {"cutmix": 1.0}))
KD = tuple(
    {"alpha": alpha, "temperature": t} for alpha, t in ((0.9, 4.0), (0.9, 2.0), (0.5, 4.0), (0.5, 2.0), (0.5, 1.0))
)
TEMPERATURES = tuple({"temperature": t} for t in (2.0, 4.0))
SHARES = tuple({"alpha": alpha, "temperature": t} for alpha, t in ((0.1, 1.0), (0.5, 1.0), (0.1, 5.0), (0.5, 5.0)))
SYSTEMS: dict[str, dict[str, Arm]] = {
    "kd": {
        "kd": Arm("kd", tried=KD, settings={"head": "lite0"}),
        "ce": CE,
    },
    "ega": {
        "ega": Arm("ega", tried=tuple({"beta": b} for b in (0.02, 0.1, 0.5))),
        "ce": CE,
        "node only": Arm("ega", {"edge": 0.0}, tried=tuple({"beta": b} for b in (0.02, 0.1, 0.5))),
        "edge only": Arm("ega", {"node": 0.0}, tried=tuple({"beta": b} for b in (0.02, 0.1, 0.5))),
        "rkd, then linear": Arm("rkd", tried=({}, {"match": 1.0})),
    },
    "reffakd": {
        "table at 0.03": Arm("reffakd", {"table_temperature": 0.03}, stores=("autoencoder",), tried=SHARES),
        "published table": Arm("reffakd", stores=("autoencoder",), tried=SHARES),
        "classes permuted": Arm(
            "reffakd", {"table_temperature": 0.03, "control": "shuffled"}, stores=("autoencoder",), tried=SHARES
        ),
        "smoothing of equal entropy": Arm(
            "reffakd", {"table_temperature": 0.03, "control": "even"}, stores=("autoencoder",), tried=SHARES
        ),
        "ce": CE,
    },
    "sskd": {
        "sskd": Arm("sskd", stores=("resnet56-rotated",)),
        "ce": replace(CE, stores=("resnet56",)),
        "kd": Arm("kd", stores=("resnet56",), tried=TEMPERATURES),
        "kd on the same rotated views": Arm("sskd", {"relation": 0.0}, stores=("resnet56-rotated",)),
        "kd, as many images": Arm("kd", stores=("resnet56",), tried=TEMPERATURES, passes=4),
    },
    "checkpoints": {
        name: Arm("kd", {"alpha": 0.5}, stores=(store,), tried=tuple({"temperature": t} for t in (2.0, 5.0, 10.0)))
        for name, store in {
            "half-way checkpoint": "checkpoint-half",
            "last checkpoint": "checkpoint-last",
            "mean of both": "checkpoint-mean",
        }.items()
    },
    "akd": {
        "λ 0.5, early-stopped teacher": Arm("akd", {"lam": 0.5}, stores=("robust-early",)),
        "λ 0.5, last teacher": Arm("akd", {"lam": 0.5}, stores=("robust-last",)),
        "λ 1, early-stopped teacher": Arm("akd", {"lam": 1.0}, stores=("robust-early",)),
        "adversarial training": Arm("akd", {"lam": 0.0}),
        "smoothing of equal entropy": Arm("akd", {"lam": 0.0, "smoothing": "equal"}),
    },
    "dad": {
        "dad": Arm("dad", stores=("resnet56", "attacked")),
        "reconstructed, not attacked": Arm("dad", stores=("resnet56", "reconstructed")),
        "kd, as many images": Arm("kd", stores=("resnet56",), tried=({"temperature": 4.0, "alpha": 0.5},), passes=2),
    },
}


class Bench:
    """Images, teachers' stores and runs of one work folder."""

    def __init__(
        self,
        data: Path,
        work: Path,
        epochs: int,
        images: int,
        student: str,
        rates: Sequence[float] = (),
        autoattack: bool = False,
    ):
        self.stores, self.runs, self.epochs, self.student = work / "stores", work / "runs", epochs, student
        self.rates, self.autoattack = rates, autoattack
        whole = unpacked("cifar10-train-0", data, work)
        self.train, self.count = str(first(whole, images) if images else whole), images or 10_000
        self.spare = unpacked("cifar10-train-1", data, work)
        self.test = str(unpacked("cifar10-test-half", data, work))
        self.shifted = _shifted(unpacked("tiny-imagenet-val-half", data, work))
        resnets = work / "cifar10-resnets"
        if not resnets.exists():
            zipfile.ZipFile(data / "cifar10-resnets.zip").extractall(resnets)
        os.environ["CIFAR_RESNETS"] = str(resnets)

    def store(self, name: str) -> featcache.FeatureStore:
        """Of the training images, by what made it: "lite0", "resnet56", "resnet56-rotated"."""
        if name == "lite0":
            return featcache.extract(self.train, "builtin/efficientnet_lite0", self._path(name), **EXACT, **VIEWS)
        if name == "autoencoder":
            return self._of_autoencoder()
        if name.startswith("checkpoint"):
            return self._of_checkpoints(name)
        if name.startswith("robust"):
            return self._of_robust(name)
        views = {"augment": "rotate4_crop", "views": 12} if name.endswith("rotated") else VIEWS
        return featcache.extract(
            self.corpus(name),
            "cifar_resnets:resnet56",
            self._path(name),
            fields=("embedding", "logits"),
            **EXACT,
            **views,
        )

    def _of_autoencoder(self) -> featcache.FeatureStore:
        """What one trained on these images makes of them."""
        out = self.runs / f"tasks-{self.count}-autoencoder-{self.epochs}"
        run = distill.fit(
            self.store("lite0"), self.train, out=out, student="conv_autoencoder", method="autoencoder", image_size=32,
            epochs=self.epochs, batch_size=64, precision="bf16", device="cpu", resume=True, workers=1,
        )  # fmt: skip
        return featcache.extract(self.train, f"run:{run.path}", self._path("autoencoder"), **EXACT, **VIEWS)

    def corpus(self, store: str) -> str:
        epsilon = {"attacked": 2, "reconstructed": 0}.get(store)
        return (
            self.train if epsilon is None else f"adversarial:cifar_resnets:resnet56::@epsilon={epsilon}::{self.train}"
        )

    def _of_robust(self, name: str) -> featcache.FeatureStore:
        """Logits of a student that was trained adversarially, half-way and at the end."""
        run = self.fit(SYSTEMS["akd"]["adversarial training"], CHOOSING - 1, 3e-3, {}, keep_checkpoints=self.epochs / 2)
        at = self.epochs / 2 if name.endswith("early") else self.epochs
        fields = ("embedding", "logits")
        return featcache.extract(
            self.train, f"run:{run.path}@epoch={at:g}", self._path(name), fields=fields, **EXACT, **VIEWS
        )

    def _smoothing(self) -> float:
        """Of the entropy that the targets of AKD have, λ 0.5."""
        run = self.fit(SYSTEMS["akd"]["λ 0.5, early-stopped teacher"], CHOOSING, 3e-3, {}, holdout=0.1)
        return float(run.metrics[-1]["mapping/equal_smoothing"])

    def _of_checkpoints(self, name: str) -> featcache.FeatureStore:
        """Logits of a `tiny` trained with labels, half-way and at the end, or their mean."""
        if name.endswith("mean"):
            both = [self.store("checkpoint-half"), self.store("checkpoint-last")]
            return featcache.derive("mean", both, self._path(name), of="logits")
        epochs = 2 * self.epochs
        out = self.runs / f"tasks-{self.count}-checkpoints-{epochs}"
        lite = self.store("lite0")
        run = distill.fit(
            lite, self.train, out=out, student="tiny", method="ce", epochs=epochs, batch_size=64, precision="bf16",
            keep_checkpoints=self.epochs, device="cpu", resume=True, workers=1,
        )  # fmt: skip
        at = self.epochs if name.endswith("half") else epochs
        teacher = f"run:{run.path}@epoch={at}"
        fields = ("embedding", "logits")
        return featcache.extract(self.train, teacher, self._path(name), fields=fields, **EXACT, **VIEWS)

    def _path(self, name: str) -> Path:
        return self.stores / f"tasks-{name}-train{'' if self.count == 10_000 else self.count}.zarr"

    def head(self) -> str:
        """A probe on Lite0's embeddings of the training images."""
        path = self.stores / f"tasks-lite0-head-{self.count}.safetensors"
        if not path.exists():
            test = featcache.extract(
                self.test, "builtin/efficientnet_lite0", self.stores / "tasks-lite0-test.zarr", **EXACT
            )
            evalsuite.probe(self.store("lite0"), test, save=path)
        return str(path)

    def fit(self, arm: Arm, seed: int, lr: float, extra: Mapping[str, Any], **given: Any) -> Run:
        options = {**arm.options, **extra}
        if options.get("smoothing") == "equal":
            options["smoothing"] = self._smoothing()
        named = "-".join([arm.method, *arm.stores, *(f"{key}={value}" for key, value in options.items())])
        epochs = max(1, round(self.epochs * arm.passes))
        settings = dict(arm.settings)
        if "head" in settings:
            settings["head"] = self.head()
        out = self.runs / f"tasks-{self.count}-{self.student.replace(':', '-')}-{named}-{epochs}-{lr}-{seed}"
        stores = [self.store(name) for name in arm.stores]
        return distill.fit(
            stores, [self.corpus(name) for name in arm.stores], out=out, student=self.student, image_size=32, method=arm.method,
            method_options=options, epochs=epochs, batch_size=64, lr=lr, seed=seed, precision="bf16", device="cpu",
            resume=True, workers=1, **settings, **given,
        )  # fmt: skip

    def chosen(self, arm: Arm) -> tuple[float, Mapping[str, Any]]:
        """Learning rate and settings of the best accuracy on 2,000 other training images, or on 500 that are attacked."""

        def held_out(lr: float, extra: Mapping[str, Any]) -> float:
            run = self.with_classifier(arm, CHOOSING, self.fit(arm, CHOOSING, lr, extra, holdout=0.1))
            if arm.method == "akd":
                value = values(self.attacked(run, first(self.spare, 500), steps=10))["PGD-10"]
            else:
                some = str(first(self.spare, 2000))
                value = self.classified(run, some, "spare").metrics["classify/top1"].value
            print(f"  held out: {arm.method} {dict(arm.options)} lr {lr} {dict(extra)}: {value:.3f}", flush=True)
            return value

        rates = self.rates or arm.rates
        if len(rates) == len(arm.tried) == 1:
            return rates[0], arm.tried[0]

        def best_rate(extra: Mapping[str, Any]) -> float:
            found = {lr: held_out(lr, extra) for lr in rates}
            while not self.rates and (lr := max(found, key=lambda each: found[each])) in (
                least := min(found),
                max(found),
            ):
                further = lr / 3 if lr == least else lr * 3  # the best may lie beyond
                found[further] = held_out(further, extra)
            return max(found, key=lambda each: found[each])

        lr = best_rate(arm.tried[0])
        if len(arm.tried) == 1:
            return lr, arm.tried[0]
        extra = max(arm.tried, key=lambda extra: held_out(lr, extra))
        return lr if self.rates else best_rate(extra), extra

    def with_classifier(self, arm: Arm, seed: int, run: Run) -> Run:
        """The run; of a student of a space, one that fits a linear classifier of labels to it."""
        if (run.path / "head.safetensors").exists():
            return run
        return distill.fit(
            self.store(arm.stores[0]), self.train, out=run.path.with_name(run.path.name + "-linear"),
            student=f"run:{run.path}", method="ce", train="linear", epochs=2, batch_size=64, lr=1e-2, seed=seed,
            precision="bf16", device="cpu", resume=True, workers=1,
        )  # fmt: skip

    def classified(self, run: Run, corpus: str, name: str) -> evalsuite.Result:
        fields, out = ("embedding", "logits"), self.stores / f"{run.path.name}-{name}.zarr"
        return evalsuite.classify(featcache.extract(corpus, f"run:{run.path}", out, fields=fields, **EXACT))

    def clean(self, run: Run) -> Figures:
        """On the test images."""
        found = self.classified(run, self.test, "test")
        return {"top-1": (found, "classify/top1"), "NLL": (found, "classify/nll")}

    def corrupted(self, run: Run) -> Figures:
        """On 1,000 test images, clean and (one result after the other) corrupted; and on Tiny-ImageNet's of the same classes."""
        some = str(first(Path(self.test), 1000))
        found = {"corrupted": self.classified(run, f"corrupted:{CORRUPTIONS[0]}:3:{some}", CORRUPTIONS[0])}
        found |= {name: self.classified(run, f"corrupted:{name}:3:{some}", name) for name in CORRUPTIONS[1:]}
        found["Tiny-ImageNet"] = self.classified(run, self.shifted, "shifted")
        found["top-1"] = self.classified(run, self.test, "test")
        return {name: (each, "classify/top1") for name, each in found.items()}

    def attacked(self, run: Run, corpus: Path | None = None, steps: int = 20) -> Figures:
        """On 1,000 test images, clean and attacked; on 100 of them by AutoAttack where that is asked for."""
        autoattack = [8] if self.autoattack and not corpus else []
        corpus = corpus or first(Path(self.test), 1000)
        robust = self._robust(run, corpus, pgd=[8], pgd_steps=steps)
        found = {f"PGD-{steps}": (robust, "pgd/8/top1"), "clean": (robust, "pgd/0/top1")}
        if autoattack:
            few = self._robust(run, first(Path(self.test), 100), autoattack=autoattack)
            found["AutoAttack"] = (few, "autoattack/8/top1")
        return found

    def _robust(self, run: Run, corpus: Path, **attacks: Any) -> evalsuite.Result:
        encoder = f"run:{run.path}"
        bank = featcache.extract(str(corpus), encoder, self.stores / f"{run.path.name}-{corpus.name}.zarr", **EXACT)
        return evalsuite.robustness(
            encoder, str(corpus), bank, self.stores / f"{run.path.name}-{corpus.name}-robustness", **attacks,
            corruptions=["brightness"], severities=[1], any_precision=True,
            head=run.path / "head.safetensors", device="cpu", precision="fp32",
        )  # fmt: skip


def _shifted(images: Path) -> str:
    """Tiny-ImageNet's images as classes of CIFAR-10."""
    out = images.with_name(f"{images.name}-as-cifar10")
    if not out.exists():
        partial = out.with_name(f"{out.name}.partial")
        for name, of in SHIFTED.items():
            for each in of:
                shutil.copytree(images / each, partial / name, dirs_exist_ok=True)
        partial.rename(out)
    return str(out)


MEASURES: dict[str, Callable[[Bench, Run], Figures]] = {"akd": Bench.attacked, "dad": Bench.corrupted}
"""Where not the accuracy on clean test images is what counts. The first figure is what arms are compared by."""


def shown(system: str, bench: Bench, arms: Mapping[str, Arm], seeds: Sequence[int]) -> Iterator[str]:
    """The system's table in Markdown, line by line; its first arm is compared with the others."""
    found: dict[str, list[Figures]] = {}
    settings = {}
    for name, arm in arms.items():
        lr, extra = bench.chosen(arm)
        settings[name] = ", ".join([f"lr {lr:.2g}", *(f"{key} {value:g}" for key, value in extra.items())])
        runs = [bench.with_classifier(arm, seed, bench.fit(arm, seed, lr, extra)) for seed in seeds]
        found[name] = [MEASURES.get(system, Bench.clean)(bench, run) for run in runs]
        print(f"{system}: {name}: {[values(each) for each in found[name]]}", flush=True)
    titles = list(values(found[name][0]))
    yield f"| {system} | {' | '.join(titles)} | difference in {titles[0]} ± SE | intervals without 0 | chosen |"
    yield f"|{'---|' * (len(titles) + 4)}"
    ours = found[next(iter(arms))]
    for name, theirs in found.items():
        cells = [mean_sd([values(each)[title] for each in theirs]) for title in titles]
        cells += ["", ""] if theirs is ours else against(theirs, ours, titles[0])
        yield f"| {name} | {' | '.join(cells)} | {settings[name]} |"


def values(figures: Figures) -> dict[str, float]:
    return {title: result.metrics[key].value for title, (result, key) in figures.items()}


def against(theirs: Sequence[Figures], ours: Sequence[Figures], title: str) -> list[str]:
    """Mean difference of a figure, paired by seed; and in how many seeds the interval over the images leaves out 0."""
    apart = [
        evalsuite.compare(a[title][0], b[title][0]).metrics[a[title][1]] for a, b in zip(theirs, ours, strict=True)
    ]
    of_seeds = np.array([each.value for each in apart])
    error = of_seeds.std(ddof=1) / np.sqrt(len(of_seeds)) if len(of_seeds) > 1 else float("nan")
    clear = sum(each.ci95 is not None and (each.ci95[0] > 0 or each.ci95[1] < 0) for each in apart)
    return [f"{of_seeds.mean():+.4f} ± {error:.4f}", f"{clear} of {len(apart)}"]


class StepClock:
    """Progress callback of a fit of two epochs: seconds of processor time of a step of the second."""

    def __init__(self) -> None:
        self.half = self.last = (0, 0.0)

    def __call__(self, at: FitProgress) -> None:
        if at.stage == "training":
            self.last = at.done, time.process_time()
            if 2 * at.done == at.total:
                self.half = self.last

    @property
    def seconds(self) -> float:
        return (self.last[1] - self.half[1]) / (self.last[0] - self.half[0])


def costs(bench: Bench, rounds: int = 3) -> Iterator[str]:
    """Processor time of a step (not of the first epoch, which decodes), in units of a bare step of the same student and batch on
    tensors in memory: one run, in turn, medians of the pairs. A step of `sskd` is of 64 images in four rotations."""
    student = open_student(bench.student, classes=[*"abcdefghij"], image_size=32)
    student.to(memory_format=torch.channels_last).train()
    optimizer = make_optimizer((student,), distill.FitConfig(student=bench.student, batch_size=64))
    images = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    label = torch.arange(64) % 10

    def bare(steps: int = 60) -> float:
        for step in range(-3, steps):
            if step == 0:
                began = time.process_time()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                logits = student(images, ("logits",))["logits"]
            F.cross_entropy(logits.float(), label).backward()
            optimizer.step()
        return (time.process_time() - began) / steps

    yield "| method | processor time of a step / of a bare step |"
    yield "|---|---|"
    for name, arm in {name: arm for arms in SYSTEMS.values() for name, arm in arms.items()}.items():
        arm = replace(arm, passes=2 / bench.epochs)
        ratios = []
        for number in range(rounds):
            before, clock = bare(), StepClock()
            run = bench.fit(arm, CHOOSING + 1 + number, 1e-3, arm.tried[0], progress=clock)
            ratios.append(clock.seconds / ((before + bare()) / 2))
            shutil.rmtree(run.path)
        yield f"| {name} | {statistics.median(ratios):.2f} ({', '.join(f'{each:.2f}' for each in ratios)}) |"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument(
        "--arm", action="append", help="this one of the systems' arms, may be repeated; all when left out"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=0, help="the first so many, as many of each class; all when 0")
    parser.add_argument("--student", default="tiny")
    parser.add_argument(
        "--rates", default="", help="learning rates to try, no others; else until the best is not the last"
    )
    parser.add_argument("--autoattack", action="store_true", help="of akd: 100 test images under AutoAttack too (slow)")
    parser.add_argument("--costs", action="store_true", help="measure what an epoch of each arm takes instead")
    options = parser.parse_args()
    rates = [float(each) for each in options.rates.split(",") if each]
    bench = Bench(
        options.data, options.work, options.epochs, options.images, options.student, rates, options.autoattack
    )
    if options.costs:
        for line in costs(bench):
            print(line, flush=True)
        return
    for system in options.systems.split(","):
        arms = {name: arm for name, arm in SYSTEMS[system].items() if name in (options.arm or SYSTEMS[system])}
        lines = list(shown(system, bench, arms, [int(seed) for seed in options.seeds.split(",")]))
        print("\n" + "\n".join(lines) + "\n", flush=True)


if __name__ == "__main__":
    main()

"""Is a distilled student a better start than none? Fine-tuned with labels, against training from scratch at equal cost.

CIFAR-10 (10,000 images), student `tiny`, teacher EfficientNet-Lite0. Each student is first distilled without labels (`--method`), then
its classifier is trained alone, or all of it, or all with a learning rate that falls from layer to layer. From scratch it is trained with
labels for as many image passes as both together. The learning rate is chosen for every arm on a tenth of the training images; the
test images are looked at once. Prints a Markdown table, mean ± sd over seeds. Interrupted, it goes on where it was.

    python benchmarks/finetune.py --seeds 0,1,2
    python benchmarks/finetune.py --seeds 0,1,2 --labelled 1000
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from faithfulness import mean_sd
from photographs import arguments
from tasks import CHOOSING, EXACT, Bench

import distill
import evalsuite
import featcache
from distill.training.run import Run


@dataclass(frozen=True)
class Arm:
    """One way to get a classifier.

    Attributes:
        distilled: whether it begins from the distilled student.
        rates: learning rates that are chosen among.
    """

    rates: Sequence[float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    distilled: bool = True


class Tuning:
    """The runs of one seed after another.

    Attributes:
        whole, labelled: images for distillation, and those of them with labels.
        epochs, after: of distillation, and of what follows.
    """

    def __init__(self, whole: Bench, labelled: Bench, method: str, epochs: int, after: int):
        self.whole, self.labelled, self.method, self.epochs, self.after = whole, labelled, method, epochs, after

    @property
    def scratch(self) -> int:
        """Epochs of the labelled images that are as many image passes as both stages together."""
        return self.after + round(self.epochs * self.whole.count / self.labelled.count)

    def fit(self, bench: Bench, name: str, seed: int, **given: Any) -> Run:
        out = bench.runs / f"finetune-{bench.count}-{name}-{seed}"
        return distill.fit(
            bench.store("lite0"), bench.train, out=out, batch_size=64, seed=seed, precision="bf16", device="cpu",
            resume=True, workers=1, **given,
        )  # fmt: skip

    def trained(self, name: str, arm: Arm, seed: int, lr: float) -> Run:
        """With labels; where the learning rate is chosen, but for a tenth of the images."""
        choosing: dict[str, Any] = {"holdout": 0.1} if seed == CHOOSING else {}
        student, epochs, first = "tiny", self.scratch, ""
        if arm.distilled:
            first = f"{self.method}-{self.epochs}-"
            # Of the same seed and share the same images are held out, where all have labels.
            start = self.fit(
                self.whole, f"{self.method}-{self.epochs}", seed, student="tiny", image_size=32, method=self.method,
                epochs=self.epochs, **choosing,
            )  # fmt: skip
            student, epochs = f"run:{start.path}", self.after
        named = f"{first}{name.replace(',', '').replace(' ', '-')}-{epochs}-{lr}"
        return self.fit(
            self.labelled, named, seed, student=student, method="ce", epochs=epochs, lr=lr, **arm.settings, **choosing
        )

    def chosen(self, name: str, arm: Arm) -> float:
        """The learning rate of the best held-out accuracy."""
        if len(arm.rates) == 1:
            return arm.rates[0]
        found = {lr: self.trained(name, arm, CHOOSING, lr).metrics[-1]["holdout/top1"] for lr in arm.rates}
        print(f"  held out: {name}: " + ", ".join(f"lr {lr:g} {top1:.3f}" for lr, top1 in found.items()), flush=True)
        return max(found, key=lambda lr: found[lr])

    def measured(self, name: str, arm: Arm, seed: int, lr: float) -> evalsuite.Result:
        """On the test images."""
        run = self.trained(name, arm, seed, lr)
        store = featcache.extract(
            self.whole.test, f"run:{run.path}", self.whole.stores / f"{run.path.name}-test.zarr",
            fields=("embedding", "logits"), **EXACT,
        )  # fmt: skip
        return evalsuite.classify(store)


def shown(tuning: Tuning, arms: Mapping[str, Arm], seeds: Sequence[int]) -> None:
    """The table, each arm against the first."""
    results: dict[str, list[evalsuite.Result]] = {}
    rates = {name: tuning.chosen(name, arm) for name, arm in arms.items()}
    for name, arm in arms.items():
        results[name] = [tuning.measured(name, arm, seed, rates[name]) for seed in seeds]
    base = next(iter(results.values()))
    passes = tuning.scratch * tuning.labelled.count
    print(f"\n{passes:,} image passes each\n\n| | top-1 | NLL | top-1 above scratch ± SE | lr |\n|---|---|---|---|---|")
    for name, found in results.items():
        of = {key: mean_sd([result.metrics[f"classify/{key}"].value for result in found]) for key in ("top1", "nll")}
        apart = [ours.metrics["classify/top1"].value - theirs.metrics["classify/top1"].value for ours, theirs in zip(found, base, strict=True)]  # fmt: skip
        error = f" ± {np.std(apart, ddof=1) / np.sqrt(len(apart)):.4f}" if len(apart) > 1 else ""
        against = "" if found is base else f"{np.mean(apart):+.4f}{error}"
        print(f"| {name} | {of['top1']} | {of['nll']} | {against} | {rates[name]:g} |", flush=True)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--method", default="centred", help="of distillation")
    parser.add_argument("--epochs", type=int, default=8, help="of distillation")
    parser.add_argument("--after", type=int, default=4, help="epochs of fine-tuning")
    parser.add_argument("--images", type=int, default=0, help="the first so many, as many of each class; all when 0")
    parser.add_argument("--labelled", type=int, default=0, help="of so many images labels are used; of all when 0")
    parser.add_argument("--layer-decay", type=float, default=0.75)
    parser.add_argument("--quick", action="store_true", help="does it run? 400 images, one learning rate, one seed")
    options = parser.parse_args()
    images, seeds = (400, [0]) if options.quick else (options.images, [int(seed) for seed in options.seeds.split(",")])
    whole, labelled = (
        Bench(options.data, options.work, options.epochs, count, "tiny")
        for count in (images, options.labelled or images)
    )
    arms = {
        "from scratch": Arm((1e-3, 3e-3, 1e-2), distilled=False),
        "distilled, then linear": Arm((3e-3, 1e-2, 3e-2), {"train": "linear"}),
        "distilled, then all": Arm((3e-4, 1e-3, 3e-3)),
        "distilled, then all by layer": Arm((3e-4, 1e-3, 3e-3), {"layer_decay": options.layer_decay}),
    }
    if options.quick:
        arms = {name: Arm(arm.rates[1:2], arm.settings, arm.distilled) for name, arm in arms.items()}
        options.epochs, options.after = 2, 1
    shown(Tuning(whole, labelled, options.method, options.epochs, options.after), arms, seeds)


if __name__ == "__main__":
    main()

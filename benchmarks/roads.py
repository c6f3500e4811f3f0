"""Does SSLKD help a small student find roads, when only 8 of 64 aerial photographs have a mask?

Two networks of ImageNet weights (EfficientNet-Lite0 under a feature pyramid) are fine-tuned on the 8 masks, their dense logits kept once
in stores and put to a vote; a U-Net of 59 k parameters then learns of masks alone (`supervised`), of its own pseudo-labels
(`self-training`), of the teachers' (`hard labels`), of their probabilities too (`no features`), and by all four terms (`sslkd`); all
with the learning rate of `--rates` by which `supervised` finds most roads, at the first seed, on 8 photographs that are not measured on
afterwards (their masks train nobody). IoU of roads on 16 other photographs, mean ± sd over seeds, and differences on the same photographs and seeds with
95 % bootstrap intervals over the photographs.

    python benchmarks/roads.py --data roads/ --seeds 0,1,2
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import distill
import evalsuite
import featcache

ROAD = "per_class/road/segmentation/iou"
OFF = {"feature": 0.0, "probability": 0.0}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("ce", {}),
    "self-training": ("sslkd", OFF),
    "hard labels": ("sslkd", OFF),
    "no features": ("sslkd", {"feature": 0.0}),
    "sslkd": ("sslkd", {}),
}
FIELDS = ("embedding", "tokens", "dense")


class Roads:
    """Photographs, what is made of them, and how it is measured."""

    def __init__(self, asked: argparse.Namespace):
        self.asked, self.work = asked, asked.work
        self.work.mkdir(parents=True, exist_ok=True)
        lists = {
            name: (asked.data / f"{name}.txt").read_text().split()
            for name in ("labelled-8", "labelled-16", "validation-16")
        }
        every = sorted(path.name for path in (asked.data / "train/images").iterdir())
        parts = {
            "few": lists["labelled-8"],
            "tune": [name for name in lists["labelled-16"] if name not in lists["labelled-8"]],
            "test": lists["validation-16"],
            "train": [name for name in every if name not in lists["validation-16"]],
        }
        for name, ids in parts.items():
            (self.work / f"{name}.txt").write_text("\n".join(ids) + "\n")
        encoder = featcache.load_encoder("builtin/efficientnet_lite0@size=64")
        encoder.preprocess = replace(encoder.preprocess, resize=64)  # the whole photograph
        stores = {
            name: self._extract(encoder, name, f"base-{name}", ["embedding"], seen=True) for name in ("few", "train")
        }
        self.base = stores

    def spec(self, part: str, labelled: str | None = None) -> str:
        options = (
            f"@images=train/images@masks=train/masks@list={self.work.resolve() / part}.txt@classes=field:0,road:255"
        )
        return f"masks:{self.asked.data}{options}" + (
            f"@labelled={self.work.resolve() / labelled}.txt" if labelled else ""
        )

    def _extract(self, encoder: Any, part: str, name: str, fields: Sequence[str], seen: bool = False) -> Any:
        views = {"views": self.asked.views, "augment": "rotate4_crop"} if seen else {}
        given: dict[str, Any] = {"fields": list(fields), "device": "cpu", "precision": "fp32", "workers": 1, **views}
        return featcache.extract(self.spec(part), encoder, self.work / f"{name}.zarr", **given)

    def fit(self, store: Any, part: str, out: str, labelled: str | None, epochs: int, **given: Any) -> str:
        common = {"device": "cpu", "workers": 1, "resume": True, "image_size": self.asked.size, "epochs": epochs}
        run = distill.fit(store, self.spec(part, labelled), out=self.work / out, **common, **given)
        return f"run:{run.path}"

    def teachers(self, seed: int) -> tuple[Any, list[evalsuite.Result]]:
        """The vote of two, fine-tuned from different seeds, and what each finds by itself."""
        stores, found = [], []
        for number in range(2):
            name = f"teacher-{seed}-{number}"
            given = {"student": "fpn/tf_efficientnet_lite0:builtin", "method": "ce", "lr": 1e-3, "batch_size": 8}
            run = self.fit(
                self.base["few"], "few", name, None, self.asked.teacher_steps, seed=10 * seed + number, **given
            )
            stores.append(self._extract(run, "train", f"{name}-train", FIELDS, seen=True))
            found.append(self.measure(run, name, "test"))
        return featcache.derive("vote", stores, self.work / f"vote-{seed}.zarr", of="dense"), found

    def measure(self, run: str, name: str, part: str) -> evalsuite.Result:
        store = self._extract(run, part, f"{name}-{part}", ["embedding", "dense"])
        return evalsuite.segmentation(store, masks=self.spec(part))

    def student(self, system: str, rate: float, seed: int, votes: Any) -> str:
        """As many steps as the others, whatever it learns of."""
        (method, options), name = SYSTEMS[system], f"{system.replace(' ', '-')}-{rate:g}-{seed}"
        given: dict[str, Any] = {
            "student": "unet/11",
            "seed": seed,
            "lr": rate,
            "method": method,
            "method_options": options,
        }
        if system == "supervised":
            return self.fit(self.base["few"], "few", name, None, self.asked.steps, batch_size=8, **given)
        if system == "self-training":
            earlier = self.student("supervised", rate, seed, votes)
            votes = self._extract(earlier, "train", f"{name}-own", FIELDS, seen=True)
        return self.fit(votes, "train", name, "few", self.asked.steps // 4, batch_size=16, **given)


def paired(a: list[evalsuite.Result], b: list[evalsuite.Result]) -> str:
    """B − A of the mean IoU over seeds, over photographs drawn again, the same for all; and by seed."""
    counts = [np.stack([each.samples[ROAD].astype(float) for each in side]) for side in (a, b)]  # seeds, photographs, 3

    def iou(sums: np.ndarray) -> np.ndarray:
        right, taken, of = np.moveaxis(sums, -1, 0)
        found: np.ndarray = right / (taken + of - right)
        return found

    apart = iou(counts[1].sum(axis=1)) - iou(counts[0].sum(axis=1))
    n = counts[0].shape[1]
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=4000).astype(float)
    drawn = [iou(np.einsum("dn,snk->dsk", times, side)).mean(axis=1) for side in counts]
    low, high = np.quantile(drawn[1] - drawn[0], [0.025, 0.975])
    error = apart.std(ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else float("nan")
    return f"{apart.mean():+.3f} (standard error over seeds {error:.3f}; over photographs {low:+.3f} to {high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="A folder with train/images, train/masks and the three lists."
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--teacher-seeds", default="0,1,2", help="Of pairs of teachers, which the seeds take in turn.")
    parser.add_argument("--rates", default="0.003,0.01")
    parser.add_argument("--size", type=int, default=160, help="px of all networks' images.")
    parser.add_argument("--views", type=int, default=8, help="Kept of each photograph: turned, mirrored, moved.")
    parser.add_argument("--teacher-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/roads"))
    asked = parser.parse_args()
    roads, began = Roads(asked), time.process_time()
    seeds, rates = list(map(int, asked.seeds.split(","))), list(map(float, asked.rates.split(",")))
    pairs = [roads.teachers(seed) for seed in map(int, asked.teacher_seeds.split(","))]
    found = {"one teacher": [each for _, of_teachers in pairs for each in of_teachers]}
    print(f"teachers: {', '.join(f'{each.metrics[ROAD].value:.3f}' for each in found['one teacher'])}", flush=True)
    of = {
        rate: roads.measure(roads.student("supervised", rate, seeds[0], None), f"tried-{rate:g}", "tune")
        for rate in rates
    }
    rate = max(rates, key=lambda rate: of[rate].metrics[ROAD].value)
    print(
        f"learning rate {rate:g} of {', '.join(f'{r:g} ({of[r].metrics[ROAD].value:.3f})' for r in rates)}", flush=True
    )
    for number, seed in enumerate(seeds):
        for system in SYSTEMS:
            run = roads.student(system, rate, seed, pairs[number % len(pairs)][0])
            found.setdefault(system, []).append(roads.measure(run, Path(run[4:]).name, "test"))
            print(f"seed {seed}: {system} {found[system][-1].metrics[ROAD].value:.3f}", flush=True)
    print(
        "\n| system | IoU of roads | mean IoU | IoU of roads, less supervised's | sslkd's, less this |\n|---|---|---|---|---|"
    )
    for system, results in found.items():
        told = []
        for metric in (ROAD, "segmentation/iou"):
            values = [each.metrics[metric].value for each in results]
            told.append(
                f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
            )
        same = len(results) == len(seeds) and system in SYSTEMS
        told.append(paired(found["supervised"], results) if same and system != "supervised" else "")
        told.append(paired(results, found["sslkd"]) if same and system != "sslkd" else "")
        print(f"| {system} | {' | '.join(told)} |")
    print(f"\n{time.process_time() - began:.0f} CPU-seconds")


if __name__ == "__main__":
    main()

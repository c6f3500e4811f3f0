"""Learning to Augment: does a selector that learns beat cheaper ones? SST-2 sentences as a pool for customer reviews (CR).

At 100, 200 and 500 labels of CR: accuracy on the 2,063 others, mean ± sd over seeds, each of which draws labels and pool anew; of
students trained on the labels alone, by KD without a pool, and with 1,500 SST-2 sentences of which a selector keeps 500: random,
all 1,500, the most similar to the labelled ones, and learned by REINFORCE from 200 more labels. These 200 are also trained on by
"similarity, and the reward's labels" and "labels alone, and the reward's": what a selector has to beat. The teacher is a logistic
regression on MiniLM-L6's embeddings of the labelled ones; a student's own part is a bag of tokens. Equal steps for all arms.

The learning rate is chosen by arm on 200 other labels, at 200 labels and one draw more (or is the one given). Interrupted, it goes on where it was.

    python benchmarks/learn_to_augment.py --seeds 0,1,2
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from _texts import EXACT, Texts, against, arguments, mean_sd, sentences, table, written

import evalsuite
import featcache
from distill.training.held_out import split
from distill.training.run import Run
from featcache.corpora import open_corpus

REWARDED, TESTED_FROM, OTHERS, POOL, KEEP = 200, 700, 3000, 1500, 500
RATES, BATCH = (3e-3, 1e-2), 64
CHOOSING = 1000
"""Seed of the draw by which learning rates are chosen."""


@dataclass(frozen=True)
class Arm:
    """One way to train a student; of all `labels` + 200, or of the former alone.

    Attributes:
        pool: whether the pool's store trains too.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pool: bool = False
    every_label: bool = False


def selecting(selector: str, every_label: bool = False) -> Arm:
    return Arm("learn_to_augment", {"selector": selector, "keep": KEEP}, True, every_label)


ARMS: Mapping[str, Arm] = {
    "learned": selecting("learned"),
    "labels alone": Arm("ce"),
    "kd without a pool": Arm("kd", {"alpha": 0.5, "temperature": 2.0}),
    "random": selecting("random"),
    "whole pool": selecting("all"),
    "most similar": selecting("similarity"),
    "labels alone, and the reward's": Arm("ce", every_label=True),
    "most similar, and the reward's labels": selecting("similarity", every_label=True),
}


class Bench(Texts):
    """Of one draw: rows of CR in an order, the first 200 for the reward, the labelled ones next, from 700 on tested."""

    def __init__(self, data: Path, work: Path, student: str, steps: int):
        super().__init__(work, student, steps)
        self.reviews = sentences(data, "cr/train") + sentences(data, "cr/dev")
        of_films = sentences(data, "sst2/train")
        some = np.random.default_rng([CHOOSING, 1]).permutation(len(of_films))[
            :OTHERS
        ]  # embedded once, whatever the seed
        self.others = [of_films[i] for i in some]
        self.store("sst2", written(work / "tables" / "sst2.csv", self.others, labels=False))
        everything = written(work / "tables" / "cr.csv", self.reviews)
        self.store("cr", everything)  # stores of parts take their rows from here

    def table(self, part: str, seed: int, labels: int = 0) -> tuple[str, str]:
        """The name of a store, and its corpus: of "target", "pool" or "test"."""
        name = f"augment-{part}-{seed}" + (f"-{labels}" if labels else "")
        drawn = np.random.default_rng([seed, part == "pool"])
        rows = self.others if part == "pool" else self.reviews
        order = drawn.permutation(len(rows))
        some = {"pool": order[:POOL], "target": order[: REWARDED + labels], "test": order[TESTED_FROM:]}[part]
        return name, written(self.work / "tables" / f"{name}.csv", [rows[i] for i in some], labels=part != "pool")

    def fitted(self, arm: Arm, labels: int, seed: int, lr: float) -> Run:
        parts = [("target", labels), *([("pool", 0)] if arm.pool else [])]
        stores = dict(self.table(part, seed, count) for part, count in parts)
        held = {} if arm.every_label else {"holdout": REWARDED / (REWARDED + labels)}
        held |= {"eval_every": 1} if arm.options.get("selector") == "learned" else {}
        rows = labels + REWARDED * arm.every_label + POOL * arm.pool
        held["epochs"] = round(self.steps / max(1, rows // BATCH))
        head = {} if arm.method == "ce" else {"head": str(self.head(labels, seed, arm.every_label)[0])}
        named = "-".join(["augment", str(labels), arm.method, *map(str, arm.options.values()), "all" * arm.every_label])
        return self.fit(named, stores, arm.method, arm.options, seed, lr, batch_size=BATCH, **held, **head)

    def head(self, labels: int, seed: int, every_label: bool) -> tuple[Path, evalsuite.Result]:
        """The teacher: fitted to the labelled rows that train; and how it does."""
        name, corpus = self.table("target", seed, labels)
        if not every_label:
            count = REWARDED + labels
            trained, _ = split(np.arange(count), REWARDED / count, seed)
            name, rows = f"{name}-trained", open_corpus(corpus)
            texts = [(rows.read(i).decode(), rows.class_names[rows.label(i)]) for i in trained.tolist()]
            corpus = written(self.work / "tables" / f"{name}.csv", texts)
        path = self.work / "heads" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = evalsuite.probe(self.store(name, corpus), self.store(*self.table("test", seed)), save=path)
        return path, found

    def tested(self, run: Run, seed: int) -> evalsuite.Result:
        name, corpus = self.table("test", seed)
        out = self.work / "stores" / f"{run.path.name}-{name}.zarr"
        return evalsuite.classify(
            featcache.extract(corpus, f"run:{run.path}", out, fields=("embedding", "logits"), **EXACT)
        )


def judgement(run: Run) -> tuple[float, float]:
    """On the held-out labels: accuracy, then cross-entropy, the higher the better."""
    return run.metrics[-1]["holdout/top1"], -run.metrics[-1]["holdout/nll"]


def top1(result: evalsuite.Result) -> float:
    return result.metrics["classify/top1"].value


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--labels", default="100,200,500")
    parser.add_argument("--student", default="bag/32")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=0.0, help="of all arms; chosen by arm when 0")
    parser.add_argument("--arm", action="append", help="this arm, may be repeated; all when left out")
    options = parser.parse_args()
    bench = Bench(options.data, options.work, options.student, options.steps)
    seeds = [int(each) for each in options.seeds.split(",")]
    arms = {name: arm for name, arm in ARMS.items() if name in (options.arm or ARMS)}
    rates = {}
    for name, arm in arms.items():
        judged = replace(arm, every_label=False)  # by the 200 that are held out
        tried = {} if options.lr else {lr: judgement(bench.fitted(judged, 200, CHOOSING, lr)) for lr in RATES}
        rates[name] = max(tried, key=lambda each: tried[each], default=options.lr)
        print(f"  tuning: {name}: {tried}", flush=True)
    head = ["arm", "accuracy", f"{next(iter(arms))}, less this one", "intervals without 0", "lr"]
    for labels in map(int, options.labels.split(",")):
        found = {}
        for name, arm in arms.items():
            found[name] = [bench.tested(bench.fitted(arm, labels, seed, rates[name]), seed) for seed in seeds]
            print(f"{labels} labels: {name}: {[top1(each) for each in found[name]]}", flush=True)
        ours = found[next(iter(arms))]
        of_teacher = [bench.head(labels, seed, False)[1].metrics["probe/top1"].value for seed in seeds]
        rows = [["the teacher", mean_sd(of_teacher), "", "", ""]]
        for name, theirs in found.items():
            apart = ["", ""] if theirs is ours else against(ours, theirs, "classify/top1")
            rows.append([name, mean_sd([top1(each) for each in theirs]), *apart, f"{rates[name]:g}"])
        print(f"\n{labels} labels\n\n" + "\n".join(table(head, rows)) + "\n", flush=True)


if __name__ == "__main__":
    main()

"""EmbedDistill on NFCorpus: which part earns what? Titles as queries, MiniLM-L6 as teacher, students of a tenth of it.

Arms, each with and without generated queries (spans of the documents): labels alone and with scores, the student encoding documents
itself; the same against the teacher's documents; these with matched queries too; matching alone. nDCG@10 on the dev queries,
mean ± sd over seeds, and as a share of the teacher's; against each rival the paired difference to the first arm of the table.

The learning rate of each arm is chosen on 300 training queries that no run learns from (or is the one given); dev is looked at once.
Equal steps for all arms. Interrupted, it goes on where it was.

    python benchmarks/embed_distill.py --seeds 0,1,2
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _texts import Texts, against, arguments, mean_sd, nfcorpus, table

import evalsuite
import featcache
from distill.training.run import Run

RATES = (1e-2, 3e-2)
CHOOSING = 1000
"""Seed of the runs by which learning rates are chosen."""
ARMS: Mapping[str, Mapping[str, Any]] = {
    "labels, own documents": {"match": 0.0, "scores": 0.0, "own": True},
    "+ scores, own documents": {"match": 0.0, "own": True},
    "labels, the teacher's documents": {"match": 0.0, "scores": 0.0},
    "+ scores": {"match": 0.0},
    "+ scores + matching": {},
    "matching alone": {"scores": 0.0, "labels": 0.0},
}


class Bench(Texts):
    def __init__(
        self, data: Path, work: Path, student: str, steps: int, spans: int, temperature: float = 0.05, nearest: int = 4
    ):
        super().__init__(work, student, steps)
        self.folder, self.spans = f"beir:{nfcorpus(data, work)}", spans
        self.scored = {"temperature": temperature, "nearest": nearest}

    def part(self, name: str) -> str:
        return f"spans:{name[5:]}::{self.folder}:corpus" if name.startswith("spans") else f"{self.folder}:{name}"

    def teacher(self, name: str) -> featcache.FeatureStore:
        return self.store(f"nfcorpus-{name}", self.part(name))

    def run(self, arm: Mapping[str, Any], generated: bool, seed: int, lr: float) -> Run:
        stores = ["queries-fit", *([f"spans{self.spans}"] if generated else [])]
        given = {**self.scored, **{key: value for key, value in arm.items() if key != "own"}}
        named = "-".join(
            ["embed", *stores[1:], *(f"{key}{value:g}" for key, value in given.items()), "own" * ("own" in arm)]
        )
        given |= {"documents": str(self.teacher("corpus").path), "qrels": f"{self.folder}:fit"}
        given |= {"own_documents": self.part("corpus")} if "own" in arm else {}
        corpora = {f"nfcorpus-{name}": self.part(name) for name in stores}
        return self.fit(named, corpora, "embed_distill", given, seed, lr)

    def found(self, run: Run | None, queries: str, own: bool = False) -> evalsuite.Result:
        """How well a student's queries, the teacher's where there is none, find documents."""
        part = f"queries-{queries}"
        documents = self.embedded(run, "corpus", self.part("corpus")) if run and own else self.teacher("corpus")
        query = self.embedded(run, part, self.part(part)) if run else self.teacher(part)
        asymmetric = run is not None and not own
        qrels = f"{self.folder}:{queries}"
        return evalsuite.retrieval(documents, query, qrels=qrels, asymmetric=asymmetric, any_precision=True)


def ndcg(result: evalsuite.Result) -> float:
    return result.metrics["ndcg@10"].value


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--student", default="bag/64")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--spans", type=int, default=3, help="generated queries of each document")
    parser.add_argument("--lr", type=float, default=0.0, help="of all arms; chosen by arm when 0")
    parser.add_argument("--nearest", type=int, default=4, help="documents nearest to each query that it is scored with")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--arm", action="append", help="this arm, may be repeated; all when left out")
    parser.add_argument("--tune", action="store_true", help="look at the queries kept for tuning only")
    options = parser.parse_args()
    bench = Bench(
        options.data, options.work, options.student, options.steps, options.spans, options.temperature, options.nearest
    )
    seeds, found, chosen = [int(each) for each in options.seeds.split(",")], {}, {}
    for name, arm in ARMS.items():
        for generated in (False, True):
            title = f"{name}, generated queries" if generated else name
            if options.arm and title not in options.arm:
                continue
            own = "own" in arm
            rates = [options.lr] if options.lr else RATES
            tried = (
                {}
                if options.lr and not options.tune
                else {lr: ndcg(bench.found(bench.run(arm, generated, CHOOSING, lr), "tune", own)) for lr in rates}
            )
            lr = chosen[title] = max(tried, key=lambda each: tried[each], default=options.lr)
            print(f"  tuning: {title}: {tried}", flush=True)
            if not options.tune:
                found[title] = [bench.found(bench.run(arm, generated, seed, lr), "dev", own) for seed in seeds]
                print(f"{title}: {[ndcg(each) for each in found[title]]}", flush=True)
    if options.tune:
        return
    teacher = bench.found(None, "dev")
    best = max(found, key=lambda name: sum(map(ndcg, found[name])))
    rows = [["the teacher", f"{ndcg(teacher):.3f}", "100 %", "", "", ""]]
    for name, results in found.items():
        share = sum(map(ndcg, results)) / len(results) / ndcg(teacher)
        apart = ["", ""] if name == best else against(found[best], results, "ndcg@10")
        rows.append([name, mean_sd([ndcg(each) for each in results]), f"{share:.0%}", *apart, f"{chosen[name]:g}"])
    head = ["arm", "nDCG@10", "of the teacher's", f"{best}, less this one", "intervals without 0", "lr"]
    print("\n" + "\n".join(table(head, rows)) + "\n", flush=True)


if __name__ == "__main__":
    main()

"""The paper's method on texts: `tintem`, `landmarks` and `centred` from MiniLM-L6 to 64 dimensions, beside `cosine`.

Students of a bag of tokens learn from NFCorpus's documents, training titles and three spans of each document. How much of the teacher
they keep on the dev titles and on 300 training titles kept apart (Gram correlation, shared neighbours, CKA), and how well they find
documents: nDCG@10, both sides the student's. Mean ± sd over seeds; the differences are of `centred`, paired.

The learning rate is chosen by method on the 300 (or is the one given). Equal steps for all. Interrupted, it goes on where it was.

    python benchmarks/text_methods.py --seeds 0,1,2
"""

from _texts import against, arguments, mean_sd, table
from embed_distill import Bench, ndcg

import evalsuite
from distill.training.run import Run

METHODS = ("centred", "landmarks", "tintem", "cosine")
RATES = (1e-2, 3e-2)
CHOOSING = 1000


def fitted(bench: Bench, method: str, seed: int, lr: float, dim: int) -> Run:
    stores = ["corpus", "queries-fit", f"spans{bench.spans}"]
    corpora = {f"nfcorpus-{name}": bench.part(name) for name in stores}
    return bench.fit(f"text-{method}-{dim}", corpora, method, {}, seed, lr, embedding_dim=dim)


def kept(bench: Bench, run: Run, queries: str) -> tuple[evalsuite.Result, evalsuite.Result]:
    """Of the teacher, and how well documents are found."""
    part = f"queries-{queries}"
    student = bench.embedded(run, part, bench.part(part))
    return evalsuite.fidelity(bench.teacher(part), student), bench.found(run, queries, own=True)


COLUMNS = {
    "Gram": "gram_pearson",
    "Gram, centred": "gram_pearson_centred",
    "mutual 10-NN": "mutual_knn@10",
    "CKA": "cka_debiased_unit",
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--student", default="bag/64")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--spans", type=int, default=3, help="spans of each document")
    parser.add_argument("--lr", type=float, default=0.0, help="of all methods; chosen by method when 0")
    parser.add_argument("--dim", type=int, default=64, help="of the student's embedding")
    options = parser.parse_args()
    bench = Bench(options.data, options.work, options.student, options.steps, options.spans)
    seeds, found, rates = [int(each) for each in options.seeds.split(",")], {}, {}
    for method in METHODS:
        tried = (
            {}
            if options.lr
            else {lr: ndcg(kept(bench, fitted(bench, method, CHOOSING, lr, options.dim), "tune")[1]) for lr in RATES}
        )
        lr = rates[method] = max(tried, key=lambda each: tried[each], default=options.lr)
        print(f"  tuning: {method}: {tried}", flush=True)
        found[method] = [kept(bench, fitted(bench, method, seed, lr, options.dim), "dev") for seed in seeds]
        print(f"{method}: {[ndcg(retrieved) for _, retrieved in found[method]]}", flush=True)
    rows = [["the teacher", *("" for _ in COLUMNS), f"{ndcg(bench.found(None, 'dev')):.3f}", "", "", ""]]
    ours = [retrieved for _, retrieved in found[METHODS[0]]]
    for method, both in found.items():
        cells = [mean_sd([kept.metrics[name].value for kept, _ in both]) for name in COLUMNS.values()]
        theirs = [retrieved for _, retrieved in both]
        apart = ["", ""] if method == METHODS[0] else against(ours, theirs, "ndcg@10")
        rows.append([method, *cells, mean_sd([ndcg(each) for each in theirs]), *apart, f"{rates[method]:g}"])
    head = ["method", *COLUMNS, "nDCG@10", f"{METHODS[0]}, less this one", "intervals without 0", "lr"]
    print("\n" + "\n".join(table(head, rows)) + "\n", flush=True)


if __name__ == "__main__":
    main()

"""OKD on letters of Shakespeare: does a small language model learn more from a large one's cached hidden states than from the text?

Teacher: a GRU of 192 (155 thousand weights), trained on tinyshakespeare's training text but for a part that is kept for tuning.
Students: GRUs of 48 (13 thousand), from 300 kB of that text, in windows of 64 bytes. Arms, all of equal steps: next tokens alone (`ce`), the
frozen cache by forward and by reverse KL, with the online module but without feedback (μ = 0), and with it (μ = 1, `okd`).

Nats a byte on dev, mean ± sd over seeds; the differences are paired by seed, ± their standard error, and the intervals are over
dev's windows. The learning rate of each arm is chosen on the part for tuning; dev is looked at once. Interrupted, it goes on where it was.

    python benchmarks/okd.py --seeds 0,1,2
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _texts import EXACT, against, arguments, table
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import distill
import evalsuite
import featcache
from distill.training.run import Run
from featcache.extraction.heads import head_beside
from featcache.inputs.texts import Texts
from featcache.student import load_student

ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ce": ("next_token", {}),
    "forward": ("okd", {"online": False}),
    "reverse": ("okd", {"online": False, "direction": "reverse"}),
    "module, μ = 0": ("okd", {"mu": 0.0}),
    "okd, μ = 1": ("okd", {}),
}
CHOOSING = 1000
"""Seed of the runs by which learning rates are chosen."""
WINDOW, CACHED, TUNING = 64, 300_000, 50_000
"""Bytes: of a window, of the text that students see, of the one for tuning."""


class Bytes(nn.Module):
    """How often each byte is there: a teacher that knows nothing, for texts to be in a store before there is one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        counts = torch.zeros(len(ids), 257).scatter_add(1, ids.clamp(min=-1) + 1, torch.ones(ids.shape))
        return {"embedding": self.scale * counts[:, 1:].log1p()}


class Bench:
    """Texts, stores and runs of one work folder; made once."""

    def __init__(self, data: Path, work: Path, student: str, epochs: int):
        self.work, self.student, self.epochs = work / "okd", student, epochs
        self.work.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(data / "tinyshakespeare.zip") as archive:
            train, dev = (archive.read(f"{name}.txt") for name in ("train", "dev"))
        parts = {"train": train[:-TUNING], "tune": train[-TUNING:], "cached": train[:CACHED], "dev": dev}
        for name, text in parts.items():
            (self.work / f"{name}.txt").write_bytes(text)
        letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(sorted({*train.decode()}))}, "?"))
        letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        letters.save(str(self.work / "letters.json"))

    def corpus(self, part: str) -> str:
        return f"windows:{self.work / f'{part}.txt'}@length={WINDOW}"

    def store(self, name: str, part: str, encoder: Any, *fields: str) -> featcache.FeatureStore:
        out = self.work / "stores" / f"{name}.zarr"
        return featcache.extract(self.corpus(part), encoder, out, fields=["embedding", *fields], **EXACT)

    def fit(self, name: str, store: featcache.FeatureStore, part: str, **given: Any) -> Run:
        return distill.fit(
            store, self.corpus(part), out=self.work / "runs" / name, precision="fp32", device="cpu", workers=1, resume=True, **given
        )  # fmt: skip

    def teacher(self, epochs: int = 3) -> Run:
        plain = featcache.Encoder(
            name="bytes", module=Bytes(), preprocess=Texts(tokenizer="bytes", max_length=WINDOW), fields={"embedding": 256},
            output="counts",
        )  # fmt: skip
        return self.fit(
            "teacher", self.store("plain", "train", plain), "train", student="gru_lm/192", method="next_token", epochs=epochs,
            batch_size=32, lr=5e-3, tokenizer=str(self.work / "letters.json"),
        )  # fmt: skip

    def cache(self) -> featcache.FeatureStore:
        return self.store("cached", "cached", f"run:{self.teacher().path}", "hidden", "length")

    def run(self, arm: str, seed: int, lr: float) -> Run:
        method, options = ARMS[arm]
        name, cache = (
            f"{list(ARMS).index(arm)}-{self.student.replace('/', '')}-{self.epochs}-{lr:g}-{seed}",
            self.cache(),
        )
        head = {"head": head_beside(cache)} if method == "okd" else {}
        return self.fit(
            name, cache, "cached", student=self.student, method=method, method_options=options, epochs=self.epochs, batch_size=32,
            lr=lr, seed=seed, **head,
        )  # fmt: skip

    def judged(self, run: Run, part: str) -> evalsuite.Result:
        """Nats a byte of a part of the text."""
        return evalsuite.mean(self.store(f"{run.path.name}-{part}", part, f"run:{run.path}", "nll", "predicted"))


def nats(result: evalsuite.Result) -> float:
    return result.metrics["mean/nll"].value


def weights(run: Run) -> int:
    return sum(weight.numel() for weight in load_student(run.path)[0].parameters())


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--student", default="gru_lm/48")
    parser.add_argument("--epochs", type=int, default=5, help="of 146 steps of 32 windows")
    parser.add_argument("--rates", default="0.04,0.08,0.16")
    options = parser.parse_args()
    bench = Bench(options.data, options.work, options.student, options.epochs)
    seeds, rates = (
        [kind(each) for each in text.split(",")] for kind, text in ((int, options.seeds), (float, options.rates))
    )
    teacher, found, chosen = bench.teacher(), {}, {}
    print(f"teacher: {weights(teacher):,} weights, tuning part {nats(bench.judged(teacher, 'tune')):.4f}", flush=True)
    for arm in ARMS:
        tried = {lr: nats(bench.judged(bench.run(arm, CHOOSING, lr), "tune")) for lr in rates}
        chosen[arm] = min(tried, key=lambda lr: tried[lr])
        print(f"  tuning: {arm}: {tried}", flush=True)
    for arm in ARMS:
        runs = [bench.run(arm, seed, chosen[arm]) for seed in seeds]
        found[arm] = [bench.judged(run, "dev") for run in runs]
        print(f"{arm}: {weights(runs[0]):,} weights, {[round(nats(each), 4) for each in found[arm]]}", flush=True)
    rows = [["the teacher", f"{nats(bench.judged(teacher, 'dev')):.4f}", "", "", "", "", ""]]
    for arm, results in found.items():
        cells = [
            ["", ""] if arm == rival else against(results, found[rival], "mean/nll") for rival in ("ce", "forward")
        ]
        values = [nats(each) for each in results]
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        rows.append([arm, f"{mean(values):.4f}{spread}", *cells[0], *cells[1], f"{chosen[arm]:g}"])
    head = ["arm", "nats a byte", "less ce", "clear of 0", "less forward", "clear of 0", "lr"]
    print("\n" + "\n".join(table(head, rows)) + "\n", flush=True)


if __name__ == "__main__":
    main()

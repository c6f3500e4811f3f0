"""What `distill fit` costs beside the bare training step, and beside a loop that runs the teacher online.

All in one run, in turn, on the same images, batch and precision: (A) an epoch of `distill.fit` after the first, which
decodes the images, its checkpoint included; (B) the same student's forward, loss, backward and optimizer step over
tensors already in memory; (C) the same with the teacher's forward pass, also on tensors in memory, before each step.
Prints A/B and C/A in time, pair by pair. A is to be at most 1.10 × B.

    python benchmarks/fit_cost.py --rounds 5

Teachers: EfficientNet-Lite0 with its real weights, and ViT-S/16 with random ones, which cost the same to run.
"""

import shutil
import statistics
import time

import timm
import torch
from _targets import judge
from photographs import arguments, unpacked

import distill
import featcache
from distill.objectives import match
from distill.pairs import Pairs
from distill.training.schedule import make_optimizer
from featcache.encoder import Encoder
from featcache.models.timm import as_teacher
from featcache.student import make_student

LIMIT = 1.10  # × the bare step, at most, that an epoch of fit takes: issue 4, Cost
PAIRS = (
    ("builtin/efficientnet_lite0", "tiny", 32, "cifar10-train-0"),
    ("vit_small_patch16_224", "timm/resnet10t", 64, "imagenet-samples-250"),
)


class Some:
    """The first samples of a corpus, over again where it has fewer."""

    def __init__(self, corpus: featcache.Corpus, count: int):
        self._corpus, self._count = corpus, count
        self.spec, self.class_names = f"{count} of {corpus.spec}", corpus.class_names
        self.ids = [f"{i}" for i in range(count)]

    def __len__(self) -> int:
        return self._count

    def read(self, i: int) -> bytes:
        return self._corpus.read(i % len(self._corpus))

    def label(self, i: int) -> int:
        return self._corpus.label(i % len(self._corpus))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    print("| teacher → student | fit, first epoch, s | fit, s an epoch | bare step, s | fit / bare | online / fit |")
    print("|---|---|---|---|---|---|")
    targets = []
    for teacher_name, student_name, size, name in PAIRS:
        corpus = Some(featcache.open_corpus(str(unpacked(name, options.data, options.work))), options.images)
        teacher = load(teacher_name).to(options.device)
        store = featcache.extract(
            corpus, teacher, options.work / "stores" / f"cost-{teacher.name.replace('/', '-')}-{options.images}.zarr"
        )
        measured = Measured(options, corpus, store, teacher, student_name, size)
        rounds = [(*measured.fit(), measured.bare(), measured.online()) for _ in range(options.rounds)]
        first, fit, bare, _ = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(fit / bare for _, fit, bare, _ in rounds)
        gain = statistics.median(online / fit for _, fit, _, online in rounds)
        spread = ", ".join(f"{fit / bare:.3f}" for _, fit, bare, _ in rounds)
        print(
            f"| {teacher.name} → {student_name}, {size} px | {first:.2f} | {fit:.2f} | {bare:.2f} | {ratio:.3f} ({spread}) | {gain:.1f} |",
            flush=True,
        )
        targets.append((f"{teacher.name} → {student_name}, fit / bare", ratio, LIMIT, "at most"))
    judge(targets)


def load(name: str) -> Encoder:
    return featcache.load_encoder(name) if "/" in name else Encoder.of(as_teacher(name, timm.create_model(name)))


class Measured:
    """Seconds an epoch of the same steps, three ways."""

    def __init__(self, options, corpus, store, teacher, student, size):
        self._options, self._corpus, self._store, self._teacher = options, corpus, store, teacher
        self._config = {
            "student": student, "image_size": size, "batch_size": options.batch_size, "precision": "fp32",
            "method": "cosine", "epochs": 2,
        }  # fmt: skip
        self._steps = options.images // options.batch_size
        torch.manual_seed(0)
        self._student, preprocess, _ = make_student(
            student, teacher.preprocess, embedding_dim=None, image_size=size, pretrained=False
        )
        self._student.to(options.device).to(memory_format=torch.channels_last).train()
        self._method = distill.load_method("cosine")(store.embedding_dim, self._student.embedding_dim)
        self._method.to(options.device)
        self._optimizer = make_optimizer((self._student, self._method), distill.FitConfig(**self._config))
        rows = range(4 * options.batch_size)
        drawn = next(Pairs(store, corpus, preprocess).plain(rows, batch_size=len(rows)))
        self._images = preprocess.to_model(torch.from_numpy(drawn.pixels)).to(options.device).split(options.batch_size)
        target = torch.from_numpy(drawn.features["embedding"]).float().to(options.device)
        self._targets = target.split(options.batch_size)
        seen = next(Pairs(store, corpus, teacher.preprocess).plain(rows, batch_size=len(rows))).pixels
        self._seen = torch.from_numpy(seen).split(options.batch_size)

    def fit(self) -> tuple[float, float]:
        """Of the first epoch, images decoded; and of the second, from the first one's last step to its own."""
        out = self._options.work / "runs" / "cost"
        shutil.rmtree(out, ignore_errors=True)
        at = {}
        distill.fit(
            self._store, self._corpus, out=out, device=self._options.device, **self._config,
            announce=lambda plan: at.setdefault(0, self._now()),
            progress=lambda told: at.setdefault(told.done, self._now()) if told.done % self._steps == 0 else None,
        )  # fmt: skip
        return at[self._steps] - at[0], at[2 * self._steps] - at[self._steps]

    def bare(self) -> float:
        return self._loop(lambda step: self._targets[step % 4])

    def online(self) -> float:
        return self._loop(lambda step: self._teacher.encode(self._seen[step % 4])["embedding"].clone())

    def _loop(self, target) -> float:
        for step in range(-2, self._steps):
            if step == 0:
                began = self._now()
            self._optimizer.zero_grad(set_to_none=True)
            output = self._method.head(self._student(self._images[step % 4]))
            match(output, target(step), "cosine").backward()
            self._optimizer.step()
        return self._now() - began

    def _now(self) -> float:
        if self._options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    main()

"""Stage two: train a student against cached targets."""

import inspect
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from distill.pairs import Pairs, teacher_preprocess
from distill.run import Run
from distill.source import Source
from distill.students import make_student
from featcache.allocator import keep_freed_memory
from featcache.corpora.store import KeptImages
from featcache.corpus import Corpus, open_corpus
from featcache.encoder import normalise
from featcache.extract import resolve_device
from featcache.plugins import load_plugin, suggest
from featcache.store import FeatureStore, open_store


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything that decides a run's result; `config.toml` mirrors it.

    Attributes:
        student: "tiny", "timm/NAME" or "timm/NAME:WEIGHTS".
        method: a name from `distill/methods/`.
        epochs: passes over the samples, each in one of its stored views.
        batch_size: samples a step.
        lr: peak learning rate of AdamW; linear warm-up over the first tenth of the steps, then cosine to 0.
        weight_decay: AdamW's.
        seed: of initial weights, order and mapping.
        embedding_dim: width of the student's embedding; the model's own when 0.
        image_size: px of the student's input; the model's own when 0.
        pretrained: start from the model's pretrained weights.
        precision: "fp32" or "bf16" (autocast); "auto" is bf16 on a GPU, else fp32.
        method_options: keyword arguments of the method.
    """

    student: str
    method: str = "tintem"
    epochs: int = 100
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0
    embedding_dim: int = 0
    image_size: int = 0
    pretrained: bool = False
    precision: str = "auto"
    method_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("weight_decay", "embedding_dim", "image_size"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"unknown precision {self.precision!r}; known: auto, fp32, bf16")
        known = [
            name
            for name in inspect.signature(load_method(self.method)).parameters
            if name not in ("teacher_dim", "student_dim")
        ]
        for name in self.method_options:
            if name not in known:
                raise ValueError(
                    f"method {self.method} has no option {name!r}; {suggest(name, known) if known else 'it has none'}"
                )


@dataclass
class Progress:
    """Where a fit stands; handed to the progress callback after every step.

    Attributes:
        stage: "mapping" or "training".
        done, total: steps of that stage.
        loss: running mean over the epoch, NaN during "mapping".
        images_per_second: over the epoch so far.
        wait: share of the epoch's time spent waiting for batches, 0…1.
    """

    stage: str
    done: int
    total: int
    loss: float = math.nan
    images_per_second: float = 0.0
    wait: float = 0.0


def load_method(name: str) -> Any:
    """The class `Method` of `distill/methods/NAME.py`; a "-" in the name is a "_" there.

    Raises:
        ValueError: no such method; the message suggests near names.
    """
    return load_plugin("distill.methods", name.replace("-", "_")).Method


def fit(
    store: FeatureStore | str | os.PathLike[str],
    corpus: Corpus | str | None = None,
    *,
    out: str | os.PathLike[str],
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **config: Any,
) -> Run:
    """Train a student so that it behaves like the teacher whose features `store` holds.

    Args:
        store: sealed teacher store, or its path.
        corpus: the images it was extracted from, or their spec; those that the store keeps when left out.
        out: the run folder.
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        workers: threads that read and render images; by default one a core.
        resume: continue an unfinished run in `out`. A finished one is returned as it is.
        progress: called after every step.
        **config: the fields of `FitConfig`; `student` is needed.

    Raises:
        ValueError: store, corpus, config or folder do not fit; nothing has been trained.
        RuntimeError: the loss became NaN; the last good checkpoint is kept.
    """
    settings = FitConfig(**config)
    store = store if isinstance(store, FeatureStore) else open_store(store)
    source: Corpus = KeptImages(store) if corpus is None else open_corpus(corpus) if isinstance(corpus, str) else corpus
    device = resolve_device(device)
    if device == "cpu":
        keep_freed_memory()

    torch.manual_seed(settings.seed)
    seen_by_teacher = teacher_preprocess(store)
    student, preprocess, record = make_student(
        settings.student,
        seen_by_teacher,
        embedding_dim=settings.embedding_dim or None,
        image_size=settings.image_size or None,
        pretrained=settings.pretrained,
    )
    pairs = Pairs(store, source, preprocess, workers)
    method = load_method(settings.method)(store.embedding_dim, student.embedding_dim, **settings.method_options)

    run = Run(out)
    run.open(
        {**asdict(settings), "store": str(store.path), "corpus": source.spec, "teacher": store.fingerprint},
        resume=resume,
    )
    if run.finished:
        return run
    checkpoint = run.load_checkpoint()
    on_mapping = (lambda done, total: progress(Progress("mapping", done, total))) if progress else None
    report = method.prepare(Source([store]), seed=settings.seed, progress=on_mapping)
    if checkpoint:
        student.load_state_dict(checkpoint["student"])
        method.load_state_dict(checkpoint["method"])
        report = checkpoint["report"]
    run.save_tensors("mapping.safetensors", dict(method.named_buffers()))

    student.to(device).to(memory_format=torch.channels_last).train()
    method.to(device)
    weights = [w for w in [*student.parameters(), *method.parameters()] if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=settings.weight_decay, fused=True)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    start = checkpoint["epoch"] if checkpoint else 0
    history = run.metrics[:start]
    per_epoch = max(1, len(pairs) // settings.batch_size)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device == "cuda")

    with SummaryWriter(str(run.path), purge_step=start + 1) as board:
        for epoch in range(start, settings.epochs):
            torch.manual_seed(
                settings.seed * 1_000_003 + epoch
            )  # dropout is the same whether or not the run was resumed
            total_loss, waited, began = torch.zeros((), device=device), 0.0, time.perf_counter()
            clock = began
            for step, (pixels, embedding) in enumerate(
                pairs.epoch(epoch, batch_size=settings.batch_size, seed=settings.seed)
            ):
                waited += time.perf_counter() - clock
                optimizer.param_groups[0]["lr"] = learning_rate(
                    epoch * per_epoch + step, settings.epochs * per_epoch, settings.lr
                )
                images = normalise(torch.from_numpy(pixels).to(device), preprocess)
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    output = student(images)
                teacher = {"embedding": torch.from_numpy(embedding).to(device).float()}
                loss = torch.stack(list(method.loss({"embedding": output.float()}, teacher).values())).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total_loss += loss.detach()
                if progress:
                    clock = time.perf_counter()
                    speed = (step + 1) * settings.batch_size / (clock - began)
                    done, total = epoch * per_epoch + step + 1, settings.epochs * per_epoch
                    progress(
                        Progress(
                            "training", done, total, float(total_loss) / (step + 1), speed, waited / (clock - began)
                        )
                    )
                clock = time.perf_counter()
            mean_loss, seconds = float(total_loss) / per_epoch, time.perf_counter() - began
            if not math.isfinite(mean_loss):
                raise RuntimeError(
                    f"{run.path}: the loss became {mean_loss} in epoch {epoch + 1}; lower lr and start again (checkpoints up to then are kept)"
                )
            metrics = {
                "epoch": epoch + 1,
                "loss": mean_loss,
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_second": per_epoch * min(settings.batch_size, len(pairs)) / seconds,
                "wait_share": waited / seconds,
                **{f"mapping/{name}": value for name, value in report.items()},
            }
            for name, value in metrics.items():
                board.add_scalar(name, value, epoch + 1)
            history.append(metrics)
            run.log(history)
            run.save_checkpoint(
                epoch + 1,
                {
                    "epoch": epoch + 1,
                    "student": _cpu(student.state_dict()),
                    "method": _cpu(method.state_dict()),
                    "optimizer": optimizer.state_dict(),
                    "report": report,
                },
            )
    run.finish(student.state_dict(), {**record, "method": settings.method, "teacher": store.encoder_name})
    return run


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of `steps`, then half a cosine down to 0 at the last."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup))) / 2


def _cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in state.items()}

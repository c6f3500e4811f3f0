"""Stage two: train a student against cached targets."""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from distill._inputs import open_all, refuse_missing_fields, refuse_unequal_parts
from distill._schedule import learning_rate, warmup_steps
from distill._training import Training, checkpoint_bytes, make_accelerator, on_main
from distill.config import FitConfig, load_method
from distill.evaluation import HeldOut, split
from distill.pairs import Pairs, teacher_preprocess
from distill.run import Run
from distill.source import Source
from distill.students import make_student
from featcache.allocator import keep_freed_memory
from featcache.corpus import Corpus
from featcache.extract import resolve_device
from featcache.store import FeatureStore

__all__ = ["FitConfig", "Plan", "Progress", "fit", "load_method"]

LOG_EVERY = 10
"""Steps between readings of the loss, which a GPU has to be waited for; checkpoints are written at them."""

Store = FeatureStore | str | os.PathLike[str]


@dataclass(frozen=True)
class Plan:
    """What a fit is about to do.

    Attributes:
        samples: trained on; one epoch sees each once.
        failed: rows of the stores without features, left out.
        held_out: samples kept for evaluation.
        views: which views are trained on, in words.
        student_weights: their number.
        steps, done: in all, and of an earlier, interrupted run.
        processes: that share every batch.
        checkpoint_bytes: of one; at most three lie on the disk at once.
    """

    samples: int
    failed: int
    held_out: int
    views: str
    student_weights: int
    steps: int
    done: int
    processes: int
    checkpoint_bytes: int


@dataclass
class Progress:
    """Where a fit stands; handed to the progress callback after every step.

    Attributes:
        stage: "mapping" or "training".
        done, total: steps of that stage.
        loss: mean over the epoch when it was last read (every tenth step), NaN before.
        terms: the same of the method's terms, by name; the loss is their sum.
        images_per_second: over the epoch so far.
        wait: share of the epoch's time spent waiting for batches, 0…1.
    """

    stage: str
    done: int
    total: int
    loss: float = math.nan
    terms: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    wait: float = 0.0


def fit(
    store: Store | Sequence[Store],
    corpus: Corpus | str | Sequence[Corpus | str | None] | None = None,
    *,
    out: str | os.PathLike[str],
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 10.0,
    trackers: Sequence[Any] = (),
    announce: Callable[[Plan], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **config: Any,
) -> Run:
    """Train a student so that it behaves like the teacher whose features `store` holds.

    Under `torchrun` or `accelerate launch`, processes share every batch, and the first one alone writes and tells.

    Args:
        store: sealed teacher store, or its path; or a list of stores of one teacher, which train together.
        corpus: the images it was extracted from, or their spec; those that the store keeps when left out. One for each
            store of a list.
        out: the run folder.
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        workers: threads that read and render images; by default one a core.
        resume: continue an unfinished run in `out`. A finished one is returned as it is.
        checkpoint_minutes: between checkpoints within an epoch; there is one at the end of each in any case.
        trackers: besides TensorBoard and `metrics.jsonl`: names that Accelerate knows ("wandb", "mlflow"), or its trackers.
        announce: called once, before the first step.
        progress: called after every step.
        **config: the fields of `FitConfig`; `student` is needed.

    Raises:
        ValueError: stores, corpora, config or folder do not fit; nothing has been trained.
        OSError: the disk is too small for the checkpoints.
        RuntimeError: the loss or a weight became NaN or infinite; the last good checkpoint is kept.
    """
    settings = FitConfig(**config)
    stores, corpora = open_all(store, corpus)
    device = resolve_device(device)
    if device == "cpu":
        keep_freed_memory()
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device == "cuda")
    accelerator = make_accelerator(device, "bf16" if bf16 else "fp32", list(trackers), str(out))
    processes, main = accelerator.num_processes, accelerator.is_main_process

    torch.manual_seed(settings.seed)
    source = Source(stores)
    student, preprocess, record = make_student(
        settings.student,
        teacher_preprocess(stores[0]),
        embedding_dim=settings.embedding_dim or None,
        image_size=settings.image_size or None,
        patch_size=settings.patch_size or None,
        drop_path=settings.drop_path,
        pretrained=settings.pretrained,
    )
    kept, held = split(len(source), settings.holdout, settings.seed)
    views: dict[str, Any] = {
        "views": settings.views,
        "student_augment": settings.student_augment,
        "processes": processes,
    }
    pairs = Pairs(source.take(kept), corpora, preprocess, workers, **views)
    pairs.check()
    refuse_unequal_parts(settings, len(pairs), processes)
    method = load_method(settings.method)(source.embedding_dim, student.embedding_dim, **settings.method_options)
    refuse_missing_fields(method, student, stores)

    run = Run(out)
    one = len(stores) == 1
    config = {
        **asdict(settings),
        "store": str(stores[0].path) if one else [str(each.path) for each in stores],
        "corpus": corpora[0].spec if one else [each.spec for each in corpora],
        "teacher": stores[0].fingerprint,
    }

    on_mapping = (lambda done, total: progress(Progress("mapping", done, total))) if progress else None

    def prepare() -> tuple[bool, dict[str, float], Any]:
        """Claim the folder, fit what is fitted before training: whether the run is finished, the report, the method."""
        if not run.finished:
            run.refuse_small_disk(checkpoint_bytes(student, method, settings))
        new = run.config is None
        run.open(config, resume=resume)
        if run.finished:
            return True, {}, None
        try:
            return False, method.prepare(pairs.source, seed=settings.seed, progress=on_mapping), method
        except ValueError:
            if new:
                run.give_up()
            raise

    finished, report, method = on_main(accelerator, prepare)
    if finished:
        return run
    checkpoint = run.load_checkpoint()
    training = Training(accelerator, student, method, preprocess, settings, checkpoint)
    per_epoch = pairs.batches(settings.batch_size)
    steps, step = settings.epochs * per_epoch, checkpoint["step"] if checkpoint else 0
    totals: dict[str, float] = checkpoint["totals"] if checkpoint else {}
    history = run.metrics[: step // per_epoch]
    held_out = None
    if main:
        run.save_tensors("mapping.safetensors", dict(method.named_buffers()))
        if settings.holdout:
            held_out = HeldOut(Pairs(source.take(held), corpora, preprocess, workers), pairs, method, settings.seed)
    accelerator.init_trackers("distill", config)
    failed = sum(len(each.failed) for each in stores)
    weights = sum(weight.numel() for weight in student.parameters())
    if announce and main:
        size = checkpoint_bytes(student, method, settings)
        announce(Plan(len(pairs), failed, len(held), pairs.description, weights, steps, step, processes, size))

    def refuse_not_finite(loss: float) -> None:
        if math.isfinite(loss) and training.finite():
            return
        what = f"the loss became {loss}" if not math.isfinite(loss) else "a weight became NaN or infinite"
        last = (
            f"the last good checkpoint is {run.checkpoints[-1]}" if run.checkpoints else "no checkpoint was written yet"
        )
        raise RuntimeError(f"{run.path}: {what} by step {step} (epoch {epoch + 1}); lower lr and start again; {last}")

    def save() -> None:
        if main:
            run.save_checkpoint(step, {"step": step, "totals": totals, **training.state()})

    saved = time.monotonic()
    with SummaryWriter(str(run.path), purge_step=step // per_epoch + 1) if main else nullcontext() as board:
        for epoch in range(step // per_epoch, settings.epochs):
            first, unread, at = step, [], Progress("training", step, steps)
            waited, clock = 0.0, time.perf_counter()
            began = clock
            batches = pairs.epoch(
                epoch,
                batch_size=settings.batch_size,
                seed=settings.seed,
                fields=method.fields,
                start=step % per_epoch,
                process=accelerator.process_index,
                processes=processes,
            )
            for batch in batches:
                waited += time.perf_counter() - clock
                lr = learning_rate(step, steps, settings.lr, warmup_steps(settings, per_epoch), settings.min_lr)
                unread.append(training.step(batch, step, lr))
                step += 1
                if step % LOG_EVERY == 0 or step % per_epoch == 0:
                    for name, value in _sums(accelerator, unread).items():
                        totals[name] = totals.get(name, 0.0) + value
                    unread.clear()
                    seen = (step - 1) % per_epoch + 1
                    at.terms = {name: value / seen for name, value in totals.items()}
                    at.loss = sum(at.terms.values())
                    refuse_not_finite(at.loss)
                    if step % per_epoch and time.monotonic() - saved >= 60 * checkpoint_minutes:
                        save()
                        saved = time.monotonic()
                seconds = time.perf_counter() - began
                at.done, at.wait = step, waited / seconds
                at.images_per_second = (step - first) * min(settings.batch_size, len(pairs)) / seconds
                if progress and main:
                    progress(replace(at))
                clock = time.perf_counter()
            metrics = {
                "epoch": epoch + 1,
                "loss": at.loss,
                **{f"loss/{name}": value for name, value in at.terms.items()},
                "lr": lr,
                "images_per_second": at.images_per_second,
                "wait_share": at.wait,
                **{f"mapping/{name}": value for name, value in report.items()},
            }
            last = epoch + 1 == settings.epochs
            if held_out and (last or (settings.eval_every and (epoch + 1) % settings.eval_every == 0)):
                metrics |= held_out.measure(training.embed)
            totals = {}
            if board is not None:
                for name, value in metrics.items():
                    board.add_scalar(name, value, epoch + 1)
                accelerator.log(metrics, step=epoch + 1)
                history.append(metrics)
                run.log(history)
            save()
            saved = time.monotonic()
    for tracker in accelerator.trackers:
        tracker.finish()
    if main:
        record |= {
            "method": settings.method,
            "teacher": stores[0].encoder_name,
            "trained_on": {"samples": len(pairs), "failed": failed, "held_out": len(held), "views": pairs.description},
        }
        run.save_tensors("mapping.safetensors", method.state_dict())
        run.finish(training.saved.state_dict(), record)
    accelerator.wait_for_everyone()
    return run


def _sums(accelerator: Any, steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """Of each term over these steps; the mean over all processes."""
    table = torch.stack([torch.stack(list(terms.values())) for terms in steps]).double().sum(0)
    return dict(zip(steps[0], accelerator.reduce(table, "mean").tolist(), strict=True))

"""Stage two: train a student against cached targets."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill.methods import ROW, Fitted, fitted_tensors
from distill.pairs import Batch
from distill.training.board import tensorboard
from distill.training.config import FitConfig, load_method, refuse_wrong_type
from distill.training.interrupt import PutOffInterrupt
from distill.training.progress import Plan, Progress
from distill.training.run import KEEP, Run, difference
from distill.training.schedule import learning_rate, warmup_steps
from distill.training.setup import Inputs, set_up
from distill.training.step import Training, checkpoint_bytes, make_accelerator, on_main
from featcache.corpora import Corpus
from featcache.machine import keep_freed_memory, resolve_device
from featcache.stop import stoppable
from featcache.store import FeatureStore

__all__ = ["FitConfig", "Plan", "Progress", "fit", "load_method"]

log = logging.getLogger("distill")

LOG_EVERY = 10
"""Steps between readings of the loss, which a GPU has to be waited for; checkpoints are written at them."""
CURVE_POINTS = 20
"""Records of the loss by step in an epoch, at most."""
BETTER = ("holdout/top1@20", "holdout/cosine", "holdout/gram_pearson")
"""What `keep="best"` goes by: the first of these that evaluations give. The higher the better."""

Store = FeatureStore | str | os.PathLike[str]


@stoppable()
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
    trust_code: bool = False,
    announce: Callable[[Plan], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    **config: Any,
) -> Run:
    """Train a student so that it behaves like the teacher whose features `store` holds.

    Under `torchrun` or `accelerate launch`, processes share every batch, and the first one alone writes and tells. On
    GPUs, batch norms then take their statistics over the whole batch; on CPUs, over their own process's share of it, so
    that a student with batch norms does not train there as it does in one process.

    Ctrl-C, SIGTERM and SIGHUP leave a checkpoint of the step that they came in; of several processes, of one of the next ten
    steps. A second Ctrl-C, or a step that does not end within ten seconds, stops at once with the checkpoints that there are.
    Before the first step nothing is left of the run.

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
        trust_code: where `student` is another run's, the code that its folder names may be imported. Code named by
            `student` itself is.
        announce: called once, before the first step.
        progress: called after every step.
        **config: the fields of `FitConfig`; `student` is needed.

    Raises:
        ValueError: stores, corpora, config or folder do not fit, or another process trains in `out`; nothing has been
            trained.
        OSError: the disk is too small for the checkpoints, or full.
        KeyboardInterrupt: Ctrl-C, between two steps; of SIGTERM and SIGHUP its subclass `featcache.stop.Stopped`.
        RuntimeError: the loss or a weight became NaN or infinite; the last good checkpoint is kept.
    """
    settings = FitConfig(**config)
    refuse_wrong_type("checkpoint_minutes", checkpoint_minutes, float)
    if not checkpoint_minutes >= 0:
        raise ValueError(f"checkpoint_minutes must not be negative, got {checkpoint_minutes}")
    device = resolve_device(device)
    if device == "cpu":
        keep_freed_memory()
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device == "cuda")
    accelerator = make_accelerator(device, "bf16" if bf16 else "fp32", list(trackers), str(out))
    inputs = set_up(settings, store, corpus, accelerator, workers, trust_code)
    with Run(out) as run:
        finished, report, inputs.method = on_main(
            accelerator, lambda: _claim_and_prepare(run, inputs, resume, progress)
        )
        if not finished:
            loop = _Loop(run, inputs, accelerator, checkpoint_minutes, progress)
            _train(run, inputs, accelerator, loop, report, workers, announce)
            accelerator.wait_for_everyone()
    return run


def _train(
    run: Run,
    inputs: Inputs,
    accelerator: Any,
    loop: "_Loop",
    report: dict[str, float],
    workers: int | None,
    announce: Callable[[Plan], None] | None,
) -> None:
    """All epochs, the evaluations, and what is left of them: metrics, checkpoints, the student."""
    settings = inputs.settings
    main = accelerator.is_main_process
    held_out = inputs.held_out(workers) if main else None
    accelerator.init_trackers("distill", inputs.config)
    if main:
        _warn(inputs, accelerator)
        if announce:
            announce(_plan(inputs, loop, accelerator.num_processes))
    with tensorboard(run, loop.epoch_start + 1) if main else nullcontext() as board, loop.interrupt:
        for epoch in range(loop.epochs_done + 1, settings.epochs + 1):
            metrics = loop.train_epoch() | {f"mapping/{name}": value for name, value in report.items()}
            due = epoch == settings.epochs or (settings.eval_every and epoch % settings.eval_every == 0)
            if held_out and due:
                metrics |= held_out.measure(loop.training.embed)
                if settings.keep == "best":
                    loop.keep_better(metrics)
            if board:
                for record in loop.unwritten:
                    board({f"step/{name}": value for name, value in record.items() if name != "step"}, record["step"])
                loop.unwritten.clear()
                board(metrics, loop.step)
                accelerator.log(metrics, step=epoch)
                loop.history.append(metrics)
            loop.save()
            loop.stop_if_asked()
    for tracker in accelerator.trackers:
        tracker.finish()
    if main:
        run.save_mapping(inputs.method.state_dict(), report)
        student, kept = loop.kept
        run.finish(student, _record(inputs) | kept)
        loop.save(finished=True)


def _claim_and_prepare(
    run: Run, inputs: Inputs, resume: bool, progress: Callable[[Progress], None] | None
) -> tuple[bool, dict[str, float], Any]:
    """Claim the folder, and fit what is fitted before training or read it where an earlier process has.

    Returns:
        Whether the run is finished already; what `prepare` reports; the method.
    """
    method, settings = inputs.method, inputs.settings
    if not run.finished:
        run.refuse_small_disk(checkpoint_bytes(inputs.student, method, settings))
    run.open(inputs.config, resume=resume)
    if run.finished:
        return True, {}, None
    on_mapping = (lambda done, total: progress(Progress("mapping", done, total))) if progress else None
    fitted = run.load_mapping() or _mapping_of_student(inputs)
    report = method.prepare(inputs.pairs.source, seed=settings.seed, progress=on_mapping, fitted=fitted)
    run.save_mapping(fitted_tensors(method), report)
    return False, report, method


def _mapping_of_student(inputs: Inputs) -> Fitted | None:
    """The mapping of the run that the student is taken from, where this one would fit the same kind for the same teacher:
    a student that follows one mapping would have to learn another anew."""
    source, _, folder = inputs.settings.student.partition(":")
    earlier = Run(folder).config if source == "run" else None
    now = json.loads(json.dumps(inputs.config))
    if earlier is None or any(earlier.get(key) != now[key] for key in ("teacher", "method", "method_options")):
        return None
    return Run(folder).load_mapping()


def _warn(inputs: Inputs, accelerator: Any) -> None:
    samples, batch_size = len(inputs.pairs), inputs.settings.batch_size
    if inputs.student.remark:
        log.warning("%s", inputs.student.remark)
    if samples < batch_size:
        log.warning("batch_size %d is more than the %d samples; every step is of all of them", batch_size, samples)
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in inputs.student.modules())
    if norms and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        log.warning("batch norms see only their process's share of the batch on a CPU")


def _plan(inputs: Inputs, loop: "_Loop", processes: int) -> Plan:
    return Plan(
        samples=len(inputs.pairs),
        failed=inputs.failed,
        held_out=len(inputs.held),
        copies=inputs.copies,
        views=inputs.pairs.description,
        student_weights=sum(weight.numel() for weight in inputs.student.parameters()),
        steps=loop.steps,
        done=loop.step,
        processes=processes,
        checkpoint_bytes=checkpoint_bytes(inputs.student, inputs.method, inputs.settings),
    )


def _record(inputs: Inputs) -> dict[str, Any]:
    """What `student.json` says: what the student is built from, and how it was trained."""
    return {
        **inputs.record,
        "method": inputs.settings.method,
        "teacher": inputs.source.stores[0].encoder_name,
        "trained_on": {
            "samples": len(inputs.pairs),
            "failed": inputs.failed,
            "held_out": len(inputs.held),
            "copies": inputs.copies,
            "views": inputs.pairs.description,
        },
    }


class _Loop:
    """The steps of a run, from its newest checkpoint on.

    Attributes:
        training: the student and what trains it.
        interrupt: to be entered around all epochs.
        step, steps: done, and in all.
        history: the records of `metrics.jsonl`, of epochs and of steps.
        unwritten: those of the epoch at hand, which TensorBoard gets when it is over.

    Raises:
        ValueError: the checkpoint is of a longer run.
    """

    def __init__(
        self,
        run: Run,
        inputs: Inputs,
        accelerator: Any,
        checkpoint_minutes: float,
        progress: Callable[[Progress], None] | None,
    ):
        self._run, self._inputs, self._accelerator = run, inputs, accelerator
        self._seconds = 60 * checkpoint_minutes
        self._progress = progress if accelerator.is_main_process else None
        checkpoint, settings = run.load_checkpoint(), inputs.settings
        self._per_epoch = inputs.pairs.batches(settings.batch_size)
        self.steps, self.step = settings.epochs * self._per_epoch, checkpoint["step"] if checkpoint else 0
        if checkpoint and (edited := difference(checkpoint.get("config", inputs.config), inputs.config)):
            raise ValueError(
                f"{run.path}: its checkpoints were made with another configuration than its config.toml now says ({edited}); "
                "undo that change, or choose another --out"
            )
        if self.step > self.steps:
            raise ValueError(
                f"{run.checkpoints[-1]}: is of step {self.step}, but this run has {self.steps}; choose another --out"
            )
        self.training = Training(accelerator, inputs.student, inputs.method, inputs.preprocess, settings, checkpoint)
        self.interrupt = PutOffInterrupt(shared=accelerator.num_processes > 1)
        self._agreed = accelerator.num_processes == 1
        self._totals: dict[str, float] = checkpoint["totals"] if checkpoint else {}
        # Of the newest record by step: how far it went, and the totals there.
        self._recorded: dict[str, Any] = checkpoint["recorded"] if checkpoint else {"step": 0, "totals": {}}
        self._best: dict[str, Any] | None = checkpoint["best"] if checkpoint else None
        self.history = [record for record in run.records if record["step"] <= self.step]
        self.unwritten = [record for record in self.history if record["step"] > self.epoch_start]
        self._at = Progress("training", self.step, self.steps)
        self._unread: list[dict[str, Tensor]] = []
        self._saved = time.monotonic()

    @property
    def epochs_done(self) -> int:
        return self.step // self._per_epoch

    @property
    def epoch_start(self) -> int:
        """Steps before the epoch at hand."""
        return self.epochs_done * self._per_epoch

    def train_epoch(self) -> dict[str, Any]:
        """What is left of the epoch; its metrics.

        Raises:
            RuntimeError: the loss or a weight became NaN or infinite.
            KeyboardInterrupt: between two steps, a checkpoint is written.
        """
        settings, epoch, first = self._inputs.settings, self.epochs_done, self.step
        assert settings.lr is not None
        warmup, batch_size = warmup_steps(settings, self._per_epoch), min(settings.batch_size, len(self._inputs.pairs))
        at, points = self._at, max(LOG_EVERY, self._per_epoch // CURVE_POINTS // LOG_EVERY * LOG_EVERY)
        waited, began = 0.0, time.perf_counter()
        clock = began
        for batch in self._batches(epoch):
            waited += time.perf_counter() - clock
            lr = learning_rate(self.step, self.steps, settings.lr, warmup, settings.min_lr)
            self._unread.append(self.training.step(batch, self.step, lr))
            self.step += 1
            self._run.begun = True
            within = self.step % self._per_epoch > 0
            if self.step % LOG_EVERY == 0 or not within:
                self._read(at)
                if (self.step - epoch * self._per_epoch) % points == 0 or not within:
                    self._record_step(lr)
                if within and time.monotonic() - self._saved >= self._seconds:
                    self.save()
            seconds = time.perf_counter() - began
            at.done, at.wait = self.step, waited / seconds
            at.images_per_second = (self.step - first) * batch_size / seconds
            try:
                if self._progress:
                    self._progress(replace(at))
                if within:
                    self.stop_if_asked()
            except KeyboardInterrupt:
                if within and self._agreed:
                    self._read(at)
                    self.save()
                raise
            clock = time.perf_counter()
        self._totals, self._recorded["totals"] = {}, {}
        return {
            "epoch": epoch + 1,
            "step": self.step,
            "loss": at.loss,
            **{f"loss/{name}": value for name, value in at.terms.items()},
            "lr": lr,
            "images_per_second": at.images_per_second,
            "wait_share": at.wait,
        }

    def stop_if_asked(self) -> None:
        """Raises KeyboardInterrupt where Ctrl-C, SIGTERM or SIGHUP came, and all processes know of it."""
        if self._agreed:
            self.interrupt.stop_if_asked()

    def keep_better(self, metrics: dict[str, Any]) -> None:
        """Keep the student as it is now where an evaluation found none as good before."""
        name = self._best["metric"] if self._best else next((name for name in BETTER if name in metrics), None)
        if name in metrics and (self._best is None or metrics[name] > self._best["value"]):
            student = {key: value.detach().cpu().clone() for key, value in self.training.saved.state_dict().items()}
            self._best = {"metric": name, "value": metrics[name], "epoch": metrics["epoch"], "student": student}

    @property
    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights of the student that is saved, and what `student.json` says of the choice."""
        if self._best is None:
            return self.training.saved.state_dict(), {}
        best = dict(self._best)
        return best.pop("student"), {"kept": best}

    def save(self, finished: bool = False) -> None:
        """Write a checkpoint and the metrics so far, in the main process; the last one, without the optimizer's state, in
        place of all others when the run is `finished`."""
        if self._accelerator.is_main_process:
            made = {"config": self._inputs.config, "record": _record(self._inputs), "best": self._best}
            curves = {"totals": self._totals, "recorded": self._recorded}
            state = {"step": self.step, **curves, **made, **self.training.state(optimizer=not finished)}
            self._run.log(self.history)
            self._run.save_checkpoint(self.step, state, keep=1 if finished else KEEP)
        self._saved = time.monotonic()

    def _record_step(self, lr: float) -> None:
        """The mean losses of the steps since the record before, as one more record."""
        last = self._recorded
        steps = self.step - last["step"]
        terms = {name: (total - last["totals"].get(name, 0.0)) / steps for name, total in self._totals.items()}
        losses = {f"loss/{name}": value for name, value in terms.items()}
        self.unwritten.append({"step": self.step, "loss": sum(terms.values()), **losses, "lr": lr})
        self.history.append(self.unwritten[-1])
        self._recorded = {"step": self.step, "totals": dict(self._totals)}

    def _batches(self, epoch: int) -> Iterator[Batch]:
        method = self._inputs.method
        return self._inputs.pairs.epoch(
            epoch,
            batch_size=self._inputs.settings.batch_size,
            seed=self._inputs.settings.seed,
            fields=(*method.fields, ROW) if getattr(method, "reads_rows", False) else method.fields,
            start=self.step % self._per_epoch,
            process=self._accelerator.process_index,
            processes=self._accelerator.num_processes,
        )

    def _read(self, at: Progress) -> None:
        """Add the losses since the last reading, means over all processes, to the epoch's, and tell `at` of them."""
        if self._unread:
            table = torch.stack([torch.stack(list(terms.values())) for terms in self._unread]).double().sum(0)
            # Processes are not told to stop at the same instant; here they meet.
            asked = table.new_tensor([float(self.interrupt.asked)])
            *sums, asks = self._accelerator.reduce(torch.cat([table, asked]), "mean").tolist()
            if asks:
                self._agreed = True
                self.interrupt.ask()
            for name, value in zip(self._unread[0], sums, strict=True):
                self._totals[name] = self._totals.get(name, 0.0) + value
            self._unread.clear()
        seen = (self.step - 1) % self._per_epoch + 1
        at.terms = {name: value / seen for name, value in self._totals.items()}
        at.loss = sum(at.terms.values())
        self._refuse_not_finite(at.loss)

    def _refuse_not_finite(self, loss: float) -> None:
        if math.isfinite(loss) and self.training.finite():
            return
        what = f"the loss became {loss}" if not math.isfinite(loss) else "a weight became NaN or infinite"
        kept = self._run.checkpoints
        last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
        epoch = (self.step - 1) // self._per_epoch + 1
        raise RuntimeError(
            f"{self._run.path}: {what} by step {self.step} (epoch {epoch}); choose another --out with a lower --lr; {last}"
        )

"""The steps of a run, and where it stands."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from distill.pairs import Drawn
from distill.training.interrupt import PutOffInterrupt
from distill.training.progress import FitProgress
from distill.training.run import KEEP, Run, difference
from distill.training.schedule import kept_after, learning_rate, steps_of
from distill.training.setup import Inputs, sampling_weights
from distill.training.step import Training

LOG_EVERY = 10
"""Steps between readings of the loss, which a GPU has to be waited for; checkpoints are written at them."""
TOLD_SECONDS = 5.0
"""Between writings of `metrics.jsonl` within an epoch, at least: who watches the run sees its curve grow."""
CURVE_POINTS = 20
"""Records of the loss by step in an epoch, at most."""
BETTER = (
    "holdout/token_nll",
    "holdout/iou",
    "holdout/top1",
    "holdout/top1@20",
    "holdout/cosine",
    "holdout/gram_pearson",
)
"""What `keep="best"` goes by: the first of these that evaluations give. The higher the better, but of nats the lower."""


class Loop:
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
        accelerator: Accelerator,
        checkpoint_minutes: float,
        progress: Callable[[FitProgress], None] | None,
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
        self._sampled = sampling_weights(settings, inputs.pairs.rows)
        self._agreed = accelerator.num_processes == 1
        self._totals: dict[str, float] = checkpoint["totals"] if checkpoint else {}
        # Of the newest record by step: how far it went, and the totals there.
        self._recorded: dict[str, Any] = checkpoint["recorded"] if checkpoint else {"step": 0, "totals": {}}
        self._best: dict[str, Any] | None = checkpoint["best"] if checkpoint else None
        self.history = [record for record in run.records if record["step"] <= self.step]
        self.unwritten = [record for record in self.history if record["step"] > self.epoch_start]
        self._at = FitProgress("training", self.step, self.steps)
        self._unread: list[dict[str, Tensor]] = []
        self._saved = self._told = time.monotonic()

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
        settings, epoch, seen = self._inputs.settings, self.epochs_done, 0
        at, points = self._at, max(LOG_EVERY, self._per_epoch // CURVE_POINTS // LOG_EVERY * LOG_EVERY)
        waited, began = 0.0, time.perf_counter()
        clock = began
        for batch in self._batches(epoch):
            waited += time.perf_counter() - clock
            lr = self._learning_rate()
            self._unread.append(self.training.step(batch, self.step, lr))
            self.step += 1
            seen += len(batch.row) * self._accelerator.num_processes
            self._run.begun = True
            within = self.step % self._per_epoch > 0
            kept = kept_after(self.step, settings.keep_checkpoints, self._per_epoch)
            if self.step % LOG_EVERY == 0 or not within or kept is not None:
                self._read(at)
                if kept is not None:
                    self._keep_snapshot(kept)
                if (self.step - epoch * self._per_epoch) % points == 0 or not within:
                    self._record_step(lr)
                if within and time.monotonic() - self._saved >= self._seconds:
                    self.save()
            seconds = time.perf_counter() - began
            at.done, at.wait = self.step, waited / seconds
            at.images_per_second = seen / seconds
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
        if name in metrics and (self._best is None or _better(name, metrics[name], self._best["value"])):
            student = {key: value.detach().cpu().clone() for key, value in self.training.saved.state_dict().items()}
            self._best = {"metric": name, "value": metrics[name], "epoch": metrics["epoch"], "student": student}

    @property
    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights of the student that is saved, and what `student.json` says of the choice."""
        if self._best is None:
            return self.training.saved.state_dict(), {}
        best = dict(self._best)
        return best.pop("student"), {"kept": best}

    def _keep_snapshot(self, epoch: float) -> None:
        if self._accelerator.is_main_process:
            record = {**self._inputs.student_record, "snapshot": {"epoch": epoch, "step": self.step}}
            self._run.save_snapshot(self.step, self.training.saved.state_dict(), record)

    def save(self, finished: bool = False) -> None:
        """Write a checkpoint and the metrics so far, in the main process; the last one, without the optimizer's state, in
        place of all others when the run is `finished`."""
        if self._accelerator.is_main_process:
            made = {"config": self._inputs.config, "record": self._inputs.student_record, "best": self._best}
            curves = {"totals": self._totals, "recorded": self._recorded}
            state = {"step": self.step, **curves, **made, **self.training.state(optimizer=not finished)}
            self._run.log(self.history)
            self._run.save_checkpoint(self.step, state, keep=1 if finished else KEEP)
        self._saved = self._told = time.monotonic()

    def _learning_rate(self) -> float:
        settings = self._inputs.settings
        assert settings.lr is not None
        warmup, stepped = steps_of(settings.warmup_epochs, self._per_epoch), settings.schedule == "step"
        milestones = [steps_of(epochs, self._per_epoch) for epochs in settings.milestones] if stepped else None
        return learning_rate(self.step, self.steps, settings.lr, warmup, settings.min_lr, milestones, settings.gamma)

    def _record_step(self, lr: float) -> None:
        """The mean losses of the steps since the record before, as one more record."""
        last = self._recorded
        steps = self.step - last["step"]
        terms = {name: (total - last["totals"].get(name, 0.0)) / steps for name, total in self._totals.items()}
        losses = {f"loss/{name}": value for name, value in terms.items()}
        self.unwritten.append({"step": self.step, "loss": sum(terms.values()), **losses, "lr": lr})
        self.history.append(self.unwritten[-1])
        if self._accelerator.is_main_process and time.monotonic() - self._told >= TOLD_SECONDS:
            self._run.log(self.history)  # records of steps after the newest checkpoint go when the run is resumed
            self._told = time.monotonic()
        self._recorded = {"step": self.step, "totals": dict(self._totals)}

    def _batches(self, epoch: int) -> Iterator[Drawn]:
        method = self._inputs.method
        weights = [each for each in (self._sampled, method.weights(epoch)) if each is not None]
        return self._inputs.pairs.epoch(
            epoch,
            batch_size=self._inputs.settings.batch_size,
            seed=self._inputs.settings.seed,
            fields=method.fields,
            pairing=method.pairing,
            group=method.group,
            weights=np.prod(weights, axis=0) if weights else None,
            start=self.step % self._per_epoch,
            process=self._accelerator.process_index,
            processes=self._accelerator.num_processes,
        )

    def _read(self, at: FitProgress) -> None:
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


def _better(metric: str, value: float, than: float) -> bool:
    return value < than if metric == "holdout/token_nll" else value > than

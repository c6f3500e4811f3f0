"""One step of training, and everything that a checkpoint has to hold of it."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, broadcast_object_list
from torch import Tensor, nn

from distill.methods import Batch, Features, Method
from distill.pairs import Drawn
from distill.training.config import FitConfig
from distill.training.layers import layer_scales
from distill.training.schedule import Ema, make_optimizer, train_mode
from featcache.inputs import Input
from featcache.plugins import suggest
from featcache.store.layout import DENSE, EMBEDDING, LOGITS, TOKEN_LOGITS
from featcache.student import Student

T = TypeVar("T")


def make_accelerator(device: str, precision: str, trackers: list[str | GeneralTracker], folder: str) -> Accelerator:
    """Of this process's device, and of the process group that `torchrun` or `accelerate launch` describe.

    Args:
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16".
        trackers: names that Accelerate knows, or trackers.
        folder: for trackers that write files.

    Raises:
        ValueError: a tracker is unknown, or its package is not installed.
    """
    known = sorted({*LoggerType.list()} - {"all", "tensorboard"})  # TensorBoard is written in any case
    for name in trackers:
        if isinstance(name, GeneralTracker):
            continue
        if name not in known:
            raise ValueError(f"unknown tracker {name!r}; {suggest(name, known)}")
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"tracker {name!r} is not installed; pip install {name}, or leave it out")
    # Accelerate keeps the device and precision of the first Accelerator of a process for all later ones.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=trackers or None,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(),
            InitProcessGroupKwargs(timeout=timedelta(hours=4)),  # the others wait while the first fits a mapping
        ],
    )


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns, or raises, in the main process; the others wait and get the same."""
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = function()
        except Exception as error:
            if accelerator.num_processes == 1:
                raise
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


class Objective(nn.Module):
    """Student and method as one module, so that DistributedDataParallel averages the gradients of both."""

    def __init__(self, student: nn.Module, method: Method):
        super().__init__()
        self.student, self.method = student, method

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        output = self.student(self.method.inputs(batch, self.student), self.method.student_fields)
        # Losses are of fp32 whatever the student computes in: a temperature of 0.01 leaves bf16 no digits.
        with torch.autocast(batch.inputs.device.type, enabled=False):
            return self.method.loss({name: value.float() for name, value in output.items()}, batch)


class Training:
    """The student, its method and its optimizer.

    Attributes:
        student: in training.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        method: Method,
        preprocess: Input[Any, Any],
        settings: FitConfig,
        checkpoint: dict[str, Any] | None,
    ):
        self._accelerator, self._settings, self._preprocess = accelerator, settings, preprocess
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            student = synchronised(student)
        self.student, self._method = student, method
        if checkpoint:
            _restore(student, checkpoint["student"])
            method.load_state_dict(checkpoint["method"])
        student.to(accelerator.device).to(memory_format=torch.channels_last)
        self._ema = Ema(student, settings.ema) if settings.ema else None
        if self._ema and checkpoint:
            self._ema.module.load_state_dict(checkpoint["ema"])
        if accelerator.num_processes > 1:
            accelerator.ddp_handler.find_unused_parameters = self._leaves_weights_unused()
        if settings.compile:
            student.compile()
        self._model = accelerator.prepare(Objective(student, method))
        train_mode(self._model)
        self._weights = [w for w in (*student.parameters(), *method.parameters()) if w.requires_grad]
        # Those that begin with −∞ or NaN, such as masks of attention, are meant so.
        self._finite = {name for name, buffer in _floating(student) if bool(buffer.isfinite().all())}
        scale = None
        if settings.layer_decay < 1:
            assert isinstance(student, Student)
            scale = layer_scales(student, settings.layer_decay)
        self._optimizer = make_optimizer((student, method), settings, scale)
        if checkpoint and "optimizer" in checkpoint:  # of a finished run it is gone
            self._optimizer.load_state_dict(checkpoint["optimizer"])

    def step(self, drawn: Drawn, number: int, lr: float) -> dict[str, Tensor]:
        """The step of that number; returns the terms of this process's share of the batch, on the device."""
        self._seed(number)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        parts = self._settings.accumulate
        for part in range(parts):
            batch = self._on_device(drawn, part, parts)
            last = part == parts - 1
            with nullcontext() if last else self._accelerator.no_sync(self._model):
                found = self._model(batch)
                self._accelerator.backward(torch.stack(list(found.values())).sum() / parts)
            for name, term in found.items():
                terms[name] = terms.get(name, 0.0) + term.detach() / parts
        if self._settings.clip_norm:
            self._accelerator.clip_grad_norm_(self._weights, self._settings.clip_norm)
        self._optimizer.step()
        if self._ema:
            self._ema.update(self.student, number)
        return terms

    def embed(self, drawn: Drawn) -> tuple[Features, Batch]:
        """Embeddings of the student that will be saved, and logits, of masks dense ones, where it has a classifier, and of a
        language model those of the next tokens, as it will be used, float32; and the batch with the teacher's."""
        batch = self._on_device(drawn)
        self.saved.eval()  # else batch norms would learn from these images, and drop-path would drop
        try:
            with self._accelerator.autocast():
                classified = (DENSE if self._method.masks else LOGITS,) if self._method.classifier else ()
                spoken = (TOKEN_LOGITS,) if TOKEN_LOGITS in self._method.student_fields else ()
                found = self.saved(batch.inputs, (EMBEDDING, *classified, *spoken))
            return {name: value.float() for name, value in found.items()}, batch
        finally:
            if self.saved is self.student:
                train_mode(self.student)

    @property
    def saved(self) -> nn.Module:
        """The student that is measured and saved: the moving average where there is one."""
        return self._ema.module if self._ema else self.student

    def finite(self) -> bool:
        """Whether all weights and running statistics are numbers."""
        values = [*self._weights, *(buffer for name, buffer in _floating(self.student) if name in self._finite)]
        return bool(torch.stack(torch._foreach_norm(values)).sum().isfinite())

    def state(self, optimizer: bool = True) -> dict[str, Any]:
        """What `checkpoint` has to hold; that of a finished run no state of the optimizer."""
        held = {"student": _cpu(self.student.state_dict()), "method": _cpu(self._method.state_dict())}
        if self._ema:
            held["ema"] = _cpu(self._ema.module.state_dict())
        return held | ({"optimizer": self._optimizer.state_dict()} if optimizer else {})

    def _leaves_weights_unused(self) -> bool:
        """Whether the student has weights that the features which the method reads do not come from."""
        assert isinstance(self.student, Student)
        black = self.student.model.example(2).to(self._accelerator.device)
        output = self.student.eval()(black, self._method.student_fields)
        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        total = torch.stack([value.sum() for value in output.values()]).sum()
        return any(gradient is None for gradient in torch.autograd.grad(total, weights, allow_unused=True))

    def _on_device(self, drawn: Drawn, part: int = 0, parts: int = 1) -> Batch:
        """Normalised images, or token ids, and the features, float32 or whole numbers, of one of equal parts of the batch."""
        device = self._accelerator.device

        def send(rows: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(np.array_split(rows, parts)[part])
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        sent = {name: send(rows) for name, rows in drawn.features.items()}
        features = {name: rows.float() if rows.is_floating_point() else rows for name, rows in sent.items()}
        images = self._preprocess.to_model(send(drawn.pixels))
        row, view, label, weight = (send(rows) for rows in (drawn.row, drawn.view, drawn.label, drawn.weight))
        mask = None if drawn.mask is None else send(drawn.mask).long() - 1
        return Batch(features, images, row, view, label, weight, self._preprocess, mask)

    def _seed(self, step: int) -> None:
        """What is drawn at a step (dropout) follows from its number, so a resumed run draws the same."""
        seed = (self._settings.seed * 1_000_003 + step) * 1_009 + self._accelerator.process_index
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` looks for every kind of device, every time
        if self._accelerator.device.type == "cuda":
            torch.cuda.manual_seed(seed)


def synchronised(student: nn.Module) -> nn.Module:
    """Its batch norms take their statistics over the shares of all processes; for GPUs."""
    from timm.layers import convert_sync_batchnorm  # torch's own drops the activations that timm's norms hold

    return convert_sync_batchnorm(student)


def checkpoint_bytes(student: nn.Module, method: nn.Module, settings: FitConfig) -> int:
    """Of one checkpoint: the weights, what the optimizer holds for each that trains, their average and the best."""
    trained = sum(w.nbytes for w in (*student.parameters(), *method.parameters()) if w.requires_grad)
    held = sum(value.nbytes for module in (student, method) for value in module.state_dict().values())
    copies = bool(settings.ema) + (settings.keep == "best")
    averaged = copies * sum(value.nbytes for value in student.state_dict().values())
    copied = 2 if settings.optimizer == "adamw" else int(settings.optimizer == "lars" or settings.momentum > 0)
    return held + averaged + trained * copied


def _restore(student: nn.Module, state: dict[str, Tensor]) -> None:
    """Raises ValueError where the student is built otherwise than the one that began the run, by an older version."""
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise ValueError(
            f"the run's checkpoint is of a student that was built otherwise ({reason}); finish it with the version that "
            "began it, or choose another --out"
        ) from None


def _floating(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point()]


def _cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in state.items()}

"""Stage two: train a student against cached targets."""

import copy
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from distill.methods import Fitted, Preparing, fitted_tensors, load_method
from distill.rendered import Renderings
from distill.training.board import tensorboard
from distill.training.config import FitConfig, refuse_wrong_type
from distill.training.loop import Loop
from distill.training.progress import FitPlan, FitProgress
from distill.training.rehearsal import rehearse
from distill.training.run import Run
from distill.training.setup import CorpusGiven, Inputs, StoreGiven, set_up
from distill.training.step import checkpoint_bytes, make_accelerator, on_main
from featcache.encoder import Encoder
from featcache.extraction.heads import head_file
from featcache.head import Head
from featcache.inputs.texts import Texts
from featcache.machine import keep_freed_memory, resolve_device
from featcache.models.run import Trained
from featcache.run_folder import on_disk, pinned, split_spec
from featcache.stop import stoppable
from featcache.store.layout import HIDDEN, LOGITS

__all__ = ["FitConfig", "FitPlan", "FitProgress", "fit", "load_method", "preview"]

log = logging.getLogger("distill")


@stoppable()
def fit(
    store: StoreGiven | Sequence[StoreGiven],
    corpus: CorpusGiven | Sequence[CorpusGiven] = None,
    *,
    out: str | os.PathLike[str],
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 10.0,
    trackers: Sequence[Any] = (),
    trust_code: bool = False,
    renderings: Renderings | None = None,
    announce: Callable[[FitPlan], None] | None = None,
    progress: Callable[[FitProgress], None] | None = None,
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
        renderings: pixels that are shared by fits of one process over the same images, as those of `distill sweep`; a fit of
            its own keeps what it renders in memory, as much as fits.
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
    settings = _settings(config)
    accelerator = _accelerator(settings, device, trackers, str(out), checkpoint_minutes)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    inputs = set_up(settings, store, corpus, accelerator, workers, trust_code, renderings)
    with Run(out) as run:
        finished, report, inputs.method = on_main(
            accelerator, lambda: _claim_and_prepare(run, inputs, resume, progress)
        )
        if not finished:
            loop = Loop(run, inputs, accelerator, checkpoint_minutes, progress)
            _train(run, inputs, accelerator, loop, report, workers, announce)
            accelerator.wait_for_everyone()
    return run


def preview(
    store: StoreGiven | Sequence[StoreGiven],
    corpus: CorpusGiven | Sequence[CorpusGiven] = None,
    *,
    out: str | os.PathLike[str],
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    checkpoint_minutes: float = 10.0,
    trackers: Sequence[Any] = (),
    trust_code: bool = False,
    renderings: Renderings | None = None,
    **config: Any,
) -> FitPlan:
    """What `fit` of the same arguments is going to do, and how long that may take, by a few images. Nothing is written.

    Raises:
        As `fit`, where that would before it trains; but for what a method says of the rows when it is prepared.
    """
    settings = _settings(config)
    accelerator = _accelerator(settings, device, trackers, str(out), checkpoint_minutes)
    inputs = set_up(settings, store, corpus, accelerator, workers, trust_code, renderings)
    run, steps = Run(out), settings.epochs * inputs.pairs.batches(settings.batch_size)
    if not run.finished:
        run.refuse_small_disk(checkpoint_bytes(inputs.student, inputs.method, settings), *_snapshots(inputs))
    run.refuse(inputs.config, resume=resume)
    done = steps if run.finished else int(run.checkpoints[-1].stem.partition("-")[2]) if run.checkpoints else 0
    return _plan(inputs, steps, done, accelerator)


def _settings(config: dict[str, Any]) -> FitConfig:
    """A student on the hub is that of the commit which its revision means now."""
    student = config.get("student")
    return FitConfig(**{**config, **({"student": pinned(student)} if isinstance(student, str) else {})})


def _accelerator(
    settings: FitConfig, device: str, trackers: Sequence[Any], folder: str, checkpoint_minutes: float
) -> Accelerator:
    refuse_wrong_type("checkpoint_minutes", checkpoint_minutes, float)
    if not checkpoint_minutes >= 0:
        raise ValueError(f"checkpoint_minutes must not be negative, got {checkpoint_minutes}")
    device = resolve_device(device)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device == "cuda")
    return make_accelerator(device, "bf16" if bf16 else "fp32", list(trackers), folder)


def _train(
    run: Run,
    inputs: Inputs,
    accelerator: Accelerator,
    loop: Loop,
    report: dict[str, float],
    workers: int | None,
    announce: Callable[[FitPlan], None] | None,
) -> None:
    """All epochs, the evaluations, and what is left of them: metrics, checkpoints, the student."""
    settings = inputs.settings
    main = accelerator.is_main_process
    held_out = inputs.held_out(workers) if main else None
    accelerator.init_trackers("distill", inputs.config)
    if main:
        _warn(inputs, accelerator)
    with tensorboard(run, loop.epoch_start + 1) if main else nullcontext() as board, loop.interrupt:
        if main and announce:
            announce(_plan(inputs, loop.steps, loop.step, accelerator))
        for epoch in range(loop.epochs_done + 1, settings.epochs + 1):
            metrics = loop.train_epoch() | {f"mapping/{name}": value for name, value in report.items()}
            due = epoch == settings.epochs or (settings.eval_every and epoch % settings.eval_every == 0)
            if len(inputs.held) and due:
                measured = on_main(accelerator, lambda: held_out.measure(loop.training.embed) if held_out else {})
                inputs.method.learn(epoch, measured)
                metrics |= measured
                if main and settings.keep == "best":
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
        record = inputs.student_record | kept
        run.finish(student, record, _head(inputs, student, record))
        loop.save(finished=True)


def _head(inputs: Inputs, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> bytes | None:
    """The student's classifier of embeddings as a file that evaluators read beside these, or a language model's head; None where it has
    none."""
    if inputs.student.gives != LOGITS and inputs.student.model.token_head is None:
        return None
    student = copy.deepcopy(inputs.student).cpu()
    student.load_state_dict(weights)
    encoder = Encoder.of(Trained("student", student, record))
    if inputs.student.gives != LOGITS:
        return head_file(encoder, (HIDDEN,))
    assert isinstance(student.classifier, nn.Linear)
    weight, bias = (each.detach().double().numpy() for each in (student.classifier.weight, student.classifier.bias))
    head = Head(weight, bias, np.arange(len(bias)), fingerprint=encoder.fingerprint, class_names=student.classes)
    return head.to_bytes(encoder=f"student of {inputs.settings.method}")


def _claim_and_prepare(
    run: Run, inputs: Inputs, resume: bool, progress: Callable[[FitProgress], None] | None
) -> tuple[bool, dict[str, float], Any]:
    """Claim the folder, and fit what is fitted before training or read it where an earlier process has.

    Returns:
        Whether the run is finished already; what `prepare` reports; the method.
    """
    method, settings = inputs.method, inputs.settings
    if not run.finished:
        run.refuse_small_disk(checkpoint_bytes(inputs.student, method, settings), *_snapshots(inputs))
    run.open(inputs.config, resume=resume)
    if run.finished:
        return True, {}, None
    if isinstance(inputs.preprocess, Texts) and inputs.preprocess.content is not None:
        run.save_tokenizer(inputs.preprocess.content)
    on_mapping = (lambda done, total: progress(FitProgress("mapping", done, total))) if progress else None
    fitted = run.load_mapping() or _mapping_of_student(inputs)
    given: Preparing = {"seed": settings.seed, "progress": on_mapping, "fitted": fitted}
    if inputs.pairs.masks:
        given["masked"] = inputs.pairs.masks.known
    report = method.prepare(inputs.pairs.rows, **given)
    run.save_mapping(fitted_tensors(method), report)
    return False, report, method


def _snapshots(inputs: Inputs) -> tuple[int, int]:
    """How many the run will keep, and the bytes of each."""
    settings = inputs.settings
    if not settings.keep_checkpoints:
        return 0, 0
    steps = settings.epochs * inputs.pairs.batches(settings.batch_size)
    size = sum(value.nbytes for value in inputs.student.state_dict().values())
    return min(steps, int(settings.epochs / settings.keep_checkpoints + 1e-6)), size


def _mapping_of_student(inputs: Inputs) -> Fitted | None:
    """The mapping of the run that the student is taken from, where this one would fit the same kind for the same teacher:
    a student that follows one mapping would have to learn another anew."""
    source, _, rest = inputs.settings.student.partition(":")
    folder = split_spec(on_disk(rest))[0] if source == "run" else None
    earlier = Run(folder).config if folder else None
    now = json.loads(json.dumps(inputs.config))
    if earlier is None or any(earlier.get(key) != now[key] for key in ("teacher", "method", "method_options")):
        return None
    assert folder
    return Run(folder).load_mapping()


def _warn(inputs: Inputs, accelerator: Accelerator) -> None:
    samples, batch_size = len(inputs.pairs), inputs.settings.batch_size
    for line in inputs.settings.ignored:
        log.warning("%s", line)
    if inputs.student.remark:
        log.warning("%s", inputs.student.remark)
    if samples < batch_size:
        log.warning("batch_size %d is more than the %d samples; every step is of all of them", batch_size, samples)
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in inputs.student.modules())
    if norms and accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        log.warning("batch norms see only their process's share of the batch on a CPU")


def _plan(inputs: Inputs, steps: int, done: int, accelerator: Accelerator) -> FitPlan:
    (snapshots, snapshot_bytes), masks = _snapshots(inputs), inputs.pairs.masks
    return FitPlan(
        samples=len(inputs.pairs),
        failed=inputs.failed,
        held_out=len(inputs.held),
        copies=inputs.copies,
        views=inputs.pairs.description,
        epochs=inputs.settings.epochs,
        view_count=int(inputs.pairs.view_counts.max()),
        pixels=inputs.pairs.pixels,
        student_weights=sum(weight.numel() for weight in inputs.student.parameters()),
        steps=steps,
        done=done,
        processes=accelerator.num_processes,
        checkpoint_bytes=checkpoint_bytes(inputs.student, inputs.method, inputs.settings),
        classes=inputs.student.classes or (),
        unlabelled=int((~masks.known).sum()) if masks else inputs.pairs.rows.unlabelled,
        snapshots=snapshots,
        snapshot_bytes=snapshot_bytes,
        input=str(inputs.preprocess),
        precision="bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        seconds=rehearse(inputs, accelerator, steps - done) if done < steps else 0.0,
    )

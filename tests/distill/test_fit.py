import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from fit_cases import (
    BATCH,
    EPOCHS,
    IMAGES,
    STEPS,
    STUDENT,
    TEACHER,
    Interrupted,
    files,
    interrupt_at,
    without_speed,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.pairs import Pairs
from distill.training import loop
from distill.training.fit import FitConfig, fit
from distill.training.progress import EPOCHS_A_VIEW
from distill.training.run import KEEP, Run
from distill.training.schedule import learning_rate
from featcache.corpora import open_corpus
from featcache.encoder import load_encoder
from featcache.extraction.extract import extract
from featcache.inputs.images import Preprocess
from featcache.store.from_arrays import write_store
from featcache.student import make_student


def test_the_run_folder_holds_what_the_contract_names(finished):
    found = set(files(finished.path))
    events = {name for name in found if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert found - events == {
        "config.toml",
        "student.safetensors",
        "student.json",
        "mapping.safetensors",
        "metrics.jsonl",
        "checkpoints/step-00000012.pt",
    }
    assert KEEP == 2
    last = torch.load(finished.path / "checkpoints/step-00000012.pt", weights_only=True)
    assert "optimizer" not in last  # twice the weights, and nothing trains on


def test_config_is_fully_resolved(finished, store, images):
    assert tomllib.loads((finished.path / "config.toml").read_text()) == {
        "student": "tiny",
        "method": "centred",
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "lr": 0.00075,  # of batches of 16
        "views": "all",
        "student_augment": "photometric",
        "optimizer": "adamw",
        "warmup_epochs": 0.3,
        "min_lr": 0.0,
        "weight_decay": 0.05,
        "clip_norm": 0.0,
        "accumulate": 1,
        "ema": 0.0,
        "compile": False,
        "eval_every": 0,
        "holdout": 0.0,
        "keep": "last",
        "seed": 0,
        "embedding_dim": STUDENT,
        "image_size": 16,
        "patch_size": 0,
        "drop_path": 0.0,
        "pretrained": False,
        "precision": "auto",
        "method_options": {"mapping_steps": 3, "mapping_batch_size": 16},
        "store": str(store.path),
        "store_digest": store.manifest.sealed.digest,
        "corpus": str(images),
        "teacher": store.fingerprint,
    }


def test_student_record(finished):
    assert json.loads((finished.path / "student.json").read_text()) == {
        "architecture": "tiny",
        "embedding_dim": STUDENT,
        "preprocess": {
            "resize": 18,
            "crop": 16,
            "size": 16,
            "interpolation": "bicubic",
            "mode": "shortest",
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.25, 0.3],
        },
        "method": "centred",
        "teacher": "test/one_convolution",
        "trained_on": {
            "samples": IMAGES,
            "failed": 0,
            "held_out": 0,
            "copies": 0,
            "views": "all 3 stored views, replayed",
        },
    }


def test_saved_weights_are_the_trained_ones(finished):
    saved, trained = load_file(finished.path / "student.safetensors"), finished.student.state_dict()
    last = torch.load(finished.path / "checkpoints" / "step-00000012.pt", weights_only=True)
    assert saved.keys() == trained.keys() == last["student"].keys()
    assert all(torch.equal(saved[key], trained[key]) and torch.equal(saved[key], last["student"][key]) for key in saved)


def test_saved_mapping_is_the_one_that_the_metrics_describe(finished):
    mapping = load_file(finished.path / "mapping.safetensors")
    assert {key: tuple(value.shape) for key, value in mapping.items()} == {"mapping.weight": (STUDENT, TEACHER)}
    singular = np.linalg.svd(mapping["mapping.weight"].numpy(), compute_uv=False)
    for record in finished.run.metrics:
        assert record["mapping/singular_max"] == pytest.approx(singular.max(), rel=1e-5)
        assert record["mapping/singular_min"] == pytest.approx(singular.min(), rel=1e-5)


def test_one_metrics_record_an_epoch_and_the_loss_falls(finished):
    lines = (finished.path / "metrics.jsonl").read_text().splitlines()
    metrics = [record for record in map(json.loads, lines) if "epoch" in record]
    assert metrics == finished.run.metrics
    assert [record["step"] for record in metrics] == [4, 8, 12]
    assert [record["epoch"] for record in metrics] == [1, 2, 3]
    assert metrics[0]["loss"] > 1.1 * metrics[-1]["loss"]
    assert metrics[-1]["lr"] == 0


def test_tensorboard_shows_the_same_metrics(finished):
    board = EventAccumulator(str(finished.path))
    board.Reload()
    metrics = finished.run.metrics
    steps = [record for record in finished.run.records if "epoch" not in record]
    assert set(board.Tags()["scalars"]) == metrics[0].keys() | {f"step/{name}" for name in steps[0]} - {"step/step"}
    for name in metrics[0]:
        events = board.Scalars(name)
        assert [event.step for event in events] == [4, 8, 12]
        assert [event.value for event in events] == pytest.approx([record[name] for record in metrics], rel=1e-6)


@pytest.mark.parametrize("stop", [None, 5, 11, 14])
def test_the_loss_by_step_is_the_mean_since_the_record_before(train, tmp_path, monkeypatch, stop):
    """Eight steps an epoch, read at every second and recorded at every fourth; also where a run was interrupted."""
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    monkeypatch.setattr(loop, "CURVE_POINTS", 2)
    few = {"batch_size": 8, "epochs": 2, "checkpoint_minutes": 0.0}
    losses, training = [], loop.Training
    step = training.step

    def watched(self, batch, number, lr):
        terms = step(self, batch, number, lr)
        losses[number:] = [(sum(term.item() for term in terms.values()), lr)]
        return terms

    monkeypatch.setattr(training, "step", watched)
    if stop:
        with pytest.raises(Interrupted):
            train(tmp_path / "run", **few, progress=interrupt_at("training", stop))
    run = train(tmp_path / "run", **few, resume=True)
    records = [record for record in run.records if "epoch" not in record]
    assert [record["step"] for record in records] == [4, 8, 12, 16]
    for record in records:
        last = losses[record["step"] - 4 : record["step"]]
        assert record["loss"] == pytest.approx(np.mean([loss for loss, _ in last]), rel=1e-5)
        assert record["loss"] == pytest.approx(sum(record[name] for name in record if name.startswith("loss/")))
        assert record["lr"] == last[-1][1]
    board = EventAccumulator(str(run.path))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("step/loss")] == [
        (record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in records
    ]


def test_what_is_told_does_not_jump_at_an_epochs_end(finished):
    training = [at for at in finished.told if at.stage == "training"]
    first = next(i for i, at in enumerate(training) if at.terms)
    assert all(at.terms and math.isfinite(at.loss) for at in training[first:])


def test_progress_is_told_after_every_step(finished):
    assert [(at.stage, at.done, at.total) for at in finished.told] == [
        *(("mapping", done, 3) for done in (1, 2, 3)),
        *(("training", done, STEPS) for done in range(1, STEPS + 1)),
    ]
    at_epoch_ends = [at.loss for at in finished.told if at.stage == "training"][STEPS // EPOCHS - 1 :: STEPS // EPOCHS]
    assert at_epoch_ends == pytest.approx([record["loss"] for record in finished.run.metrics], rel=1e-6)
    assert all(0 <= at.wait <= 1 for at in finished.told)


def test_the_loss_is_of_the_very_pairs_and_the_saved_mapping(train, store, images, tmp_path):
    """One step of all samples: the logged loss is the untrained student's, recomputed here."""
    run = train(tmp_path / "run", epochs=1, batch_size=IMAGES, seed=3, method="tintem")
    torch.manual_seed(3)
    teacher = Preprocess.from_dict(store.manifest.encoder.preprocess)
    student, preprocess, _ = make_student("tiny", teacher, embedding_dim=STUDENT, image_size=16, pretrained=False)
    pairs = Pairs(store, open_corpus(str(images)), preprocess)
    drawn = next(pairs.epoch(0, batch_size=IMAGES, seed=3))
    embedding = drawn.features["embedding"]
    scaled = (drawn.pixels / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    with torch.no_grad():
        output = student.train()(torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()).numpy()
    target = embedding.astype(np.float64) @ load_file(run.path / "mapping.safetensors")["mapping.weight"].numpy().T
    cosine = (output * target).sum(1) / np.linalg.norm(output, axis=1) / np.linalg.norm(target, axis=1)
    assert run.metrics[0]["loss"] == pytest.approx((1 - cosine).mean(), rel=1e-4)


def test_the_seed_decides_everything(finished, train, tmp_path):
    again, other = train(tmp_path / "again", workers=1), train(tmp_path / "other", seed=1)
    for name in ("student.safetensors", "mapping.safetensors", "student.json"):
        assert (again.path / name).read_bytes() == (finished.path / name).read_bytes(), name
    assert without_speed(again.metrics) == without_speed(finished.run.metrics)
    assert (other.path / "student.safetensors").read_bytes() != (finished.path / "student.safetensors").read_bytes()
    assert other.metrics[0]["loss"] != again.metrics[0]["loss"]


@pytest.mark.parametrize(
    ("stage", "done", "checkpoints"),
    [
        ("mapping", 2, []),
        ("training", 3, []),
        ("training", 6, ["step-00000004.pt"]),
        ("training", 12, ["step-00000004.pt", "step-00000008.pt"]),
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_never_been(finished, train, tmp_path, stage, done, checkpoints):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at(stage, done))
    run = Run(tmp_path / "run")
    assert not run.finished
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == checkpoints
    assert without_speed(run.metrics) == without_speed(finished.run.metrics[: len(checkpoints)])
    before = files(run.path)
    with pytest.raises(ValueError, match="holds this run, unfinished; continue it with --resume"):
        train(run.path)
    assert files(run.path) == before
    told = []
    assert train(run.path, resume=True, progress=told.append).finished
    assert [at.done for at in told if at.stage == "training"] == list(range(4 * len(checkpoints) + 1, STEPS + 1))
    for name in ("student.safetensors", "mapping.safetensors", "student.json", "config.toml"):
        assert (run.path / name).read_bytes() == (finished.path / name).read_bytes(), name
    assert without_speed(run.metrics) == without_speed(finished.run.metrics)


def test_heads_that_train_with_the_student_are_resumed_too(train, tmp_path):
    whole = train(tmp_path / "whole", method="proteus", epochs=2)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", method="proteus", epochs=2, progress=interrupt_at("training", 6))
    resumed = train(tmp_path / "run", method="proteus", epochs=2, resume=True)
    assert without_speed(resumed.metrics) == without_speed(whole.metrics)
    assert whole.metrics[1]["loss"] < whole.metrics[0]["loss"]
    assert (resumed.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()


def test_an_interruption_of_a_resumed_run_is_nothing_special(finished, train, tmp_path):
    for done in (6, 10):
        with pytest.raises(Interrupted):
            train(tmp_path / "run", resume=True, progress=interrupt_at("training", done))
    resumed = train(tmp_path / "run", resume=True)
    assert (resumed.path / "student.safetensors").read_bytes() == (finished.path / "student.safetensors").read_bytes()
    board = EventAccumulator(str(resumed.path))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [4, 8, 12]


def test_another_configuration_is_refused_with_the_difference(finished, train):
    before = files(finished.path)
    for resume in (False, True):
        with pytest.raises(
            ValueError,
            match=r"another configuration \(epochs: 3 there, 4 here, lr: 0\.00075 there, 0\.1 here, warmup_epochs: 0\.3 there, 0\.4 here\)",
        ):
            train(finished.path, epochs=4, lr=0.1, resume=resume)
    assert files(finished.path) == before


def test_a_folder_of_something_else_is_refused_untouched(train, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(tmp_path, resume=True)
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_a_finished_run_is_returned_untrained(finished, train):
    before = files(finished.path)
    for resume in (False, True):
        told = []
        run = train(finished.path, resume=resume, progress=told.append)
        assert (run.path, run.finished, told) == (finished.path, True, [])
    assert files(finished.path) == before


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    finished, train, tmp_path, monkeypatch
):
    def explode_in_the_second_epoch(step, steps, peak, *rest):
        return learning_rate(step, steps, peak, *rest) if step < STEPS // EPOCHS else 1e30

    monkeypatch.setattr(loop, "learning_rate", explode_in_the_second_epoch)
    with pytest.raises(
        RuntimeError,
        match=r"the loss became nan by step 8 \(epoch 2\); choose another --out with a lower --lr; .* is .*step-00000004\.pt$",
    ):
        train(tmp_path / "run")
    run = Run(tmp_path / "run")
    assert not run.finished
    assert [record["epoch"] for record in run.metrics] == [1]
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-00000004.pt"]
    state = run.load_checkpoint()
    assert state["step"] == 4
    assert all(weight.isfinite().all() for weight in state["student"].values())


def test_too_large_a_learning_rate_leaves_no_student(train, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"the loss became nan by step 4 \(epoch 1\).* no checkpoint was written yet"
    ):
        train(tmp_path / "run", lr=1e30)
    assert not (tmp_path / "run" / "student.json").exists()
    assert not (tmp_path / "run" / "student.safetensors").exists()


def test_the_finished_run_is_an_encoder(finished):
    encoder = load_encoder(f"run:{finished.path}")
    assert encoder.preprocess == finished.preprocess
    assert encoder.embedding_dim == STUDENT
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8))
    student = finished.student.to(memory_format=torch.contiguous_format).eval()  # the layout of fp32 encoding
    with torch.inference_mode():
        expected = student(finished.preprocess.to_model(pixels).contiguous())
    assert torch.equal(encoder.encode(pixels)["embedding"], expected)
    assert expected.std(dim=0).min() > 0


def test_an_unfinished_run_is_no_encoder(train, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("mapping", 1))
    with pytest.raises(ValueError, match=r"holds no finished student"):
        load_encoder(f"run:{tmp_path / 'run'}")


def test_a_timm_student_with_a_projection(train, images, tmp_path):
    run = train(tmp_path / "run", student="timm/resnet10t", image_size=32, epochs=1, batch_size=32)
    encoder = load_encoder(f"run:{run.path}")
    assert encoder.preprocess == Preprocess(
        resize=18, crop=16, size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    assert load_file(run.path / "student.safetensors")["projection.weight"].shape == (STUDENT, 512)
    seen = extract(open_corpus(str(images)), encoder, tmp_path / "student.zarr", device="cpu", precision="fp32")
    assert seen.gather(range(IMAGES)).shape == (IMAGES, STUDENT)
    assert np.isfinite(seen.gather(range(IMAGES))).all()


def test_bf16_is_close_to_fp32(train, tmp_path):
    loss = {
        precision: train(tmp_path / precision, precision=precision, epochs=1, batch_size=IMAGES).metrics[0]["loss"]
        for precision in ("fp32", "bf16")
    }
    assert loss["bf16"] == pytest.approx(loss["fp32"], abs=0.02)
    assert loss["bf16"] != loss["fp32"]


def test_store_and_corpus_may_be_opened_already(finished, train, store, images, tmp_path):
    run = fit(
        str(store.path),
        open_corpus(str(images)),
        out=tmp_path / "run",
        device="cpu",
        student="tiny",
        embedding_dim=STUDENT,
        image_size=16,
        epochs=EPOCHS,
        batch_size=BATCH,
        method_options={"mapping_steps": 3, "mapping_batch_size": 16},
    )
    assert (run.path / "student.safetensors").read_bytes() == (finished.path / "student.safetensors").read_bytes()
    assert run.config == finished.run.config


def test_nothing_is_written_when_store_and_corpus_do_not_fit(store, images, make_images, tmp_path):
    fewer = make_images(tmp_path / "fewer", 5)
    with pytest.raises(ValueError, match="lacks 59 of the store's 64 samples"):
        fit(store, str(fewer), out=tmp_path / "run", student="tiny", device="cpu")
    bare = write_store(tmp_path / "bare.zarr", np.eye(64, 4), sample_ids=list(store.sample_ids))
    with pytest.raises(ValueError, match="cannot be replayed; extract it with featcache"):
        fit(bare, str(images), out=tmp_path / "run", student="tiny", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "tintm"}, "unknown method 'tintm'; did you mean tintem"),
        ({"method_options": {"mapping_step": 3}}, "centred has no option 'mapping_step'; did you mean mapping_steps"),
        ({"method": "proteus", "method_options": {"lr": 1.0}}, "proteus has no option 'lr'"),
        ({"method_options": {"student_dim": 3}}, "centred has no option 'student_dim'"),
        ({"epochs": -1}, "epochs must be greater than 0, got -1"),
        ({"epochs": 0}, "epochs must be greater than 0, got 0"),
        ({"batch_size": 0}, "batch_size must be greater than 0, got 0"),
        ({"lr": 0.0}, "lr must be greater than 0, got 0.0"),
        ({"lr": math.nan}, "lr must be greater than 0, got nan"),
        ({"precision": "fp16"}, "unknown precision 'fp16'; known: auto, fp32, bf16"),
        ({"lr": "abc"}, "lr must be a number or left out, got 'abc'"),
        ({"lr": True}, "lr must be a number or left out, got True"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"batch_size": 64.0}, "batch_size must be a whole number, got 64.0"),
        ({"accumulate": 2.0}, "accumulate must be a whole number, got 2.0"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"compile": "False"}, "compile must be true or false, got 'False'"),
        ({"pretrained": 1}, "pretrained must be true or false, got 1"),
        ({"views": 3}, "views must be text, got 3"),
        ({"warmup_epochs": "two"}, "warmup_epochs must be a number or left out, got 'two'"),
        ({"method_options": ["tokens"]}, r"method_options must be a table, got \['tokens'\]"),
        ({"method_options": {"tokens": "False"}}, "tokens must be true or false, got 'False'"),
        ({"method_options": {"mapping": 3}}, "mapping must be text, got 3"),
        ({"method_options": {"mapping_steps": 1.5}}, "mapping_steps must be a whole number or left out, got 1.5"),
        ({"method_options": {"temperatures": 0.1}}, "temperatures must be a list of numbers, got 0.1"),
        ({"method_options": {"temperatures": ["0.1"]}}, r"temperatures must be a list of numbers, got \['0.1'\]"),
        ({"epochs": 2, "warmup_epochs": 2.5}, "warmup_epochs 2.5 is more than the 2 epochs; lower it"),
    ],
    ids=str,
)
def test_wrong_configurations_are_refused_on_creation(unchecked, given, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(student="tiny", **given)


def test_a_whole_number_is_a_number_and_a_tuple_a_list(unchecked):
    config = FitConfig(student="tiny", lr=1, warmup_epochs=0, method_options={"temperatures": (1, 0.5)})
    assert (config.lr, config.warmup_epochs) == (1, 0)


def test_a_student_that_is_no_text_is_refused(unchecked):
    with pytest.raises(ValueError, match="student must be text, got 3"):
        FitConfig(student=3)


@pytest.mark.parametrize(
    ("minutes", "message"),
    [
        (-1, "must not be negative, got -1"),
        (math.nan, "must not be negative, got nan"),
        ("1", "must be a number, got '1'"),
    ],
)
def test_wrong_checkpoint_minutes_are_refused(unchecked, train, tmp_path, minutes, message):
    with pytest.raises(ValueError, match=f"^checkpoint_minutes {message}$"):
        train(tmp_path / "run", checkpoint_minutes=minutes)
    assert not (tmp_path / "run").exists()


def test_the_student_has_to_be_named():
    with pytest.raises(TypeError, match="student"):
        FitConfig()


# -- what the loop tells ----------------------------------------------------------------------------------


def test_terms_are_told_by_name_and_add_up(train, tmp_path):
    told = []
    options = {"mapping_steps": 3, "mapping_batch_size": 16, "relation": 0.5}
    run = train(tmp_path / "run", method="tintem", method_options=options, progress=told.append)
    last = told[-1]
    assert set(last.terms) == {"cosine", "relation"}
    assert last.loss == pytest.approx(sum(last.terms.values()))
    assert run.metrics[-1]["loss/relation"] == pytest.approx(last.terms["relation"])


def test_the_plan_is_announced_before_the_first_step(train, tmp_path):
    said = []
    train(tmp_path / "run", epochs=2, holdout=0.25, announce=said.append, progress=said.append)
    plan = next(each for each in said if not hasattr(each, "stage"))
    assert [each.stage for each in said[: said.index(plan)]] == ["mapping"] * 3
    assert (plan.samples, plan.held_out, plan.failed, plan.steps, plan.done, plan.processes) == (48, 16, 0, 6, 0, 1)
    assert "48 samples × 2 epochs here: twice the epochs are worth twice the images" in plan.expected
    longer = replace(plan, epochs=EPOCHS_A_VIEW * 3)  # of three views
    assert "after 48 samples × 12 epochs in 3 views, more images or views are worth more" in longer.expected


def test_a_batch_larger_than_the_samples_is_said_once(train, tmp_path, caplog):
    train(tmp_path / "fits", epochs=2, batch_size=IMAGES)
    assert caplog.messages == []
    plans = []
    train(tmp_path / "run", epochs=2, batch_size=IMAGES + 1, announce=plans.append)
    assert caplog.messages == ["batch_size 65 is more than the 64 samples; every step is of all of them"]
    assert plans[0].steps == 2


@pytest.mark.parametrize(("student", "said"), [("tiny", 1), ("two_processes:make", 0)])
def test_batch_norms_of_processes_on_a_cpu_are_said_once(train, tmp_path, monkeypatch, caplog, student, said):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    train(tmp_path / "run", epochs=2, student=student)
    assert caplog.messages == ["batch norms see only their process's share of the batch on a CPU"] * said


def test_trackers_are_told_what_the_metrics_say(train, tmp_path):
    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None
        main_process_only = False

        def __init__(self):
            super().__init__()
            self.config, self.logged, self.finished = None, [], False

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step, **kwargs):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    tracker = Tracker()
    run = train(tmp_path / "run", trackers=[tracker])
    assert tracker.config["student"] == "tiny"
    assert tracker.logged == [(record["epoch"], record) for record in run.metrics]
    assert tracker.finished


def test_clipping_schedule_and_optimizer_reach_the_training(train, tmp_path):
    """Each changes the weights, and the learning rate that is logged is the schedule's."""
    changed = {
        "plain": {},
        "lars": {"optimizer": "lars"},
        "sgd": {"optimizer": "sgd", "schedule": "step", "milestones": [0.5], "gamma": 0.25},
        "clip": {"clip_norm": 1e-3, "optimizer": "lars"},
        "least": {"min_lr": 1e-3},
        "ema": {"ema": 0.5},
        "accumulate": {"accumulate": 2},
    }
    runs = {name: train(tmp_path / name, epochs=1, **settings) for name, settings in changed.items()}
    saved = {(run.path / "student.safetensors").read_bytes() for run in runs.values()}
    assert len(saved) == len(changed)
    assert runs["least"].metrics[-1]["lr"] == pytest.approx(1e-3)
    assert runs["sgd"].metrics[-1]["lr"] == pytest.approx(0.25 * 0.1 * BATCH / 128)
    assert runs["sgd"].config["milestones"] == [0.5]
    assert not {"schedule", "milestones", "gamma", "momentum"} & {*runs["plain"].config}


def test_tokens_are_asked_for_before_the_folder_is_claimed(train, tmp_path):
    with pytest.raises(
        ValueError, match=r"teacher\.zarr: holds no tokens, which this method needs; extract with --fields"
    ):
        train(tmp_path / "run", method_options={"tokens": True})
    assert not (tmp_path / "run").exists()

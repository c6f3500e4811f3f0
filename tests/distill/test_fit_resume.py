"""No run is lost, and none goes on as another: data, mapping, checkpoints, Ctrl-C."""

import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fit_cases import STEPS, STUDENT, TEACHER, Interrupted, files, interrupt_at, without_speed
from safetensors.torch import load_file, save_file

from distill.mappings._descent import minimise_sne
from distill.training import loop
from distill.training.fit import fit
from distill.training.interrupt import PutOffInterrupt
from distill.training.run import KEEP, Run
from distill.training.schedule import learning_rate
from featcache.extraction.extract import extract
from featcache.inputs.images import KeptPixels
from featcache.store import FeatureStore
from featcache.student import load_student

# -- the data of a run ------------------------------------------------------------------------------------


@pytest.fixture
def own_store(make_images, make_teacher, tmp_path, monkeypatch):
    """`photos/` and `t.zarr` in the working directory; `own_store(seed)` puts a store of other pictures in its place."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "photos", 20)

    def again(seed: int):
        shutil.rmtree("photos")
        make_images(tmp_path / "photos", 20, seed)
        return extract("photos", make_teacher(), "t.zarr", device="cpu", precision="fp32", overwrite=True)

    again(0)
    return again


def fit_own(store="t.zarr", corpus="photos", **given):
    small = {"student": "tiny", "image_size": 16, "method": "proteus", "epochs": 2, "batch_size": 8, "device": "cpu"}
    return fit(store, corpus, out="run", **{**small, **given})


@pytest.mark.parametrize("stop", [3, None], ids=["unfinished", "finished"])
def test_a_run_does_not_go_on_with_other_data_at_the_same_place(own_store, stop):
    if stop:
        with pytest.raises(Interrupted):
            fit_own(progress=interrupt_at("training", stop))
    else:
        fit_own()
    digests = [Run("run").config["store_digest"], own_store(1).manifest.sealed.digest]
    assert digests[0] != digests[1]
    before = files(Path("run"))
    difference = rf"\(store_digest: '{digests[0][:8]}' there, '{digests[1][:8]}' here\)"
    with pytest.raises(ValueError, match=f"^run: holds a run with another configuration {difference}; choose another"):
        fit_own(resume=True)
    assert files(Path("run")) == before


def test_several_stores_are_told_apart_each(own_store, make_images, make_teacher):
    make_images(Path("more"), 12, seed=5)
    extract("more", make_teacher(), "m.zarr", device="cpu", precision="fp32")
    run = fit_own(["t.zarr", "m.zarr"], ["photos", "more"], epochs=1)
    was = run.config["store_digest"]
    assert fit_own([f"{Path.cwd()}/t.zarr", "m.zarr"], ["./photos", "more"], epochs=1).finished
    now = own_store(1).manifest.sealed.digest
    shown = rf"store_digest: \['{was[0][:8]}', '{was[1][:8]}'\] there, \['{now[:8]}', '{was[1][:8]}'\] here"
    with pytest.raises(ValueError, match=shown):
        fit_own(["t.zarr", "m.zarr"], ["photos", "more"], epochs=1)


@pytest.mark.parametrize("corpus", ["./photos", "{here}/photos", "folder:photos/"])
def test_another_way_to_name_store_and_corpus_is_the_same_run(own_store, corpus):
    fit_own()
    before = files(Path("run"))
    assert fit_own(f"{Path.cwd()}/t.zarr", corpus.format(here=Path.cwd())).finished
    assert files(Path("run")) == before


@pytest.mark.parametrize("corpus", ["photos", None], ids=["original", "kept"])
def test_a_run_that_was_moved_with_its_data_is_the_same_run(own_store, make_teacher, tmp_path, corpus):
    """And the next --resume finds the data at their new place."""
    if corpus is None:
        pixels = KeptPixels(size=18)
        extract("photos", make_teacher(), "t.zarr", device="cpu", overwrite=True, pixels=pixels)
    here = Path.cwd()
    with pytest.raises(Interrupted):
        fit_own(here / "t.zarr", corpus and str(here / corpus), progress=interrupt_at("training", 3))
    (tmp_path / "new").mkdir()
    for name in ("t.zarr", "photos", "run"):
        shutil.move(name, tmp_path / "new" / name)
    os.chdir(tmp_path / "new")
    there = f"{tmp_path}/new/"
    with pytest.raises(Interrupted):
        fit_own(f"{there}t.zarr", corpus and there + corpus, resume=True, progress=interrupt_at("training", 4))
    config = Run("run").config
    assert (config["store"], config["corpus"]) == (
        f"{there}t.zarr",
        there + corpus if corpus else f"store:{there}t.zarr",
    )
    run = fit_own("t.zarr", corpus, resume=True)
    assert run.finished
    assert fit_own("t.zarr", corpus).path == run.path


def test_kept_images_are_others_than_the_originals(own_store, make_teacher):
    extract("photos", make_teacher(), "t.zarr", device="cpu", overwrite=True, pixels=KeptPixels(size=18))
    fit_own()
    with pytest.raises(ValueError, match=r"corpus: 'photos' there, 'store:t\.zarr' here"):
        fit_own(corpus=None)


def test_a_store_that_was_moved_is_the_same_store(own_store):
    with pytest.raises(Interrupted):
        fit_own(progress=interrupt_at("training", 3))
    shutil.move("t.zarr", "moved.zarr")
    assert fit_own("moved.zarr", resume=True).finished


def test_hyphens_and_underscores_in_a_methods_name_are_one_configuration(own_store):
    fit_own(method="lightly-v1")
    assert fit_own(method="lightly_v1").config["method"] == "lightly_v1"


def test_an_edited_config_does_not_go_on_from_checkpoints_of_another(train, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("training", 6))
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text().replace("lr = 0.00075", "lr = 0.1"))
    said = r"run: its checkpoints were made with another configuration than .* \(lr: 0\.00075 there, 0\.1 here\); undo"
    with pytest.raises(ValueError, match=said):
        train(tmp_path / "run", resume=True, lr=0.1)


def test_a_run_of_which_nothing_is_trained_may_be_removed(train, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("training", 1))
    with pytest.raises(ValueError, match=r"\(lr: .*\); nothing is trained there yet: remove it"):
        train(tmp_path / "run", resume=True, lr=0.1)


def test_a_lost_student_is_made_again_from_the_last_checkpoint(train, tmp_path):
    run = train(tmp_path / "run")
    weights = load_file(run.path / "student.safetensors")
    (run.path / "student.safetensors").unlink()
    with pytest.raises(ValueError, match=r"student\.safetensors: is gone; `distill fit --out .*run --resume` makes it"):
        load_student(run.path)
    train(tmp_path / "run", resume=True)
    for name, weight in load_file(run.path / "student.safetensors").items():
        assert torch.equal(weight, weights[name]), name


def test_damaged_files_of_a_run_are_named(train, tmp_path):
    run = train(tmp_path / "run")
    (run.path / "student.json").write_text("{")
    with pytest.raises(ValueError, match=r"student\.json: is damaged; train again"):
        load_student(run.path)
    (run.path / "metrics.jsonl").write_text('{"epoch": 1')
    (run.path / "student.safetensors").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: is damaged; remove it"):
        train(tmp_path / "run", resume=True)


def test_no_run_lies_below_a_file(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/run: lies below a file; choose another --out"):
        train(tmp_path / "file" / "run")


def test_a_checkpoint_of_a_longer_run_is_refused(train, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("training", 6))
    run = Run(tmp_path / "run")
    run.save_checkpoint(STEPS + 1, {**run.load_checkpoint(), "step": STEPS + 1})
    with pytest.raises(
        ValueError, match=r"step-00000013\.pt: is of step 13, but this run has 12; choose another --out$"
    ):
        train(run.path, resume=True)
    assert not run.finished


def test_an_unsealed_store_is_refused(store, images, tmp_path):
    shutil.copytree(store.path, tmp_path / "t.zarr")
    unfinished = FeatureStore(tmp_path / "t.zarr")
    unfinished.manifest = unfinished.manifest.changed(sealed=None)
    with pytest.raises(ValueError, match=r"t\.zarr: is not sealed; finish its extraction first"):
        fit(unfinished, str(images), out=tmp_path / "run", student="tiny", device="cpu")


# -- the mapping of a run ---------------------------------------------------------------------------------


@pytest.fixture
def minimised(monkeypatch):
    """One entry for each time that the SNE loss was minimised."""
    calls = []
    monkeypatch.setattr(
        "distill.mappings.sne.minimise_sne", lambda *a, **k: calls.append(k["steps"]) or minimise_sne(*a, **k)
    )
    return calls


@pytest.mark.parametrize("options", [{}, {"mapping_layer_norm": True}, {"mapping": "phi_s"}], ids=str)
def test_a_fitted_mapping_is_not_fitted_again(train, tmp_path, minimised, options):
    few = {} if "mapping" in options else {"mapping_steps": 3, "mapping_batch_size": 16}
    given = {"epochs": 2, "method_options": {**few, **options}}
    whole = train(tmp_path / "whole", **given)
    for stop in (2, 6):
        with pytest.raises(Interrupted):
            train(tmp_path / "run", **given, resume=True, progress=interrupt_at("training", stop))
    told = []
    run = train(tmp_path / "run", **given, resume=True, progress=told.append)
    assert len(minimised) == (2 if few else 0)
    assert {at.stage for at in told} == {"training"}
    for name in ("student.safetensors", "mapping.safetensors"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert without_speed(run.metrics) == without_speed(whole.metrics)


@pytest.mark.parametrize("damage", ["cut", "no report", "other shapes", "other names"])
def test_a_mapping_file_that_is_of_no_use_is_replaced(finished, train, tmp_path, minimised, damage):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("training", 2))
    file, report = tmp_path / "run" / "mapping.safetensors", {"report": '{"sne": 1.0}'}
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "no report":
        save_file(load_file(file), file)
    elif damage == "other shapes":
        save_file({"mapping.weight": torch.ones(STUDENT, TEACHER + 1)}, file, report)
    else:
        save_file({"queue": torch.ones(4, TEACHER)}, file, report)
    run = train(tmp_path / "run", resume=True)
    assert minimised == [3, 3]
    for name in ("student.safetensors", "mapping.safetensors"):
        assert (run.path / name).read_bytes() == (finished.path / name).read_bytes(), name
    assert without_speed(run.metrics) == without_speed(finished.run.metrics)


# -- checkpoints within an epoch --------------------------------------------------------------------------


@pytest.fixture
def every_other_step(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    return {"checkpoint_minutes": 0.0, "batch_size": 8, "ema": 0.8, "method": "proteus", "epochs": 2}


@pytest.mark.parametrize("stop", [3, 8, 12])
def test_a_run_goes_on_from_the_middle_of_an_epoch(train, tmp_path, every_other_step, stop):
    """Interrupted in the callback of a step whose checkpoint, if there is one, is written already."""
    whole = train(tmp_path / "whole", **every_other_step)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **every_other_step, progress=interrupt_at("training", stop))
    run = Run(tmp_path / "run")
    found = [int(path.stem.removeprefix("step-")) for path in run.checkpoints]
    newest = stop - stop % 2 if stop % 8 else stop - 2
    assert found[-1] == newest
    assert len(found) <= KEEP
    plans, told = [], []
    train(run.path, resume=True, **every_other_step, announce=plans.append, progress=told.append)
    assert [at.done for at in told] == list(range(newest + 1, 17))
    assert (plans[0].done, plans[0].steps) == (newest, 16)
    assert without_speed(run.metrics) == without_speed(whole.metrics)
    for name in ("student.safetensors", "mapping.safetensors"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def test_without_minutes_there_is_a_checkpoint_an_epoch(train, tmp_path, every_other_step):
    with pytest.raises(Interrupted):
        train(
            tmp_path / "run", **{**every_other_step, "checkpoint_minutes": 60.0}, progress=interrupt_at("training", 14)
        )
    assert [path.stem for path in Run(tmp_path / "run").checkpoints] == ["step-00000008"]


def test_what_a_killed_process_left_half_written_goes(train, tmp_path, every_other_step):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **every_other_step, progress=interrupt_at("training", 5))
    left = tmp_path / "run" / "checkpoints" / "step-00000006.pt.partial"
    left.write_bytes(b"half of it")
    other = tmp_path / "run" / "checkpoints" / "step-00000005.pt.partial"
    other.write_bytes(b"half of it")
    assert train(tmp_path / "run", resume=True, **every_other_step).finished
    assert not left.exists()
    assert not other.exists()


def test_a_weight_that_is_no_number_is_never_saved(train, tmp_path, monkeypatch):
    """The loss of a step says nothing about the weights that it leaves."""
    monkeypatch.setattr(loop, "learning_rate", lambda step, *rest: 1e-3 if step < STEPS - 1 else math.inf)
    with pytest.raises(RuntimeError, match=r"a weight became NaN or infinite by step 12 .* is .*step-00000008\.pt$"):
        train(tmp_path / "run")
    assert [path.stem for path in Run(tmp_path / "run").checkpoints] == ["step-00000004", "step-00000008"]
    assert not Run(tmp_path / "run").finished


def flip_a_byte(path):
    """In the middle of the file, where the tensors are: `torch.load` reads it without a word."""
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    torch.load(path, weights_only=True)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage", [flip_a_byte, cut_off, lambda path: path.write_bytes(b"")], ids=["byte", "cut", "empty"]
)
def test_a_damaged_checkpoint_is_passed_over_and_costs_nothing_but_time(train, tmp_path, damage, caplog):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("training", 11))
    *_, new = Run(tmp_path / "run").checkpoints
    damage(new)
    train(tmp_path / "run", resume=True)
    assert caplog.messages == [f"{new}: is damaged, so it is passed over"]
    for name, weight in load_file(train(tmp_path / "whole").path / "student.safetensors").items():
        assert torch.equal(weight, load_file(tmp_path / "run" / "student.safetensors")[name]), name


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_unasked(train, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("training", 11))
    for path in Run(tmp_path / "run").checkpoints:
        cut_off(path)
    before = files(tmp_path / "run")
    with pytest.raises(
        RuntimeError, match=r"run/checkpoints: every checkpoint is damaged; train again with another --out"
    ):
        train(tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == before


def test_a_disk_too_small_for_the_checkpoints_is_refused_at_once(train, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=5_000_000)
    monkeypatch.setattr("distill.training.run.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(
        OSError, match=r"run: 20\.\d MB of checkpoints to write, .* has 5\.0 MB free; make room or choose"
    ):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"ema": 0.9}, {"optimizer": "lars"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0}),
        *({"method": "proteus"}, {"keep": "best", "holdout": 0.25}),
    ],
    ids=str,
)
def test_checkpoints_are_as_large_as_announced(train, tmp_path, settings):
    plans = []
    with pytest.raises(Interrupted):
        train(tmp_path / "run", announce=plans.append, progress=interrupt_at("training", 6), **settings)
    run = Run(tmp_path / "run")
    size = run.checkpoints[-1].stat().st_size
    assert plans[0].checkpoint_bytes == pytest.approx(size, rel=0.02)


def test_a_mapping_that_does_not_fit_leaves_no_folder_to_clear(train, tmp_path):
    with pytest.raises(ValueError, match="the identity mapping needs a student of 12 or more"):
        train(tmp_path / "run", method_options={"mapping": "identity"})
    assert train(tmp_path / "run", epochs=1).finished


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError("much"), KeyError("oops")], ids=repr)
def test_whatever_the_mapping_raises_leaves_no_folder_to_clear(train, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("distill.mappings.sne.minimise_sne", fail)
        with pytest.raises(type(error), match=str(error)):
            train(tmp_path / "run")
    assert files(tmp_path / "run") == {}
    assert train(tmp_path / "run", epochs=1).finished


def test_a_run_that_was_begun_keeps_what_it_has_when_its_mapping_fails(train, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", progress=interrupt_at("mapping", 1))
    before = files(tmp_path / "run")
    monkeypatch.setattr("distill.mappings.sne.minimise_sne", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == before


# -- Ctrl-C -----------------------------------------------------------------------------------------------


def ctrl_c():
    raise KeyboardInterrupt


def signal_itself():
    os.kill(os.getpid(), signal.SIGINT)


def press_at(done: int, press, told: list[int]):
    """Ctrl-C after that step of training; `told` gets the steps."""

    def progress(at):
        if at.stage == "training":
            told.append(at.done)
            if at.done == done:
                press()

    return progress


@pytest.fixture
def usual_handler():
    """Of a program that nobody started in the background."""
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, was)


def test_ctrl_c_keeps_the_step_that_it_came_in(train, tmp_path, usual_handler):
    """Sixteen steps in two epochs; the loss is read at steps 8, 10 and 16."""
    given = {"batch_size": 8, "ema": 0.8, "method": "proteus", "epochs": 2}
    whole, run, done = train(tmp_path / "whole", **given), Run(tmp_path / "run"), 0
    for stop, press in ((1, ctrl_c), (6, signal_itself), (10, ctrl_c), (13, signal_itself)):
        told = []
        with pytest.raises(KeyboardInterrupt):
            train(run.path, **given, resume=True, progress=press_at(stop, press, told))
        assert told == list(range(done + 1, stop + 1))
        assert run.checkpoints[-1].stem == f"step-{stop:08d}"
        done = stop
    train(run.path, resume=True, **given)
    assert (run.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()
    assert without_speed(run.metrics) == without_speed(whole.metrics)


def test_ctrl_c_within_a_step_waits_for_its_end(train, tmp_path, monkeypatch, usual_handler):
    def interrupted(step, *rest):
        if step == 5:
            signal_itself()
        return learning_rate(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run")
    assert Run(tmp_path / "run").load_checkpoint()["step"] == 6


def test_ctrl_c_at_the_end_of_an_epoch_waits_for_its_metrics(finished, train, tmp_path, usual_handler):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", progress=press_at(8, signal_itself, []))
    run = Run(tmp_path / "run")
    assert [path.stem for path in run.checkpoints] == ["step-00000004", "step-00000008"]
    assert without_speed(run.metrics) == without_speed(finished.run.metrics[:2])


def test_pressed_twice_or_waited_for_too_long_ctrl_c_stops_at_once(monkeypatch, usual_handler):
    def wait(presses):
        with PutOffInterrupt() as interrupt:
            for _ in range(presses):
                signal_itself()
                pressed.append(interrupt.asked)
            time.sleep(60)
            pytest.fail("it went on")

    pressed = []
    with pytest.raises(KeyboardInterrupt):
        wait(2)
    assert pressed == [True]
    monkeypatch.setattr("distill.training.interrupt.PATIENCE", 0.05)
    with pytest.raises(KeyboardInterrupt):
        wait(1)
    assert pressed == [True, True]


def test_no_weight_that_is_no_number_is_saved_on_ctrl_c(train, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda step, *rest: math.inf)
    with pytest.raises(RuntimeError, match="a weight became NaN or infinite by step 1 "):
        train(tmp_path / "run", progress=press_at(1, ctrl_c, []))
    assert Run(tmp_path / "run").checkpoints == []

"""Students that a run keeps on the way: when, which weights, and what they are good for afterwards."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from fit_cases import STEPS, STUDENT, Interrupted, files, interrupt_at, without_speed
from safetensors.torch import load_file

from distill.exporting.export import export
from distill.training.config import FitConfig
from distill.training.run import Run
from distill.training.schedule import kept_after
from featcache.encoder import load_encoder
from featcache.extraction.extract import extract
from featcache.run_folder import find, snapshots, split_spec, student_files
from featcache.student import load_student, open_student

KEEPS = {"keep_checkpoints": 0.5, "method": "proteus", "ema": 0.8}


@pytest.fixture(scope="module")
def kept(train, tmp_path_factory):
    """A run of 12 steps in 3 epochs that keeps a student after every other step; tests only read it."""
    return train(tmp_path_factory.mktemp("kept") / "run", **KEEPS)


@pytest.mark.parametrize(
    "every", [Fraction(1), Fraction(2), Fraction(1, 2), Fraction(1, 3), Fraction(3, 2), Fraction(1, 9)]
)
@pytest.mark.parametrize("per_epoch", [4, 7])
def test_a_student_is_kept_when_a_multiple_of_the_epochs_is_full(every, per_epoch):
    """In fractions, that are exact."""
    for step in range(1, 5 * per_epoch + 1):
        full = [times for times in range(1, 60) if Fraction(step - 1) < times * every * per_epoch <= step]
        expected = pytest.approx(float(full[-1] * every), abs=1e-4) if full else None
        assert kept_after(step, float(every), per_epoch) == expected
    assert kept_after(1, 0.0, per_epoch) is None


def test_the_students_kept_are_those_of_their_steps(kept, train, tmp_path):
    found = snapshots(kept.path)
    assert [(each.epoch, each.step) for each in found] == [(step / 4, step) for step in range(2, STEPS + 1, 2)]
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **{**KEEPS, "keep_checkpoints": 0.0}, progress=interrupt_at("training", 10))
    then, weights = Run(tmp_path / "run").load_checkpoint(), load_file(find(f"{kept.path}@step=8").path)
    assert then["step"] == 8
    assert then["ema"].keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in then["ema"].items())
    assert find(f"{kept.path}@epoch=2").record == {**then["record"], "snapshot": {"epoch": 2.0, "step": 8}}


def test_the_last_of_them_is_the_finished_runs_student(kept):
    whole, last, earlier = (load_encoder(f"run:{kept.path}{at}") for at in ("", "@epoch=3", "@step=4"))
    assert last.fingerprint == whole.fingerprint != earlier.fingerprint
    assert last.name == f"run:{kept.path}@epoch=3"
    assert earlier.files == (str(kept.path / "snapshots" / "step-00000004.safetensors"),)
    assert student_files(kept.path) == [str(kept.path / f"student.{kind}") for kind in ("json", "safetensors")]


def test_resumed_runs_keep_the_same(kept, train, tmp_path):
    for stop in (3, 7, 8):
        with pytest.raises(Interrupted):
            train(tmp_path / "run", **KEEPS, resume=True, progress=interrupt_at("training", stop))
    run = train(tmp_path / "run", **KEEPS, resume=True)
    assert files(run.path / "snapshots") == files(kept.path / "snapshots")
    assert (run.path / "student.safetensors").read_bytes() == (kept.path / "student.safetensors").read_bytes()
    assert without_speed(run.metrics) == without_speed(kept.metrics)


def test_keeping_changes_nothing_else(kept, train, tmp_path):
    run = train(tmp_path / "run", **{**KEEPS, "keep_checkpoints": 0.0})
    assert (run.path / "student.safetensors").read_bytes() == (kept.path / "student.safetensors").read_bytes()
    assert without_speed(run.metrics) == without_speed(kept.metrics)
    assert {**run.config, "keep_checkpoints": 0.5} == kept.config
    assert not (run.path / "snapshots").exists()


def test_an_unfinished_runs_students_are_encoders_and_begin_others(train, images, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **KEEPS, progress=interrupt_at("training", 5))
    spec = f"run:{tmp_path / 'run'}@epoch=1"
    store = extract(str(images), spec, tmp_path / "s.zarr", device="cpu", precision="fp32")
    assert store.encoder_name == spec
    assert store.fingerprint == load_encoder(spec).fingerprint
    weights = load_file(tmp_path / "run" / "snapshots" / "step-00000004.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in open_student(spec).state_dict().items())
    on = train(tmp_path / "on", student=spec, method="proteus", embedding_dim=0, image_size=0, lr=1e-9)
    trained = load_student(on.path)[0].named_parameters()
    assert all(torch.allclose(value, weights[name], atol=1e-5) for name, value in trained)
    with pytest.raises(ValueError, match=r"holds no finished student"):
        load_encoder(f"run:{tmp_path / 'run'}")


def test_a_student_kept_by_a_run_brings_that_runs_mapping(train, tmp_path):
    first = train(tmp_path / "first", epochs=1, keep_checkpoints=0.5)
    on = train(tmp_path / "on", student=f"run:{first.path}@epoch=0.5", embedding_dim=0, image_size=0, epochs=1, seed=5)
    (was, _), (now, _) = first.load_mapping(), on.load_mapping()
    shared = [name for name in was if name.startswith("mapping.")]
    assert shared
    assert all(torch.equal(was[name], now[name]) for name in shared)


def test_what_is_not_kept_is_told(kept, finished, tmp_path):
    six = r"epoch 0\.5 \(step 2\), epoch 1 \(step 4\), .*, epoch 3 \(step 12\)$"
    with pytest.raises(ValueError, match=rf"run: keeps no student of epoch 2\.2; it keeps {six}"):
        load_encoder(f"run:{kept.path}@epoch=2.2")
    with pytest.raises(ValueError, match=r"keeps no student of step 5; it keeps epoch"):
        open_student(f"run:{kept.path}@step=5")
    with pytest.raises(
        ValueError, match=r"a: keeps no student of epoch 2; it keeps none: fit with --set keep_checkpoi"
    ):
        load_student(f"{finished.path}@epoch=2")
    with pytest.raises(ValueError, match=r"@epoch=two: 'two' is no number; give @epoch=N"):
        load_student(f"{kept.path}@epoch=two")
    (tmp_path / "a@step=1").mkdir()
    assert split_spec(tmp_path / "a@step=1") == (tmp_path / "a@step=1", "", 0.0)
    with pytest.raises(ValueError, match=r"^keep_checkpoints 4\.0 is more than the 3 epochs; lower it"):
        FitConfig(student="tiny", epochs=3, keep_checkpoints=4.0)


def test_a_damaged_one_is_named(train, tmp_path):
    run = train(tmp_path / "run", method="proteus", epochs=1, keep_checkpoints=1.0)
    (file,) = (run.path / "snapshots").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"step-00000004\.safetensors: is damaged .*; remove it"):
        load_student(f"{run.path}@epoch=1")


def test_they_have_to_fit_on_the_disk(train, tmp_path, monkeypatch):
    """Three checkpoints of 7 MB with Adam's moments, and 60 students of a third of that."""
    monkeypatch.setattr("distill.training.run.shutil.disk_usage", lambda folder: SimpleNamespace(free=100_000_000))
    settings = {"method": "proteus", "epochs": 30}
    with pytest.raises(OSError, match=r"run: 1[56]\d\.\d MB of checkpoints to write, .* has 100\.0 MB free"):
        train(tmp_path / "run", **settings, keep_checkpoints=0.5)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **settings, progress=interrupt_at("training", 1))


def test_they_can_be_exported(kept, tmp_path):
    made = export(f"{kept.path}@epoch=1.5", tmp_path / "out")
    assert made.max_difference < 1e-5
    card = (made.path / "README.md").read_text()
    assert "| kept on the way | after 1.5 epochs, 6 steps |" in card
    assert f"| loss | {kept.metrics[0]['loss']:.6g} |" in card.partition("By then:")[2]
    assert load_student(f"{kept.path}@epoch=1.5")[0].embedding_dim == STUDENT

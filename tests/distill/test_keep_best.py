"""`keep="best"`: the student of the best evaluation is saved, whenever the run was interrupted."""

import json

import pytest
import torch
from fit_cases import Interrupted, interrupt_at
from safetensors.torch import load_file

from distill.exporting.export import export
from distill.training import loop
from distill.training.config import FitConfig
from distill.training.run import Run

SCORES = [0.2, 0.6, 0.6, 0.1]
HELD = {"holdout": 0.25, "keep": "best", "epochs": 4}  # 48 of 64 images train: three steps an epoch


@pytest.fixture
def scored(monkeypatch):
    """Evaluations give `SCORES`; yields the weights that were measured, by epoch."""
    measured = {}

    def measure(self, embed):
        student = embed.__self__.saved
        epoch = len(measured) + 1
        measured[epoch] = {key: value.clone() for key, value in student.state_dict().items()}
        return {"holdout/gram_pearson": 1 - SCORES[epoch - 1], "holdout/cosine": SCORES[epoch - 1]}

    monkeypatch.setattr("distill.training.held_out.HeldOut.measure", measure)
    return measured


def test_the_first_of_the_best_is_saved(train, tmp_path, scored):
    run = train(tmp_path / "run", **HELD)
    saved = load_file(run.path / "student.safetensors")
    assert all(torch.equal(value, scored[2][name]) for name, value in saved.items())
    assert not all(torch.equal(value, scored[4][name]) for name, value in saved.items())
    kept = json.loads((run.path / "student.json").read_text())["kept"]
    assert kept == {"metric": "holdout/cosine", "value": 0.6, "epoch": 2}
    assert len(run.metrics) == 4


@pytest.mark.parametrize("stop", [5, 8, 11])
def test_also_of_a_run_that_was_interrupted(train, tmp_path, scored, stop):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **HELD, progress=interrupt_at("training", stop))
    done = (stop - 1) // 3
    for epoch in [epoch for epoch in scored if epoch > done]:
        del scored[epoch]
    before = dict(scored)
    if stop > 6:  # what is not finished can be exported as it would be saved now
        folder = export(tmp_path / "run", tmp_path / "out", unfinished=True).path
        assert "| unfinished |" in (folder / "README.md").read_text()
    run = train(tmp_path / "run", **HELD, resume=True)
    saved = load_file(run.path / "student.safetensors")
    assert all(torch.equal(value, (before | scored)[2][name]) for name, value in saved.items())


def test_it_evaluates_after_every_epoch_unless_told():
    assert (FitConfig(student="tiny", keep="best").eval_every, FitConfig(student="tiny", keep="best").holdout) == (
        1,
        0.05,
    )
    assert FitConfig(student="tiny", keep="best", eval_every=3).eval_every == 3
    assert FitConfig(student="tiny").eval_every == 0


def test_names_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="unknown keep 'worst'; known: last, best"):
        FitConfig(student="tiny", keep="worst")


def test_a_lost_student_comes_back_from_the_last_checkpoint(train, tmp_path):
    run = train(tmp_path / "run", **HELD)
    whole = (run.path / "student.safetensors").read_bytes()
    (run.path / "student.safetensors").unlink()
    assert [path.name for path in Run(run.path).checkpoints] == ["step-00000012.pt"]
    assert train(tmp_path / "run", **HELD, resume=True).finished
    assert (run.path / "student.safetensors").read_bytes() == whole


def test_labels_decide_where_there_are_any():
    """Those of the samples' own, then votes of neighbours, then angles to the teacher."""
    assert (
        loop.BETTER.index("holdout/top1") < loop.BETTER.index("holdout/top1@20") < loop.BETTER.index("holdout/cosine")
    )
    assert {*loop.BETTER[:3]} == {"holdout/token_nll", "holdout/iou", "holdout/top1"}

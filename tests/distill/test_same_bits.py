"""`--resume` ends in the same bits: every mapping, in methods that have one, at the smallest batches and parts of them.

A matrix by columns and the same matrix by rows give other bits where few rows are multiplied.
"""

import pytest
from fit_cases import Interrupted, interrupt_at, without_speed

from distill.training import loop
from featcache.plugins import plugin_names

FEW = {"mapping_steps": 2, "mapping_batch_size": 16}


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("method", ["landmarks", "tintem"])
@pytest.mark.parametrize("mapping", plugin_names("distill.mappings"))
def test_a_resumed_run_has_the_same_bits(train, tmp_path, monkeypatch, mapping, method, batch_size, accumulate):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    given = {
        "student": "odd_students:Plain", "embedding_dim": 12 if mapping == "identity" else 0, "method": method,
        "method_options": {"mapping": mapping, **(FEW if mapping in ("sne", "orthogonal") else {})},
        "epochs": 1, "batch_size": batch_size, "accumulate": accumulate, "checkpoint_minutes": 0.0,
    }  # fmt: skip
    whole = train(tmp_path / "whole", **given)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **given, progress=interrupt_at("training", 5))
    run = train(tmp_path / "run", **given, resume=True)
    for name in ("student.safetensors", "mapping.safetensors"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert without_speed(run.metrics) == without_speed(whole.metrics)

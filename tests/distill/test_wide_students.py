"""Students wider than their teacher: every mapping and every method trains them, and the target keeps the teacher's angles."""

import json

import numpy as np
import pytest
import torch
from fit_cases import TEACHER
from method_cases import CASES, label

from distill import load_method
from distill.testing.methods import (
    ROWS,
    headed,
    shown_texts,
    student_batch,
    teacher_batch,
    together,
    write_token_rows,
)
from featcache.plugins import plugin_names

WIDE = TEACHER + 5


def cosines(rows):
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("mapping", plugin_names("distill.mappings"))
def test_every_mapping_trains_a_wide_student(train, tmp_path, mapping):
    run = train(tmp_path / "run", embedding_dim=WIDE, epochs=1, method_options={"mapping": mapping})
    assert run.metrics[-1]["mapping/lifted_from"] == TEACHER
    assert run.metrics[-1]["mapping/deviation"] < 1e-5
    assert json.loads((run.path / "student.json").read_text())["embedding_dim"] == WIDE


@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_method_takes_a_wide_student(case, tmp_path):
    name, options = case
    source = write_token_rows(tmp_path, views=4)
    torch.manual_seed(0)
    method = load_method(name)(source.embedding_dim, WIDE, **options)
    method.prepare(headed(source, method), seed=0)
    group = together(method)
    teacher = shown_texts(method, teacher_batch(source, method.fields, group=group))
    student = student_batch(method.student_fields, width=WIDE, rows=ROWS * group)
    terms = method.loss(student, teacher)
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(output.grad.isfinite().all() and output.grad.any() for output in student.values() if output.is_leaf)
    if (target := method.target(teacher)) is not None and not options.get("joint"):
        seen = teacher["prefix_tokens"][:, 0] if "prefix_tokens" in method.fields else teacher["embedding"]
        np.testing.assert_allclose(cosines(target.numpy()), cosines(seen.numpy()), atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"mapping_layer_norm": True}, {"mapping_start": "random"}, {"mapping": "identity"}], ids=str
)
def test_a_wide_run_goes_on_from_its_mapping(train, tmp_path, options):
    given = {"embedding_dim": WIDE, "epochs": 2, "method_options": options}
    whole = train(tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", **given, progress=stop_at(3))
    run = train(tmp_path / "run", **given, resume=True)
    for name in ("student.safetensors", "mapping.safetensors"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name


def stop_at(done):
    def progress(at):
        if (at.stage, at.done) == ("training", done):
            raise KeyboardInterrupt

    return progress

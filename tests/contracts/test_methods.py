"""What every registered distillation method must do, in every way of using it."""

import copy
import inspect
import math
from dataclasses import replace

import pytest
import torch
from method_cases import (
    CASES,
    FIELDS,
    ROWS,
    STUDENT,
    TEACHER,
    build,
    label,
    student_batch,
    teacher_batch,
    total,
    write_token_store,
)
from torch import nn

from distill import load_method
from distill.methods import fitted_tensors
from featcache.rows import Rows


@pytest.fixture(params=CASES, ids=label)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Rows.of([write_token_store(tmp_path_factory.mktemp("store") / "s.zarr")])


@pytest.fixture
def method(case, source):
    return build(case, source)[0]


@pytest.fixture
def teacher(method, source):
    return teacher_batch(source, method.fields)


@pytest.fixture
def student(method):
    return student_batch(method.student_fields)


def loss_of(method, student, teacher):
    """Of a copy, so that what a method remembers of a batch (a queue) is the same each time."""
    return total(copy.deepcopy(method).loss(student, teacher))


def test_is_a_module_that_describes_itself(method):
    assert isinstance(method, nn.Module)
    first, *_ = type(method).__doc__.splitlines()
    assert first.endswith(".")
    assert 40 < len(first) <= 120


def test_options_have_defaults(case):
    options = [
        p
        for n, p in inspect.signature(load_method(case[0])).parameters.items()
        if n not in ("teacher_dim", "student_dim")
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in options)


def test_a_hyphen_in_a_name_is_an_underscore(case):
    assert load_method(case[0].replace("_", "-")) is load_method(case[0])


def test_prepare_reports_finite_numbers(case, source):
    report = build(case, source)[1]
    assert all(isinstance(key, str) and type(value) is float and math.isfinite(value) for key, value in report.items())


def test_prepare_is_a_function_of_source_and_seed(case, source):
    (first, report), (second, again) = build(case, source), build(case, source)
    torch.rand(7)
    assert report == again == first.prepare(source, seed=0)
    for key, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[key]), key


def test_prepare_takes_what_an_earlier_one_left(case, source):
    first, report = build(case, source)
    second, again = build(case, source, fitted=(fitted_tensors(first), report))
    assert again == report
    assert second.fields == first.fields
    assert second.state_dict().keys() == first.state_dict().keys()
    for key, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[key]), key


def test_fields_are_the_embedding_and_what_else_loss_reads(method, teacher, student):
    assert set(method.fields) <= set(FIELDS)
    assert method.fields[0] == method.student_fields[0] == "embedding"
    for given, fields in ((teacher.features, method.fields), (student, method.student_fields)):
        for field in fields[1:]:
            without = {name: value for name, value in given.items() if name != field}
            batches = (without, teacher) if given is student else (student, replace(teacher, features=without))
            with pytest.raises(KeyError, match=field):
                loss_of(method, *batches)


def test_state_goes_through_a_checkpoint(case, method, source, teacher, student):
    method.loss(student, teacher)
    restored, _ = build(case, source)
    for weight in restored.parameters():
        nn.init.normal_(weight)
    restored.load_state_dict({key: value.clone() for key, value in method.state_dict().items()})
    assert torch.equal(loss_of(restored, student, teacher), loss_of(method, student, teacher))


def test_the_target_is_in_the_students_space(method, teacher):
    target = method.target(teacher)
    if target is not None:
        assert target.shape == (ROWS, STUDENT)
        assert target.isfinite().all()
        assert not target.requires_grad


def test_terms_are_finite_scalars_with_names(method, teacher, student):
    terms = method.loss(student, teacher)
    assert terms
    for name, term in terms.items():
        assert isinstance(name, str)
        assert term.shape == (), name
        assert term.isfinite(), name


def test_loss_reaches_all_of_the_student(method, teacher, student):
    total(method.loss(student, teacher)).backward()
    for name, output in student.items():
        assert output.grad.isfinite().all(), name
        assert (output.grad.abs().sum(dim=-1) > 0).all(), name


def test_nothing_flows_into_the_teacher(method, teacher, student):
    """Features come from a store: were they leaves, all that may train is in the method."""
    assert not any(value.requires_grad for value in teacher.features.values())
    total(method.loss(student, teacher)).backward()
    assert not any(buffer.requires_grad for buffer in method.buffers())


def test_exactly_what_trains_has_a_gradient(method, teacher, student):
    total(method.loss(student, teacher)).backward()
    for key, weight in method.named_parameters():
        assert (weight.grad is not None and weight.grad.abs().sum() > 0) == weight.requires_grad, key


def test_a_step_downhill_lowers_the_loss(method, teacher, student):
    before = copy.deepcopy(method)
    loss = total(method.loss(student, teacher))
    loss.backward()
    weights = [*student.values(), *(w for w in method.parameters() if w.requires_grad)]
    torch.optim.SGD(weights, lr=1e-3).step()
    before.load_state_dict(
        {**before.state_dict(), **{key: weight.detach() for key, weight in method.named_parameters()}}
    )
    assert total(before.loss(student, teacher)) < loss


def test_widths_are_those_of_teacher_and_student(case):
    name, options = case
    method = load_method(name)(TEACHER + 1, STUDENT + 1, **options)
    assert {size for weight in method.parameters() for size in weight.shape} <= {TEACHER + 1, STUDENT + 1, 2048}

"""What every distillation method must be, and a store and batches to try one on."""

import copy
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from distill.methods import Batch, Features, Fitted, Method, fitted_tensors, load_method
from featcache.head import Head
from featcache.inputs.images import PARAMETERS, Preprocess
from featcache.rows import Rows
from featcache.store import FeatureStore, create_store
from featcache.store.layout import OK
from featcache.store.manifest import CorpusRecord, EncoderRecord, Manifest, ViewsRecord

TEACHER, STUDENT, ROWS, VIEWS, CLASSES = 12, 6, 20, 2, 3
POSITIONS, TOKENS = 5, 7
"""Of texts, and how many tokens there are."""
Case = tuple[str, Mapping[str, Any]]
"""A method's name, and its options."""
FIELDS = {
    "embedding": (TEACHER,),
    "tokens": (16, TEACHER),
    "prefix_tokens": (2, TEACHER),
    "logits": (CLASSES,),
    "hidden": (POSITIONS, TEACHER),
    "token_logits": (POSITIONS, TOKENS),
    "length": (),
    "dense": (CLASSES, 4, 4),
}


def write_token_store(
    path: Path,
    fields: Mapping[str, tuple[int, ...]] = FIELDS,
    seed: int = 0,
    views: int = VIEWS,
    count: int = ROWS,
    spec: str | None = None,
) -> FeatureStore:
    """Random features of any shape, three classes; texts of 2 to `POSITIONS` tokens, whose hidden states behind the end are no zeros."""
    rng = np.random.default_rng(seed)
    manifest = Manifest(
        encoder=EncoderRecord(name="arrays", fingerprint="arrays", preprocess={}),
        corpus=CorpusRecord(spec=spec, rows=count, class_names=["ant", "bee", "cat"]),
        views=ViewsRecord(count=views),
        fields={name: list(shape) for name, shape in fields.items()},
        dtypes={"length": "int32"} if "length" in fields else {},
        chunk_rows=count,
    )
    store = create_store(path, manifest)
    features = {name: rng.normal(size=(count, views, *shape)).astype(np.float16) for name, shape in fields.items()}
    if "length" in fields:
        features["length"] = np.repeat(_lengths(count)[:, None], views, axis=1).astype(np.int32)
    rows = {
        "label": np.arange(count) % CLASSES,
        "sample_id": np.array([str(i) for i in range(count)], dtype=object),
        "content": np.zeros((count, 16), np.uint8),
        "view": np.zeros((count, views, len(PARAMETERS)), np.float32),
        "reason": np.array([""] * count, dtype=object),
        "state": np.full(count, OK, np.uint8),
    }
    store.write_chunk(0, {**features, **rows})
    store.seal()
    return store


def _lengths(count: int) -> np.ndarray:
    """Of the texts of `write_token_store`."""
    return 2 + np.arange(count) % (ROWS // 2) % (POSITIONS - 1)


def write_token_rows(folder: Path, views: int = VIEWS) -> Rows:
    """Half of `ROWS` of a store, half of one of adversarial images made of its own."""
    for number, spec in enumerate(("photos/", "adversarial:arrays::::photos/")):
        write_token_store(folder / f"{number}.zarr", seed=number, views=views, count=ROWS // 2, spec=spec)
    return read_token_rows(folder)


def read_token_rows(folder: Path) -> Rows:
    """What `write_token_rows` has written."""
    return Rows.of([folder / "0.zarr", folder / "1.zarr"])


@functools.cache
def _written_once(folder: Path, views: int) -> Path:
    """The folder in `folder` of what `write_token_rows` makes; tests only read it."""
    write_token_rows(folder / f"token-rows-{views}", views)
    return folder / f"token-rows-{views}"


def batch_of(features: Features, row: Tensor | None = None, label: Tensor | None = None) -> Batch:
    """Samples with these features of the teacher; of no row, without labels, unless they are given."""
    none = torch.full((len(next(iter(features.values()))),), -1)
    inputs = torch.zeros(len(none), 3, 1, 1)
    return Batch(
        features,
        inputs,
        none if row is None else row,
        torch.zeros_like(none),
        none if label is None else label,
        torch.ones(len(none)),
        Preprocess(resize=8, crop=8, size=8),
    )


def teacher_batch(rows: Rows, fields: tuple[str, ...], view: int = 0, group: int = 1) -> Batch:
    """All of them, in order; each in `group` views, from `view` on; with masks of two thirds."""
    every, views = np.repeat(np.arange(len(rows)), group), np.tile(np.arange(view, view + group), len(rows))
    stored = {name: torch.from_numpy(rows.gather(every, name, views)) for name in fields}
    features = {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}
    mask = torch.randint(-1, CLASSES, (len(every), 6, 6), generator=torch.Generator().manual_seed(5))
    mask[::3] = -1
    batch = batch_of(features, label=torch.from_numpy(rows.labels[every]))
    return replace(batch, view=torch.from_numpy(views), mask=mask)


def shown_texts(method: Method, teacher: Batch) -> Batch:
    """The batch, and to a language model its texts: token ids, as long as the rows of `write_token_rows`, −1 behind the end."""
    if "token_logits" not in method.student_fields:
        return teacher
    ids = torch.randint(TOKENS, (len(teacher.label), POSITIONS), generator=torch.Generator().manual_seed(3))
    behind = torch.arange(POSITIONS) >= torch.from_numpy(_lengths(len(ids)))[:, None]
    return replace(teacher, inputs=ids.masked_fill(behind, -1))


def headed(rows: Rows, method: Method) -> Rows:
    """The same rows; for a method that reads hidden states with the head that reads them."""
    if "hidden" in method.fields:
        weight, rows = np.random.default_rng(4).normal(size=(TOKENS, TEACHER)), rows.pick(np.arange(len(rows)))
        rows.head = Head(weight, np.linspace(-1, 1, TOKENS), np.arange(TOKENS))
    return rows


def together(method: Method | type[Method]) -> int:
    """In how many views a batch of `write_token_store` has each of its rows."""
    return 1 if method.pairing != "group" else method.group or VIEWS


def student_batch(fields: tuple[str, ...], seed: int = 1, width: int = STUDENT, rows: int = ROWS) -> Features:
    """What a student with a 3 × 3 grid might give, as leaves, and what `classified` makes of its embedding."""
    drawn = torch.Generator().manual_seed(seed)
    shapes = {"embedding": (rows, width), "tokens": (rows, 9, width), "dense": (rows, CLASSES, 3, 3)}
    leaves = {name: torch.randn(shapes[name], generator=drawn).requires_grad_() for name in fields if name in shapes}
    return classified(leaves, fields)


def classified(student: Features, fields: Sequence[str] = ("logits",)) -> Features:
    """With the logits that a classifier gives of the embedding, and those of every position of a text, as far as `fields` name them."""
    embedding, drawn = student["embedding"], torch.Generator().manual_seed(2)
    weight = torch.randn(embedding.shape[1], CLASSES, generator=drawn)
    steps = torch.randn(POSITIONS, embedding.shape[1], TOKENS, generator=drawn)
    made = {"logits": embedding @ weight, "token_logits": torch.einsum("bd,tdc->btc", embedding, steps)}
    return {**student, **{name: value for name, value in made.items() if name in fields}}


class SmallStudent(nn.Module):
    """Of images: embedding and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, STUDENT, 3), nn.BatchNorm2d(STUDENT)
        self.classifier = nn.Linear(STUDENT, CLASSES)

    def forward(self, images: Tensor, fields: Sequence[str]) -> Features:
        embedding = self.norm(self.convolution(images)).relu().mean((2, 3))
        return {"embedding": embedding, "logits": self.classifier(embedding)}


def total(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def build(
    name: str, options: Mapping[str, Any], rows: Rows, fitted: Fitted | None = None
) -> tuple[Method, dict[str, float]]:
    """A prepared method, its heads drawn from seed 0, and what it reports."""
    torch.manual_seed(0)
    method = load_method(name)(TEACHER, STUDENT, **options)
    return method, method.prepare(headed(rows, method), seed=0, progress=None, fitted=fitted)


def loss_of(method: Method, student: Features, teacher: Batch) -> Tensor:
    """Of a copy, so that what a method remembers of a batch (a queue) is the same each time."""
    return total(copy.deepcopy(method).loss(student, teacher))


class MethodContract:
    """Of the method `name` with `options`; with few steps, where it fits something before training."""

    name: str
    options: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture
    def case(self) -> Case:
        return self.name, self.options

    @pytest.fixture
    def rows(self, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Rows:
        return read_token_rows(_written_once(tmp_path_factory.getbasetemp(), load_method(case[0]).group or VIEWS))

    @pytest.fixture
    def method(self, case: Case, rows: Rows) -> Method:
        return build(*case, rows)[0]

    @pytest.fixture
    def teacher(self, method: Method, rows: Rows) -> Batch:
        return shown_texts(method, teacher_batch(rows, method.fields, group=together(method)))

    @pytest.fixture
    def student(self, method: Method) -> Features:
        return student_batch(method.student_fields, rows=ROWS * together(method))

    def test_it_is_a_method_that_describes_itself(self, method: Method) -> None:
        assert isinstance(method, Method)
        first, *_ = (type(method).__doc__ or "").splitlines()
        assert first.endswith(".")
        assert 40 < len(first) <= 120

    def test_options_have_defaults(self, case: Case) -> None:
        parameters = inspect.signature(load_method(case[0])).parameters
        options = [each for key, each in parameters.items() if key not in ("teacher_dim", "student_dim")]
        assert all(each.kind is each.KEYWORD_ONLY and each.default is not each.empty for each in options)

    def test_a_hyphen_in_a_name_is_an_underscore(self, case: Case) -> None:
        assert load_method(case[0].replace("_", "-")) is load_method(case[0])

    def test_prepare_reports_finite_numbers(self, case: Case, rows: Rows) -> None:
        report = build(*case, rows)[1]
        assert all(type(key) is str and type(value) is float for key, value in report.items())
        assert all(map(math.isfinite, report.values()))

    def test_prepare_is_a_function_of_rows_and_seed(self, case: Case, rows: Rows) -> None:
        (first, report), (second, again) = build(*case, rows), build(*case, rows)
        torch.rand(7)
        assert report == again == first.prepare(headed(rows, first), seed=0)
        for key, value in second.state_dict().items():
            assert torch.equal(value, first.state_dict()[key]), key

    def test_prepare_takes_what_an_earlier_one_left(self, case: Case, rows: Rows) -> None:
        first, report = build(*case, rows)
        second, again = build(*case, rows, fitted=(fitted_tensors(first), report))
        assert again == report
        assert second.fields == first.fields
        assert second.state_dict().keys() == first.state_dict().keys()
        for key, value in second.state_dict().items():
            assert torch.equal(value, first.state_dict()[key]), key

    def test_fields_are_the_embedding_and_what_else_loss_reads(
        self, method: Method, teacher: Batch, student: Features
    ) -> None:
        assert set(method.fields) <= set(FIELDS)
        assert method.fields[0] == method.student_fields[0] == "embedding"
        for given, fields in ((teacher.features, method.fields), (student, method.student_fields)):
            for field in fields[1:]:
                without = {name: value for name, value in given.items() if name != field}
                of_student, of_teacher = (
                    (without, teacher) if given is student else (student, replace(teacher, features=without))
                )
                with pytest.raises(KeyError, match=field):
                    loss_of(method, of_student, of_teacher)

    def test_state_goes_through_a_checkpoint(
        self, case: Case, method: Method, rows: Rows, teacher: Batch, student: Features
    ) -> None:
        method.loss(student, teacher)
        restored, _ = build(*case, rows)
        for weight in restored.parameters():
            nn.init.normal_(weight)
        restored.load_state_dict({key: value.clone() for key, value in method.state_dict().items()})
        assert torch.equal(loss_of(restored, student, teacher), loss_of(method, student, teacher))

    def test_the_target_is_in_the_students_space(self, method: Method, teacher: Batch) -> None:
        target = method.target(teacher)
        if target is not None:
            assert target.shape == (len(teacher.label), STUDENT)
            assert target.isfinite().all()
            assert not target.requires_grad

    def test_terms_are_finite_scalars_with_names(self, method: Method, teacher: Batch, student: Features) -> None:
        terms = method.loss(student, teacher)
        assert terms
        for name, term in terms.items():
            assert isinstance(name, str)
            assert term.shape == (), name
            assert term.isfinite(), name

    def test_what_the_student_is_shown_follows_from_the_seed_and_leaves_nothing_in_it(
        self, method: Method, teacher: Batch
    ) -> None:
        batch, student = replace(teacher, inputs=torch.randn(ROWS, 3, 8, 8)), SmallStudent().train()
        student.norm.eval()
        shown = []
        for _ in range(2):
            torch.manual_seed(5)
            shown.append(method.inputs(batch, student))
        assert torch.equal(shown[0], shown[1])
        assert shown[0].shape == batch.inputs.shape
        assert shown[0].isfinite().all()
        assert not shown[0].requires_grad
        assert [module.training for module in student.modules()] == [True, True, False, True]
        assert all(weight.grad is None and weight.requires_grad for weight in student.parameters())

    def test_loss_reaches_all_of_the_student(self, method: Method, teacher: Batch, student: Features) -> None:
        total(method.loss(student, teacher)).backward()
        for name, output in student.items():
            if not output.is_leaf:
                continue
            assert output.grad is not None, name
            assert output.grad.isfinite().all(), name
            assert (output.grad.abs().sum(dim=-1) > 0).all(), name

    def test_nothing_flows_into_the_teacher(self, method: Method, teacher: Batch, student: Features) -> None:
        """Features come from a store: were they leaves, all that may train is in the method."""
        assert not any(value.requires_grad for value in teacher.features.values())
        total(method.loss(student, teacher)).backward()
        assert not any(buffer.requires_grad for buffer in method.buffers())

    def test_exactly_what_trains_has_a_gradient(self, method: Method, teacher: Batch, student: Features) -> None:
        total(method.loss(student, teacher)).backward()
        for key, weight in method.named_parameters():
            assert (weight.grad is not None and bool(weight.grad.abs().sum() > 0)) == weight.requires_grad, key

    def test_a_step_downhill_lowers_the_loss(self, method: Method, teacher: Batch, student: Features) -> None:
        before = copy.deepcopy(method)
        loss = total(method.loss(student, teacher))
        loss.backward()
        leaves = [output for output in student.values() if output.is_leaf]
        torch.optim.SGD([*leaves, *(w for w in method.parameters() if w.requires_grad)], lr=1e-3).step()
        student = classified(student, list(student))
        before.load_state_dict(
            {**before.state_dict(), **{key: weight.detach() for key, weight in method.named_parameters()}}
        )
        assert total(before.loss(student, teacher)) < loss

    def test_on_a_gpu_it_stays_there(self, method: Method, teacher: Batch, student: Features) -> None:
        """Of a GPU that is made up: tensors of two devices do not mix, and nothing waits for the value of one."""

        def there(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        with FakeTensorMode():
            for module in method.modules():
                weights, buffers = dict(module._parameters), dict(module._buffers)
                module._parameters |= {
                    key: nn.Parameter(there(w), w.requires_grad) for key, w in weights.items() if w is not None
                }
                module._buffers |= {key: there(value) for key, value in buffers.items() if value is not None}
            batch = replace(
                teacher,
                features={name: there(value) for name, value in teacher.features.items()},
                inputs=there(teacher.inputs),
                row=there(teacher.row),
                view=there(teacher.view),
                label=there(teacher.label),
                weight=there(teacher.weight),
                mask=None if teacher.mask is None else there(teacher.mask),
            )
            target, terms = (
                method.target(batch),
                method.loss({name: there(value) for name, value in student.items()}, batch),
            )
            assert target is None or target.device.type == "cuda"
            assert {term.device.type for term in terms.values()} == {"cuda"}

    def test_widths_are_those_of_teacher_and_student(self, case: Case) -> None:
        """Of matrices; 2048, 768 and 64, as hidden widths of their own, aside."""
        name, options = case
        method = load_method(name)(TEACHER + 1, STUDENT + 1, **options)
        matrices = [weight for weight in method.parameters() if weight.ndim == 2]
        assert {size for weight in matrices for size in weight.shape} <= {TEACHER + 1, STUDENT + 1, 2048, 768, 64}

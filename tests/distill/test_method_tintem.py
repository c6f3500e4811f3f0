"""TinTeM against the paper's loss in float64, one image and one pair at a time; which term feeds what."""

import numpy as np
import pytest
import torch
from torch import nn

from distill import load_method
from distill.mappings import load_mapping
from distill.methods._tokens import resize_tokens
from distill.objectives import TEMPERATURES
from distill.testing.methods import (
    ROWS,
    STUDENT,
    TEACHER,
    batch_of,
    student_batch,
    teacher_batch,
    total,
    write_token_store,
)
from featcache.rows import Rows
from featcache.store.from_arrays import write_store


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Rows.of([write_token_store(tmp_path_factory.mktemp("store") / "s.zarr")])


@pytest.fixture(scope="module")
def source_without_prefix(tmp_path_factory):
    fields = {"embedding": (TEACHER,), "tokens": (16, TEACHER)}
    return Rows.of([write_token_store(tmp_path_factory.mktemp("store") / "s.zarr", fields)])


def prepared(source, **options):
    torch.manual_seed(0)
    if not options.keys() & {"joint", "mapping"}:
        options["mapping_steps"] = 3
    method = load_method("tintem")(TEACHER, STUDENT, **options)
    report = method.prepare(source, seed=0)
    return method, report


def double(value):
    return value.detach().numpy().astype(np.float64)


def cosine_distance(a, b):
    return 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def gram(x):
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x @ x.T


def paper_head(head, x):
    norm, layer = head
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * double(norm.weight) + double(norm.bias)
    return x @ double(layer.weight).T + double(layer.bias)


def shake(module):
    """Away from ones and zeros, where a mistake could hide."""
    torch.manual_seed(5)
    for weight in module.parameters():
        nn.init.normal_(weight, 0.2, 0.6)


def test_golden_values():
    """Class tokens (3, 4) on (4, 3) and (0, 1) on (0, 2): 0.04 and 0.

    As one vector with the patch, (3, 4, 0, 5) on (4, 3, 0, 5), 1 − 49/50, and (0, 1, 1, 0) on (0, 2, 0, 2), ½.
    """
    method = load_method("tintem")(3, 2, tokens=True)
    method.mapping = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        method.mapping.weight.copy_(torch.eye(2, 3))
    teacher = batch_of(
        {
            "embedding": torch.tensor([[4.0, 3.0, 7.0], [0.0, 2.0, -1.0]]),
            "tokens": torch.tensor([[[0.0, 5.0, 1.0]], [[0.0, 2.0, 3.0]]]),
        }
    )
    student = {
        "embedding": torch.tensor([[3.0, 4.0], [0.0, 1.0]]),
        "tokens": torch.tensor([[[0.0, 5.0]], [[1.0, 0.0]]]),
    }
    terms = method.loss(student, teacher)
    assert method.target(teacher).tolist() == [[4.0, 3.0], [0.0, 2.0]]
    assert terms["cosine"].item() == pytest.approx(0.02, abs=1e-6)
    assert terms["tokens"].item() == pytest.approx((0.02 + 0.5) / 2, abs=1e-6)
    assert list(terms) == ["cosine", "tokens"]


def test_golden_values_of_the_terms_between_samples():
    """The head gives zeros, so to it all are equally near; temperature 1 / ln 3.

    Of three class tokens (1, 0), (0, 1), (0, 1), the first is indifferent and the others prefer each other 3 : 1, so
    P is ⅛, ⅛ and ¼ against ⅙: ½ ln 9/8. The tokens of the first two images are like that too; those of the third are
    all the same: 0.
    """
    a, b = [1.0, 0.0], [0.0, 1.0]
    sharp = {"temperatures": (1 / np.log(3),), "relation_temperatures": (1 / np.log(3),)}
    method = load_method("tintem")(2, 2, joint=True, tokens=True, relation=2.0, **sharp)
    for weight in method.mapping.parameters():
        nn.init.zeros_(weight)
    teacher = batch_of({"embedding": torch.tensor([a, b, b]), "tokens": torch.tensor([[b, b], [a, b], [b, b]])})
    even = torch.tensor([[0.0, 1.0], [3**0.5 / 2, -0.5], [-(3**0.5) / 2, -0.5]])
    terms = method.loss({"embedding": even, "tokens": torch.ones(3, 2, 2)}, teacher)
    assert {name: term.item() for name, term in terms.items()} == {
        "cosine": 1.0,
        "tokens": 1.0,
        "sne": pytest.approx(0.058891517828, rel=1e-5),
        "sne_tokens": pytest.approx(0.039261011885, rel=1e-5),
        "relation": pytest.approx(0.117783035656, rel=1e-5),
    }


@pytest.mark.parametrize("temperatures", [TEMPERATURES, (0.1, 1.0)])
def test_the_full_loss_equals_the_paper(source, slow_relation_kl, temperatures):
    """L_token, L_fea over the same grid, L_global and L_local, class token among the tokens."""
    method, report = prepared(source, tokens=True, joint=True, temperatures=temperatures)
    assert report == {}
    shake(method.mapping)
    drawn = torch.Generator().manual_seed(2)
    student = {**student_batch(("embedding",)), "tokens": torch.randn(ROWS, 16, STUDENT, generator=drawn)}
    teacher = teacher_batch(source, method.fields)
    z = np.concatenate([double(teacher["prefix_tokens"])[:, :1], double(teacher["tokens"])], 1)
    h = paper_head(method.mapping, z)
    s = np.concatenate([double(student["embedding"])[:, None], double(student["tokens"])], 1)
    style = {"temperatures": temperatures, "symmetric": True, "mask_diagonal": True}
    expected = {
        "cosine": cosine_distance(s[:, 0], h[:, 0]).mean(),
        "tokens": cosine_distance(s.reshape(ROWS, -1), h.reshape(ROWS, -1)).mean(),
        "sne": slow_relation_kl(gram(z[:, 0]), gram(h[:, 0]), **style),
        "sne_tokens": np.mean([slow_relation_kl(gram(z[i]), gram(h[i]), **style) for i in range(ROWS)]),
    }
    found = {name: term.item() for name, term in method.loss(student, teacher).items()}
    assert found == {name: pytest.approx(value, rel=1e-3) for name, value in expected.items()}


def test_with_a_frozen_mapping_the_loss_is_the_cosine_to_it(source):
    method, _ = prepared(source)
    student, teacher = student_batch(("embedding",)), teacher_batch(source, ("embedding",))
    mapped = double(teacher["embedding"]) @ double(method.mapping.weight).T
    terms = method.loss(student, teacher)
    assert list(terms) == ["cosine"]
    assert terms["cosine"].item() == pytest.approx(
        cosine_distance(double(student["embedding"]), mapped).mean(), rel=1e-5
    )
    assert method.fields == method.student_fields == ("embedding",)


def test_the_relation_is_to_the_teacher_before_the_mapping(source, slow_relation_kl):
    method, _ = prepared(source, relation=0.3)
    student, teacher = student_batch(("embedding",)), teacher_batch(source, ("embedding",))
    expected = slow_relation_kl(
        gram(double(teacher["embedding"])), gram(double(student["embedding"])), (0.05, 0.1), True, True
    )
    assert method.loss(student, teacher)["relation"].item() == pytest.approx(0.3 * expected, rel=1e-4)


@pytest.mark.parametrize("lengths", [1, -1])
def test_least_along_the_mapped_teacher_and_most_against_it(source, lengths):
    method, _ = prepared(source, tokens=True)
    teacher = teacher_batch(source, method.fields)
    mapped = {"embedding": method.target(teacher), "tokens": method.mapping(teacher["tokens"])}
    per_image = lengths * torch.linspace(0.1, 9, ROWS)
    student = {
        "embedding": (per_image[:, None] * mapped["embedding"]).requires_grad_(),
        "tokens": (per_image[:, None, None] * mapped["tokens"]).requires_grad_(),
    }
    terms = method.loss(student, teacher)
    assert {name: term.item() for name, term in terms.items()} == {
        "cosine": pytest.approx(1 - lengths, abs=1e-6),
        "tokens": pytest.approx(1 - lengths, abs=1e-6),
    }
    total(terms).backward()
    assert max(output.grad.abs().max() for output in student.values()) < 1e-5


def test_terms_between_samples_are_zero_where_student_and_teacher_agree():
    method = load_method("tintem")(4, 4, joint=True, tokens=True, relation=1.0)
    method.mapping = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        method.mapping.weight.copy_(3 * torch.linalg.qr(torch.randn(4, 4)).Q)
    teacher = batch_of({"embedding": torch.randn(5, 4), "tokens": torch.randn(5, 9, 4)})
    student = {name: method.mapping(value).detach().requires_grad_() for name, value in teacher.features.items()}
    terms = method.loss(student, teacher)
    assert list(terms) == ["cosine", "sne", "tokens", "sne_tokens", "relation"]
    total(terms).backward()
    assert total(terms).item() == pytest.approx(0, abs=1e-5)
    assert student["embedding"].grad.abs().max() < 1e-4
    assert method.mapping.weight.grad.abs().max() < 1e-3


# --- which term feeds what


@pytest.mark.parametrize("tokens", [False, True])
def test_with_joint_the_head_hears_only_sne_and_the_student_only_cosines(source, tokens):
    method, _ = prepared(source, joint=True, tokens=tokens)
    teacher, student = teacher_batch(source, method.fields), student_batch(method.student_fields)
    for name, term in method.loss(student, teacher).items():
        of_head = torch.autograd.grad(term, list(method.parameters()), retain_graph=True, allow_unused=True)
        of_student = torch.autograd.grad(term, list(student.values()), retain_graph=True, allow_unused=True)
        if name.startswith("sne"):
            # A shift of all mapped rows is felt too: cosines are angles at the origin.
            assert all(gradient.abs().sum() > 0 for gradient in of_head), name
            assert of_student == (None,) * len(student), name
        else:
            assert of_head == (None,) * len(of_head), name
            assert of_student[0].abs().sum() > 0, name


def test_the_mapping_stays_out_of_training(source):
    method, report = prepared(source, relation=0.3)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    assert list(method.parameters()) == []
    assert before.keys() == {"mapping.weight"}
    total(method.loss(student_batch(("embedding",)), teacher_batch(source, ("embedding",)))).backward()
    assert torch.equal(method.mapping.weight, before["mapping.weight"])
    assert set(report) == {"sne_start", "sne", "singular_min", "singular_max", "deviation"}


def test_any_registered_mapping_will_do(source):
    method, report = prepared(source, mapping="spectral")
    expected = load_mapping("spectral")(STUDENT).fit(source)
    teacher = teacher_batch(source, ("embedding",))
    np.testing.assert_allclose(method.target(teacher), expected.transform(teacher["embedding"].numpy()), rtol=1e-6)
    assert report == {
        "singular_min": pytest.approx(1, abs=1e-5),
        "singular_max": pytest.approx(1, abs=1e-5),
        "deviation": pytest.approx(0, abs=1e-5),
    }


def test_options_reach_the_mapping(source):
    told = []
    options = {"start": "random", "layer_norm": True, "steps": 4, "batch_size": 8, "lr": 0.01}
    given = {f"mapping_{name}": value for name, value in options.items()}
    method = load_method("tintem")(TEACHER, STUDENT, temperatures=(0.2,), **given)
    method.prepare(source, seed=3, progress=lambda done, steps: told.append((done, steps)))
    expected = load_mapping("sne")(STUDENT, temperatures=(0.2,), seed=3, **options).fit(source).module()
    for name, value in expected.named_buffers():
        assert torch.equal(method.mapping.get_buffer(name), value)
    assert told[-1] == (4, 4)


def test_no_steps_leave_the_start_of_the_mapping(source):
    method = load_method("tintem")(TEACHER, STUDENT, mapping_steps=0)
    report = method.prepare(source, seed=0)
    np.testing.assert_allclose(method.mapping.weight, load_mapping("spectral")(STUDENT).fit(source).weight_, rtol=1e-6)
    assert report["sne"] == report["sne_start"]


@pytest.mark.parametrize("mapping", ["sne", "phi_s", "spectral", "random_orthonormal", "orthogonal"])
def test_a_mapping_that_was_fitted_is_taken_as_it_is(source, mapping):
    first, report = prepared(source, mapping=mapping)
    tensors = {name: tensor + 1 for name, tensor in first.named_buffers()}
    second, again = load_method("tintem")(TEACHER, STUDENT, mapping=mapping), {**report, "deviation": 7.0}
    assert second.prepare(source, seed=0, fitted=(tensors, again)) == again
    teacher = teacher_batch(source, ("embedding",))
    assert second.mapping.normalised == first.mapping.normalised
    assert not torch.equal(second.target(teacher), first.target(teacher))
    for name, tensor in second.named_buffers():
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"mapping.weight": torch.ones(STUDENT, TEACHER + 1)},
        {"mapping.weight": torch.ones(STUDENT + 1, TEACHER)},
        {"mapping.weight": torch.ones(STUDENT, TEACHER)},
        {"mapping.weight": torch.ones(STUDENT, TEACHER), "mapping.bias": torch.ones(STUDENT)},
        {"mapping.weight": torch.ones(STUDENT, TEACHER), "mapping.mean": torch.ones(TEACHER + 1)},
    ],
    ids=lambda tensors: str({name: tuple(tensor.shape) for name, tensor in tensors.items()}),
)
def test_tensors_of_another_mapping_are_not_taken(source, tensors):
    expected, report = prepared(source, mapping="phi_s")
    method = load_method("tintem")(TEACHER, STUDENT, mapping="phi_s")
    assert method.prepare(source, seed=0, fitted=(tensors, {})) == report
    for name, tensor in expected.named_buffers():
        assert torch.equal(method.get_buffer(name), tensor)


def test_the_mapping_of_a_package_with_a_module_of_its_own_is_fitted_again(source, monkeypatch):
    class Own(type(load_mapping("spectral")(1))):
        def module(self):
            return nn.Sequential(super().module())

    monkeypatch.setattr("distill.methods.tintem.load_mapping", lambda name: Own)
    first, report = prepared(source, mapping="own")
    tensors = {name: tensor + 1 for name, tensor in first.named_buffers()}
    second, again = load_method("tintem")(TEACHER, STUDENT, mapping="own"), dict.fromkeys(report, 7.0)
    assert second.prepare(source, seed=0, fitted=(tensors, again)) == report
    teacher = teacher_batch(source, ("embedding",))
    assert torch.equal(second.target(teacher), first.target(teacher))


# --- tokens


def test_the_class_token_is_the_first_prefix_token_where_there_is_one(source, source_without_prefix):
    for given, fields in (
        (source, ("embedding", "tokens", "prefix_tokens")),
        (source_without_prefix, ("embedding", "tokens")),
    ):
        method, _ = prepared(given, tokens=True)
        assert method.fields == fields
        assert method.student_fields == ("embedding", "tokens")
        teacher = teacher_batch(given, method.fields)
        class_token = teacher["prefix_tokens"][:, 0] if "prefix_tokens" in fields else teacher["embedding"]
        assert torch.equal(method.target(teacher), method.mapping(class_token))


def test_mapped_tokens_are_resampled_to_the_students_grid(source):
    """16 tokens on a 4 × 4 grid, four on the student's 2 × 2."""
    method, _ = prepared(source, tokens=True)
    teacher, student = teacher_batch(source, method.fields), student_batch(("embedding",))
    student["tokens"] = torch.randn(ROWS, 4, STUDENT)
    mapped = method.mapping(teacher["tokens"])
    goal = torch.cat([method.target(teacher), resize_tokens(mapped, 4).flatten(1)], 1)
    output = torch.cat([student["embedding"], student["tokens"].flatten(1)], 1)
    expected = cosine_distance(double(output), double(goal)).mean()
    assert method.loss(student, teacher)["tokens"].item() == pytest.approx(expected, rel=1e-5)


def test_resampling_keeps_the_order_of_the_grid():
    """A plane that rises by 10 a row and by 1 a column stays one; row-major."""
    plane = (10 * torch.arange(4.0)[:, None] + torch.arange(4.0)).reshape(1, 16, 1)
    same = resize_tokens(plane, 16)
    assert same is plane
    large = resize_tokens(plane, 64).reshape(8, 8)
    inner = 10 * torch.arange(0.25, 3, 0.5)[:, None] + torch.arange(0.25, 3, 0.5)
    torch.testing.assert_close(large[1:-1, 1:-1], inner)
    small = resize_tokens(plane, 1)
    assert small.item() == pytest.approx(16.5, abs=1e-4)
    half = resize_tokens(plane, 4).reshape(2, 2)
    torch.testing.assert_close(half[1] - half[0], 10 * (half[:, 1] - half[:, 0]))
    assert half.mean().item() == pytest.approx(16.5, abs=1e-4)


def test_grids_that_are_not_square_only_fit_themselves():
    tokens = torch.randn(2, 6, 3)
    assert resize_tokens(tokens, 6) is tokens
    for count, given in ((4, tokens), (6, torch.randn(2, 4, 3))):
        with pytest.raises(ValueError, match="only square grids can"):
            resize_tokens(given, count)


@pytest.mark.parametrize("name", ["tintem", "proteus"])
def test_stores_without_suitable_tokens_are_refused(tmp_path, name):
    bare = write_store(tmp_path / "bare.zarr", np.ones((5, TEACHER)))
    with pytest.raises(ValueError, match=r"bare.zarr: has no patch tokens; extract it with `--fields"):
        load_method(name)(TEACHER, STUDENT, tokens=True).prepare(Rows.of([bare]), seed=0)
    wide = write_token_store(tmp_path / "wide.zarr", {"embedding": (TEACHER,), "tokens": (4, 16)})
    with pytest.raises(ValueError, match=r"wide.zarr: its tokens have 16 dimensions and its embedding 12"):
        load_method(name)(TEACHER, STUDENT, tokens=True).prepare(Rows.of([wide]), seed=0)


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "sen"}, "unknown mapping 'sen'; did you mean sne"),
        ({"mapping": "spectral", "mapping_steps": 3, "mapping_lr": 0.1}, "spectral has no mapping_steps, mapping_lr"),
        ({"joint": True, "mapping": "spectral"}, "with joint the head trains beside the student"),
        ({"joint": True, "mapping_steps": 3}, "with joint the head trains beside the student"),
        ({"mapping_steps": -1}, "mapping_steps must not be negative, got -1"),
        ({"mapping_batch_size": 0}, "mapping_batch_size must be greater than 0, got 0"),
        ({"mapping_lr": 0.0}, "mapping_lr must be greater than 0, got 0.0"),
        ({"relation": -0.1}, "relation must not be negative, got -0.1"),
        ({"temperatures": ()}, r"^temperatures must be one or more numbers greater than 0, got \[\]"),
        ({"temperatures": (0.1, 0.0)}, r"^temperatures must be one or more .* got \[0\.1, 0\.0\]"),
        ({"relation_temperatures": [-0.1]}, r"relation_temperatures must be one or more .* got \[-0\.1\]"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_method("tintem")(TEACHER, STUDENT, **options)

"""OKD and its baseline against a slow loop over positions in float64, whom each term reaches, and what is never read."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from distill.methods.next_token import NextToken
from distill.methods.okd import OKD, OnlineModule
from distill.testing.methods import (
    POSITIONS,
    STUDENT,
    TEACHER,
    TOKENS,
    build,
    shown_texts,
    student_batch,
    teacher_batch,
    total,
    write_token_rows,
    write_token_store,
)
from featcache.head import Head
from featcache.rows import Rows


@pytest.fixture
def rows(tmp_path):
    return write_token_rows(tmp_path)


def given(rows, **options):
    """The method, the teacher's batch with weights, and the student's features."""
    method, _ = build("okd", options, rows)
    teacher = shown_texts(method, teacher_batch(rows, method.fields))
    weight = torch.linspace(0.5, 2, len(teacher.label))
    return method, replace(teacher, weight=weight), student_batch(method.student_fields)


def slow(method, teacher, student, direction, temperature):
    """Every term without its factor, position by position in float64."""
    head = [each.double().numpy() for each in (method.head_weight, method.head_bias)]
    sums = dict.fromkeys(("ce", "kl", "module_ce", "module_kl"), 0.0)
    count = 0.0
    for text in range(len(teacher.label)):
        weight = float(teacher.weight[text])
        for t in range(int(teacher["length"][text]) - 1):
            y = int(teacher.inputs[text, t + 1])
            h = teacher["hidden"][text, t].double().numpy()
            if method.module is not None:
                down, up = (
                    [each.detach().double().numpy() for each in (layer.weight, layer.bias)]
                    for layer in (method.module.down, method.module.up)
                )
                inner = torch.nn.functional.gelu(torch.from_numpy(down[0] @ h + down[1])).numpy()
                h = h + up[0] @ inner + up[1]
            p, q = head[0] @ h + head[1], student["token_logits"][text, t].detach().double().numpy()
            soft_p, soft_q = log_softmax(p / temperature), log_softmax(q / temperature)
            first, second = (soft_p, soft_q) if direction == "forward" else (soft_q, soft_p)
            sums["kl"] += weight * temperature**2 * (np.exp(first) * (first - second)).sum()
            p, q = log_softmax(p), log_softmax(q)
            sums["ce"] -= weight * q[y]
            sums["module_ce"] -= weight * p[y]
            sums["module_kl"] += weight * (np.exp(q) * (q - p)).sum()
            count += weight
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_the_formula_in_float64(rows, direction, temperature):
    options = {"direction": direction, "temperature": temperature, "lam": 0.3, "mu": 0.7, "start": 0.2}
    method, teacher, student = given(rows, **options)
    found = {name: term.item() for name, term in method.loss(student, teacher).items()}
    parts = slow(method, teacher, student, direction, temperature)
    factors = {"ce": 0.7, "kl": 0.3, "module_ce": 1.0, "module_kl": 0.7}
    assert found == pytest.approx({name: factors[name] * value for name, value in parts.items()}, rel=1e-5)


def test_golden_values():
    """Two tokens, a text of three: after 0 comes 1, after 1 comes 1. h = (1, 0), (0, 2); p = h; q = (0, 0), (0, ln 3)."""
    method = OKD(2, 2, lam=0.5, mu=1.0)
    method.register_buffer("head_weight", torch.eye(2), persistent=False)
    method.register_buffer("head_bias", torch.zeros(2), persistent=False)
    batch = shown_texts(method, teacher_batch_of([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]], [3], [[0, 1, 1]]))
    batch = replace(batch, inputs=torch.tensor([[0, 1, 1]]))
    student = {"token_logits": torch.tensor([[[0.0, 0.0], [0.0, np.log(3)], [5.0, -5.0]]])}
    found = {name: term.item() for name, term in method.loss(student, batch).items()}
    # ½ · mean(ln 2, ln 4/3); ½ · mean(KL(.7311|.5), KL(.8808|.75)); mean(ln(1 + e), ln(1 + e⁻²)); the same KLs the other way
    golden = {"ce": 0.24520731, "kl": 0.04106252, "module_ce": 0.72009476, "module_kl": 0.09235369}
    assert found == pytest.approx(golden, abs=1e-6)
    assert NextToken(2, 2).loss(student, batch)["ce"].item() == pytest.approx(2 * golden["ce"], abs=1e-6)


def teacher_batch_of(hidden, length, ids):
    from distill.testing.methods import batch_of

    features = {"hidden": torch.tensor(hidden), "length": torch.tensor(length)}
    return replace(batch_of(features), inputs=torch.tensor(ids))


def test_it_is_least_where_the_student_says_what_the_teacher_says(rows):
    """KL is 0 there, and only there: of λ = 1, without a module, no step from it goes down."""
    method, teacher, _ = given(rows, online=False, lam=1.0)
    p = torch.einsum("btd,cd->btc", teacher["hidden"], method.head_weight) + method.head_bias
    assert total(method.loss({"token_logits": p}, teacher)).item() == pytest.approx(0, abs=1e-6)
    assert total(method.loss({"token_logits": p + 3}, teacher)).item() == pytest.approx(0, abs=1e-5)
    for seed in range(5):
        moved = p + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        assert total(method.loss({"token_logits": moved}, teacher)) > 1e-4


def test_cross_entropy_alone_is_least_at_the_frequencies(rows):
    """Of a student that says the same everywhere: the entropy of the tokens that follow another, each as often as its text's weight says."""
    _, teacher, _ = given(rows)
    token, weight = teacher.inputs[:, 1:], teacher.weight[:, None].expand(-1, POSITIONS - 1)
    known = token >= 0
    often = torch.bincount(token[known], weight[known], TOKENS).double()
    p = often / often.sum()
    said = p.clamp(min=1e-30).log().float().expand(len(token), POSITIONS, TOKENS)
    least = NextToken(TEACHER, STUDENT).loss({"token_logits": said}, teacher)["ce"].item()
    assert least == pytest.approx(float(torch.special.entr(p).sum()), rel=1e-5)
    for seed in range(3):
        other = said + 0.1 * torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed))
        assert NextToken(TEACHER, STUDENT).loss({"token_logits": other}, teacher)["ce"] > least


def test_the_module_begins_as_the_frozen_head(rows):
    online, teacher, student = given(rows)
    frozen, _, _ = given(rows, online=False)
    a, b = online.loss(student, teacher), frozen.loss(student, teacher)
    assert torch.equal(a["kl"], b["kl"])
    assert torch.equal(a["ce"], b["ce"])
    assert set(a) - set(b) == {"module_ce", "module_kl"}
    hidden = torch.randn(4, 3)
    assert torch.equal(OnlineModule(3, 2, 0.0)(hidden), hidden)
    for _ in range(2):  # at the first step W₂ moves, at the second W₁ too
        online.zero_grad()
        total(online.loss(student_batch(online.student_fields), teacher)).backward()
        with torch.no_grad():
            for weight in online.parameters():
                weight -= 0.1 * weight.grad
    assert all(weight.grad.any() for weight in online.parameters())


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_the_module_learns_of_its_own_terms_and_the_student_of_its_own(rows, mu):
    method, teacher, student = given(rows, start=0.1, mu=mu)
    for name in ("ce", "kl"):
        method.loss(student_batch(method.student_fields), teacher)[name].backward()
        assert all(weight.grad is None for weight in method.parameters())
    found = method.loss(student, teacher)
    for name in set(found) - {"ce", "kl"}:
        found[name].backward(retain_graph=True)
        assert student["embedding"].grad is None
        assert all(weight.grad.any() for weight in method.parameters())
    assert ("module_kl" in found) == (mu > 0)


@pytest.mark.parametrize("options", [{"start": 0.1}, {"online": False, "direction": "reverse"}], ids=str)
def test_what_stands_behind_the_end_is_never_read(rows, options):
    """Not a number of it: neither hidden states, nor what the student says, nor the text that has one token."""
    method, teacher, student = given(rows, **options)
    behind = torch.arange(POSITIONS) >= teacher["length"][:, None]
    spoilt = {**teacher.features, "hidden": teacher["hidden"].masked_fill(behind[..., None], float("nan"))}
    logits = student["token_logits"].detach()
    last = torch.arange(POSITIONS) >= teacher["length"][:, None] - 1
    spoilt_logits = logits.masked_fill(last[..., None], float("inf")).requires_grad_()
    clean_logits = logits.clone().requires_grad_()
    clean = method.loss({"token_logits": clean_logits}, teacher)
    found = method.loss({"token_logits": spoilt_logits}, replace(teacher, features=spoilt))
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    total(clean).backward()
    total(found).backward()
    assert torch.equal(spoilt_logits.grad, clean_logits.grad)
    assert not spoilt_logits.grad[last].any()
    assert all(weight.grad.isfinite().all() for weight in method.parameters())


def test_a_text_of_one_token_asks_nothing(rows):
    method, teacher, student = given(rows)
    alone = replace(
        teacher,
        inputs=teacher.inputs.masked_fill(torch.arange(POSITIONS) > 0, -1),
        features={**teacher.features, "length": torch.ones_like(teacher["length"])},
    )
    found = total(method.loss(student, alone))
    found.backward()
    assert found == 0
    assert not student["embedding"].grad.any()


def test_another_vocabulary_is_refused(rows):
    method, teacher, student = given(rows)
    with pytest.raises(
        ValueError, match="tells 6 tokens apart, the teacher 7; give a student of the teacher's tokeniser"
    ):
        method.loss({"token_logits": student["token_logits"][..., 1:]}, teacher)


def test_texts_are_compared_as_far_as_both_go(rows):
    """A batch whose texts are short is cut; a student may take more of a text than its teacher did, or less."""
    method, teacher, student = given(rows)
    logits, whole = student["token_logits"].detach(), method.loss(student, teacher)
    longer = torch.cat([teacher.inputs, torch.zeros_like(teacher.inputs)], dim=1)
    more = method.loss({"token_logits": torch.cat([logits, logits], dim=1)}, replace(teacher, inputs=longer))
    assert all(torch.equal(more[name], whole[name]) for name in whole)
    cut = {**teacher.features, "length": teacher["length"].clamp(max=3)}
    fewer = method.loss({"token_logits": logits[:, :3]}, replace(teacher, inputs=teacher.inputs[:, :3]))
    told = method.loss({"token_logits": logits}, replace(teacher, features=cut))
    assert all(fewer[name].item() == pytest.approx(told[name].item(), rel=1e-6) for name in whole)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lam": 0.0}, "lam must be above 0 .that is method next_token"),
        ({"lam": 1.5}, "at most 1, got 1.5"),
        ({"direction": "sideways"}, "direction must be forward or reverse, got 'sideways'"),
        ({"source": "tokens"}, "source must be hidden or token_logits, got 'tokens'"),
        ({"source": "token_logits"}, "the online module needs hidden states; set online=false"),
        ({"mu": -1.0}, "mu must not be negative"),
        ({"bottleneck": 0}, "bottleneck must be greater than 0"),
    ],
)
def test_options_that_are_none(options, match):
    with pytest.raises(ValueError, match=match):
        OKD(TEACHER, STUDENT, **options)


def test_rows_that_do_not_suit(tmp_path, rows):
    with pytest.raises(ValueError, match=r"method okd needs the head .* --set head=FILE"):
        OKD(TEACHER, STUDENT).prepare(rows, seed=0)
    rows.head = Head(np.ones((TOKENS, 3)), np.zeros(TOKENS), np.arange(TOKENS))
    with pytest.raises(ValueError, match="head: reads 3 dimensions, hidden has 12"):
        OKD(TEACHER, STUDENT).prepare(rows, seed=0)
    plain = Rows.of(write_token_store(tmp_path / "plain.zarr", {"embedding": (TEACHER,)}))
    plain.head = Head(np.ones((TOKENS, TEACHER)), np.zeros(TOKENS), np.arange(TOKENS))
    with pytest.raises(ValueError, match="has no hidden; extract it again with --fields embedding,hidden"):
        OKD(TEACHER, STUDENT).prepare(plain, seed=0)


def test_logits_that_a_store_keeps_are_a_teacher_too(rows):
    """The same as of the hidden states whose logits they are; without a head."""
    method, teacher, student = given(rows, online=False)
    logits = teacher["hidden"] @ method.head_weight.T + method.head_bias
    kept = OKD(TEACHER, STUDENT, online=False, source="token_logits")
    assert kept.prepare(Rows(rows.stores, rows._store_number, rows.index), seed=0) == {}
    found = kept.loss(student, replace(teacher, features={**teacher.features, "token_logits": logits}))
    whole = method.loss(student, teacher)
    assert {name: term.item() for name, term in found.items()} == pytest.approx(
        {name: term.item() for name, term in whole.items()}, rel=1e-5
    )


def test_the_head_is_in_no_checkpoint(rows):
    method, _ = build("okd", {}, rows)
    assert not any("head" in name for name in method.state_dict())
    assert not any("head" in name for name, weight in method.named_parameters())

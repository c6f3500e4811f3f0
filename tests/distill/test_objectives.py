import math

import numpy as np
import pytest
import torch

from distill.objectives import TEMPERATURES, ce, cosines, gathered, kl, match, of_mean_one, relation_fro, relation_kl

STYLES = [(True, True), (True, False), (False, True), (False, False)]


def unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    x = rng.normal(size=(rows, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def gram(x: np.ndarray) -> np.ndarray:
    return x @ x.T


def test_the_papers_temperatures():
    assert pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10]) == TEMPERATURES


@pytest.mark.parametrize(("symmetric", "mask_diagonal"), STYLES)
@pytest.mark.parametrize("temperatures", [(1.0,), (0.1,), (0.01,), (0.05, 0.3, 2.0), TEMPERATURES], ids=str)
def test_relation_kl_equals_the_formula_in_loops(rng, slow_relation_kl, symmetric, mask_diagonal, temperatures):
    target, output = gram(unit(rng, 9, 5)), gram(unit(rng, 9, 3))
    style = {"temperatures": temperatures, "symmetric": symmetric, "mask_diagonal": mask_diagonal}
    expected = slow_relation_kl(target, output, **style)
    assert expected > 1e-3
    double = relation_kl(torch.from_numpy(target), torch.from_numpy(output), **style)
    single = relation_kl(torch.from_numpy(target).float(), torch.from_numpy(output).float(), **style)
    assert double.item() == pytest.approx(expected, rel=1e-10)
    assert single.item() == pytest.approx(expected, rel=1e-3)


def test_relation_kl_between_different_rows_and_columns(rng, slow_relation_kl):
    target, output = unit(rng, 4, 6) @ unit(rng, 7, 6).T, unit(rng, 4, 3) @ unit(rng, 7, 3).T
    style = {"temperatures": (0.05, 0.5), "symmetric": False, "mask_diagonal": False}
    loss = relation_kl(torch.from_numpy(target), torch.from_numpy(output), **style)
    assert loss.item() == pytest.approx(slow_relation_kl(target, output, **style), rel=1e-10)


def test_relation_kl_defaults_are_the_papers(rng, slow_relation_kl):
    target, output = gram(unit(rng, 6, 5)), gram(unit(rng, 6, 2))
    loss = relation_kl(torch.from_numpy(target), torch.from_numpy(output))
    assert loss.item() == pytest.approx(slow_relation_kl(target, output, TEMPERATURES, True, True), rel=1e-10)


L3, L5 = math.log(3), math.log(5)
NEAR_AND_FAR = [[9.0, L3, 0.0], [L3, 9.0, 0.0], [0.0, 0.0, 9.0]]
"""Odds 3 : 1, 3 : 1 and 1 : 1 at temperature 1; 9 : 1, 9 : 1 and 1 : 1 at temperature 1/2."""
CYCLE = [[9.0, 0.0, L3], [L3, 9.0, 0.0], [0.0, L3, 9.0]]
"""Odds 1 : 3 in every row, and p(j|i) + p(i|j) = 1 for every pair."""
ONE_OF_FOUR = [[L5, 0.0, 0.0, 0.0], [0.0, L5, 0.0, 0.0], [0.0, 0.0, L5, 0.0], [0.0, 0.0, 0.0, L5]]
"""Odds 5 : 1 : 1 : 1 in every row."""


@pytest.mark.parametrize(
    ("target", "temperatures", "symmetric", "mask_diagonal", "expected"),
    [
        # P = 1/4 1/8 1/8 against 1/6: ½ ln 9/8
        (NEAR_AND_FAR, (1.0,), True, True, 0.058891517828191),
        # P = 3/10 1/10 1/10 against 1/6: 0.6 ln 1.8 + 0.4 ln 0.6
        (NEAR_AND_FAR, (0.5,), True, True, 0.148341749433),
        (NEAR_AND_FAR, (1.0, 0.5), True, True, 0.103616633631),
        # (2 (¾ ln 3/2 + ¼ ln 1/2) + 0) / 3
        (NEAR_AND_FAR, (1.0,), False, True, 0.087208023961),
        (CYCLE, (1.0,), True, True, 0.0),
        # ¾ ln 3/2 + ¼ ln 1/2
        (CYCLE, (1.0,), False, True, 0.130812035941),
        # ⅝ ln 5/2 + ⅜ ln 1/2, and the same spread over four rows
        (ONE_OF_FOUR, (1.0,), False, False, 0.312751514704),
        (ONE_OF_FOUR, (1.0,), True, False, 0.312751514704),
    ],
)
def test_relation_kl_golden_values_against_indifference(target, temperatures, symmetric, mask_diagonal, expected):
    target = torch.tensor(target, dtype=torch.float64)
    loss = relation_kl(
        target,
        torch.zeros_like(target),
        temperatures=temperatures,
        symmetric=symmetric,
        mask_diagonal=mask_diagonal,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-11)


def test_relation_kl_is_from_target_to_output():
    """⅓ ln 2/3 + ⅔ ln 4/3, not the ½ ln 9/8 of the other direction."""
    target, output = torch.zeros(3, 3, dtype=torch.float64), torch.tensor(NEAR_AND_FAR, dtype=torch.float64)
    assert relation_kl(target, output, temperatures=(1.0,)).item() == pytest.approx(0.056633012265, abs=1e-11)


@pytest.mark.parametrize(("symmetric", "mask_diagonal"), STYLES)
def test_relation_kl_is_zero_at_equality_and_positive_elsewhere(rng, symmetric, mask_diagonal):
    style = {"symmetric": symmetric, "mask_diagonal": mask_diagonal}
    target = torch.from_numpy(gram(unit(rng, 8, 4)))
    at_minimum = target.clone().requires_grad_()
    loss = relation_kl(target, at_minimum, **style)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert at_minimum.grad.abs().max() < 1e-10
    for _ in range(20):
        other = torch.from_numpy(gram(unit(rng, 8, 4)))
        assert relation_kl(target, (target + 0.05 * other).clamp(-1, 1), **style) > 1e-6


def test_relation_kl_does_not_see_rotations_or_lengths(rng):
    teacher, student = rng.normal(size=(10, 6)), rng.normal(size=(10, 4))
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    lengths = rng.uniform(0.1, 10, size=(10, 1))

    def loss(student: np.ndarray) -> float:
        t, s = torch.from_numpy(teacher), torch.from_numpy(student)
        return relation_kl(cosines(t, t), cosines(s, s)).item()

    assert loss(student) > 0.1
    assert loss(lengths * (student @ rotation)) == pytest.approx(loss(student), rel=1e-9)
    assert loss(student @ np.diag([1, 1, 1, 3.0])) != pytest.approx(loss(student), rel=1e-3)


def test_relation_kl_ignores_a_masked_diagonal(rng):
    target, output = (torch.from_numpy(gram(unit(rng, 6, 4))) for _ in range(2))
    other = output + torch.diag(torch.arange(6.0, dtype=torch.float64))
    assert relation_kl(target, other).item() == relation_kl(target, output).item()
    assert (
        relation_kl(target, other, mask_diagonal=False).item()
        != relation_kl(target, output, mask_diagonal=False).item()
    )


@pytest.mark.parametrize(("symmetric", "mask_diagonal"), STYLES)
def test_relation_kl_gradients_are_finite_with_duplicates_at_the_lowest_temperature(rng, symmetric, mask_diagonal):
    rows = torch.from_numpy(unit(rng, 5, 6)).float()
    teacher = torch.cat([rows, rows, -rows])
    student = teacher[:, :3].clone().requires_grad_()
    loss = relation_kl(
        cosines(teacher, teacher),
        cosines(student, student),
        temperatures=(0.01,),
        symmetric=symmetric,
        mask_diagonal=mask_diagonal,
    )
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize(("symmetric", "mask_diagonal"), STYLES)
def test_relation_kl_gradients_are_right(rng, symmetric, mask_diagonal):
    teacher, student = (torch.from_numpy(rng.normal(size=(5, d))).requires_grad_() for d in (4, 3))

    def loss(teacher, student):
        return relation_kl(
            cosines(teacher, teacher),
            cosines(student, student),
            temperatures=(0.2, 1.0),
            symmetric=symmetric,
            mask_diagonal=mask_diagonal,
        )

    assert torch.autograd.gradcheck(loss, (teacher, student))


@pytest.mark.parametrize(("symmetric", "mask_diagonal"), STYLES[:3])
def test_relation_kl_refuses_what_is_not_square(symmetric, mask_diagonal):
    similarity = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"rows and columns to be the same samples, got \(3, 4\)"):
        relation_kl(similarity, similarity, symmetric=symmetric, mask_diagonal=mask_diagonal)


def test_cosines(rng):
    rows, columns = rng.normal(size=(4, 6)), rng.normal(size=(3, 6))
    expected = [[r @ c / np.linalg.norm(r) / np.linalg.norm(c) for c in columns] for r in rows]
    np.testing.assert_allclose(cosines(torch.from_numpy(rows), torch.from_numpy(columns)), expected, rtol=1e-12)


def test_match_equals_numpy(rng):
    output, target = rng.normal(size=(7, 5)), rng.normal(size=(7, 5))
    cosine = [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(output, target, strict=True)]
    expected = {
        "cosine": np.mean(cosine),
        "l2": np.mean(np.linalg.norm(output - target, axis=1)),
        "mse": np.mean((output - target) ** 2),
        "huber": np.mean([d * d / 2 if d < 1 else d - 0.5 for d in np.abs(output - target).flat]),
    }
    for kind, value in expected.items():
        assert match(torch.from_numpy(output), torch.from_numpy(target), kind).item() == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "expected"), [("cosine", (0.04 + 2) / 2), ("l2", (math.sqrt(2) + 3) / 2), ("mse", 2.75), ("huber", 0.875)]
)
def test_match_golden_values(kind, expected):
    output, target = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    assert match(output, target, kind).item() == pytest.approx(expected, rel=1e-6)
    assert match(output, output.clone(), kind).item() == pytest.approx(0, abs=1e-6)


def test_match_is_the_cosine_by_default():
    assert match(torch.tensor([[3.0, 4.0]]), torch.tensor([[8.0, 6.0]])).item() == pytest.approx(0.04, rel=1e-5)


def test_match_refuses_other_kinds():
    with pytest.raises(ValueError, match="unknown match 'l1'; known: cosine, huber, l2, mse"):
        match(torch.zeros(2, 2), torch.zeros(2, 2), "l1")


@pytest.mark.parametrize("kind", ["cosine", "l2", "mse", "huber"])
def test_match_has_its_minimum_at_the_target(rng, kind):
    target = torch.from_numpy(rng.normal(size=(5, 4)))
    output = target.clone().requires_grad_()
    loss = match(output, target, kind)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert output.grad.abs().max() < 1e-12
    for _ in range(10):
        assert match(target + 0.1 * torch.from_numpy(rng.normal(size=(5, 4))), target, kind) > 1e-5


def test_relation_kl_of_several_matrices_is_their_mean(rng, slow_relation_kl):
    target, output = (torch.from_numpy(np.stack([gram(unit(rng, 6, 4)) for _ in range(6)])) for _ in range(2))
    for symmetric, mask_diagonal in STYLES:
        style = {"temperatures": (0.1, 0.5), "symmetric": symmetric, "mask_diagonal": mask_diagonal}
        expected = [slow_relation_kl(t, o, **style) for t, o in zip(target.numpy(), output.numpy(), strict=True)]
        together = relation_kl(target.unflatten(0, (2, 3)), output.unflatten(0, (2, 3)), **style)
        assert together.item() == pytest.approx(np.mean(expected), rel=1e-10)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_kl_and_ce_equal_numpy(rng):
    target, output = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    p, q = softmax(target / 0.4), softmax(output / 0.4)
    t, o = torch.from_numpy(target), torch.from_numpy(output)
    assert kl(t, o, temperature=0.4).item() == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-12)
    reverse = kl(t, o, temperature=0.4, direction="reverse")
    assert reverse.item() == pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-12)
    q = softmax(output)
    assert ce(o, torch.from_numpy(p)).item() == pytest.approx(-(p * np.log(q)).sum(1).mean(), rel=1e-12)
    classes = np.array([0, 3, 1, 1, 2, 0])
    assert ce(o, torch.from_numpy(classes)).item() == pytest.approx(-np.log(q[range(6), classes]).mean(), rel=1e-12)


@pytest.mark.parametrize(
    ("temperature", "direction", "expected"),
    [
        # ¾ ln 3/2 + ¼ ln 1/2
        (1.0, "forward", 0.130812035941),
        # 0.9 ln 1.8 + 0.1 ln 0.2
        (0.5, "forward", 0.368064207168),
        # ½ ln 2/3 + ½ ln 2
        (1.0, "reverse", 0.143841036226),
    ],
)
def test_kl_golden_values(temperature, direction, expected):
    target, output = torch.tensor([[L3, 0.0]] * 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    assert kl(target, output, temperature=temperature, direction=direction).item() == pytest.approx(expected, abs=1e-11)


def test_ce_golden_values():
    logits = torch.tensor([[L3, 0.0]], dtype=torch.float64)
    assert ce(logits, torch.tensor([0])).item() == pytest.approx(0.287682072452, abs=1e-11)  # ln 4/3
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    assert ce(logits, half).item() == pytest.approx(0.836988216786, abs=1e-11)  # ½ ln 4/3 + ½ ln 4


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_has_its_minimum_where_they_agree_up_to_a_constant(rng, direction):
    target = torch.from_numpy(rng.normal(size=(5, 4)))
    output = (target + 3).requires_grad_()
    loss = kl(target, output, temperature=0.3, direction=direction)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert output.grad.abs().max() < 1e-12
    other = target + 0.1 * torch.from_numpy(rng.normal(size=(5, 4)))
    assert kl(target, other, temperature=0.3, direction=direction) > 1e-4


def test_ce_is_least_at_the_logarithm_of_the_target_and_is_its_entropy(rng):
    p = torch.from_numpy(softmax(rng.normal(size=(5, 4))))
    logits = p.log().requires_grad_()
    loss = ce(logits, p)
    loss.backward()
    assert loss.item() == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-12)
    assert logits.grad.abs().max() < 1e-12


def test_kl_refuses_other_directions():
    with pytest.raises(ValueError, match="unknown direction 'both'; known: forward, reverse"):
        kl(torch.zeros(2, 2), torch.zeros(2, 2), direction="both")


def test_relation_fro(rng):
    """Not squared, not divided: √(3² + 4²), whatever the size."""
    target = torch.zeros(3, 4, dtype=torch.float64)
    output = target.clone()
    output[0, 1], output[2, 2] = 3, -4
    assert relation_fro(target, output).item() == pytest.approx(5, abs=1e-12)
    a, b = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    expected = np.sqrt(((a - b) ** 2).sum())
    assert relation_fro(torch.from_numpy(a), torch.from_numpy(b)).item() == pytest.approx(expected, rel=1e-12)
    at_minimum = torch.from_numpy(a).requires_grad_()
    loss = relation_fro(torch.from_numpy(a), at_minimum)
    loss.backward()
    assert loss.item() == 0
    assert at_minimum.grad.abs().max() == 0


def test_weighted_relation_fro_is_a_loop_over_pairs(rng):
    a, b = rng.normal(size=(2, 5, 5))
    weight = np.array([0, 1, 0.25, 3, 1])
    pairs = sum(weight[i] * weight[j] * (a[i, j] - b[i, j]) ** 2 for i in range(5) for j in range(5))
    expected = 5 * np.sqrt(pairs) / weight.sum()

    def found(weight):
        return relation_fro(torch.from_numpy(a), torch.from_numpy(b), torch.tensor(weight)).item()

    assert found(weight) == pytest.approx(expected, rel=1e-12)
    assert found(4 * weight) == pytest.approx(expected, rel=1e-12)
    assert found(np.full(5, 0.3)) == pytest.approx(found(np.ones(5)), rel=1e-12)
    assert found(np.ones(5)) == relation_fro(torch.from_numpy(a), torch.from_numpy(b)).item()
    golden = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.zeros(2, 2), torch.tensor([3.0, 1.0])
    assert relation_fro(*golden).item() == pytest.approx(2 * np.sqrt(3 * 1 * (1 + 4)) / 4)


def test_rows_that_count_for_nothing_leave_no_gradient():
    output = torch.ones(3, 3).requires_grad_()
    loss = relation_fro(torch.zeros(3, 3), output, torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(output.grad, torch.zeros(3, 3))


def test_weights_over_their_mean():
    assert of_mean_one(torch.tensor([1.0, 0.0, 5.0])).tolist() == [0.5, 0, 2.5]
    assert of_mean_one(torch.zeros(2)).tolist() == [0, 0]


def test_one_process_gathers_its_own_rows():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gathered(rows) is rows

"""AKD: the formula in float64, the known optimum of the attack on linear students, and what training leaves behind."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fit_cases import Interrupted, interrupt_at, without_speed
from safetensors.torch import load_file
from small_world import make_images
from tiny import tiny_encoder
from torch import distributed, multiprocessing, nn

import distill
from distill.methods.akd import AKD, smoothing_of
from distill.testing.methods import SmallStudent, batch_of, write_token_store
from distill.training import loop
from distill.training.step import Objective
from featcache import extract
from featcache.inputs.images import Preprocess
from featcache.rows import Rows

TEACHER = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -1.0], [1.0, 1.0, 0.0]])
STUDENT = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 2.0], [0.5, 0.0, 1.0]])
LABEL = torch.tensor([0, 2, -1])


def akd(**options) -> AKD:
    return AKD(12, 6, **options)


def batch(teacher=TEACHER, label=LABEL):
    return batch_of({"embedding": torch.zeros(len(teacher), 12), "logits": teacher}, label=label)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({}, 1.1182304191),
        ({"lam": 1.0, "temperature": 2.0}, 1.2366396928),
        ({"lam": 0.0}, 0.5893817686),
        ({"lam": 0.25, "smoothing": 0.3}, 1.1250535508),
    ],
)
def test_the_loss_is_the_formula_and_has_these_values(options, golden):
    """Labels 0 and 2, and a row without one, which has the teacher alone."""
    lam, smoothing, temperature = (options.get(k, d) for k, d in (("lam", 0.5), ("smoothing", 0), ("temperature", 1)))
    weight, losses = np.array([1.0, 0.5, 2.0]), []
    for t, s, label in zip(TEACHER.double().numpy(), STUDENT.double().numpy(), LABEL.tolist(), strict=True):
        soft = softmax(t / temperature)
        own = (1 - smoothing) * np.eye(3)[label] + smoothing / 3
        target = soft if label < 0 else (1 - lam) * own + lam * soft
        losses.append(-(target * np.log(softmax(s))).sum())
    if lam == 0:
        weight[2] = 0
    expected = (weight * losses).sum() / weight.sum()
    given = replace(batch(), weight=torch.tensor([1.0, 0.5, 2.0]))
    found = akd(**options).loss({"embedding": torch.zeros(3, 6), "logits": STUDENT}, given)
    assert list(found) == ["ce"]
    assert found["ce"].item() == pytest.approx(expected, rel=1e-6)
    assert found["ce"].item() == pytest.approx(golden, rel=1e-6)


def test_its_minimum_is_the_targets_entropy_where_the_student_says_the_target():
    method = akd()
    target = method.mixture(LABEL, TEACHER)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(3))
    logits = target.log().requires_grad_()
    loss = method.loss({"embedding": torch.zeros(3, 6), "logits": logits}, batch())["ce"]
    loss.backward()
    assert loss.item() == pytest.approx(torch.special.entr(target).sum(dim=1).mean().item(), rel=1e-6)
    assert logits.grad.abs().max() < 1e-7


class Linear(nn.Module):
    def __init__(self, classes: int = 2):
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(3 * 4 * 4, classes)

    def forward(self, images, fields):
        return {"logits": self.linear(images.flatten(1))}


PREPROCESS = Preprocess(resize=4, crop=4, size=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def normalised(pixels):
    """float64, from 0…255."""
    mean, std = (np.array(each)[:, None, None] for each in (PREPROCESS.mean, PREPROCESS.std))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_a_linear_student_of_two_classes_is_attacked_optimally(lam):
    """ε is in 1/255ths of the pixel range whatever the channel's deviation, and no pixel leaves the range."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    label, student = torch.tensor([0, 1, 0, 1, -1, 1]), Linear()
    teacher = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0], [0.0, 9.0]])
    given = replace(batch(teacher, label), inputs=PREPROCESS.to_model(torch.from_numpy(pixels)), preprocess=PREPROCESS)
    found = akd(lam=lam, epsilon=8.0, steps=4).inputs(given, student)
    weight = student.linear.weight.detach().double().numpy().reshape(2, 3, 4, 4)
    own = np.array([0, 1, 0, 1, 1, 1])
    for image, mine, true, known in zip(pixels.transpose(0, 3, 1, 2), found, own, label >= 0, strict=True):
        if lam == 0 and not known:
            continue  # there is nothing to attack
        worst = image + 8 * np.sign(weight[1 - true] - weight[true])
        np.testing.assert_allclose(mine.numpy(), normalised(worst.clip(0, 255)), atol=1e-5)


def test_the_start_is_random_and_the_image_stays_near():
    pixels = torch.randint(0, 256, (5, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    given = replace(
        batch(torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])),
        inputs=PREPROCESS.to_model(pixels),
        preprocess=PREPROCESS,
    )
    student, black_and_white = Linear(3), [normalised(np.full((3, 1, 1), value)) for value in (0, 255)]

    def shown(seed, **options):
        torch.manual_seed(seed)
        return akd(**options).inputs(given, student)

    few = {"steps": 1, "step_size": 0.5}
    assert torch.equal(shown(0, **few), shown(0, **few))
    assert not torch.equal(shown(0, **few), shown(1, **few))
    assert torch.equal(shown(0, random_start=False), shown(1, random_start=False))
    for steps in (1, 5):
        found = shown(2, steps=steps, epsilon=4.0)
        away = (found - given.inputs).abs() * torch.tensor(PREPROCESS.std)[:, None, None] * 255
        assert 3 < away.max() <= 4 + 1e-3
        assert (found.double().numpy() >= black_and_white[0] - 1e-6).all()
        assert (found.double().numpy() <= black_and_white[1] + 1e-6).all()
    assert not (shown(2, steps=5) - shown(2, steps=5, step_size=0.1)).abs().max() < 0.01


def test_batch_norms_are_used_or_trained_as_asked():
    for norms, moves in (("eval", False), ("train", True)):
        student = SmallStudent().train()
        before = student.norm.running_mean.clone()
        akd(norms=norms).inputs(
            replace(batch(), inputs=torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))), student
        )
        assert bool((student.norm.running_mean != before).any()) is moves
        assert student.norm.training


def test_the_smoothing_of_equal_entropy_is_reported(tmp_path):
    rows = Rows.of([write_token_store(tmp_path / "s.zarr")])
    method = akd(lam=0.4, temperature=2.0)
    report = method.prepare(rows, seed=0)
    entropies = []
    for logits, label in zip(rows.gather(range(20), "logits").astype(np.float64), rows.labels, strict=True):
        target = 0.6 * np.eye(3)[label] + 0.4 * softmax(logits / 2)
        entropies.append(-(target * np.log(target)).sum())
    assert report["target_entropy"] == pytest.approx(np.mean(entropies), rel=1e-6)
    share = report["equal_smoothing"]
    smooth = np.array([1 - share + share / 3, share / 3, share / 3])
    assert -(smooth * np.log(smooth)).sum() == pytest.approx(report["target_entropy"], rel=1e-6)
    assert akd(lam=0.0).prepare(rows, seed=0) == {}
    assert smoothing_of(0.0, 10) == pytest.approx(0, abs=1e-9)
    assert smoothing_of(math.log(10), 10) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"epsilon": 0.0},
            "ε 0 of the attack attacks nothing; give epsilon in 1/255ths .* such as 8, or choose method kd",
        ),
        ({"epsilon": 8 / 255}, "is in 1/255ths .*; for 0.0313725 of the range give 8$"),
        ({"epsilon": -1.0}, "ε -1.0 of the attack"),
        ({"lam": 1.5}, "lam must be from 0 to 1, got 1.5"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"step_size": 0.0}, "step_size must be greater than 0"),
        ({"norms": "none"}, "norms must be eval or train, got none"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"smoothing": 1.0}, "smoothing must be from 0 up to less than 1"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        akd(**options)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """`train(out, ...)`: a small fit on three classes of 12 images, whose store has logits."""
    folder = tmp_path_factory.mktemp("classes")
    for seed, name in enumerate("abc"):
        make_images(folder / "images" / name, 12, seed=seed)
    given = {"fields": ("embedding", "logits"), "device": "cpu", "precision": "fp32"}
    store = extract(str(folder / "images"), tiny_encoder(), folder / "s.zarr", **given)

    def train(out, **given):
        few = {"student": "tiny", "embedding_dim": 8, "image_size": 16, "batch_size": 6, "epochs": 2, "device": "cpu"}
        return distill.fit(store, str(folder / "images"), out=out, method="akd", **{**few, **given})

    return train


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_has_the_same_bits(train, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    given = {"method_options": {"steps": 2}, "precision": precision, "checkpoint_minutes": 0.0}
    whole = train(tmp_path / "whole", **given)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", **given, progress=interrupt_at("training", 5))
    run = train(tmp_path / "run", **given, resume=True)
    assert (run.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()
    assert without_speed(run.metrics) == without_speed(whole.metrics)
    assert 0 < whole.metrics[-1]["mapping/target_entropy"] < math.log(3)
    stronger = train(tmp_path / "stronger", **{**given, "method_options": {"steps": 2, "epsilon": 32.0}})
    assert stronger.metrics[-1]["loss"] > whole.metrics[-1]["loss"]
    assert load_file(whole.path / "head.safetensors")["weight"].shape == (3, 8)


def process(rank: int, folder: str, processes: int = 2) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    torch.save(gradients(rank, processes), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def gradients(rank: int = 0, processes: int = 1) -> list[torch.Tensor]:
    """Of two attacked steps on this process's share of eight images."""
    torch.manual_seed(0)
    student = SmallStudent().train()
    student.norm.eval()
    model = training = Objective(student, akd(random_start=False))
    if processes > 1:
        model = nn.parallel.DistributedDataParallel(training)
    drawn, found = torch.Generator().manual_seed(1), []
    for _ in range(2):
        images, teacher = torch.randn(8, 3, 8, 8, generator=drawn), torch.randn(8, 3, generator=drawn)
        mine = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
        label = torch.tensor([0, 1, 2, -1, 0, 1, 2, 0])
        model.zero_grad()
        terms = model(replace(batch(teacher[mine], label[mine]), inputs=images[mine]))
        terms["ce"].backward()
        found += [weight.grad.clone() for weight in student.parameters()]
    return found


def test_two_processes_attack_and_train_as_one(tmp_path):
    alone = gradients()
    multiprocessing.spawn(process, (str(tmp_path),), 2)
    for rank in range(2):
        for mine, whole in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-6)

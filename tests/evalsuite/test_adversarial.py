"""PGD: the known optimum of linear encoders, a slow float64 loop elsewhere, and nothing left behind in the model."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import nn
from typer.testing import CliRunner

import evalsuite.attacks.autoattack
import featcache_cli.screen
from evalsuite import compare, robustness
from evalsuite.attacks.adversarial import Pgd, attack, logits_of, unit_start
from evalsuite.attacks.autoattack import AutoAttack
from featcache import extract, open_corpus
from featcache.encoder import Encoder
from featcache.head import Head
from featcache.inputs.images import Preprocess
from featcache.precision import CANDIDATES, FP32
from featcache_cli import programs

SIZE, STEPS = 16, 10


class LinearModule(nn.Module):
    def __init__(self, stops: bool = False) -> None:
        super().__init__()
        self.linear, self.stops = nn.Linear(3 * SIZE * SIZE, 4), stops

    def forward(self, images):
        embedding = self.linear(images.flatten(1))
        return {"embedding": embedding.detach() if self.stops else embedding}


class CurvedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, 4)
        self.judged: list[torch.Tensor] = []  # images of the passes without a gradient

    def forward(self, images):
        if not torch.is_grad_enabled():
            self.judged.append(images)
        return {"embedding": self.conv(images).relu().mean((2, 3))}


def encoder_of(make, width: int) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        module = make()
    shown = Preprocess(resize=SIZE, crop=SIZE, size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return Encoder(name="small", module=module, preprocess=shown, fields={"embedding": width}, output="all of it")


def linear_encoder(stops: bool = False) -> Encoder:
    return encoder_of(lambda: LinearModule(stops), 4)


def curved_encoder() -> Encoder:
    return encoder_of(CurvedModule, 6)


def on_pixels(encoder: Encoder, head: Head) -> tuple[np.ndarray, np.ndarray]:
    """float64 weight (C, S, S, 3) and bias (C,) of a linear encoder and a head as one map of pixels in 0…255."""
    linear = encoder.module.linear
    of_images = head.weight @ linear.weight.detach().double().numpy()
    mean, std = (np.array(each) * 255 for each in (encoder.preprocess.mean, encoder.preprocess.std))
    weight = of_images.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1) / std
    bias = head.weight @ linear.bias.detach().double().numpy() + head.bias - (weight * mean).sum((1, 2, 3))
    return weight, bias


def write_head(path: Path, classes: int, width: int, scale: float = 1, metadata: dict | None = None) -> Path:
    rng = np.random.default_rng(3)
    weight, bias = scale * rng.normal(size=(classes, width)), scale * 0.1 * rng.normal(size=classes)
    save_file({"weight": weight, "bias": bias}, path, {k: json.dumps(v) for k, v in (metadata or {}).items()})
    return path


def pixels_of(corpus) -> np.ndarray:
    return np.stack([np.asarray(Image.open(Path(corpus.spec) / name)) for name in corpus.ids])


@pytest.fixture
def corpus(tmp_path):
    """24 images of noise in the full pixel range, in classes ant and bee."""
    rng = np.random.default_rng(1)
    for i in range(24):
        path = tmp_path / "noise" / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return open_corpus(str(tmp_path / "noise"))


@pytest.fixture
def few_queries(monkeypatch):
    pytest.importorskip("art", reason="needs featcache[adversarial]")
    monkeypatch.setattr(evalsuite.attacks.autoattack, "QUERIES", 20)


def measured(encoder, corpus, head, epsilons, rows=None, steps=STEPS, **given):
    rows = np.arange(len(corpus)) if rows is None else rows
    return Pgd(epsilons, steps, head, corpus).measure(encoder, rows, device="cpu", **given)


def optimum(encoder, path, corpus, epsilons, scale=1.0, name="pgd"):
    """What is right under the strongest attack that there is on a linear encoder and a head of two classes."""
    weight, bias = on_pixels(encoder, Head.read(path))
    pixels = pixels_of(corpus).astype(np.float64)
    sign = np.array([1 if corpus.label(i) else -1 for i in range(len(corpus))])
    direction, offset = weight[1] - weight[0], bias[1] - bias[0]
    expected = {}
    for epsilon in epsilons:
        worst = np.clip(pixels - epsilon * sign[:, None, None, None] * np.sign(direction), 0, 255)
        margin = sign * ((worst * direction).sum((1, 2, 3)) + offset)
        assert np.abs(margin).min() > 1e-3 * scale * 0.1  # no image is a tie that rounding decides
        expected[f"{name}/{epsilon:g}/top1"] = margin > 0
    return expected


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["soft", "sure"])
def test_a_linear_classifier_is_attacked_optimally(corpus, tmp_path, scale):
    """Of a sure one, the cross-entropy and its gradient round to zero in float32."""
    encoder, path = linear_encoder(), write_head(tmp_path / "head.safetensors", 2, 4, scale)
    expected = optimum(encoder, path, corpus, (0, 0.5, 2, 4), scale)
    found = measured(encoder, corpus, path, [2, 0.5, 4])
    assert list(found) == list(expected)
    for name, right in expected.items():
        np.testing.assert_array_equal(found[name], right, err_msg=name)
    accuracies = [right.mean() for right in found.values()]
    assert accuracies == sorted(accuracies, reverse=True)
    assert len(set(accuracies)) >= 3


def test_autoattack_finds_the_optimum_of_a_linear_classifier(corpus, tmp_path, few_queries):
    encoder, path = linear_encoder(), write_head(tmp_path / "head.safetensors", 2, 4)
    expected = optimum(encoder, path, corpus, (0, 0.5, 2), name="autoattack")
    found = AutoAttack([0.5, 2], path, corpus).measure(encoder, np.arange(len(corpus)), device="cpu")
    assert list(found) == list(expected)
    for name, right in expected.items():
        np.testing.assert_array_equal(found[name], right, err_msg=name)


def test_autoattack_is_no_weaker_than_pgd_and_leaves_nothing_behind(corpus, tmp_path, few_queries):
    """Three classes, so that both losses are taken; the numbers that the toolbox draws are nobody else's."""
    encoder, path, rows = curved_encoder(), write_head(tmp_path / "head.safetensors", 3, 6), np.arange(len(corpus))
    drawn = np.random.get_state()[1].tolist()
    attack = AutoAttack([1], path, corpus)
    found, again = (attack.measure(encoder, rows, device="cpu")["autoattack/1/top1"] for _ in range(2))
    np.testing.assert_array_equal(found, again)
    assert np.random.get_state()[1].tolist() == drawn
    assert all(weight.grad is None for weight in encoder.module.parameters())
    by_pgd = measured(encoder, corpus, path, [1])["pgd/1/top1"]
    assert found.sum() <= by_pgd.sum()
    pixels, target = pixels_of(corpus), np.array([corpus.label(i) for i in range(len(corpus))])
    attacked = attack.attacked(encoder, pixels, target, 1.0, corpus.ids, 0)
    assert np.abs(attacked.astype(np.float64) - pixels).max() <= 1 + 1e-4
    assert 0 <= attacked.min() <= attacked.max() <= 255


def test_autoattack_without_its_package_names_the_extra(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "art.attacks.evasion", None)
    with pytest.raises(ValueError, match=r"pip install 'featcache\[adversarial\]'"):
        AutoAttack([1], write_head(tmp_path / "head.safetensors", 2, 4), corpus)


def test_it_is_the_papers_loop_on_cross_entropy(corpus, tmp_path):
    encoder = curved_encoder()
    head = Head.read(write_head(tmp_path / "head.safetensors", 3, 6))
    pixels, epsilon = pixels_of(corpus), 8.0
    target = np.arange(len(corpus)) % 3
    start = np.stack([unit_start(name, 0, pixels.shape[1:]) for name in corpus.ids])
    assert len(np.unique(start)) > 0.99 * start.size
    assert -1 <= start.min() < -0.99
    assert 0.99 < start.max() <= 1
    found = attack(encoder, head, pixels, target, start, epsilon, STEPS)

    module = copy.deepcopy(encoder.module).double()
    mean, std = (
        torch.tensor(each).double()[:, None, None] for each in (encoder.preprocess.mean, encoder.preprocess.std)
    )
    weight, bias = torch.from_numpy(head.weight), torch.from_numpy(head.bias)

    def loss(x, label):
        logits = module(((x - mean) / std)[None])["embedding"] @ weight.T + bias
        return nn.functional.cross_entropy(logits, torch.tensor([label]))

    before, after = [], []
    for image, label, drawn, ours in zip(pixels, target, start, found, strict=True):
        clean = torch.from_numpy(image).permute(2, 0, 1).double() / 255
        x = clean + epsilon / 255 * torch.from_numpy(drawn).permute(2, 0, 1).double()
        for _ in range(STEPS):
            x = x.clamp(0, 1).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(x, label), x)
            x = x.detach() + 2.5 * epsilon / 255 / STEPS * gradient.sign()
            x = torch.minimum(torch.maximum(x, clean - epsilon / 255), clean + epsilon / 255)
        x = x.clamp(0, 1)
        same = np.abs(x.permute(1, 2, 0).numpy() * 255 - ours) < 1e-3
        assert same.mean() > 0.98
        before.append(loss(clean, label).item())
        after.append(loss(torch.from_numpy(ours).permute(2, 0, 1).double() / 255, label).item())
    assert (np.array(after) > np.array(before)).all()


@pytest.mark.parametrize("epsilon", [0.3, 8, 255])
def test_no_pixel_leaves_the_ball_or_the_range(corpus, tmp_path, epsilon):
    encoder, head = linear_encoder(), Head.read(write_head(tmp_path / "head.safetensors", 2, 4))
    pixels = pixels_of(corpus)
    start = np.stack([unit_start(name, 0, pixels.shape[1:]) for name in corpus.ids])
    found = attack(encoder, head, pixels, np.zeros(len(pixels), int), start, float(epsilon), 3)
    assert found.min() >= 0
    assert found.max() <= 255
    away = np.abs(found.astype(np.float64) - pixels)
    assert away.max() <= epsilon + 1e-4
    assert (away > 0.9 * epsilon).mean() > (0.2 if epsilon < 255 else 0)


def test_clean_logits_are_those_of_the_features(corpus, tmp_path):
    encoder, head = curved_encoder(), Head.read(write_head(tmp_path / "head.safetensors", 3, 6))
    pixels = pixels_of(corpus)
    embedding = encoder.encode(torch.from_numpy(pixels), ["embedding"])["embedding"].numpy()
    np.testing.assert_array_equal(logits_of(encoder, head, pixels.astype(np.float32)), head.logits(embedding))


def test_neither_batch_nor_order_matter(corpus, tmp_path):
    encoder, head = curved_encoder(), write_head(tmp_path / "head.safetensors", 2, 6)
    all_rows = np.arange(len(corpus))
    done: list[int] = []

    def attacked(epsilons, rows, batch_size, **given):
        """What `measure` says, and the images under the last ε, both by row."""
        encoder.module.judged.clear()
        found = measured(encoder, corpus, head, epsilons, rows, batch_size=batch_size, **given)
        return found, torch.cat(encoder.module.judged[len(epsilons) :: len(epsilons) + 1]).numpy()

    whole, images = attacked([1, 4], all_rows, 10, progress=done.append)
    assert done == [10, 20, 30, 40, 50, 60, 64, 68, 72]
    assert len({right.tobytes() for right in whole.values()}) > 1
    for rows, batch_size in ((all_rows, 1), (all_rows[::-1], 7), (all_rows[5:8], 3)):
        part, of_part = attacked([4, 1], rows, batch_size)
        for name, right in whole.items():
            np.testing.assert_array_equal(part[name], right[rows], err_msg=name)
        assert (of_part == images[rows]).mean() > 0.99
    _, otherwise = attacked([1, 4], all_rows, 10, seed=1)
    assert (otherwise == images).mean() < 0.99


def test_the_encoder_is_handed_back_as_it_came(corpus, tmp_path):
    encoder, head = curved_encoder(), write_head(tmp_path / "head.safetensors", 2, 6)
    expected = measured(encoder, corpus, head, [4])
    assert encoder.precision is FP32
    half = CANDIDATES["bf16+channels_last"]
    encoder.to("cpu", half).module.requires_grad_(True)
    before = copy.deepcopy(encoder.module.state_dict())
    found = measured(encoder, corpus, head, [4])
    for name in expected:  # attacked in fp32 all the same
        np.testing.assert_array_equal(found[name], expected[name])
    assert (encoder.precision, encoder.device) == (half, torch.device("cpu"))
    assert not encoder.module.training
    for key, weight in encoder.module.state_dict().items():
        assert torch.equal(weight, before[key])
        assert weight.dtype == before[key].dtype
    assert all(weight.grad is None for weight in encoder.module.parameters())


def test_classes_are_matched_by_name_else_by_number(corpus, tmp_path):
    encoder = linear_encoder()
    plain = measured(encoder, corpus, write_head(tmp_path / "plain.safetensors", 2, 4), [1])
    assert 0 < plain["pgd/0/top1"].mean() != 0.5
    turned = {"labels": [0, 1], "class_names": ["bee", "ant"]}
    for name, metadata, same in (
        ("named", {"labels": [0, 1], "class_names": ["ant", "bee"]}, True),
        ("elsewhere", {"labels": [4, 7], "class_names": ["ant", "bee"]}, True),
        ("turned", turned, False),
        ("numbered", {"labels": [0, 1], "class_names": ["0", "1"]}, True),
        ("turned-numbers", {"labels": [1, 0], "class_names": ["1", "0"]}, False),
    ):
        head = write_head(tmp_path / f"{name}.safetensors", 2, 4, metadata=metadata)
        np.testing.assert_array_equal(
            measured(encoder, corpus, head, [1])["pgd/0/top1"], plain["pgd/0/top1"] == same, err_msg=name
        )


def test_what_cannot_be_attacked_is_told_in_one_line(corpus, tmp_path):
    head = write_head(tmp_path / "head.safetensors", 2, 4)
    one = write_head(tmp_path / "one.safetensors", 1, 4)
    wasps = {"labels": [0, 1], "class_names": ["ant", "wasp"]}
    other = write_head(tmp_path / "other.safetensors", 2, 4, metadata=wasps)
    numbers = write_head(tmp_path / "numbers.safetensors", 2, 4, metadata={"labels": [0, 5]})
    for given, message in (
        (([4], 5, None, corpus), "needs a classifier: fit one with `evalsuite probe … --save FILE`"),
        (([4], 5, one, corpus), r"one\.safetensors has one class"),
        (([4], 5, other, corpus), r"1 classes that .*other\.safetensors does not know \(bee\)"),
        (([4], 5, numbers, corpus), r"numbers\.safetensors knows no class 1 of .*noise"),
        (([4, -1], 5, head, corpus), "ε -1 of the attack: give 1/255ths"),
        (([float("nan")], 5, head, corpus), "ε nan"),
        (([256], 5, head, corpus), "ε 256"),
        (([8 / 255], 5, head, corpus), r"ε 0\.03.* is in 1/255ths .*; for 0\.0313725 of the range give 8$"),
        (([0.3], 5, head, corpus), r"for 0\.3 of the range give 76\.5"),
        (([4], 0, head, corpus), "0 steps of the attack: give at least 1"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            Pgd(*given)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="small lets no gradient through to its pixels"):
        measured(linear_encoder(stops=True), corpus, head, [4])
    broken = linear_encoder()
    broken.module.linear.bias[0] = torch.nan
    with pytest.raises(ValueError, match="small gives what is not finite"):
        measured(broken, corpus, head, [4])
    (Path(corpus.spec) / corpus.ids[3]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{corpus.ids[3]} can no longer be read \(.*bring .*noise back"):
        measured(linear_encoder(), corpus, head, [4])


def test_the_command_measures_it_beside_the_corruptions(tmp_path, monkeypatch, few_queries):
    pytest.importorskip("imagecorruptions", reason="needs featcache[robustness]")
    rng = np.random.default_rng(1)
    for i in range(9):
        path = tmp_path / "test" / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (tmp_path / "test/bee/damaged.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(featcache_cli.screen.results, "width", 200)
    monkeypatch.setattr(tiny, "student", curved_encoder, raising=False)
    extract("test", curved_encoder(), tmp_path / "bank.zarr", device="cpu", precision="fp32")
    head = write_head(tmp_path / "head.safetensors", 2, 6)
    line = "robustness --encoder python:tiny:student --corpus test --bank bank.zarr --out kept --corruptions contrast"
    line += " --severity 1 --k 3 --device cpu --json r.json --pgd 4,1 --pgd-steps 5 --autoattack 2"
    refused = CliRunner().invoke(programs.app("evalsuite"), line.split())
    assert "needs a classifier" in str(refused.exception)
    assert not Path("kept").exists()
    ran = CliRunner().invoke(programs.app("evalsuite"), [*line.split(), "--head", str(head)], catch_exceptions=False)
    assert ran.exit_code == 0
    record = json.loads(Path("r.json").read_text())
    corpus = open_corpus("test")
    rows = np.array([i for i, name in enumerate(corpus.ids) if "damaged" not in name])
    expected = measured(curved_encoder(), corpus, head, [1, 4], rows, steps=5)
    assert list(expected) == ["pgd/0/top1", "pgd/1/top1", "pgd/4/top1"]
    samples = np.load("r.samples.npz")
    for name, right in expected.items():
        assert record["metrics"][name]["value"] == right.mean()
        low, high = record["metrics"][name]["ci95"]
        assert low <= right.mean() <= high
        assert record["parameters"]["chance"][name] == 5 / 9  # of the majority
        np.testing.assert_array_equal(samples[name], right)
        row = next(line for line in ran.output.splitlines() if name in line)
        assert f"{right.mean():.4f}" in row
    assert record["parameters"]["pgd"] == {"norm": "linf", "epsilons": [0, 1, 4], "steps": 5, "stride": 2.5}
    assert record["parameters"]["autoattack"] == {"norm": "linf", "epsilons": [0, 2], "steps": 100, "queries": 20}
    assert record["metrics"]["autoattack/0/top1"]["value"] == record["metrics"]["pgd/0/top1"]["value"]
    assert "autoattack/2/top1" in ran.output
    assert "bank bank.zarr: left out of 10 rows: 1 failed" in record["remarks"]
    assert any("right on 0.1111 of the clean images, next to chance (0.5556)" in line for line in record["remarks"])
    assert compare("r.json", "r.json").metrics["pgd/4/top1"].value == 0
    assert compare("r.json", "r.json").metrics["autoattack/2/top1"].value == 0

    seen: list[tuple[int, int, str]] = []
    robustness(
        "python:tiny:student", "test", "bank.zarr", "kept", corruptions=["contrast"], severities=[1], k=3, head=head, pgd=[4],
        pgd_steps=1, device="cpu", progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert seen == [(2 * 10 + 9, 4 * 10, "pgd"), (2 * 10 + 18, 4 * 10, "pgd")]

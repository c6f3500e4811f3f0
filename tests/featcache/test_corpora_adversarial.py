"""DAD's images: the known optimum on a linear teacher, a codebook looked up one patch at a time, and made once."""

import io
import json
import math
import pickle
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from safetensors.numpy import save_file
from tiny import tiny_encoder
from torch import nn

from featcache import Encoder, Preprocess, extract, open_corpus
from featcache.corpora import adversarial
from featcache.corpora._codebook import Codebook
from featcache.corpora.adversarial import Recipe, _start, shown
from featcache.inputs import Views

SIZE = 16
COLUMN = {"ant": 1, "bee": 0}


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.passes = nn.Linear(3 * SIZE * SIZE, 4), 0

    def forward(self, images):
        self.passes += 1
        embedding = self.linear(images.flatten(1))
        return {"embedding": embedding, "logits": embedding[:, :2]}


def teacher(fields=("embedding", "logits")) -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        module = Linear()
    return Encoder(
        name="linear",
        module=module,
        preprocess=Preprocess(resize=SIZE, crop=SIZE, size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)),
        fields={name: {"embedding": 4, "logits": 2}[name] for name in fields},
        output="all",
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Classes ant and bee of seven images, one without a class, and one that cannot be read; a head; modules t and d."""
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "photos" / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (SIZE, SIZE + 3 * (i == 4), 3)  # one is of another shape
        Image.fromarray(rng.integers(60, 196, shape, dtype=np.uint8)).save(path)
    Image.fromarray(rng.integers(60, 196, (SIZE, SIZE, 3), dtype=np.uint8)).save(tmp_path / "photos" / "loose.png")
    (tmp_path / "photos/bee/damaged.png").write_bytes(b"no image")
    head = {"weight": rng.normal(size=(2, 4)), "bias": np.zeros(2)}
    save_file(head, tmp_path / "h.safetensors", {"class_names": json.dumps(["bee", "ant"])})
    made = []
    monkeypatch.setitem(sys.modules, "t", SimpleNamespace(make=lambda: made.append(teacher()) or made[-1]))
    monkeypatch.setitem(
        sys.modules, "d", SimpleNamespace(same=lambda: lambda x: x, half=lambda: lambda x: x[:, :, ::2], none=lambda: 3)
    )
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(made=made, head=head, folder=tmp_path)


def pixels_of(corpus, i: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(corpus.read(i))))


SPEC = "adversarial:t:make::h.safetensors@epsilon=1.5@step=1.5@start=0@decoder=d:same::photos"


def test_a_linear_teacher_is_attacked_along_its_gradient(place):
    """One step from the image itself, and a decoder that changes nothing, so that the step alone is to be seen."""
    clean, corpus = open_corpus("photos"), open_corpus(SPEC)
    assert list(corpus.ids) == list(clean.ids)
    assert corpus.class_names == ["ant", "bee"]
    assert corpus.labels == [clean.label(i) for i in range(len(clean))]
    module, shapes = place.made[0].module, place.made[0].preprocess
    weight = place.head["weight"] @ module.linear.weight.detach().double().numpy()
    bias = place.head["weight"] @ module.linear.bias.detach().double().numpy()
    mean, std = (np.array(each)[:, None, None] for each in (shapes.mean, shapes.std))
    for i, name in enumerate(clean.ids):
        if name == "bee/damaged.png" or pixels_of(clean, i).shape[1] != SIZE:
            continue
        image = pixels_of(clean, i).transpose(2, 0, 1) / 255
        logits = weight @ ((image - mean) / std).ravel() + bias
        own = COLUMN[corpus.class_names[corpus.label(i)]] if corpus.label(i) >= 0 else int(logits.argmax())
        gradient = (weight[1 - own] - weight[own]).reshape(3, SIZE, SIZE) / std
        expected = (image + 1.5 * gradient / np.linalg.norm(gradient)).clip(0, 1)
        assert np.abs(pixels_of(corpus, i).transpose(2, 0, 1) - 255 * expected).max() <= 0.51, name


def test_unreadable_images_keep_their_place_and_their_reason(place):
    corpus = open_corpus(SPEC)
    row = list(corpus.ids).index("bee/damaged.png")
    with pytest.raises(ValueError, match=r"bee/damaged\.png: not an image that Pillow knows"):
        corpus.read(row)
    store = extract(corpus, tiny_encoder(), place.folder / "s.zarr", device="cpu", precision="fp32")
    assert store.failed.tolist() == [row]
    assert store.manifest.corpus.spec == SPEC


def test_images_are_made_once_and_again_where_something_differs(place):
    def archives():
        return sorted((place.folder / "home/adversarial").glob("*.zip"))

    first = open_corpus(SPEC)
    assert archives() == [first.path]
    assert place.made[-1].module.passes > 0
    again = open_corpus(SPEC.replace("::photos", "::./photos"))
    assert place.made[-1].module.passes == 0
    assert archives() == [first.path] == [again.path]
    assert pickle.loads(pickle.dumps(again)).read(0) == first.read(0)
    other = open_corpus(SPEC.replace("epsilon=1.5", "epsilon=1"))
    assert other.read(0) != first.read(0)
    assert len(archives()) == 2
    elsewhere = open_corpus(SPEC.replace("@epsilon", "@out=kept/a.zip@epsilon"))
    assert elsewhere.path.read_bytes() == first.path.read_bytes()
    with pytest.raises(ValueError, match=r"kept/a\.zip: its images were made otherwise \(another @epsilon\); choose"):
        open_corpus(SPEC.replace("@epsilon=1.5", "@out=kept/a.zip@epsilon=2"))
    path = place.folder / "photos" / first.ids[0]
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    with pytest.raises(ValueError, match=r"made otherwise \(another rows\)"):
        open_corpus(SPEC.replace("@epsilon", "@out=kept/a.zip@epsilon"))
    Path("kept/a.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"kept/a\.zip: holds no adversarial images"):
        open_corpus(SPEC.replace("@epsilon", "@out=kept/a.zip@epsilon"))


KILLED = """
import os, signal, sys, types
from featcache.corpora import adversarial, open_corpus
import test_corpora_adversarial as here

sys.modules["t"] = types.SimpleNamespace(make=here.teacher)
adversarial._WINDOW = 2
made, png = [], adversarial._png

def last(image):
    made.append(image)
    if len(made) > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return png(image)

adversarial._png = last
open_corpus(sys.argv[1])
"""


@pytest.mark.parametrize("decoder", ["", "@decoder=d:same"])
def test_a_killed_process_is_gone_on_with(place, monkeypatch, decoder):
    """To the bytes of one that was not; what had been made is not made again, nor another codebook."""
    monkeypatch.setattr(adversarial, "_WINDOW", 2)
    spec = f"adversarial:t:make::h.safetensors@epsilon=1@codes=20{decoder}::photos"
    whole = open_corpus(spec.replace("@epsilon", "@out=whole.zip@epsilon"))
    (place.folder / "d.py").write_text("def same():\n    return lambda x: x\n")
    killed = warm.run(KILLED, spec)
    assert killed.returncode == -9, killed.stderr
    home = place.folder / "home/adversarial"
    (parts,) = home.glob("*.parts")
    left = {path.name: path.read_bytes() for path in parts.glob("*.zip")}
    assert 1 <= len(left) < 4
    assert not [*home.glob("*.zip")]
    attacked, attack = [], adversarial._Maker._attacked

    def counted(self, pixels, rows, decoder):
        attacked.extend(rows)
        return attack(self, pixels, rows, decoder)

    monkeypatch.setattr(adversarial._Maker, "_attacked", counted)
    monkeypatch.setattr(Codebook, "fit", None)
    again = open_corpus(spec)
    assert again.path.read_bytes() == whole.path.read_bytes()
    made_before = {start + i for start in (int(name[:-4]) for name in left) for i in range(2)}
    assert not made_before & {*attacked}
    assert sorted([*made_before, *attacked, list(again.ids).index("bee/damaged.png")])[-1] == 8
    assert not parts.exists()


def test_a_failure_leaves_nothing_behind(place):
    with pytest.raises(ValueError, match=r"decoder d:half: gives \(.*\) of images"):
        open_corpus(SPEC.replace("d:same", "d:half"))
    assert not list((place.folder / "home/adversarial").glob("*.zip*"))


def test_epsilon_0_means_reconstructions_alone(place):
    clean, corpus = open_corpus("photos"), open_corpus("adversarial:t:make::h.safetensors@epsilon=0@codes=20::photos")
    readable = [i for i in range(len(clean)) if clean.ids[i] != "bee/damaged.png"]
    codebook = Codebook.fit((pixels_of(clean, i) for i in readable), codes=20, patch=2, seed=0)
    for i in readable:
        image = torch.tensor(pixels_of(clean, i)).permute(2, 0, 1)[None] / 255
        expected = (codebook(codebook(image)) * 255).round().byte()[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels_of(corpus, i), expected)
    assert place.made[-1].module.passes == 0
    attacked = open_corpus("adversarial:t:make::h.safetensors@codes=20::photos")
    assert any((pixels_of(attacked, i) != pixels_of(corpus, i)).any() for i in readable)


def test_a_teachers_own_logits_need_no_head(place):
    """Of as many classes as the corpus has; the columns are those of the numbers."""
    with_head = {"weight": np.eye(2, 4), "bias": np.zeros(2)}
    save_file(with_head, "own.safetensors", {"class_names": json.dumps(["ant", "bee"])})
    own = open_corpus("adversarial:t:make::@decoder=d:same@start=0::photos")
    headed = open_corpus("adversarial:t:make::own.safetensors@decoder=d:same@start=0::photos")
    assert np.abs(pixels_of(own, 0).astype(int) - pixels_of(headed, 0)).max() <= 1


def test_codes_are_looked_up_as_one_patch_at_a_time():
    rng = np.random.default_rng(1)
    codebook = Codebook(rng.random((9, 12)).astype(np.float32), 2)
    image = rng.random((3, 5, 7)).astype(np.float32)
    filled = np.pad(image, ((0, 0), (0, 1), (0, 1)), mode="edge")
    expected = np.empty_like(filled)
    for y in range(0, 6, 2):
        for x in range(0, 8, 2):
            patch = filled[:, y : y + 2, x : x + 2].ravel()
            nearest = codebook.codes[((codebook.codes - patch) ** 2).sum(axis=1).argmin()]
            expected[:, y : y + 2, x : x + 2] = nearest.reshape(3, 2, 2)
    np.testing.assert_array_equal(codebook(torch.from_numpy(image)[None])[0].numpy(), expected[:, :5, :7])


def test_a_codebook_of_all_patches_changes_nothing():
    rng = np.random.default_rng(2)
    image = rng.integers(0, 4, (8, 8, 1), dtype=np.uint8).repeat(3, axis=2) * 80
    codebook = Codebook.fit([image], codes=1000, patch=2, seed=0)
    assert len(codebook.codes) <= 16
    x = torch.tensor(image).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(codebook(x), x)
    with pytest.raises(ValueError, match="no image could be read"):
        Codebook.fit([], codes=4, patch=2, seed=0)


def test_starts_follow_from_the_id_and_lie_on_the_ball():
    recipe, shape = Recipe(epsilon=2.0, start=0.8), (3, 8, 8)
    starts = [_start(f"{i}", recipe, shape) for i in range(300)]
    lengths = np.array([np.linalg.norm(start) for start in starts])
    assert set(lengths.round(4).tolist()) == {0.0, 2.0}
    assert 0.7 < (lengths > 0).mean() < 0.9
    np.testing.assert_array_equal(starts[7], _start("7", recipe, shape))
    assert not any(_start(f"{i}", Recipe(start=0.0), shape).any() for i in range(20))


@pytest.mark.parametrize(("mode", "resize", "size"), [("shortest", 20, 18), ("squash", 18, 18), ("shortest", 20, 12)])
def test_the_teacher_is_shown_what_it_sees_of_files(mode, resize, size):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (24, 30, 3), dtype=np.uint8))
    image = image.resize((40, 30), Image.Resampling.BICUBIC)
    preprocess = Preprocess(resize=resize, crop=18, size=size, mode=mode, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    seen = preprocess.render(image, preprocess.draw(image.size, Views(), "", 0))
    whole = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255
    found = shown(preprocess, whole)
    expected = preprocess.to_model(torch.tensor(seen)[None])
    assert found.shape == expected.shape
    away = (found - expected).abs().mean() * 0.25 * 255
    assert away < (
        2 if size == 18 else 16
    )  # pixels are rounded twice; at another size they are resampled once, not twice


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("photos", "is not adversarial:TEACHER::HEAD"),
        ("t:make::photos", "is not adversarial:TEACHER::HEAD"),
        ("t:make::h.safetensors@eps=1::photos", "@eps=1: no such option; did you mean"),
        ("t:make::h.safetensors@epsilon=-1::photos", "@epsilon=-1.0: must be 0 or more"),
        ("t:make::h.safetensors@steps=1.5::photos", "@steps=1.5: give a whole number"),
        ("t:make::h.safetensors@start=2::photos", "@start=2.0: must be from 0 to 1"),
        ("t:make::h.safetensors@decoder=d:none::photos", "decoder d:none: returned a int, not a function"),
        ("t:make::h.safetensors@decoder=d:gone::photos", "decoder d:gone: AttributeError"),
        ("t:make::gone.safetensors::photos", r"gone\.safetensors: no such file; give a head"),
        ("t:make::h.safetensors::gone", "gone: no such folder"),
        ("t:make::other.safetensors::photos", r"2 classes that .*other\.safetensors does not know"),
        ("t:make::wide.safetensors::photos", r"wide\.safetensors: is of 5 dimensions, t:make has 4"),
        (
            "t:make::else.safetensors::photos",
            r"else\.safetensors: was fitted to the embeddings of another encoder \(abc\)",
        ),
        (
            "t:make::::three",
            "linear's logits tells 2 classes apart|linear tells 2 classes apart and does not name them",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(place, rest, message):
    save_file(place.head, "other.safetensors", {"class_names": json.dumps(["wasp", "fly"])})
    save_file(place.head, "else.safetensors", {"class_names": json.dumps(["bee", "ant"]), "fingerprint": "abc"})
    wide = {"weight": np.ones((2, 5)), "bias": np.zeros(2)}
    save_file(wide, "wide.safetensors", {"class_names": json.dumps(["bee", "ant"])})
    for name in "abc":
        (place.folder / "three" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place.folder / "three" / name / "0.png")
    with pytest.raises(ValueError, match=message) as refused:
        open_corpus(f"adversarial:{rest}")
    assert "\n" not in str(refused.value)


def test_a_teacher_without_a_gradient_is_refused(place, monkeypatch):
    class Stops(Linear):
        def forward(self, images):
            return {"embedding": super().forward(images)["embedding"].detach()}

    encoder = teacher(("embedding",))
    encoder.module = Stops().eval()
    monkeypatch.setitem(sys.modules, "t", SimpleNamespace(make=lambda: encoder))
    with pytest.raises(ValueError, match="linear lets no gradient through to its pixels"):
        open_corpus("adversarial:t:make::h.safetensors::photos")
    with pytest.raises(ValueError, match="linear gives no logits; give a classifier of its embeddings"):
        open_corpus("adversarial:t:make::::photos")


def test_the_archive_is_one_that_others_read(place):
    corpus = open_corpus(SPEC)
    with zipfile.ZipFile(corpus.path) as archive:
        assert archive.testzip() is None
        made = json.loads(archive.read("made.json"))
    assert made["record"]["@epsilon"] == 1.5
    assert made["record"]["encoder"] == place.made[0].fingerprint
    assert math.isclose(made["record"]["@start"], 0)

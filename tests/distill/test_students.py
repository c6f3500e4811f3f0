import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from featcache.encoder import load_encoder
from featcache.inputs.images import Preprocess
from featcache.student import load_student, make_student, open_student

TEACHER = Preprocess(resize=40, crop=36, size=36, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
VIT = "timm/vit_tiny_patch16_224"
CLIP = "open_clip/ViT-S-32-alt"


def make(spec, embedding_dim=None, image_size=None, **given):
    return make_student(
        spec, TEACHER, embedding_dim=embedding_dim, image_size=image_size, **{"pretrained": False, **given}
    )


def pictures(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip_tower():
    return open_student(CLIP, image_size=64, embedding_dim=10).eval()


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A module `my_students` in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_students", raising=False)
    (tmp_path / "my_students.py").write_text(
        "from torch import nn\n"
        "def flat():\n    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())\n"
        "def patches():\n    return nn.Sequential(nn.Conv2d(3, 5, 64), nn.Flatten())\n"
        "def number():\n    return 3\n"
        "def boom():\n    return {}['oops']\n"
        "def wanting(width):\n    return nn.Flatten()\n"
        "class Late(nn.Module):\n    def forward(self, images):\n        return {}['oops']\n"
    )


@pytest.mark.parametrize(
    ("spec", "embedding_dim", "image_size", "width", "size"),
    [
        ("tiny", None, None, 128, 32),
        ("tiny", 10, 24, 10, 24),
        ("timm/resnet10t", None, 32, 512, 32),
        ("timm/resnet10t", 10, 32, 10, 32),
        (VIT, 10, 32, 10, 32),
    ],
)
def test_output_width_and_image_size(spec, embedding_dim, image_size, width, size):
    student, preprocess, record = make(spec, embedding_dim, image_size)
    assert student.eval()(pictures(size)).shape == (2, width)
    assert (student.embedding_dim, preprocess.size) == (width, size)
    assert record == {"architecture": spec, "embedding_dim": width, "preprocess": preprocess.to_dict()}


def test_a_projection_only_where_widths_differ():
    assert isinstance(make("tiny", 128)[0].projection, nn.Identity)
    assert make("tiny", 10)[0].projection.weight.shape == (10, 128)


def test_a_student_sees_the_teachers_square():
    for spec in ("tiny", "timm/resnet10t"):
        preprocess = make(spec, image_size=32)[1]
        for part in ("resize", "crop", "interpolation", "mode"):
            assert getattr(preprocess, part) == getattr(TEACHER, part)


def test_normalisation_is_the_models_own_and_the_teachers_where_it_has_none():
    assert (make("tiny")[1].mean, make("tiny")[1].std) == (TEACHER.mean, TEACHER.std)
    model = make("timm/resnet10t")[1]
    assert (model.size, model.mean, model.std) == (176, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_patch_size_and_drop_path_reach_timm():
    student, _, record = make(VIT, 10, 32, patch_size=8, drop_path=0.2)
    assert student.shapes() == {"embedding": (10,), "tokens": (16, 10), "prefix_tokens": (1, 10)}
    assert record["patch_size"] == 8
    rates = [block.drop_path1.drop_prob for block in student.body.blocks[1:]]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(1, 12)])


def test_making_a_student_does_not_teach_it_anything():
    student = make("tiny")[0]
    assert student.training
    assert torch.equal(student.body[1].running_mean, torch.zeros(32))


def test_pretrained_weights_are_resampled_to_patches_and_size(tmp_path):
    native = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "w.safetensors")
    student = make(f"{VIT}:{tmp_path}/w.safetensors", 10, 32, patch_size=8)[0]
    assert student.body.pos_embed.shape == (1, 17, 192)
    assert student.body.patch_embed.proj.weight.shape == (192, 3, 8, 8)
    assert native.pos_embed.shape == (1, 197, 192)
    assert make(f"{VIT}:{tmp_path}/w.safetensors", 10, 32, patch_size=8)[2]["architecture"] == VIT


@pytest.mark.parametrize(
    ("spec", "given"),
    [
        ("tiny", {}),
        ("timm/resnet10t", {"image_size": 64}),
        ("timm/mobilenetv3_small_050", {"image_size": 32}),
        (VIT, {"image_size": 32, "patch_size": 8, "drop_path": 0.3}),
    ],
)
def test_the_record_rebuilds_the_student(spec, given, tmp_path):
    student, preprocess, record = make(spec, 10, **given)
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    (tmp_path / "student.json").write_text(json.dumps(record))
    images = pictures(preprocess.size)
    rebuilt, _ = load_student(tmp_path)
    assert torch.equal(rebuilt(images), student.eval()(images))

    encoder = load_encoder(f"run:{tmp_path}")
    assert encoder.preprocess == preprocess
    assert encoder.fields == student.shapes()
    found = encoder.module(images)
    assert {name: tuple(value.shape[1:]) for name, value in found.items()} == encoder.fields
    torch.testing.assert_close(found["embedding"], student(images))


# -- features ---------------------------------------------------------------------------------------------


def test_tokens_of_a_transformer_are_the_models_own_projected():
    student = make(VIT, 10, 32, patch_size=8)[0].eval()
    images = pictures(32)
    found = student.features(images, ("embedding", "tokens", "prefix_tokens"))
    raw = student.body.forward_features(images)
    project = nn.functional.linear
    weight, bias = student.projection.weight, student.projection.bias
    torch.testing.assert_close(found["tokens"], project(raw[:, 1:], weight, bias))
    torch.testing.assert_close(found["prefix_tokens"], project(raw[:, :1], weight, bias))
    # This model pools by its class token, so the embedding is that token.
    torch.testing.assert_close(found["embedding"], found["prefix_tokens"][:, 0])


@pytest.mark.parametrize(("spec", "size", "positions"), [("tiny", 32, 16), ("timm/resnet10t", 64, 4)])
def test_tokens_of_a_convnet_are_positions_whose_mean_is_the_embedding(spec, size, positions):
    student = make(spec, 10, size)[0].eval()
    found = student.features(pictures(size), ("embedding", "tokens"))
    assert found["tokens"].shape == (2, positions, 10)
    torch.testing.assert_close(found["tokens"].mean(1), found["embedding"], atol=1e-5, rtol=1e-4)


def test_tokens_are_row_major():
    student = make("tiny")[0].eval()
    images = pictures(32)
    changed = images.clone()
    changed[:, :, -1, 0] += 3
    before, after = (student.features(seen, ["tokens"])["tokens"] for seen in (images, changed))
    difference = (before - after).norm(dim=-1)
    bottom_left, top_right = 12, 3
    assert (difference[:, bottom_left] > 0).all()
    assert (difference[:, top_right] == 0).all()


@pytest.mark.parametrize("spec", ["tiny", VIT])
def test_forward_gives_the_embedding_or_the_fields_asked_for(spec):
    student = make(spec, 10, 32)[0].eval()
    images = pictures(32)
    assert torch.equal(student(images), student.features(images)["embedding"])
    asked = student(images, fields=("embedding", "tokens"))
    assert set(asked) == {"embedding", "tokens"}
    torch.testing.assert_close(asked["embedding"], student(images))


def test_a_field_that_a_student_lacks_is_refused():
    with pytest.raises(ValueError, match="gives no tokens: its tokens have another width than its embedding"):
        make("timm/mobilenetv3_small_050", 10, 32)[0].features(pictures(32), ("tokens",))
    with pytest.raises(ValueError, match="gives no prefix_tokens: it has none"):
        make("tiny")[0].features(pictures(32), ("prefix_tokens",))


def test_gradients_of_tokens_reach_the_body():
    student = make(VIT, 10, 32)[0]
    student(pictures(32), fields=("tokens",))["tokens"].square().sum().backward()
    assert student.body.patch_embed.proj.weight.grad.abs().sum() > 0


# -- open_clip --------------------------------------------------------------------------------------------


def test_an_open_clip_tower_embeds_as_open_clip_does(clip_tower):
    images = pictures(64)
    with torch.no_grad():
        found = clip_tower.features(images, ("embedding", "tokens", "prefix_tokens"))
        torch.testing.assert_close(found["embedding"], clip_tower.projection(clip_tower.body.tower.visual(images)))
    assert found["tokens"].shape == (2, 4, 10)
    torch.testing.assert_close(found["prefix_tokens"][:, 0], found["embedding"])  # pooled by the class token


def test_open_clip_students_carry_its_normalisation():
    _, preprocess, record = make(CLIP, image_size=64)
    assert preprocess.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert (preprocess.size, record["architecture"]) == (64, CLIP)


# -- MODULE:CALLABLE --------------------------------------------------------------------------------------


def test_a_module_of_the_users_own(own_code, tmp_path):
    student, preprocess, record = make("my_students:flat", 7)
    assert (preprocess, student.width, record["architecture"]) == (TEACHER, 12, "my_students:flat")
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    (tmp_path / "student.json").write_text(json.dumps(record))
    assert torch.equal(
        load_encoder(f"run:{tmp_path}", trust_code=True).module(pictures(36))["embedding"], student(pictures(36))
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_students:number", "returned a int, not an nn.Module"),
        ("my_students:flatt", "no attribute 'flatt'; give MODULE:CALLABLE"),
        ("my_student:flat", "No module named 'my_student'"),
        ("my_students:boom", r"student my_students:boom: it raised KeyError: 'oops'"),
        ("my_students:wanting", r"student my_students:wanting: it raised TypeError: wanting\(\) missing 1 required"),
        ("my_students:Late", r"does not take images of 36 px \(KeyError: 'oops'\)"),
        ("my_students:patches", "does not take images of 36 px"),
    ],
)
def test_modules_that_are_no_students_are_refused(own_code, spec, message):
    with pytest.raises(ValueError, match=message):
        make(spec)


def test_a_classifier_only_where_classes_are_given(tmp_path):
    names = ["cat", "dog", "hen"]
    torch.manual_seed(0)
    plain, _, _ = make("tiny", 10)
    torch.manual_seed(0)
    student, preprocess, record = make("tiny", 10, classes=names)
    assert record["classes"] == names
    assert {*student.state_dict()} - {*plain.state_dict()} == {"classifier.weight", "classifier.bias"}
    images = pictures(preprocess.size)
    assert torch.equal(student.eval()(images), plain.eval()(images))  # what is drawn for it comes last
    found = student.features(images, ["embedding", "logits", "tokens"])
    assert torch.equal(found["embedding"], student(images))
    weight, bias = student.classifier.weight, student.classifier.bias
    torch.testing.assert_close(found["logits"], student(images) @ weight.T + bias)
    assert student.shapes() == {"embedding": (10,), "tokens": (16, 10), "logits": (3,)}
    with pytest.raises(ValueError, match="gives no logits: it has none"):
        plain.features(images, ["logits"])

    save_file(student.state_dict(), tmp_path / "student.safetensors")
    (tmp_path / "student.json").write_text(json.dumps(record))
    encoder = load_encoder(f"run:{tmp_path}")
    torch.testing.assert_close(encoder.module(images)["logits"], found["logits"])
    assert encoder.fields["logits"] == (3,)
    assert make(f"run:{tmp_path}")[0].classes == names
    assert make(f"run:{tmp_path}", 11)[0].classifier.weight.shape == (3, 11)
    assert make(f"run:{tmp_path}", classes=["cat", "dog"])[0].classifier.weight.shape == (2, 10)
    (tmp_path / "student.json").write_text(json.dumps({**record, "classes": [1]}))
    with pytest.raises(ValueError, match=r"student\.json: is damaged \(classes must be names\)"):
        load_student(tmp_path)


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "given", "message"),
    [
        ("tinny", {}, "unknown student 'tinny'; give tiny, timm/NAME"),
        ("timm/", {}, "unknown student 'timm/'"),
        ("timm/resnet10tt", {}, "no such model; did you mean .*resnet10t"),
        ("open_clip/ViT-B-3", {}, "no such model; did you mean .*ViT-B-32"),
        ("open_clip/ViT-B-32:nowhere.pt", {}, "no such pretrained tag or file"),
        ("tiny", {"patch_size": 4}, "tiny takes no patch_size, only timm students do"),
        ("tiny", {"drop_path": 0.1}, "tiny takes no drop_path"),
        ("tiny", {"pretrained": True}, "pretrained is for timm students"),
        ("timm/resnet10t", {"patch_size": 4}, "does not take patch_size 4 .*; leave it out"),
        (VIT, {"image_size": 30}, "30 px is not a multiple of its patches of 16 px"),
    ],
)
def test_unknown_students_and_settings_are_refused(spec, given, message):
    with pytest.raises(ValueError, match=message):
        make(spec, **given)


def test_weights_of_another_architecture_are_refused(tmp_path):
    _, _, record = make("tiny", 10)
    save_file({"x": torch.zeros(1)}, tmp_path / "student.safetensors")
    (tmp_path / "student.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"student\.safetensors: does not fit tiny"):
        load_student(tmp_path)

"""Students of the user's own whose output is none: one line that says what it is, and what to do."""

import importlib
import json

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import distill
from featcache.student import load_student, open_student

CODE = """
import torch
from torch import nn

class Named(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.convolution, self.give = nn.Conv2d(3, 4, 3, stride=2), give

    def forward(self, images):
        return self.give(self.convolution(images), self.training)

def maps(): return Named(lambda x, training: x)
def dictionary(): return Named(lambda x, training: {"features": x.mean((2, 3)), "logits": x})
def pair(): return Named(lambda x, training: (x.mean((2, 3)), x))
def tokens(): return Named(lambda x, training: x.flatten(2))
def flat(): return Named(lambda x, training: x.mean())
def whole(): return Named(lambda x, training: x.mean((2, 3)).long())
def pooled(): return Named(lambda x, training: x.mean((2, 3)))
def pair_in_training(): return Named(lambda x, training: (x.mean((2, 3)), 0) if training else x.mean((2, 3)))
def grey(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def logits(): return nn.Sequential(nn.Conv2d(3, 1000, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def nothing(): return Named(lambda x, training: x.mean((2, 3))[:, :0])
def detached(): return Named(lambda x, training: x.mean((2, 3)).detach())
def frozen(): return pooled().requires_grad_(False)

class Extra(nn.Linear):
    def get_extra_state(self): return {"scale": 1}
    def set_extra_state(self, state): pass
    def forward(self, images): return super().forward(images.flatten(1))

def extra(): return Extra(3 * 16 * 16, 4)

class Locked(Named):
    def __deepcopy__(self, memo): raise TypeError("cannot pickle '_thread.lock' object")

def locked(): return Locked(lambda x, training: x.mean((2, 3)))

class Masked(Named):
    def __init__(self):
        super().__init__(None)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        if self.training:
            self.seen = self.seen + 1
        rows = self.convolution(images).mean((2, 3))
        return rows @ self.mask.softmax(-1)

class InPlace(Named):
    def __init__(self):
        super().__init__(None)

    def forward(self, images):
        return self.convolution(images.sub_(1).mul_(2)).mean((2, 3))

def one_by_one(): return nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten())
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "own_students.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("maps", r"the student gives maps, \(B, 4, 7, 7\); pool them"),
        ("dictionary", r"returns a dictionary \(features, logits\); let it return the embedding \(B, D\) alone"),
        ("pair", "returns a tuple; let it return the embedding"),
        ("tokens", r"gives \(1, 4, 49\) torch.float32 of one image; let it give \(B, D\) floating-point"),
        ("flat", r"gives \(\) torch.float32 of one image"),
        ("whole", r"gives \(1, 4\) torch.int64 of one image"),
        (
            "pair_in_training",
            r"in training the student gives a tuple of two images, in use \(2, 4\); let it give the same",
        ),
        ("nothing", r"gives \(1, 0\) torch.float32 of one image"),
        ("detached", r"does not follow from its weights \(under torch.no_grad, or detached\?\), so they cannot train"),
        ("extra", "body._extra_state of its state is no tensor, and only tensors are saved; leave it out"),
        ("locked", r"cannot be copied \(TypeError: cannot pickle '_thread.lock' object\)"),
        ("grey", "takes images of 1 channels; it is given RGB images: begin with a layer that takes 3"),
    ],
)
def test_what_is_no_embedding_is_refused_in_one_line(name, said):
    with pytest.raises(ValueError, match=f"^own_students:{name}: .*{said}") as refused:
        open_student(f"own_students:{name}", image_size=16)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("code")
def test_a_thousand_numbers_are_remarked_on():
    assert "if they are logits" in open_student("own_students:logits", image_size=16).remark
    assert open_student("own_students:pooled", image_size=16).remark == ""


@pytest.mark.usefixtures("code")
def test_a_student_without_weights_that_train_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match=r"^own_students:frozen: none of the student's weights trains; leave some"):
        train(tmp_path / "run", student="own_students:frozen", image_size=16, embedding_dim=4, method="proteus")
    assert not (tmp_path / "run").exists()
    wider = {"student": "own_students:frozen", "image_size": 16, "embedding_dim": 6}  # its projection trains
    assert train(tmp_path / "run", **wider, epochs=1, method="cosine").finished


@pytest.mark.usefixtures("code")
def test_a_mask_of_minus_infinity_is_no_weight_that_became_so(train, tmp_path):
    run = train(tmp_path / "run", student="own_students:Masked", image_size=16, epochs=1, method="cosine")
    backbone, _ = load_student(run.path, trust_code=True)
    assert torch.equal(backbone.body.mask, torch.full((4, 4), -torch.inf).triu(1))
    assert backbone.body.seen == run.metrics[-1]["step"]


@pytest.mark.usefixtures("code")
def test_a_student_that_works_on_its_images_in_place_is_exported(train, tmp_path):
    run = train(tmp_path / "run", student="own_students:InPlace", image_size=16, epochs=1, method="cosine")
    assert distill.export(run, tmp_path / "out", trust_code=True).max_difference <= 1e-5


@pytest.mark.usefixtures("code")
def test_batch_norms_on_one_value_are_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(
        ValueError, match="batch norms cannot train on one image of 16 px at a time; give a larger batch"
    ):
        train(tmp_path / "run", student="own_students:one_by_one", batch_size=4, accumulate=4, method="cosine")
    assert not (tmp_path / "run").exists()
    assert train(
        tmp_path / "run", student="own_students:one_by_one", batch_size=4, accumulate=2, method="cosine", epochs=1
    ).finished


@pytest.mark.parametrize(
    ("name", "width", "size"),
    [
        ("resnet18", 512, 32), ("mobilenet_v3_small", 1024, 32), ("squeezenet1_1", 512, 64), ("vit_b_32", 768, 224),
        ("convnext_tiny", 768, 32), ("densenet121", 1024, 32), ("shufflenet_v2_x0_5", 1024, 32), ("swin_t", 768, 32),
    ],
)  # fmt: skip
def test_torchvision_gives_features_not_logits(name, width, size):
    """The oracle is what goes into the model's own last layer with weights."""
    backbone = open_student(f"torchvision.models:{name}", image_size=size)
    assert backbone.width == width
    assert "classifier of 1,000 classes is left out" in backbone.remark
    whole = getattr(torchvision.models, name)().eval()
    whole.load_state_dict(backbone.body.state_dict(), strict=False)
    last = [layer for layer in whole.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    seen = []
    last.register_forward_hook(lambda layer, given, output: seen.append(given[0]))
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        whole(images)
        found = backbone.eval()(images)
    expected = seen[0] if seen[0].ndim == 2 else seen[0].relu().mean((2, 3))
    torch.testing.assert_close(found, expected)


def test_a_torchvision_student_comes_back_as_it_was_saved(train, tmp_path, caplog):
    run = train(tmp_path / "run", student="torchvision.models:resnet18", image_size=32, epochs=1, method="cosine")
    assert any("classifier of 1,000 classes is left out" in line for line in caplog.messages)
    assert json.loads((run.path / "student.json").read_text())["architecture"] == "torchvision.models:resnet18"
    backbone, _ = load_student(run.path, trust_code=True)
    assert (backbone.width, np.prod(backbone(torch.zeros(1, 3, 32, 32)).shape)) == (512, backbone.embedding_dim)

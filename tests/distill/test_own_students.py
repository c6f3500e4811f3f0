"""Students of the user's own whose output is none: one line that says what it is, and what to do."""

import importlib
import json

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from featcache.backbones import build_backbone, load_backbone

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
def one_by_one(): return nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten())
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "odd_students.py").write_text(CODE)
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
        ("grey", "takes images of 1 channels; it is given RGB images: begin with a layer that takes 3"),
    ],
)
def test_what_is_no_embedding_is_refused_in_one_line(name, said):
    with pytest.raises(ValueError, match=f"^odd_students:{name}: .*{said}") as refused:
        build_backbone(f"odd_students:{name}", image_size=16)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("code")
def test_a_thousand_numbers_are_remarked_on():
    assert "if they are logits" in build_backbone("odd_students:logits", image_size=16).remark
    assert build_backbone("odd_students:pooled", image_size=16).remark == ""


@pytest.mark.usefixtures("code")
def test_batch_norms_on_one_value_are_refused_before_anything_is_written(train, tmp_path):
    with pytest.raises(
        ValueError, match="batch norms cannot train on one image of 16 px at a time; give a larger batch"
    ):
        train(tmp_path / "run", student="odd_students:one_by_one", batch_size=4, accumulate=4, method="cosine")
    assert not (tmp_path / "run").exists()
    assert train(
        tmp_path / "run", student="odd_students:one_by_one", batch_size=4, accumulate=2, method="cosine", epochs=1
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
    backbone = build_backbone(f"torchvision.models:{name}", image_size=size)
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
    backbone, _ = load_backbone(run.path, trust_code=True)
    assert (backbone.width, np.prod(backbone(torch.zeros(1, 3, 32, 32)).shape)) == (512, backbone.embedding_dim)

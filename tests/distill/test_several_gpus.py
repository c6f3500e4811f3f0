"""What only several GPUs take, as far as a CPU can tell."""

import copy

import pytest
import torch
from torch import nn

from distill.training.step import synchronised
from featcache.student import open_student


@pytest.mark.parametrize("spec", ["tiny", "timm/resnet10t", "timm/mobilenetv3_small_050"])
def test_a_student_with_shared_batch_norms_is_the_same_function(spec, rng):
    student = open_student(spec, image_size=64)
    shared = synchronised(copy.deepcopy(student))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in shared.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in shared.modules())
    images = torch.from_numpy(rng.normal(size=(2, 3, 64, 64)).astype("float32"))
    with torch.no_grad():
        assert torch.equal(shared.eval()(images), student.eval()(images))

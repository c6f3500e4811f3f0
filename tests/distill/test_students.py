import pytest
import torch

from distill.students import make_student
from featcache.preprocess import Preprocess

TEACHER = Preprocess(resize=40, crop=36, size=36, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def make(spec, embedding_dim=None, image_size=None):
    return make_student(spec, TEACHER, embedding_dim=embedding_dim, image_size=image_size, pretrained=False)


@pytest.mark.parametrize(
    ("spec", "embedding_dim", "image_size", "width", "size"),
    [
        ("tiny", None, None, 128, 32),
        ("tiny", 10, 24, 10, 24),
        ("timm/resnet10t", None, 32, 512, 32),
        ("timm/resnet10t", 10, 32, 10, 32),
    ],
)
def test_output_width_and_image_size(spec, embedding_dim, image_size, width, size):
    student, preprocess, record = make(spec, embedding_dim, image_size)
    assert student.eval()(torch.zeros(2, 3, size, size)).shape == (2, width)
    assert (student.embedding_dim, preprocess.size) == (width, size)
    assert record == {"architecture": spec, "embedding_dim": width, "preprocess": preprocess.to_dict()}


def test_a_student_sees_the_teachers_square():
    for spec in ("tiny", "timm/resnet10t"):
        preprocess = make(spec, image_size=32)[1]
        for part in ("resize", "crop", "interpolation", "mode"):
            assert getattr(preprocess, part) == getattr(TEACHER, part)


def test_normalisation_is_the_models_own_and_the_teachers_where_it_has_none():
    assert (make("tiny")[1].mean, make("tiny")[1].std) == (TEACHER.mean, TEACHER.std)
    timm = make("timm/resnet10t")[1]
    assert (timm.size, timm.mean, timm.std) == (176, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_size_that_the_model_cannot_take_is_refused():
    with pytest.raises(ValueError, match="only takes images of 224 px, not 32"):
        make("timm/vit_tiny_patch16_224", image_size=32)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tinny", "unknown student 'tinny'; give tiny, timm/NAME"),
        ("timm/", "unknown student 'timm/'"),
        ("timm/resnet10tt", "no such model; did you mean .*resnet10t"),
    ],
)
def test_unknown_students_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make(spec)

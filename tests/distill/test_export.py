"""An exported student in a process that has no featcache gives what the student gives."""

import dataclasses
import functools
import importlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from exported_runs import TEACHER, make_run_in
from fit_cases import STEPS, STUDENT, Interrupted, interrupt_at
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill.exporting.card import preprocessing_code
from distill.exporting.int8 import Calibration
from distill.training.run import Run
from featcache.encoder import load_encoder
from featcache.graph import Preprocessed, pixels
from featcache.inputs import Views
from featcache.inputs.images import Preprocess, decode
from featcache.models import Standalone
from featcache.student import load_student, make_student, open_student

MODULE = importlib.import_module("distill.exporting.export")  # the package's attribute of that name is the function
export = MODULE.export
WRITING = importlib.import_module("distill.exporting.safetensors")
VIT = {"spec": "timm/vit_tiny_patch16_224", "image_size": 32, "patch_size": 8}
BLOCKED = "import sys\nfor name in ('featcache', 'distill', 'evalsuite', 'featcache_cli'): sys.modules[name] = None\n"


@pytest.fixture
def make_run(tmp_path):
    return functools.partial(make_run_in, tmp_path)


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def without_featcache(folders):
    """What the code in each folder's card makes of that folder's `images.npy`, in one process without this project."""
    script = BLOCKED + "import os, numpy as np, torch\n"
    for folder in folders:
        blocks = code_blocks(folder / "README.md")
        script += f"os.chdir({str(folder)!r})\nimages = torch.from_numpy(np.load('images.npy'))\n" + blocks[0]
        script += "with torch.no_grad(): np.save('embedding.npy', np.asarray(model(images)))\n"
        if (folder / "hubconf.py").exists():
            script += next(block for block in blocks if "torch.hub" in block)
            script += "with torch.no_grad(): np.save('hub.npy', model(images))\n"
            script += f"np.save('pixels.npy', model.preprocess(Image.open({str(folder.parent / 'picture.png')!r})))\n"
        for block, made in zip([b for b in blocks if "features_only" in b], ("backbone", "again"), strict=False):
            script += block + f"with torch.no_grad(): np.save('{made}.npy', {made}.eval()(images)[-1])\n"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
    return [torch.from_numpy(np.load(folder / "embedding.npy")) for folder in folders]


EXPORTS = {
    "tiny": {"spec": "tiny"},
    "tiny without projection": {"spec": "tiny", "embedding_dim": None},
    "timm convnet": {"spec": "timm/resnet10t", "image_size": 64},
    "timm transformer": VIT,
    "timm transformer without projection": {**VIT, "embedding_dim": None},
    "timm with two classifiers": {"spec": "timm/deit_tiny_distilled_patch16_224", "image_size": 32},
    "timm with a batch norm before two classifiers": {"spec": "timm/repvit_m0_9", "image_size": 32},
    "timm with a classifier a scale": {"spec": "timm/efficientvim_m1", "image_size": 32},
    "timm convnet in float16": {"spec": "timm/lcnet_035", "image_size": 64, "precision": "fp16"},
    "timm with classes": {**VIT, "classes": ["cat", "dog", "hen"]},
    "timm with classes and without projection": {**VIT, "embedding_dim": None, "classes": ["cat", "dog"]},
    "tiny with classes": {"spec": "tiny", "classes": ["cat", "dog"]},
    "classes in ONNX": {"spec": "tiny", "classes": ["cat", "dog"], "format": "onnx"},
    "transformer in ONNX": {**VIT, "format": "onnx"},
    "transformer in ONNX and float16": {**VIT, "format": "onnx", "precision": "fp16"},
}
SETTINGS = ("format", "precision")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Of each: what `export` says of it, what its own code gives in a bare process, what the student gives."""
    folder = tmp_path_factory.mktemp("exports, with a comma")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(folder / "picture.png")
    exported, expected = {}, {}
    for number, (name, given) in enumerate(EXPORTS.items()):
        settings = {key: given[key] for key in SETTINGS if key in given}
        student = {key: value for key, value in given.items() if key not in SETTINGS}
        run = make_run_in(folder, **student, name=f"run{number}")
        exported[name] = export(run, folder / f"out{number}", **settings)
        student = load_encoder(f"run:{run.path}")
        images = MODULE.pictures(7, student.preprocess)
        np.save(exported[name].path / "images.npy", images.numpy())
        expected[name] = student.module(images)["logits" if "classes" in given else "embedding"]
    found = without_featcache([each.path for each in exported.values()])
    return {name: (exported[name], embedding, expected[name]) for name, embedding in zip(EXPORTS, found, strict=True)}


@pytest.mark.parametrize("name", EXPORTS)
def test_the_cards_own_code_gives_what_the_student_gives_without_featcache(exports, name):
    exported, found, expected = exports[name]
    onnx = "ONNX" in name
    assert exported.files == (
        ("README.md", "model.onnx") if onnx else ("README.md", "config.json", "hubconf.py", "model.safetensors")
    )
    apart = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max()
    assert apart < (1e-2 if "float16" in name else 1e-4 if onnx else 1e-6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in EXPORTS if "ONNX" not in name])
def test_torch_hub_gives_the_student_with_its_preprocessing(exports, name):
    exported, found, _ = exports[name]
    np.testing.assert_array_equal(np.load(exported.path / "hub.npy"), found.numpy())
    names = {}
    exec(code_blocks(exported.path / "README.md")[1], names)
    expected = names["pixels"](Image.open(exported.path.parent / "picture.png"))
    np.testing.assert_array_equal(np.load(exported.path / "pixels.npy"), expected.numpy())


def test_the_cards_preprocessing_turns_photographs_and_refuses_deep_ones(tmp_path):
    names, exif = {}, Image.Exif()
    exec(preprocessing_code(Preprocess(resize=36, crop=32, size=32)), names)
    exif[0x0112] = 6  # a camera held upright
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(
        tmp_path / "x.png", exif=exif
    )
    upright = Image.fromarray(np.asarray(decode((tmp_path / "x.png").read_bytes())))
    assert upright.size == (40, 60)
    turned = names["pixels"](Image.open(tmp_path / "x.png"))
    assert torch.equal(turned, names["pixels"](upright))
    for mode in ("I;16", "I", "F"):
        with pytest.raises(ValueError, match="convert the image to 8 bits first"):
            names["pixels"](Image.new(mode, (40, 40), 300))


LAST = {
    "timm convnet": "layer4",
    "timm transformer": "blocks",
    "timm with two classifiers": "blocks",
    "timm with a batch norm before two classifiers": "stages",
    "timm convnet in float16": "blocks",
    "timm with classes": "blocks",
}
"""The module whose output is the last map, before all norms and heads."""


@pytest.mark.parametrize("name", LAST)
def test_the_last_feature_map_is_the_students_own(exports, name):
    exported, number = exports[name][0], [*EXPORTS].index(name)
    student, seen = load_student(exported.path.parent / f"run{number}")[0], []
    student.body.get_submodule(LAST[name]).register_forward_hook(lambda _, given, output: seen.append(output))
    with torch.no_grad():
        student(torch.from_numpy(np.load(exported.path / "images.npy")))
    own = seen[0]
    if own.ndim == 3:  # tokens of a transformer, the last 16 those of patches
        own = (
            own[:, -16 if "two" not in name else -4 :]
            .transpose(1, 2)
            .unflatten(2, (4, 4) if "two" not in name else (2, 2))
        )
    for made in ("backbone", "again"):  # from `local-dir:`, from a `checkpoint_path`
        found = torch.from_numpy(np.load(exported.path / f"{made}.npy"))
        atol = (1e-2 if "float16" in name else 1e-5) * float(own.abs().max())
        torch.testing.assert_close(found, own, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("name", "said"), [("tiny", "tiny is no model that timm loads by itself"), ("transformer in ONNX", "")]
)
def test_the_card_says_where_there_are_no_feature_maps(exports, name, said):
    card = (exports[name][0].path / "README.md").read_text()
    assert ("None by timm's `features_only`: " + said in card) if said else "Feature maps" not in card


CHANNELS_LAST = """
import torch
from types import SimpleNamespace as Named
def backbone(images): return [torch.ones(1, 4, 8, 3)]
backbone.feature_info = Named(channels=lambda: [3], reduction=lambda: [2])
"""


def test_what_timm_gives_no_maps_of_is_said(tmp_path):
    alone = Standalone(network=torch.nn.Identity(), config={}, code="", maps="raise RuntimeError('none of it')")
    record = {"architecture": "timm/some"}
    said = WRITING._of_maps(tmp_path, alone, record, torch.zeros(1, 3, 8, 8), "fp32")
    assert "None by timm's `features_only`: timm has no such thing for timm/some (RuntimeError: none of it)" in said
    last = dataclasses.replace(
        alone, maps=CHANNELS_LAST, last_map=torch.ones(1, 3, 4, 8), config={"architecture": "some", "model_args": {}}
    )
    said = WRITING._of_maps(tmp_path, last, record, torch.zeros(1, 3, 8, 8), "fp32")
    assert "gives 1 maps (B, H, W, C) of [3] channels, at 1/[2] of" in said
    other = dataclasses.replace(alone, maps="backbone = lambda images: [images]", last_map=torch.ones(1, 3, 8, 8))
    said = WRITING._of_maps(tmp_path, other, record, torch.zeros(1, 3, 8, 8), "fp32")
    assert "the last one is not what timm's `forward_intermediates` gives of the student" in said


@pytest.mark.parametrize("name", [name for name in EXPORTS if name.startswith("timm")])
def test_timm_loads_its_own_layout_by_name(exports, name):
    exported, found, _ = exports[name]
    assert 'timm.create_model(f"local-dir:{folder}", pretrained=True)' in code_blocks(exported.path / "README.md")[0]
    model = timm.create_model(f"local-dir:{exported.path}", pretrained=True).eval()
    with torch.no_grad():
        again = model(torch.from_numpy(np.load(exported.path / "images.npy")))
    torch.testing.assert_close(again, found, atol=1e-5, rtol=1e-5)


def test_an_export_with_classes_is_a_teacher_with_logits(exports):
    exported, found, _ = exports["timm with classes"]
    teacher = load_encoder(f"timm/local-dir:{exported.path}")
    assert teacher.fields["logits"] == (3,)
    torch.testing.assert_close(
        teacher.module(torch.from_numpy(np.load(exported.path / "images.npy")))["logits"], found, atol=1e-5, rtol=1e-5
    )
    assert json.loads((exported.path / "config.json").read_text())["label_names"] == ["cat", "dog", "hen"]
    assert "`logits = model(" in (exported.path / "README.md").read_text()


def test_float16_halves_the_files(exports):
    whole = exports["transformer in ONNX"][0].path / "model.onnx"
    half = exports["transformer in ONNX and float16"][0].path / "model.onnx"
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    with safe_open(exports["timm convnet in float16"][0].path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} <= {torch.float16, torch.int64}  # noqa: SIM118


# The smallest of each of timm's modules that has one under 33 M weights, and the size in px of the images.
FAMILIES = {
    "byoanet": ("halonet_h1", None),
    "byobnet": ("mobileone_s0", 32),
    "cait": ("cait_xxs24_224", 32),
    "coat": ("coat_lite_tiny", 32),
    "convit": ("convit_tiny", 32),
    "convmixer": ("convmixer_768_32", 32),
    "convnext": ("convnext_atto", 32),
    "cpubone": ("cpubone_nano", 32),
    "crossvit": ("crossvit_tiny_240", None),
    "csatv2": ("csatv2", 64),
    "cspnet": ("cs3darknet_focus_s", 32),
    "cspnext": ("cspnext_s", 32),
    "davit": ("davit_tiny", 32),
    "deit": ("deit_tiny_distilled_patch16_224", 32),
    "densenet": ("densenet121", 32),
    "dla": ("dla46_c", 32),
    "dpn": ("dpn48b", 32),
    "edgenext": ("edgenext_small", 32),
    "efficientformer": ("efficientformer_l1", None),
    "efficientformer_v2": ("efficientformerv2_s0", 32),
    "efficientnet": ("efficientnet_b0", 32),
    "efficientvim": ("efficientvim_m1", 32),
    "efficientvit_mit": ("efficientvit_b0", 32),
    "efficientvit_msra": ("efficientvit_m0", 32),
    "eva": ("eva02_tiny_patch14_224", None),
    "fasternet": ("fasternet_t0", 32),
    "fastvit": ("fastvit_t8", 32),
    "focalnet": ("focalnet_tiny_srf", 32),
    "gcvit": ("gcvit_xxtiny", 32),
    "ghostnet": ("ghostnet_050", 32),
    "hardcorenas": ("hardcorenas_a", 32),
    "hgnet": ("hgnetv2_b0", 32),
    "hiera": ("hiera_tiny_224", 32),
    "hieradet_sam2": ("sam2_hiera_tiny", 32),
    "hrnet": ("hrnet_w18_small", 32),
    "iformer": ("iformer_t", 32),
    "inception_next": ("inception_next_atto", 32),
    "inception_v3": ("inception_v3", 96),
    "lcnetv2": ("lcnetv2_base", 32),
    "levit": ("levit_128s", 32),
    "lowformer": ("lowformer_b0", 32),
    "mambaout": ("test_mambaout", 32),
    "maxxvit": ("test_coatnet", 32),
    "metaformer": ("poolformerv2_s12", 32),
    "mlp_mixer": ("gmlp_ti16_224", 32),
    "mobilenetv3": ("lcnet_035", 32),
    "mobilevit": ("mobilevit_s", 32),
    "mvitv2": ("mvitv2_tiny", 32),
    "nest": ("nest_tiny", 32),
    "nextvit": ("nextvit_small", 32),
    "nfnet": ("test_nfnet", 32),
    "pit": ("pit_ti_224", 32),
    "pvt_v2": ("pvt_v2_b0", None),
    "rdnet": ("rdnet_tiny", 32),
    "regnet": ("regnetx_002", 32),
    "repghost": ("repghostnet_050", 32),
    "repvit": ("repvit_m0_9", 32),
    "res2net": ("res2next50", 32),
    "resnest": ("resnest14d", 32),
    "resnet": ("resnet10t", 32),
    "resnetv2": ("resnetv2_18", 32),
    "rexnet": ("rexnet_100", 32),
    "selecsls": ("selecsls42", 32),
    "senet": ("legacy_seresnet18", 32),
    "sequencer": ("sequencer2d_s", 32),
    "shvit": ("shvit_s1", 32),
    "sknet": ("skresnet18", 32),
    "starnet": ("starnet_s1", 32),
    "swiftformer": ("swiftformer_s", 32),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 32),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 32),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 32),
    "tiny_vit": ("tiny_vit_5m_224", 32),
    "tnt": ("tnt_s_legacy_patch16_224", 32),
    "tresnet": ("tresnet_m", 32),
    "twins": ("twins_svt_small", 32),
    "visformer": ("visformer_tiny", 32),
    "vision_transformer": ("test_vit", 32),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 32),
    "vision_transformer_relpos": ("test_vit_relpos", 32),
    "vitamin": ("vitamin_small_224", 32),
    "volo": ("volo_d1_224", 32),
    "vovnet": ("ese_vovnet19b_dw", 32),
    "xception": ("legacy_xception", 32),
    "xception_aligned": ("xception41p", 32),
    "xcit": ("xcit_nano_12_p8_224", 32),
}


@pytest.mark.parametrize("module", FAMILIES)
def test_a_student_of_any_timm_family_is_exported_as_timms_own(module):
    """`volo` alone cannot be: it adds the largest of another classifier's outputs over all tokens."""
    name, size = FAMILIES[module]
    torch.manual_seed(0)
    student, _, record = make_student(f"timm/{name}", TEACHER, embedding_dim=10, image_size=size, pretrained=False)
    for layer in student.eval().modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.8, 1.2)
    images = MODULE.pictures(3, Preprocess.from_dict(record["preprocess"]))
    alone = student.model.standalone(student.behind, record, images)
    assert ("local-dir" in alone.code) == (module != "volo")
    with torch.no_grad():
        found, expected = alone.network(images), student(images)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_every_timm_module_of_moderate_size_is_among_them():
    too_large = {
        "beit",
        "deepseek_vit",
        "gemma4_vit",
        "inception_resnet_v2",
        "inception_v4",
        "mobilenetv5",
        "naflexvit",
        "nasnet",
        "pnasnet",
        "qwen3_vit",
        "vgg",
        "vision_transformer_sam",
    }
    assert set(timm.list_modules()) <= {*FAMILIES, *too_large}


def test_a_large_embedding_is_judged_by_its_length(make_run, tmp_path):
    """Of one with norm 10,000 and more, float32 rounds by more than 1e-4, and by 1e-7 of its length."""
    run = make_run()
    weights = load_file(run.path / "student.safetensors")
    weights["projection.weight"] *= 1e6
    save_file(weights, run.path / "student.safetensors")
    student = load_encoder(f"run:{run.path}")
    assert student.module(MODULE.pictures(5, student.preprocess))["embedding"].norm(dim=1).min() > 1e4
    assert export(run, tmp_path / "large", format="onnx").max_difference < 1e-5


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_preprocessing_in_the_graph_is_pillows_to_two_levels(interpolation, mode):
    rng = np.random.default_rng(0)
    for resize, crop, size in ((40, 36, 36), (64, 56, 16), (32, 32, 48), (48, 48, 33)):
        like = Preprocess(resize=resize, crop=crop, size=size, interpolation=interpolation, mode=mode)
        for width, height in ((60, 40), (33, 97), (200, 150), (24, 24), (31, 20)):
            picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            expected = like.render(picture, like.draw(picture.size, Views(), "picture", 0)).astype(int)
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()[None]
            found = Preprocessed(torch.nn.Identity(), like).square(pixels)[0].permute(1, 2, 0).numpy()
            assert np.abs(found - expected).max() <= 2  # a level of the first pass is more than one in the second
            assert (found != expected).mean() < 0.05


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_with_its_preprocessing_takes_images_of_any_size(make_run, tmp_path, precision):
    run = make_run()
    exported = export(run, tmp_path / "out", format="onnx", precision=precision, with_preprocessing=True)
    session = onnxruntime.InferenceSession(exported.path / "model.onnx")
    student = load_encoder(f"run:{run.path}")
    for width, height in ((80, 45), (45, 80), (32, 32), (37, 33)):
        images = pixels(2, height, width)
        rendered = [
            student.preprocess.render(Image.fromarray(each.numpy()), TEACHER.draw((width, height), Views(), "", 0))
            for each in images
        ]
        expected = student.encode(torch.from_numpy(np.stack(rendered)))["embedding"].numpy()
        (found,) = session.run(None, {"pixels": images.numpy()})
        cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosine.min() > 0.9995


def test_a_timm_student_is_a_model_of_timms_own_hub_layout(exports):
    model = timm.create_model(f"local-dir:{exports['timm transformer'][0].path}", pretrained=True)
    assert (model.num_classes, model.patch_embed.patch_size, model.patch_embed.img_size) == (10, (8, 8), (32, 32))
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["interpolation"], config["crop_pct"]) == ((3, 32, 32), "bilinear", 0.9)
    assert (config["mean"], config["std"]) == ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


def test_modules_of_the_users_own_and_open_clip_say_how_they_are_built(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_student.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.AvgPool2d(9), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    export(make_run("own_student:make"), tmp_path / "out", trust_code=True)
    assert "from own_student import make" in code_blocks(tmp_path / "out" / "README.md")[0]
    assert "The module `own_student` is your own code" in (tmp_path / "out" / "README.md").read_text()
    shutil.copy(tmp_path / "own_student.py", tmp_path / "out")
    script = BLOCKED + "import torch\ntorch.hub.load('out', 'student', source='local')(torch.zeros(1, 3, 36, 36))"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
    export(make_run("open_clip/ViT-S-32-alt", image_size=32, name="clip"), tmp_path / "clip-out")
    assert "open_clip.create_model(" in code_blocks(tmp_path / "clip-out" / "README.md")[0]


def test_an_onnx_file_says_what_it_takes(exports):
    exported = exports["transformer in ONNX"][0]
    assert exported.max_difference <= 1e-4
    model = onnx.load(exported.path / "model.onnx")
    batch, *rest = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [dim.dim_value for dim in rest] == [3, 32, 32]
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert Preprocess.from_dict(json.loads(properties["preprocess"])).size == 32
    assert properties["teacher"] == "timm/resnet18.a1_in1k"


def test_the_cards_preprocessing_is_the_encoders(make_run, tmp_path):
    """To within the rounding that the card tells of; here the crop falls on whole pixels."""
    export(make_run(), tmp_path / "out")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    names = {}
    exec(code_blocks(tmp_path / "out" / "README.md")[1], names)
    preprocess = Preprocess.from_dict(json.loads((tmp_path / "run" / "student.json").read_text())["preprocess"])
    view = TEACHER.draw(picture.size, Views(count=1, augment="none"), "picture", 0)
    pixels = preprocess.render(decode((tmp_path / "picture.png").read_bytes()), view)
    expected = preprocess.to_model(torch.from_numpy(pixels[None].copy()))
    torch.testing.assert_close(names["pixels"](picture), expected, atol=0.02, rtol=0)


def test_the_card_says_who_taught_it_on_what_and_how_well(make_run, tmp_path):
    result = {
        "command": "knn",
        "inputs": {},
        "parameters": {"temperature": 0.07},
        "metrics": {"top1@20": {"value": 0.8125, "ci95": [0.8, 0.825]}, "top5@20": {"value": 1.0, "ci95": None}},
        "versions": {},
    }
    (tmp_path / "knn.json").write_text(json.dumps(result))
    export(make_run(), tmp_path / "out", results=[tmp_path / "knn.json"])
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "| teacher | timm/resnet18.a1_in1k, fingerprint `abc123` |",
        "| data | digits:train: 5 images, 0 failed and left out |",
        "| trained on | 4 images, 1 held out; the plain view only |",
        "| method | tintem |",
        "mapping_steps = 7",
        "| holdout/gram_pearson | 0.75 |",
        "`evalsuite knn` (temperature 0.07):",
        "| top1@20 | 0.8125 | 0.8000–0.8250 |",
        "timm records `apache-2.0` for timm/resnet18.a1_in1k.",
    ):
        assert said in card
    assert str(tmp_path) not in card


def test_data_of_a_store_that_is_gone(make_run, tmp_path):
    run = make_run()
    shutil.rmtree(tmp_path / "teacher.zarr")
    export(run, tmp_path / "out")
    assert "digits:train: its store can no longer be read" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_student_of_a_checkpoint_can_be_exported(train, tmp_path, ema):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", ema=ema, progress=interrupt_at("training", STEPS - 1))
    with pytest.raises(ValueError, match="holds no finished student"):
        export(tmp_path / "run", tmp_path / "out")
    folder = export(tmp_path / "run", tmp_path / "out", unfinished=True).path
    newest = torch.load(Run(tmp_path / "run").checkpoints[-1], weights_only=True)
    student = open_student("tiny", embedding_dim=STUDENT, image_size=16)
    student.load_state_dict(newest["ema" if ema else "student"])
    names = {}
    exec(code_blocks(folder / "README.md")[0].replace('folder = "."', f"folder = {str(folder)!r}"), names)
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(names["model"](images), student.eval()(images))
    assert f"| unfinished | the checkpoint of step {newest['step']} |" in (folder / "README.md").read_text()


def test_a_run_without_a_checkpoint_has_nothing_to_export(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint that a student can be made from"):
        export(tmp_path / "run", tmp_path / "out", unfinished=True)
    assert not (tmp_path / "out").exists()


# -- refusals ---------------------------------------------------------------------------------------------


def test_nothing_is_left_when_the_exported_model_differs(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(MODULE.LARGEST_DIFFERENCE, ("safetensors", "fp32"), -1.0)
    run = make_run()
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match=r"the safetensors model differs from the student by .*; nothing was kept"):
        export(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_cannot_be_exported_is_refused_before_anything_is_written(make_run, tmp_path):
    run = make_run()
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.toml").write_text("")
    (tmp_path / "bad.json").write_text('{"command": "knn"}')
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, message in (
        ({"run": tmp_path / "unfinished"}, "holds no finished student .*; finish it with `distill fit … --resume`"),
        ({"run": tmp_path / "nowhere"}, "holds no finished student .*; make one with"),
        ({"format": "pickle"}, "unknown format 'pickle'; known: safetensors, onnx"),
        ({"precision": "int4"}, "unknown precision 'int4'; known: fp32, fp16, int8"),
        ({"precision": "int8"}, "int8 is for ONNX files; give format onnx"),
        ({"precision": "int8", "format": "onnx"}, "precision int8 and a calibration .* need each other"),
        ({"format": "onnx", "calibration": Calibration(corpus="digits:test")}, "need each other"),
        (
            {"precision": "int8", "format": "onnx", "calibration": Calibration(corpus=str(tmp_path / "empty"))},
            "no images",
        ),
        ({"with_preprocessing": True}, "preprocessing can be put into ONNX files only; give format onnx"),
        ({"out": tmp_path / "run"}, "exists; choose another name or remove it"),
        ({"results": [tmp_path / "bad.json"]}, r"bad\.json: not a result file \(KeyError\)"),
        ({"results": [tmp_path / "none.json"]}, r"none\.json: not a result file \(FileNotFoundError\)"),
    ):
        with pytest.raises(ValueError, match=message):
            export(**{"run": run, "out": tmp_path / "out", **arguments})
        assert {path.name for path in tmp_path.iterdir()} == before

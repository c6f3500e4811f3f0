"""An exported student in a process that has no featcache gives what the student gives."""

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image

from distill.run import Run
from distill.students import make_student
from featcache.arrays import write_store
from featcache.encoder import load_encoder, normalise
from featcache.preprocess import Preprocess
from featcache.views import Views, decode, render

MODULE = importlib.import_module("distill.export")  # the package's attribute of that name is the function
export = MODULE.export
TEACHER = Preprocess(resize=40, crop=36, size=36, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
VIT = {"spec": "timm/vit_tiny_patch16_224", "image_size": 32, "patch_size": 8}
BLOCKED = "import sys\nfor name in ('featcache', 'distill', 'evalsuite', 'cli'): sys.modules[name] = None\n"


def make_run_in(folder, spec="tiny", embedding_dim=10, image_size=None, patch_size=None, name="run"):
    """A finished run whose student's weights are random, norms' statistics too."""
    torch.manual_seed(0)
    student, _, record = make_student(
        spec, TEACHER, embedding_dim=embedding_dim, image_size=image_size, patch_size=patch_size, pretrained=False
    )
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    if not (folder / "teacher.zarr").exists():
        write_store(folder / "teacher.zarr", np.ones((5, 4)))
    run = Run(folder / name)
    config = {"student": spec, "method": "tintem", "epochs": 2, "method_options": {"mapping_steps": 7}}
    stores = {"store": str(folder / "teacher.zarr"), "corpus": "digits:train", "teacher": "abc123"}
    run.open(config | stores, resume=False)
    run.log([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "holdout/gram_pearson": 0.75}])
    trained_on = {"samples": 4, "failed": 0, "held_out": 1, "views": "the plain view only"}
    made = {"method": "tintem", "teacher": "timm/resnet18.a1_in1k", "trained_on": trained_on}
    run.finish(student.state_dict(), record | made)
    return run


@pytest.fixture
def make_run(tmp_path):
    return functools.partial(make_run_in, tmp_path)


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def without_featcache(folders):
    """What the code in each folder's card makes of that folder's `images.npy`, in one process without this project."""
    script = BLOCKED + "import os, numpy as np, torch\n"
    for folder in folders:
        script += f"os.chdir({str(folder)!r})\n" + code_blocks(folder / "README.md")[0]
        script += (
            "with torch.no_grad():\n"
            "    np.save('embedding.npy', np.asarray(model(torch.from_numpy(np.load('images.npy')))))\n"
        )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
    return [torch.from_numpy(np.load(folder / "embedding.npy")) for folder in folders]


EXPORTS = {
    "tiny": {"spec": "tiny"},
    "tiny without projection": {"spec": "tiny", "embedding_dim": None},
    "timm convnet": {"spec": "timm/resnet10t", "image_size": 64},
    "timm transformer": VIT,
    "timm transformer without projection": {**VIT, "embedding_dim": None},
    "timm with two classifiers": {"spec": "timm/deit_tiny_distilled_patch16_224", "image_size": 32},
    "transformer in ONNX": {**VIT, "format": "onnx"},
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Of each: what `export` says of it, what its own code gives in a bare process, what the student gives."""
    folder = tmp_path_factory.mktemp("exports")
    exported, expected = {}, {}
    for number, (name, given) in enumerate(EXPORTS.items()):
        format = given.get("format", "safetensors")
        run = make_run_in(
            folder, **{key: value for key, value in given.items() if key != "format"}, name=f"run{number}"
        )
        exported[name] = export(run, folder / f"out{number}", format=format)
        student = load_encoder(f"run:{run.path}")
        images = MODULE.pictures(7, student.preprocess)
        np.save(exported[name].path / "images.npy", images.numpy())
        expected[name] = student.module(images)["embedding"]
    found = without_featcache([each.path for each in exported.values()])
    return {name: (exported[name], embedding, expected[name]) for name, embedding in zip(EXPORTS, found, strict=True)}


@pytest.mark.parametrize("name", EXPORTS)
def test_the_cards_own_code_gives_what_the_student_gives_without_featcache(exports, name):
    exported, found, expected = exports[name]
    onnx = "ONNX" in name
    assert exported.files == (
        ("README.md", "model.onnx") if onnx else ("README.md", "config.json", "model.safetensors")
    )
    torch.testing.assert_close(found, expected, atol=1e-4 if onnx else 1e-6, rtol=0 if onnx else 1e-6)


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
    export(make_run("own_student:make"), tmp_path / "out")
    assert "from own_student import make" in code_blocks(tmp_path / "out" / "README.md")[0]
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
    view = Views(count=1, augment="none").draw(picture.size, TEACHER, "picture", 0)
    pixels = render(decode((tmp_path / "picture.png").read_bytes()), view, preprocess)
    expected = normalise(torch.from_numpy(pixels[None].copy()), preprocess)
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


# -- refusals ---------------------------------------------------------------------------------------------


def test_nothing_is_left_when_the_exported_model_differs(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(MODULE.LARGEST_DIFFERENCE, "safetensors", -1.0)
    run = make_run()
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match=r"the safetensors model differs from the student by .*; nothing was kept"):
        export(run, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_a_killed_export_left_is_replaced(make_run, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "junk").write_text("")
    assert "junk" not in export(make_run(), tmp_path / "out").files
    assert not (tmp_path / "out.partial").exists()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(make_run, tmp_path):
    run = make_run()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.toml").write_text("")
    (tmp_path / "bad.json").write_text('{"command": "knn"}')
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, message in (
        ({"run": tmp_path / "unfinished"}, "holds no finished student .*; finish it with `distill fit … --resume`"),
        ({"run": tmp_path / "nowhere"}, "holds no finished student .*; make one with"),
        ({"format": "pickle"}, "unknown format 'pickle'; known: safetensors, onnx"),
        ({"out": tmp_path / "run"}, "exists; choose another name or remove it"),
        ({"results": [tmp_path / "bad.json"]}, r"bad\.json: not a result file \(KeyError\)"),
        ({"results": [tmp_path / "none.json"]}, r"none\.json: not a result file \(FileNotFoundError\)"),
    ):
        with pytest.raises(ValueError, match=message):
            export(**{"run": run, "out": tmp_path / "out", **arguments})
        assert {path.name for path in tmp_path.iterdir()} == before

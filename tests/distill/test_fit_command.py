"""`distill fit` at the command line: several stores, what it says, config files, and settings that are not flags."""

import json
import sys
from types import SimpleNamespace

import pytest

import featcache_cli.distill
import featcache_cli.screen
from distill.methods import load_method
from distill.training.config import FitConfig, method_options
from distill.training.run import Run
from featcache.extraction.extract import extract
from featcache.plugins import plugin_names
from featcache_cli import programs
from featcache_cli.distill import METHOD, _described


@pytest.fixture
def stores(tmp_path, make_images, make_teacher):
    """Two folders of 12 and 8 images, one of them broken, and their stores: flags for `distill fit`."""
    flags = []
    for name, count in (("a", 12), ("b", 8)):
        folder = make_images(tmp_path / name, count, seed=count)
        if name == "b":
            (folder / "003.png").write_bytes(b"no image")
        extract(str(folder), make_teacher(), tmp_path / f"{name}.zarr", device="cpu", precision="fp32")
        flags.append(f"--store {tmp_path / name}.zarr --corpus {folder}")
    return " ".join(flags)


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setattr(featcache_cli.screen.screen, "width", 400)
    yield lambda line: _run(line, monkeypatch, capsys)
    featcache_cli.screen.screen.quiet = False


def _run(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as stopped:
        programs.run_distill()
    out, err = capsys.readouterr()
    return SimpleNamespace(code=stopped.value.code or 0, out=out, err=err)


def test_stores_repeat_with_their_corpora(stores, command, tmp_path):
    settings = "--epochs 2 --batch-size 5 --set holdout=0.25 --set method=proteus --set views=student"
    done = command(f"distill fit {stores} --student tiny --out {tmp_path / 'run'} {settings} --json -")
    assert done.code == 0, done.err
    assert "14 samples, 1 failed rows left out, 5 held out for evaluation" in done.err
    assert "the teacher's plain view against views of the student's own (colours changed, nothing moved)" in done.err
    assert "4 steps" in done.err
    assert "held-out samples: gram_pearson" in done.err
    said = json.loads(done.out)
    assert said["config"]["store"] == [str(tmp_path / f"{name}.zarr") for name in "ab"]
    assert said["config"]["views"] == "student"
    again = command(f"distill fit --config {tmp_path / 'run' / 'config.toml'} --out {tmp_path / 'again'}")
    assert again.code == 0, again.err
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_settings_of_the_process_are_not_of_the_run(stores, command, tmp_path):
    line = f"distill fit {stores} --student tiny --out {tmp_path / 'run'} --method proteus --epochs 1 --batch-size 5"
    done = command(f"{line} --set checkpoint_minutes=0.5")
    assert done.code == 0, done.err
    assert "checkpoint_minutes" not in Run(tmp_path / "run").config
    refused = command(f"{line} --set checkpoint_minute=1")
    assert refused.code == 2
    assert "did you mean checkpoint_minutes" in refused.err
    refused = command(f"{line} --set trackers=nowhere")
    assert refused.code == 2
    assert "unknown tracker 'nowhere'" in refused.err


def test_another_process_of_the_group_says_nothing(stores, command, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "run"
    done = command(
        f"distill fit {stores} --student tiny --out {out} --method proteus --epochs 1 --batch-size 5 --json -"
    )
    assert (done.code, done.out, done.err) == (0, "", "")


FEW = "--student tiny --method mse --epochs 1 --batch-size 5"


@pytest.fixture
def run_folder(stores, command, tmp_path):
    """A finished run of mse with an option of its own."""
    assert command(f"distill fit {stores} {FEW} --set head=mlp --out {tmp_path / 'run'}").code == 0
    return tmp_path / "run"


def config_of(command, line):
    """The `config.toml` of `distill fit` with these words."""
    done = command(f"distill fit {line} --json -")
    assert done.code == 0, done.err
    return json.loads(done.out)["config"]


@pytest.mark.parametrize(
    ("text", "value"), [("False", False), ("TRUE", True), ("false", False), ("0.5", 0.5), ("a", "a")]
)
def test_set_reads_toml_and_pythons_booleans(text, value):
    given = {}
    featcache_cli.distill._set(given, f"compile={text}")
    assert given == {"compile": value}


def test_none_is_a_word_where_an_option_takes_words():
    given = {}
    featcache_cli.distill._set(given, "own=none")
    assert given == {"method_options": {"own": "none"}}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("epochs", "--set takes KEY=VALUE"),
        ("epochs=", "--set takes KEY=VALUE"),
        ("warmup_epochs=None", "None is no value; leave the setting out for its default"),
        ("mapping=sne", "method mse has no such setting; it is an option of centred, landmarks, tintem"),
        ("heat=mlp", "method mse has no such setting; did you mean head"),
    ],
)
def test_set_refuses_with_the_remedy(command, setting, said):
    refused = command(f"distill fit --store t.zarr --out r --student tiny --method mse --set {setting}")
    assert refused.code == 2
    assert refused.err.startswith(f"error: --set {setting}: ")
    assert said in refused.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"epochs = 1\nfoo = 3", "foo: no such setting; known: "),
        (b"epoch = 1", "epoch: no such setting; did you mean epochs"),
        (b"store = 3", "store = 3: give a path"),
        (b"method_options = 3", "method_options = 3: give a table"),
        (b"epochs = = 1", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        (None, "no such file"),
    ],
)
def test_a_config_file_that_is_none_is_refused_by_name(command, tmp_path, text, said):
    file = tmp_path / "c.toml"
    if text is not None:
        file.write_bytes(text)
    refused = command(f"distill fit --config {file} --store t.zarr --out r --student tiny")
    assert refused.code == 2
    assert refused.err.startswith(f"error: {file}: {said}")


def test_resume_takes_all_from_the_folder_and_says_when_it_was_finished(run_folder, command):
    (run_folder / "student.json").unlink()
    resumed = command(f"distill fit --resume --out {run_folder}")
    assert resumed.code == 0, resumed.err
    assert "images/s" in resumed.err
    again = command(f"distill fit --resume --out {run_folder} --epochs 1 --set head=mlp")
    assert again.code == 0, again.err
    assert "finished before" in again.err
    assert "images/s" not in again.err
    for changed, said in (("--epochs 2", "epochs: 1 there, 2 here"), ("--set head=linear", "'head': 'linear'}")):
        refused = command(f"distill fit --resume --out {run_folder} {changed}")
        assert refused.code == 2
        assert "holds a run with another configuration" in refused.err
        assert said in refused.err


def test_another_method_leaves_the_files_options_behind(run_folder, command, tmp_path):
    base = f"--config {run_folder / 'config.toml'} --out"
    assert config_of(command, f"{base} {tmp_path / 'same'} --seed 1")["method_options"] == {"head": "mlp"}
    other = config_of(
        command, f"{base} {tmp_path / 'other'} --method tintem --set mapping=spectral --set embedding_dim=4"
    )
    assert (other["method"], other["method_options"]) == ("tintem", {"mapping": "spectral"})
    third = config_of(command, f"{base} {tmp_path / 'third'} --set method=proteus")
    assert (third["method"], third["method_options"]) == ("proteus", {})


def test_what_followed_from_another_setting_follows_again(run_folder, command, tmp_path):
    """Not a warm-up of a hundredth of the epochs where ten times as many are asked for."""
    base = f"--config {run_folder / 'config.toml'} --out"
    kept = config_of(command, f"{base} {tmp_path / 'kept'} --seed 1")
    assert (kept["epochs"], kept["warmup_epochs"]) == (1, 0.1)
    other = config_of(command, f"{base} {tmp_path / 'other'} --epochs 3 --batch-size 4")
    assert other["warmup_epochs"] == pytest.approx(0.3)
    assert other["lr"] == pytest.approx(3e-3 * (4 / 256) ** 0.5)
    sgd = config_of(
        command, f"{base} {tmp_path / 'sgd'} --set optimizer=sgd --set schedule=step --set milestones=[0.5]"
    )
    assert (sgd["lr"], sgd["weight_decay"], sgd["warmup_epochs"]) == (0.1 * kept["batch_size"] / 128, 5e-4, 0.0)
    own = f"{base} {tmp_path / 'own'} --lr 0.01 --set warmup_epochs=0.5"
    assert config_of(command, own)["lr"] == 0.01
    of_own = f"--config {tmp_path / 'own' / 'config.toml'} --out {tmp_path / 'of_own'} --epochs 2 --batch-size 4"
    given = config_of(command, of_own)
    assert (given["lr"], given["warmup_epochs"]) == (0.01, 0.5)


def test_settings_lists_every_setting_and_option_with_its_default(command):
    listed = json.loads(command("distill settings --method tintem --json -").out)
    defaults = {name: each["default"] for name, each in listed["settings"].items()}
    assert {*FitConfig.__dataclass_fields__} - {*defaults} == {"method_options"}
    assert (defaults["epochs"], defaults["ema"], defaults["checkpoint_minutes"]) == (100, 0.0, 10.0)
    assert {*listed["options"]} == {*method_options("tintem")}
    assert listed["options"]["joint"]["default"] is False
    for name, each in (listed["settings"] | listed["options"]).items():
        assert each["what"], name
    shown = command("distill settings --method mse").out
    assert "min_lr = 0.0" in shown
    assert "options of method mse" in shown
    assert "head = " in shown


def test_the_method_that_help_names_is_the_default():
    assert FitConfig(student="tiny").method == METHOD


def test_a_folder_without_a_run_cannot_be_resumed(command, tmp_path):
    refused = command(f"distill fit --resume --out {tmp_path / 'nowhere'}")
    assert refused.code == 2
    assert "nowhere: holds no run to resume (config.toml); begin one with --store and --student" in refused.err


def test_options_of_the_method_are_flags(stores, command, tmp_path):
    """As --set gives them; in --help with what they are; another method's are refused with near names."""
    fit = f"distill fit {stores} --student tiny --epochs 1 --method rkd"
    done = command(f"{fit} --out {tmp_path / 'flags'} --no-such 1")
    assert (done.code, "--no-such" in done.err) == (2, True)
    done = command(f"{fit} --out {tmp_path / 'flags'} --angle-batch 5 --normalise false --match=0.5")
    assert done.code == 0, done.err
    assert Run(tmp_path / "flags").config["method_options"] == {"angle_batch": 5, "normalise": False, "match": 0.5}
    assert "angle_batch must be a whole number" in command(f"{fit} --out {tmp_path / 'x'} --angle-batch 5.5").err
    said = " ".join(command("distill fit --method=rkd --help").out.split())
    assert "Options of method rkd" in said
    assert all(f"--{option.replace('_', '-')}" in said for option in method_options("rkd"))
    assert "--angle-batch" not in command("distill fit --help").out


@pytest.mark.parametrize("name", plugin_names("distill.methods"))
def test_every_option_of_a_method_is_described(name):
    """Its own docstring does, or that of the method which it extends."""
    options = _described(load_method(name))
    assert [
        key for key, each in options.items() if key not in ("teacher_dim", "student_dim") and not each["what"]
    ] == []


def test_an_option_says_what_the_nearest_docstring_does():
    ours, theirs = (_described(load_method(name)) for name in ("centred", "landmarks"))
    assert ours["own"] == theirs["own"]
    assert ours["temperatures"]["default"] == (0.1, 0.2) != theirs["temperatures"]["default"]
    assert ours["temperatures"]["what"] != theirs["temperatures"]["what"]

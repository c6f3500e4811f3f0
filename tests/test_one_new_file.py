"""One new file is a plugin: of every kind, a module and an entry point of somebody else's package are all it takes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from warm import python_path

import featcache_cli.screen
from distill.testing import MappingContract, MethodContract
from evalsuite.testing import DetectorContract, EvaluatorContract
from featcache.store import open_store
from featcache.testing import (
    CorpusContract,
    EngineContract,
    FormatContract,
    InputContract,
    ModelContract,
)
from featcache_cli import programs

FILES = {
    "featcache.corpora": (
        "stripes",
        '''
"""`stripes:COUNT`: pictures with stripes along or across."""
import io
import numpy as np
from PIL import Image

class Stripes:
    class_names = ["along", "across"]

    def __init__(self, count):
        self.spec, self.ids = f"stripes:{count}", [f"{i:03d}" for i in range(count)]

    def __len__(self):
        return len(self.ids)

    def label(self, i):
        return i % 2

    def read(self, i):
        lines = np.random.default_rng(i).integers(0, 256, (16, 1, 3), np.uint8).repeat(20, 1)
        file = io.BytesIO()
        Image.fromarray(lines if i % 2 == 0 else lines.transpose(1, 0, 2)).save(file, "PNG")
        return file.getvalue()

def open_corpus(rest):
    if not rest.isdecimal():
        raise ValueError(f"stripes:{rest}: give a count")
    return Stripes(int(rest))
''',
    ),
    "featcache.models": (
        "acme",
        '''
"""`acme/WIDTH`: one linear layer."""
import torch
from torch import nn
from featcache.models import Model
from others_negatives import Negatives

class Acme(Model):
    output = "the only layer"

    def __init__(self, width):
        super().__init__()
        self.spec = f"acme/{width}"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, int(width)))
        self.input, self.fields = Negatives(resize=8, crop=8, size=8), {"embedding": (int(width),)}
        self.image_size, self.record = 8, {"architecture": self.spec}

    def making(self, record):
        width = record["architecture"][5:]
        return f"\\nbody = nn.Sequential(nn.Flatten(), nn.Linear(192, {width}))"

def open_model(rest: str) -> Acme:
    return Acme(rest)

def make_model(rest, variant):
    variant.refuse_all_but_size(f"acme/{rest}")
    return Acme(rest)

def rebuild_model(rest, record):
    return Acme(rest)
''',
    ),
    "featcache.inputs": (
        "negatives",
        '''
"""Images, white for black."""
from featcache.inputs.images import Preprocess

class Negatives(Preprocess):
    def to_dict(self):
        return super().to_dict() | {"input": "negatives"}

    def to_model(self, rendered):
        return -super().to_model(rendered)

def open_input(record):
    return Negatives.from_dict({key: value for key, value in record.items() if key != "input"})
''',
    ),
    "featcache.engines": (
        "backwards",
        '''
"""The last span first."""
from featcache.engines import Engine

class Backwards(Engine):
    def map(self, spans, work):
        for span in reversed(spans):
            yield from work([span])

def open_engine(rest):
    return Backwards()
''',
    ),
    "featcache.interchange": (
        "npz",
        '''
"""npz: one archive, a file an array."""
import numpy as np
from featcache.interchange import Checksums, Format, manifest_text, of_arrays, parse_manifest

class Npz(Format):
    reads = "a .npz with `embedding`"

    def recognises(self, path, head):
        return head.startswith(b"PK")

    def write(self, store, units, out, *, as_is):
        sums, units = Checksums(), list(units)
        for unit in units:
            sums.update(unit)
        whole = {name: np.concatenate([unit[name] for unit in units]) for name in units[0]}
        whole = {name: array.astype(str) if array.dtype == object else array for name, array in whole.items()}
        with out.open("wb") as file:
            np.savez(file, manifest=manifest_text(store.manifest, "npz", sums.to_dict()), **whole)

    def read(self, path):
        with np.load(path) as file:
            arrays = dict(file)
        manifest = parse_manifest(str(arrays.pop("manifest")), path) if "manifest" in arrays else None
        arrays = {name: array.astype(object) if array.dtype.kind == "U" else array for name, array in arrays.items()}
        return of_arrays(path, arrays, manifest)
''',
    ),
    "distill.mappings": (
        "reversal",
        '''
"""The last dimensions first, turned."""
import numpy as np
from distill.mappings import FeatureMapping, Frozen, checked_rows

class Reversal(FeatureMapping):
    def __init__(self, dim, *, seed=0):
        self.dim, self.seed = dim, seed

    def fit(self, store, progress=None):
        rows = checked_rows(store, self.dim)
        if self.dim > rows.embedding_dim:
            self._lift(rows, self.seed)
        else:
            self.weight_ = np.eye(rows.embedding_dim, dtype=np.float32)[::-1][: self.dim].copy()
        return self

    def module(self):
        return Frozen(self.weight_)
''',
    ),
    "distill.methods": (
        "nearness",
        '''
"""Distances as they are."""
from torch import nn
from distill.methods import Method

class Nearness(Method):
    """The distance to the teacher through a linear head, to a power of one's own.

    Args:
        power: of the distance.
    """

    def __init__(self, teacher_dim, student_dim, *, power: float = 2.0):
        super().__init__()
        self.head, self.power = nn.Linear(student_dim, teacher_dim), power

    def loss(self, student, batch):
        apart = (self.head(student["embedding"]) - batch["embedding"]).square().mean(dim=-1)
        return {"distance": (apart ** (self.power / 2)).mean()}
''',
    ),
    "evalsuite.detectors": (
        "centre",
        '''
"""Distance from the middle."""
import numpy as np
from evalsuite.detectors import Detector

class Centre(Detector):
    power: float = 1.0

    def fit(self, bank):
        self.mean_ = np.concatenate(list(bank.blocks())).mean(0)
        return self

    def score(self, embedding):
        return np.linalg.norm(embedding - self.mean_, axis=1).astype(np.float64) ** self.power
''',
    ),
    "evalsuite.evaluators": (
        "spread",
        '''
"""How far rows are apart."""
from dataclasses import dataclass
from evalsuite.evaluators import Evaluator, Store, option, store

@dataclass(frozen=True, kw_only=True)
class Spread(Evaluator):
    """The standard deviation of all values."""

    summary = "How far rows are apart."
    rows: Store = store("The rows.")
    scale: float = option(1.0, "What it is multiplied with.")

    def run(self):
        import numpy as np
        from evalsuite.result import Metric, Result
        from featcache.rows import Rows

        rows = Rows.of(self.rows)
        metrics = {"spread": Metric(self.scale * float(np.concatenate(list(rows.blocks())).std()))}
        return Result("spread", {"rows": rows.record()}, {"scale": self.scale}, metrics)
''',
    ),
}
"""By entry-point group, a plugin's name and its file."""

NAMES = {group: name for group, (name, _) in FILES.items()}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Somebody else's package, as it is installed."""
    folder = tmp_path_factory.mktemp("site")
    entries = []
    for group, (name, text) in FILES.items():
        (folder / f"others_{name}.py").write_text(text.lstrip())
        entries.append(f"[{group}]\n{name} = others_{name}\n")
    (folder / "others-1.dist-info").mkdir()
    (folder / "others-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1\n")
    (folder / "others-1.dist-info/entry_points.txt").write_text("\n".join(entries))
    return folder


@pytest.fixture(autouse=True)
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(featcache_cli.screen.screen, "width", 200)
    monkeypatch.setattr(featcache_cli.screen.results, "width", 200)


@pytest.fixture
def run(capsys, monkeypatch):
    """`run("featcache …")`: what a command printed, once it ended well."""

    def command(line, expected=0):
        program, *arguments = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            getattr(programs, f"run_{program}")()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == expected, said.err
        return said.out + said.err

    return command


def test_help_lists_the_names_of_every_kind(run, monkeypatch):
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    listed = {
        "featcache extract": ("featcache.corpora", "featcache.models", "featcache.engines"),
        "featcache export": ("featcache.interchange",),
        "featcache import": ("featcache.interchange",),
        "distill fit": ("distill.methods", "featcache.models"),
        "distill mapping": ("distill.mappings",),
        "distill settings": ("distill.methods",),
        "evalsuite ood": ("evalsuite.detectors",),
        "evalsuite robustness": ("featcache.corpora", "featcache.models", "evalsuite.detectors"),
        "evalsuite": ("evalsuite.evaluators",),
    }
    for command, groups in listed.items():
        said = run(f"{command} --help")
        assert all(NAMES[group] in said for group in groups), command


def test_help_imports_no_torch_and_no_plugin(site):
    check = (
        "import sys\nfrom featcache_cli import programs\nprogram = sys.argv[0] = sys.argv.pop(1)\n"
        "try:\n    getattr(programs, f'run_{program}')()\n"
        "except SystemExit:\n    assert not [name for name in sys.modules if name == 'torch' or name.startswith('others_')]\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", check, "featcache", "extract", "--help"],
        env={**os.environ, "PYTHONPATH": python_path(site), "TERMINAL_WIDTH": "200"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "stripes" in said.stdout


def test_a_methods_options_are_flags(run, monkeypatch):
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    said = run("distill fit --method nearness --help")
    assert "--power" in said
    assert "of the distance" in said.lower()
    assert "nearness" in run("distill methods")
    assert "power = 2.0" in run("distill settings --method nearness")


def test_an_evaluators_fields_are_flags(run):
    said = run("evalsuite spread --help")
    assert all(flag in said for flag in ("--rows", "--scale", "What it is multiplied with.", "--json"))


def test_commands_use_them(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("featcache extract stripes:24 --teacher acme/5 --engine backwards --device cpu --out t.zarr")
    store = open_store("t.zarr")
    assert (len(store), store.encoder_name, store.class_names) == (24, "acme/5", ["along", "across"])
    assert store.manifest.encoder.preprocess["input"] == "negatives"
    run("featcache extract mixed:8:stripes:24 --teacher acme/5 --device cpu --out mixed.zarr")

    run("featcache export t.zarr t.npz --format npz")
    run("featcache import t.npz back.zarr")
    assert open_store("back.zarr").manifest.sealed == store.manifest.sealed

    run(
        "distill fit --store t.zarr --corpus stripes:24 --student acme/4 --out runs/a --epochs 1 --device cpu "
        "--method nearness --power 1.5 --set batch_size=8"
    )
    assert "power = 1.5" in Path("runs/a/config.toml").read_text()
    run(
        "distill fit --store t.zarr --corpus stripes:24 --student acme/4 --out runs/b --epochs 1 --device cpu "
        "--method tintem --mapping reversal --set batch_size=8"
    )
    assert "reversal" in Path("runs/b/config.toml").read_text()
    assert "reversal" in run("distill mapping --store t.zarr --mapping reversal --dim 4")
    assert "input 'negatives': only plain images can be used here" in run("distill export runs/a student", expected=2)

    run("featcache extract stripes:24 --teacher run:runs/a --device cpu --out s.zarr")
    run(
        "evalsuite ood --id-train t.zarr --id-test back.zarr --far mixed=mixed.zarr --detector centre:power=2 "
        "--any-precision --json ood.json"
    )
    assert any(name.startswith("centre:power=2/") for name in json.loads(Path("ood.json").read_text())["metrics"])
    assert "spread" in run("evalsuite spread --rows s.zarr --scale 3 --json spread.json")
    assert json.loads(Path("spread.json").read_text())["parameters"] == {"scale": 3}
    run("evalsuite ood --id-train t.zarr --id-test back.zarr --far m=mixed.zarr --detector centre:power=x", expected=2)
    run("featcache extract stripes:x --teacher acme/5", expected=2)


class TestStripes(CorpusContract):
    spec = "stripes:5"


class TestAcme(ModelContract):
    name, teacher, student = "acme", "acme/5", "acme/5"


class TestNegatives(InputContract):
    name = "negatives"

    @property
    def example(self):
        from featcache.inputs import input_of

        return input_of(
            {"input": "negatives", "resize": 10, "crop": 8, "size": 6, "mean": [0.5] * 3, "std": [0.25] * 3}
        )


class TestBackwards(EngineContract):
    spec = "backwards"


class TestNpz(FormatContract):
    name = "npz"


class TestReversal(MappingContract):
    name, learns = "reversal", False


class TestNearness(MethodContract):
    name, options = "nearness", {"power": 1.5}


class TestCentre(DetectorContract):
    name = "centre"


class TestSpread(EvaluatorContract):
    name = "spread"

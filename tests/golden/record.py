"""Everything that the toolkit makes, from tiny inputs, as digests: recorded before a change, and compared after it.

    PYTHONPATH=CHECKOUT python tests/golden/record.py OUT.json

It uses the command line (`cli.py` of that checkout, in this process) and the names that the three packages export, and
nothing else, so that modules may move. `compare.py` says what differs between two recordings of one machine; features
and weights are other bits on another processor or with another torch.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import random
import re
import runpy
import shutil
import sys
import tarfile
import tempfile
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything reads them: another number of threads gives other bits, and tables are as wide as the screen.
os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file

import featcache

HERE = Path(__file__).parent
CHECKOUT = Path(featcache.__file__).parents[1]
SHARED = ["--device", "cpu", "--workers", "1"]
EXACT = [*SHARED, "--precision", "fp32"]
"""`--precision auto` is chosen by time, and so is not recorded."""

# -- what is left out, and why ----------------------------------------------------------------------------

VOLATILE = {
    "versions": "of Python and packages: a release of ours, or an update, is no change of what is made",
    "images_per_second": "time",
    "wait_share": "time",
    "wait": "time",
    "encode": "time",
    "write": "time",
    "seconds": "time",
}
"""Keys that are dropped wherever they stand in JSON and TOML."""
NAMES_ONLY = {
    r"(^|/)events\.out\.tfevents\.": "TensorBoard's: named after host, time and process, full of times",
    r"(^|/)checkpoints/": "pickled with the names of modules; what comes of resuming from them is recorded",
}
"""Files of which only the name is recorded."""
SAID = {
    r"[\d,.]+ (images|samples|rows)/s": "N /s",
    r"\(wait \d+%, encode \d+%, write \d+%\)": "(wait, encode, write)",
    r"^\| (images_per_second|wait_share) \| .*": r"| \1 | N |",
    r"\b[\d,.]+ (s|ms|seconds?|minutes?|min)\b": "N s",
    r"(events\.out\.tfevents\.)\S+": r"\1N",
    r"[\d.,]+ [KMGT]i?B free": "N free",
}
"""Of what commands print, and of model cards: times, rates, and the space on the disk."""

PROGRESS = "ETA N s"
"""The end of lines that are dropped: one is printed every 30 seconds, of what takes longer just now."""


def canonical(value: Any, here: str) -> Any:
    """JSON values without volatile keys, and without the folder that all was made in."""
    if isinstance(value, dict):
        return {key: canonical(each, here) for key, each in value.items() if key not in VOLATILE}
    if isinstance(value, list | tuple):
        return [canonical(each, here) for each in value]
    if isinstance(value, float) and value != value:
        return "nan"
    return plain(value, here) if isinstance(value, str) else value


def plain(text: str, here: str) -> str:
    """One line or a few, without folders, times and rates."""
    text = text.replace(here, "HERE").replace(str(CHECKOUT), "CHECKOUT")
    for pattern, instead in SAID.items():
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_like_json(path: Path) -> Any:
    """What a text file says, or None where it is no JSON, TOML or Markdown."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".toml":
        return tomllib.loads(path.read_text())
    return path.read_text().splitlines() if path.suffix in (".md", ".csv") else None


def onnx_bytes(path: Path) -> bytes:
    """The graph and its weights; its notes hold stack traces, so paths and line numbers of our code."""
    import onnx

    model = onnx.load(path)
    model.producer_version = model.doc_string = ""
    for part in (model.graph, *model.functions, *model.graph.node, *model.graph.value_info,
                 *model.graph.input, *model.graph.output, *model.graph.initializer,
                 *(node for function in model.functions for node in function.node)):  # fmt: skip
        part.doc_string = ""
        del part.metadata_props[:]
    return model.SerializeToString(deterministic=True)


def safetensors_bytes(path: Path) -> bytes:
    """The file, but for the order of its notes: safetensors keeps them in a hash map, and writes them in any order."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    return json.dumps(header).encode() + data[8 + length :]


EXACTLY = {".onnx": onnx_bytes, ".safetensors": safetensors_bytes}
"""What is digested of a file, where it is not the file as it is."""


def files_of(path: Path) -> Iterator[tuple[str, Path]]:
    found = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return ((path.name if path.is_file() else each.relative_to(path).as_posix(), each) for each in found)


def recorded(path: Path, here: str) -> dict[str, Any]:
    """Relative file → its SHA-256; and of text, what it says, whose digest then stands for the file's."""
    files, said = {}, {}
    for name, file in files_of(path):
        if only := next((pattern for pattern in NAMES_ONLY if re.search(pattern, name)), None):
            files[re.sub(r"(tfevents\.).*", r"\1N", name)] = f"not compared: {NAMES_ONLY[only].split(':')[0]}"
        elif (value := read_like_json(file)) is not None:
            said[name] = canonical(value, here)
            files[name] = digest(json.dumps(said[name]).encode())  # the order of keys counts
        else:
            files[name] = digest(EXACTLY.get(file.suffix, Path.read_bytes)(file))
    return {"files": files, "content": said}


# -- a recording ------------------------------------------------------------------------------------------


class Recorder:
    """Runs steps in the working folder `here` and keeps what they made, by name.

    Attributes:
        artefacts: name → `recorded`, or what a command printed and its exit code.
        paths: name → where it lies.
    """

    def __init__(self, here: Path, only: Callable[[str], bool] = lambda name: True):
        self.here, self.only = here, only
        self.artefacts: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}

    def keep(self, name: str, path: str | Path) -> None:
        place = self.here / path
        self.paths[name] = place
        if place.exists():
            self.artefacts[name] = recorded(place, str(self.here))
        else:
            self.artefacts[name] = {"missing": str(path)}

    def said(self, name: str, value: Any) -> None:
        self.artefacts[name] = {"files": {}, "content": {"": canonical(value, str(self.here))}}

    def run(self, name: str, program: str, *words: object) -> str:
        """`python cli.py PROGRAM WORDS…`; what it printed, and its exit code, are the artefact `NAME (said)`."""
        if not self.only(name):
            return ""
        seed()
        out, err, code = io.StringIO(), io.StringIO(), 0
        was = sys.argv
        sys.argv = ["cli.py", program, *map(str, words)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runpy.run_path(str(CHECKOUT / "cli.py"), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
        except Exception:
            code, _ = 99, err.write(traceback.format_exc())
        finally:
            sys.argv = was
        self.said(f"{name} (said)", {"code": code, "out": self._lines(out), "err": self._lines(err)})
        return out.getvalue()

    def call(self, name: str, function: Callable[[], Any]) -> Any:
        """The public API; an exception is recorded in words."""
        if not self.only(name):
            return None
        seed()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                return function()
        except Exception as error:
            self.said(f"{name} (said)", {"raised": f"{type(error).__name__}: {error}"})
            return None

    def _lines(self, text: io.StringIO) -> list[str]:
        said = plain(text.getvalue(), str(self.here)).splitlines()
        return [line.rstrip() for line in said if not line.endswith(PROGRESS)]


def seed() -> None:
    """No step depends on what the one before it drew."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# -- inputs -----------------------------------------------------------------------------------------------


def picture(number: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Large shapes and some grain, another for every number, and a colour of its class, `number % 3`."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 160, (size[1] // 4, size[0] // 4, 3)).repeat(4, 0).repeat(4, 1)
    coarse[..., number % 3] += 60
    return Image.fromarray((coarse + rng.integers(0, 30, coarse.shape)).astype(np.uint8))


def bmp(number: int, size: tuple[int, int] = (40, 36)) -> bytes:
    """Not compressed: the same bytes whatever libraries are installed, so the same content hash."""
    buffer = io.BytesIO()
    picture(number, size).save(buffer, "bmp")
    return buffer.getvalue()


def write_folder(folder: Path, numbers: range, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> None:
    for number in numbers:
        path = folder / classes[number % 3] / f"{number:03d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bmp(number, (40, 36) if number % 2 else (36, 44)))


def write_inputs(here: Path) -> None:
    shutil.copy(HERE / "golden_models.py", here)
    write_folder(here / "photos", range(24))
    write_folder(here / "more", range(16, 36))  # eight of them are of `photos`
    write_folder(here / "other", range(100, 112))
    write_folder(here / "broken", range(9))
    (here / "broken/bee/001.bmp").write_bytes(b"BM no image")
    (here / "broken/cat/notes.txt").write_text("passed over")
    rows = [["path", "label", "class"], *([f"photos/{name}", n, name[:3]] for n, name in enumerate(
        sorted(p.relative_to(here / "photos").as_posix() for p in (here / "photos").rglob("*.bmp"))[:7]))]  # fmt: skip
    with open(here / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    for shard in range(2):
        with tarfile.open(here / f"shard-{shard}.tar", "w") as tar:
            for number in range(6 * shard, 6 * shard + 6):
                for suffix, data in (("bmp", bmp(number)), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    write_torchvision(here)
    write_hugging_face(here)
    rng = np.random.default_rng(5)
    save_file({"weight": rng.normal(size=(3, 8)).astype(np.float32), "bias": np.zeros(3, np.float32)},
              here / "raw_head.safetensors")  # fmt: skip
    np.save(here / "text.npy", rng.normal(size=(3, 8)))
    np.save(here / "negatives.npy", rng.normal(size=(11, 8)))
    np.save(here / "foreign.npy", rng.normal(size=(9, 5)).astype(np.float32))


def write_torchvision(here: Path) -> None:
    """MNIST's files, small."""
    raw = here / "torchvision/MNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for split in ("train", "t10k"):
        header = np.array([0x803, 8, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            header + rng.integers(0, 256, (8, 28, 28), dtype=np.uint8).tobytes())  # fmt: skip
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, 8], ">i4").tobytes() + np.arange(8, dtype=np.uint8).tobytes())  # fmt: skip
    os.environ["TORCHVISION_ROOT"] = str(here / "torchvision")


def write_hugging_face(here: Path) -> None:
    try:
        import datasets
    except ImportError:
        return
    datasets.disable_progress_bars()
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["bee", "ant"])})
    images = [{"bytes": bmp(number), "path": None} for number in range(40, 46)]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1, 0, 1]}, features=kinds)
    table.save_to_disk(str(here / "hf"))


def write_weights(here: Path) -> None:
    """timm's smallest transformer and convnet, with random weights."""
    import timm

    for name in ("test_vit", "test_resnet"):
        torch.manual_seed(3)
        torch.save(timm.create_model(name, pretrained=False).state_dict(), here / f"{name}.pt")


def clusters(number: int, count: int, dim: int = 8, spread: float = 1.0) -> np.ndarray:
    """(count, dim) float32, row n near the centre of class n % 3."""
    centres = np.random.default_rng(9).normal(size=(3, dim))
    rows = np.random.default_rng(number).normal(size=(count, dim)) * spread
    return (rows + 2 * centres[np.arange(count) % 3]).astype(np.float32)


# -- the steps --------------------------------------------------------------------------------------------


def stores(at: Recorder) -> None:
    """Extractions of every corpus, field, view, precision and kept image."""

    def extract(
        name: str, corpus: str, *words: object, teacher: str = "golden_models:first", exact: bool = True
    ) -> None:
        flags = [*(EXACT if exact else SHARED), "--teacher", teacher, "--out", f"{name}.zarr"]
        at.run(f"store/{name}", "featcache", "extract", corpus, *flags, *words)
        if at.only(f"store/{name}"):
            at.keep(f"store/{name}", f"{name}.zarr")

    extract("folder", "photos")
    extract("fields", "photos", "--fields", "embedding,tokens,prefix_tokens,logits")
    extract("views", "photos", "--views", "3", "--augment", "rrc", "--crop-area", "0.6")
    extract("flip", "photos", "--views", "2", "--augment", "flip", "--fields", "embedding,tokens,prefix_tokens",
            "--pixels", "32")  # fmt: skip
    extract("rotate4", "photos", "--views", "4", "--augment", "rotate4")
    extract("raw-pixels", "photos", "--pixels", "16", "--pixels-format", "raw")
    extract("float32", "photos", "--dtype", "float32")
    for precision in ("bf16", "fp16", "bf16-autocast+channels_last", "fp32+channels_last"):
        extract(precision, "photos", "--precision", precision, exact=False)
    extract("batch-5", "photos", "--batch-size", "5")
    extract("reused", "more")  # eight rows from the store `folder`
    extract("from-pixels", "store:raw-pixels.zarr")
    extract("broken", "broken")
    extract("too-many", "broken", "--max-failures", "0")
    extract("table", "table.csv")
    extract("table-class", "table.csv@label=class")
    extract("wds", "wds:shard-{0..1}.tar")
    extract("mixed", "mixed:8:photos")
    extract("corrupted", "corrupted:gaussian_noise:3:photos")
    extract("torchvision", "torchvision:MNIST:test")
    extract("hf", "hf:hf")
    extract("digits", "digits:test", "--fields", "embedding")
    extract("other", "other")
    extract("vit", "photos", "--fields", "embedding,tokens,prefix_tokens,logits",
            teacher="timm/test_vit:test_vit.pt@size=32")  # fmt: skip
    extract("vit-layer", "photos", teacher="timm/test_vit:test_vit.pt@size=32@layer=-2@norm=true@pool=avg")
    extract("resnet", "photos", teacher="timm/test_resnet:test_resnet.pt@size=32")
    two = ["--teacher", "golden_models:first", "--teacher", "golden_models:second", "--out", "two-a.zarr", "--out",
           "two-b.zarr", "--overwrite"]  # fmt: skip
    at.run("store/two", "featcache", "extract", "other", *EXACT, *two, "--views", "2", "--augment", "flip")
    if at.only("store/two"):
        at.keep("store/two-a", "two-a.zarr")
        at.keep("store/two-b", "two-b.zarr")
    at.run("store/replaced", "featcache", "extract", "more", *EXACT, "--teacher", "golden_models:second", "--out",
           "replaced.zarr")  # fmt: skip
    at.run("store/replaced-again", "featcache", "extract", "photos", *EXACT, "--teacher", "golden_models:second",
           "--out", "replaced.zarr", "--overwrite")  # fmt: skip
    if at.only("store/replaced"):
        at.keep("store/replaced", "replaced.zarr")
    interrupted(at)
    for name in ("folder", "broken", "flip", "vit"):
        at.run(f"info/{name}", "featcache", "info", f"{name}.zarr", "--json", "-")
        at.run(f"verify/{name}", "featcache", "verify", f"{name}.zarr", "--json", "-")
    at.run("check", "featcache", "check", "folder.zarr", "reused.zarr", "broken.zarr", "--json", "-")


class Stopped(BaseException):
    """As if the process had been killed there."""


def interrupted(at: Recorder) -> None:
    """An extraction stopped after its first batch, and resumed: the store is that of `store/folder`."""
    if not at.only("store/resumed"):
        return

    def stop(progress: Any) -> None:
        if progress.done >= 8:
            raise Stopped

    def both() -> None:
        given = {"device": "cpu", "precision": "fp32", "workers": 1, "batch_size": 4}
        teacher = featcache.load_encoder("golden_models:second")
        with contextlib.suppress(Stopped):
            featcache.extract("photos", teacher, "resumed.zarr", progress=stop, **given)
        featcache.extract("photos", teacher, "resumed.zarr", **given)

    at.call("store/resumed", both)
    at.keep("store/resumed", "resumed.zarr")


def arrays(at: Recorder) -> None:
    """Stores of arrays: what evaluators read below, and what `write_store` chooses by itself."""
    names = ["ant", "bee", "cat"]

    def write(name: str, embedding: np.ndarray, **given: Any) -> None:
        at.call(f"arrays/{name}", lambda: featcache.write_store(f"{name}.zarr", embedding, **given))
        if at.only(f"arrays/{name}"):
            at.keep(f"arrays/{name}", f"{name}.zarr")

    for number, (name, count, spread) in enumerate((("train", 150, 1.0), ("test", 60, 1.0), ("shifted", 30, 1.4))):
        write(name, clusters(number, count, spread=spread), labels=np.arange(count) % 3, class_names=names,
              sample_ids=[f"{name}/{n}" for n in range(count)], per_chunk=40)  # fmt: skip
    for number, (name, spread) in enumerate((("near", 3.0), ("far", 6.0)), 10):
        write(name, clusters(number, 40, spread=spread), sample_ids=[f"{name}/{n}" for n in range(40)])
    for name, of, count in (("small-train", 0, 150), ("small-test", 1, 60)):
        project = np.random.default_rng(20).normal(size=(8, 4))
        write(name, (clusters(of, count) @ project).astype(np.float32), labels=np.arange(count) % 3, class_names=names,
              sample_ids=[f"{name[6:]}/{n}" for n in range(count)], fingerprint="student")  # fmt: skip
    write("near-small", clusters(12, 40, 4, 3.0), sample_ids=[f"near/{n}" for n in range(40)], fingerprint="student")
    write("failed", clusters(3, 12), failed={2: "no image", 7: "no image"}, logits=clusters(4, 12, 3))
    write("wide", 1e5 * clusters(5, 12), dtype="auto")
    write("two-views", clusters(6, 24).reshape(12, 2, 8), dtype="float32")


def interchange(at: Recorder) -> None:
    """Every format out and in again, of an extracted store and of arrays; and files of other programs."""
    for store in ("broken", "train", "vit"):
        for format, name in (("npy", "npy"), ("parquet", "x.parquet"), ("safetensors", "x.safetensors"),
                             ("clip-retrieval", "clip")):  # fmt: skip
            label = f"interchange/{store}/{format}"
            out = f"export-{store}-{name}"
            at.run(f"{label}/export", "featcache", "export", f"{store}.zarr", out, "--format", format)
            at.run(f"{label}/import", "featcache", "import", out, f"import-{store}-{format}.zarr")
            if at.only(label):
                at.keep(f"{label}/export", out)
                at.keep(f"{label}/import", f"import-{store}-{format}.zarr")
    at.run("interchange/foreign", "featcache", "import", "foreign.npy", "foreign.zarr", "--encoder", "theirs")
    if at.only("interchange/foreign"):
        at.keep("interchange/foreign", "foreign.zarr")


METHODS: dict[str, list[dict[str, Any]]] = {
    "tintem": [
        {"mapping_steps": 3},
        {"mapping": "spectral", "relation": 0.3},
        {"joint": True},
        {"tokens": True, "mapping_steps": 3},
        {"tokens": True, "joint": True, "relation": 0.3},
        *({"mapping": name} for name in ("identity", "orthogonal", "phi_s", "random_orthonormal", "spectral")),
        {"mapping_steps": 3, "mapping_start": "random", "mapping_layer_norm": True},
    ],
    "centred": [{"mapping": "spectral", "landmarks": 7}],
    "landmarks": [
        {"mapping_steps": 3},
        {"mapping": "spectral", "landmarks": 7, "own": '"none"'},
        {"mapping": "spectral", "tokens": True, "landmarks": 50, "weight": 1, "temperatures": "[0.02, 0.1]"},
    ],
    "proteus": [{}, {"tokens": True}],
    "cosine": [{}, {"head": "layernorm_linear"}],
    "mse": [{}, {"head": "mlp"}],
    "rkd": [{}, {"match": 1.0, "normalise": False, "angle_batch": 7}],
    "lightly_v1": [{}, {"queue": 50}],
}
"""As `tests/method_cases.py`, and every mapping."""
WAYS: dict[str, list[str]] = {
    "ema": ["ema=0.9"],
    "accumulate": ["accumulate=2"],
    "pairs-plain": ["views=plain"],
    "pairs-student": ["views=student"],
    "pairs-crops": ["views=student", "student_augment=crops"],
    "held-out": ["holdout=0.25", "eval_every=1", "keep=best"],
    "lars": ["optimizer=lars", "clip_norm=1"],
    "bf16": ["precision=bf16"],
    "warm-up": ["warmup_epochs=1.5", "min_lr=0.0001", "lr=0.01", "seed=3"],
}


def words(options: dict[str, Any]) -> list[str]:
    given = ((key, str(value).lower() if isinstance(value, bool) else value) for key, value in options.items())
    return [word for key, value in given for word in ("--set", f"{key}={value}")]


FEW = ["--epochs", "2", "--batch-size", "8", *SHARED]
VIT = ["--student", "timm/test_vit", "--set", "image_size=32"]
PLAIN = ["--student", "golden_models:Plain"]


def fits(at: Recorder) -> None:
    """Two epochs of every method and mapping, and of every way of training."""

    def fit(name: str, *given: object) -> None:
        at.run(f"fit/{name}", "distill", "fit", "--out", f"runs/{name}", *FEW, *given)
        if at.only(f"fit/{name}"):
            at.keep(f"fit/{name}", f"runs/{name}")

    for method, ways in METHODS.items():
        for options in ways:
            name = (
                "-".join([method, *(f"{key}={value}" for key, value in options.items())])
                .replace(" ", "")
                .replace('"', "")
            )
            student = VIT if options.get("tokens") else PLAIN
            fit(name, "--store", "flip.zarr", "--corpus", "photos", *student, "--method", method, *words(options))
    for name, settings in WAYS.items():
        flags = [word for setting in settings for word in ("--set", setting)]
        fit(name, "--store", "flip.zarr", *PLAIN, "--method", "proteus", *flags)  # the images that the store keeps
    fit("tiny", "--store", "flip.zarr", "--student", "tiny", "--set", "mapping_steps=3", "--set", "embedding_dim=4")
    fit("two-stores", "--store", "folder.zarr", "--corpus", "photos", "--store", "other.zarr", "--corpus", "other",
        *PLAIN, "--method", "mse", "--set", "holdout=0.2")  # fmt: skip
    fit("resnet", "--store", "flip.zarr", "--student", "timm/test_resnet", "--method", "cosine", "--set",
        "image_size=32", "--set", "drop_path=0.1")  # fmt: skip
    fit("further", "--store", "flip.zarr", "--student", "run:runs/tiny", "--method", "cosine")
    fit("config", "--config", "runs/ema/config.toml", "--set", "seed=1", "--trust-code")
    resumed(at)
    sweep = (
        'store = "flip.zarr"\ncorpus = "photos"\nmethods = ["cosine", "proteus"]\nstudents = ["tiny"]\nseeds = [0, 1]\n'
        "dimensions = [4]\n[common]\nepochs = 1\nbatch_size = 8\n"
    )
    (at.here / "sweep.toml").write_text(sweep)
    at.run("sweep", "distill", "sweep", "sweep.toml", "--out", "sweep", "--trust-code", *SHARED)
    if at.only("sweep"):
        at.keep("sweep", "sweep")
    (at.here / "evaluated.toml").write_text(
        f'{sweep}[evaluate]\nbank = "photos"\nquery = "more"\nfar = {{other = "other"}}\nk = 3\ndetectors = ["knn:k=2"]\n'
    )
    if at.only("sweep-evaluated"):
        at.run("sweep-evaluated", "distill", "sweep", "evaluated.toml", "--out", "evaluated", "--trust-code", *SHARED)
        # The precision of its extractions is the one that was the fastest just now: other numbers, under the same names.
        said = at.artefacts["sweep-evaluated (said)"]["content"]
        said[""] = {"code": said[""]["code"]}
        results = (file for _, file in files_of(at.here / "evaluated/results") if file.suffix == ".json")
        at.said("sweep-evaluated", {file.name: sorted(json.loads(file.read_text())["metrics"]) for file in results})


def resumed(at: Recorder) -> None:
    """A fit stopped in its second epoch, and resumed: the weights are those of one that was not."""
    if not at.only("fit/resumed"):
        return
    import distill

    def stop(progress: Any) -> None:
        if getattr(progress, "stage", "") == "train" and progress.done == 4:
            raise Stopped

    def both() -> None:
        given = {"student": "golden_models:Plain", "method": "rkd", "epochs": 2, "batch_size": 8, "ema": 0.5,
                 "device": "cpu", "workers": 1, "checkpoint_minutes": 0.0}  # fmt: skip
        distill.fit("flip.zarr", "photos", out="runs/whole", **given)
        with contextlib.suppress(Stopped):
            distill.fit("flip.zarr", "photos", out="runs/resumed", progress=stop, **given)
        distill.fit("flip.zarr", "photos", out="runs/resumed", resume=True, **given)
        same = [(at.here / "runs" / name / "student.safetensors").read_bytes() for name in ("whole", "resumed")]
        at.said("fit/resumed (same)", same[0] == same[1])

    at.call("fit/resumed", both)
    at.keep("fit/whole", "runs/whole")
    at.keep("fit/resumed", "runs/resumed")


def exports(at: Recorder) -> None:
    """Students as files of other programs, as stores again, and reports of mappings."""

    def export(name: str, run: str, *given: object) -> None:
        at.run(f"export/{name}", "distill", "export", f"runs/{run}", f"export-{name}", "--trust-code", *given)
        if at.only(f"export/{name}"):
            at.keep(f"export/{name}", f"export-{name}")

    export("tiny", "tiny")
    export("resnet", "resnet")
    export("vit-fp16", "proteus-tokens=True", "--precision", "fp16")
    export("plain", "ema")
    export("onnx", "tiny", "--format", "onnx")
    export("onnx-images", "tiny", "--format", "onnx", "--with-preprocessing", "--precision", "fp16")
    for name in ("photos", "more", "other"):
        at.run(f"student/{name}", "featcache", "extract", name, *EXACT, "--teacher", "run:runs/tiny", "--out",
               f"student-{name}.zarr")  # fmt: skip
        if at.only(f"student/{name}"):
            at.keep(f"student/{name}", f"student-{name}.zarr")
    at.run("mapping", "distill", "mapping", "--store", "train.zarr", "--dim", "4", "--id-test", "test.zarr", "--ood",
           "near.zarr", "--json", "mapping.json")  # fmt: skip
    if at.only("mapping"):
        at.keep("mapping", "mapping.json")
    at.run("settings", "distill", "settings", "--json", "-")
    at.run("methods", "distill", "methods", "--json", "-")


ALONE = ("knn", "knn:k=1", "mahalanobis", "mahalanobis++", "rmd", "ssd", "gmm", "cosine_mean", "residual", "lof")
HEAD = ("msp", "maxlogit", "energy", "gen", "klm", "react", "ash", "scale", "dice", "she", "vim", "nnguide", "fdbd", "nci",
        "gradnorm")  # fmt: skip
TEXT = ("mcm:text=text.npy", "neglabel:text=text.npy:negatives=negatives.npy")


def evaluators(at: Recorder) -> None:
    """Results and tables of every evaluator; comparisons and what a report draws."""

    def evaluate(name: str, command: str, *given: object) -> None:
        out = f"result-{name}.json"
        at.run(f"result/{name}", "evalsuite", command, *given, "--json", out)
        if at.only(f"result/{name}"):
            at.keep(f"result/{name}", out)
            if (at.here / out.replace(".json", ".samples.npz")).exists():
                at.keep(f"result/{name}/samples", out.replace(".json", ".samples.npz"))

    evaluate("knn", "knn", "--bank", "train.zarr", "--query", "test.zarr", "--k", "1,5,20")
    evaluate("knn-cospress", "knn", "--bank", "train.zarr", "--query", "test.zarr", "--preset", "cospress")
    evaluate(
        "knn-shots", "knn", "--bank", "train.zarr", "--query", "test.zarr", "--k", "3", "--shots", "5", "--seed", "2"
    )
    evaluate("knn-index", "knn", "--bank", "train.zarr", "--query", "test.zarr", "--k", "5", "--index", "HNSW8")
    evaluate("knn-small", "knn", "--bank", "small-train.zarr", "--query", "small-test.zarr", "--k", "1,5,20")
    evaluate("knn-identical", "knn", "--bank", "folder.zarr", "--query", "reused.zarr", "--k", "3", "--drop-identical")
    evaluate("knn-overlap", "knn", "--bank", "folder.zarr", "--query", "reused.zarr", "--k", "3")
    evaluate("knn-precisions", "knn", "--bank", "folder.zarr", "--query", "bf16.zarr", "--k", "3", "--any-precision")
    evaluate("knn-refused", "knn", "--bank", "folder.zarr", "--query", "bf16.zarr", "--k", "3")
    evaluate("probe", "probe", "--train", "train.zarr", "--test", "test.zarr", "--c", "0.1,1,10", "--save",
             "head.safetensors", "--device", "cpu")  # fmt: skip
    if at.only("result/probe"):
        at.keep("result/probe/head", "head.safetensors")
    sets = ["--id-train", "train.zarr", "--id-test", "test.zarr", "--near", "near=near.zarr", "--far", "far=far.zarr"]
    every = [word for detector in (*ALONE, *HEAD, *TEXT) for word in ("--detector", detector)]
    evaluate("ood", "ood", *sets, *every, "--head", "head.safetensors", "--k", "10")
    evaluate("ood-csid", "ood", *sets, "--csid", "shifted=shifted.zarr", "--detector", "knn", "--detector", "rmd")
    evaluate("ood-knn", "ood", *sets[:6], "--detector", "knn")
    evaluate("ood-small", "ood", "--id-train", "small-train.zarr", "--id-test", "small-test.zarr", "--near",
             "near=near-small.zarr", "--detector", "knn")  # fmt: skip
    evaluate("ood-images", "ood", "--id-train", "folder.zarr", "--id-test", "reused.zarr", "--far", "o=other.zarr",
             "--detector", "knn:k=2", "--drop-identical")  # fmt: skip
    evaluate("fidelity", "fidelity", "--teacher", "test.zarr", "--student", "small-test.zarr", "--teacher-bank",
             "train.zarr", "--student-bank", "small-train.zarr", "--k", "5")  # fmt: skip
    evaluate("fidelity-mapping", "fidelity", "--teacher", "folder.zarr", "--student", "student-photos.zarr", "--mapping",
             "runs/tiny/mapping.safetensors", "--k", "3")  # fmt: skip
    at.run("result/probe-images", "evalsuite", "probe", "--train", "student-photos.zarr", "--test", "student-more.zarr",
           "--c", "1", "--save", "student-head.safetensors", "--device", "cpu", "--json", "-")  # fmt: skip
    few = ["--corruptions", "contrast,gaussian_noise,jpeg_compression", "--severity", "1,5", "--size", "32", "--k", "3"]
    evaluate("robustness", "robustness", "--encoder", "run:runs/tiny", "--corpus", "more", "--bank", "student-photos.zarr",
             "--out", "corrupted", *few, "--far", "other=student-other.zarr", "--detector", "knn:k=2", "--head",
             "student-head.safetensors", "--pgd", "4", "--pgd-steps", "2", *SHARED)  # fmt: skip
    if at.only("result/robustness"):
        at.keep("result/robustness/stores", "corrupted")
    evaluate("robustness-reference", "robustness", "--encoder", "run:runs/tiny", "--corpus", "more", "--bank",
             "student-photos.zarr", "--out", "corrupted", *few, "--reference", "result-robustness.json", *SHARED)  # fmt: skip
    for name, a, b in (
        ("knn", "knn", "knn-small"),
        ("ood", "ood-knn", "ood-small"),
        ("robustness", "robustness", "robustness"),
    ):
        evaluate(f"compare-{name}", "compare", f"result-{a}.json", f"result-{b}.json")
    report(at)


def report(at: Recorder) -> None:
    """The numbers in the page; not how it draws them."""
    if not at.only("report"):
        return
    results = [
        f"result-{n}.json" for n in ("knn", "knn-small", "ood", "probe", "fidelity", "robustness", "compare-knn")
    ]
    at.run("report", "evalsuite", "report", *results, "--out", "report.html")
    del at.artefacts["report (said)"]  # says how large the page is
    page = (at.here / "report.html").read_text() if (at.here / "report.html").exists() else ""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    at.said("report data", json.loads(found[1]) if found else "there is none")


COMMANDS = {
    "featcache": ("extract", "info", "verify", "check", "export", "import", "push", "ls", "rm", "demo", "new"),
    "distill": ("fit", "methods", "settings", "export", "push", "sweep", "mapping", "ls", "watch", "speed"),
    "evalsuite": (
        *("knn", "retrieval", "zeroshot", "ood", "fidelity", "probe", "classify", "mean", "robustness", "select"),
        *("compare", "report", "detector fit", "detector score", "detector drift"),
    ),
}


def helps(at: Recorder) -> None:
    """What every command says of itself."""
    for program, commands in COMMANDS.items():
        at.run(f"help/{program}", program, "--help")
        for command in commands:
            at.run(f"help/{program}/{command}", program, *command.split(), "--help")


SECTIONS = (helps, stores, arrays, interchange, fits, exports, evaluators)
SUITE = (
    *("help", "store/folder", "store/fields", "store/views", "store/flip", "store/raw-pixels"),
    *("store/float32", "store/reused", "store/broken", "store/table", "store/wds", "store/two", "arrays"),
    *("interchange/broken", "fit/ema", "fit/tiny", "export/tiny", "export/plain", "result/knn", "result/probe"),
    *("result/ood", "result/fidelity", "result/compare-knn", "result/compare-ood"),
)
"""What `test_golden.py` looks at, by the beginnings of names; not what needs other packages, or a processor's own numbers."""
NOT_IN_SUITE = ("knn-index", "precisions", "refused", "images", "mapping")


@contextlib.contextmanager
def workplace(here: Path) -> Iterator[None]:
    """`here` as the working folder, with the inputs in it and a home of its own."""
    was = Path.cwd()
    os.environ |= {"FEATCACHE_HOME": str(here / "home"), "HF_HOME": str(here / "hf-home")}
    os.chdir(here)
    torch.set_num_threads(1)
    try:
        write_inputs(here)
        write_weights(here)
        yield
    finally:
        os.chdir(was)


def in_suite(name: str) -> bool:
    return name.startswith(SUITE) and not any(part in name for part in NOT_IN_SUITE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSON to write")
    parser.add_argument("--folder", type=Path, help="an empty folder for what is made, which then stays")
    parser.add_argument("--suite", action="store_true", help="only what test_golden.py looks at")
    given = parser.parse_args()
    out = given.out.resolve()
    with tempfile.TemporaryDirectory(prefix="golden-") as made:
        here = (given.folder or Path(made)).resolve()
        at = Recorder(here, in_suite if given.suite else lambda name: True)
        with workplace(here):
            for section in SECTIONS:
                section(at)
    record = at.artefacts | {"": {name: path.relative_to(here).as_posix() for name, path in at.paths.items()}}
    out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    files = sum(len(each.get("files", ())) for each in at.artefacts.values())
    print(f"{len(at.artefacts)} artefacts, {files} files of {CHECKOUT}: {out}")  # noqa: T201


if __name__ == "__main__":
    main()

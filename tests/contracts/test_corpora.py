"""Every registered corpus is one, and ours are what they say."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tiny import tiny_encoder

from featcache import KeptPixels, extract
from featcache.corpora import open_corpus
from featcache.inputs.images import decode
from featcache.plugins import plugin_names
from featcache.testing import CorpusContract


def folder(root: Path) -> str:
    """Two classes, one image without a class, and things that are no images."""
    for i, name in enumerate(["b/2.png", "b/1.JPG", "a/deep/er/0.png", "loose.webp", "a/notes.txt", ".hidden/1.png"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path)
    (root / "b/._1.png").write_bytes(b"no image")
    return str(root)


def adversarial(root: Path) -> str:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    save_file({"weight": np.eye(2, 6), "bias": np.zeros(2)}, root / "h.safetensors", {"class_names": '["a", "b"]'})
    return f"adversarial:python:tiny:tiny_encoder::{root / 'h.safetensors'}@codes=4::{folder(root / 'photos')}"


def corrupted(root: Path) -> str:
    pytest.importorskip("imagecorruptions", reason="needs featcache[robustness]")
    for i, name in enumerate(["b/1.png", "a/0.png"]):
        (root / "photos" / name).parent.mkdir(parents=True)
        Image.fromarray(np.full((32, 40, 3), 90 * i, np.uint8)).save(root / "photos" / name)
    return f"corrupted:gaussian_noise:3@size=40:{root / 'photos'}"


def digits(root: Path) -> str:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    return "digits:test"


def lines(root: Path) -> str:
    (root / "texts.txt").write_text("one\r\ntwo, élan\nthree\n")
    return f"lines:{root / 'texts.txt'}"


def manifest(root: Path) -> str:
    folder(root)
    (root / "m.csv").write_text("path,label\nb/2.png,b\nb/1.JPG,b\na/deep/er/0.png,a\nloose.webp,\n")
    return str(root / "m.csv")


def masks(root: Path) -> str:
    for kind, level in (("images", 9), ("masks", 255)):
        for name in ("b/2", "loose"):
            (root / kind / "b").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 6), level, np.uint8)).save(root / kind / f"{name}.png")
    return f"masks:{root}"


def mixed(root: Path) -> str:
    return f"mixed:6:{folder(root / 'photos')}"


def wds(root: Path) -> str:
    folder(root / "photos")
    for shard, names in enumerate([["b/2.png", "b/1.JPG"], ["a/deep/er/0.png", "a/notes.txt", "loose.webp"]]):
        with tarfile.open(root / f"s-{shard:02d}.tar", "w") as tar:
            for name in names:
                tar.add(root / "photos" / name, name)
    return f"wds:{root}/s-{{00..01}}.tar"


def hf(root: Path) -> str:
    datasets = pytest.importorskip("datasets", reason="needs featcache[hf]")
    folder(root / "photos")
    images = [{"bytes": (root / "photos" / name).read_bytes(), "path": None} for name in ("b/2.png", "loose.webp")]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee"]))
    datasets.Dataset.from_dict({"image": images, "label": [1, 0]}, features=features).save_to_disk(root / "saved")
    return f"hf:{root / 'saved'}"


def store(root: Path) -> str:
    out = root / "kept.zarr"
    extract(folder(root), tiny_encoder(), out, pixels=KeptPixels(size=6), device="cpu", precision="fp32")
    return f"store:{out}"


def torchvision(root: Path) -> str:
    for i, name in enumerate(["River/1.jpg", "Forest/0.jpg", "River/0.jpg"]):
        path = root / "eurosat" / "2750" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path)
    return f"torchvision:EuroSAT::{root}"


def texts(root: Path) -> str:
    (root / "t.csv").write_text('text,label\n"one, two",b\nthree,a\n"fo\nur",\n')
    return f"texts:{root / 't.csv'}"


def beir(root: Path) -> str:
    lines = [{"_id": f"d {i}", "title": "" if i else "One", "text": f"text {i}"} for i in range(4)]
    (root / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"beir:{root}:corpus"


def spans(root: Path) -> str:
    return f"spans:2@seed=1::{beir(root)}"


def windows(root: Path) -> str:
    (root / "long.txt").write_text("a long text " * 9)
    return f"windows:{root / 'long.txt'}@length=16@stride=8"


SPECS: dict[str, Callable[[Path], str]] = {
    "adversarial": adversarial,
    "beir": beir,
    "corrupted": corrupted,
    "digits": digits,
    "folder": folder,
    "hf": hf,
    "lines": lines,
    "manifest": manifest,
    "masks": masks,
    "mixed": mixed,
    "spans": spans,
    "store": store,
    "texts": texts,
    "torchvision": torchvision,
    "wds": wds,
    "windows": windows,
}
"""How to make a small corpus of each kind in an empty folder. A new kind adds a line here."""

NAMES = plugin_names("featcache.corpora")


def test_every_registered_corpus_is_under_this_contract():
    assert set(SPECS) >= set(NAMES), "add the new corpus to SPECS"


class TestCorpora(CorpusContract):
    @pytest.fixture(params=NAMES)
    def corpus(self, request, tmp_path, monkeypatch):
        monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / ".featcache"))
        return open_corpus(SPECS[request.param](tmp_path))


def test_folder_labels_are_its_first_level_sub_folders(tmp_path):
    corpus = open_corpus(folder(tmp_path))
    assert corpus.ids == ["a/deep/er/0.png", "b/1.JPG", "b/2.png", "loose.webp"]
    assert corpus.class_names == ["a", "b"]
    assert [corpus.label(i) for i in range(4)] == [0, 1, 1, -1]
    assert corpus.read(2) == (tmp_path / "b/2.png").read_bytes()


def test_digits_are_scikit_learns_scans():
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    scans, train, test = datasets.load_digits(), open_corpus("digits:train"), open_corpus("digits:test")
    assert (len(train), len(test)) == (1347, 450)
    assert [c.label(i) for c in (train, test) for i in range(len(c))] == scans.target.tolist()
    for row, corpus, i in ((0, train, 0), (1346, train, 1346), (1347, test, 0), (1796, test, 449)):
        np.testing.assert_allclose(np.asarray(decode(corpus.read(i)))[..., 0] / 255 * 16, scans.images[row], atol=0.04)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/at/all", "no such folder; give a directory of images"),
        ("digit:test", r"unknown kind of corpus 'digit' .*; did you mean digits\?"),
        ("digits:validation", "no such split; give digits:train or digits:test"),
    ],
)
def test_a_corpus_that_is_not_there_is_refused_with_the_remedy(spec, message):
    with pytest.raises(ValueError, match=message):
        open_corpus(spec)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no images in this folder \(looked for .*\.jpg"):
        open_corpus(str(tmp_path))

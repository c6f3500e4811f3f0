"""torchvision's data sets against torchvision, on small ones made here in the formats of the real ones."""

import hashlib
import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from featcache.corpora import open_corpus
from featcache.inputs.images import decode


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHVISION_ROOT", str(tmp_path))
    return tmp_path


def assert_same(corpus, source):
    assert len(corpus) == len(source)
    assert len(set(corpus.ids)) == len(corpus)
    for i, (image, label) in enumerate(source):
        np.testing.assert_array_equal(np.asarray(decode(corpus.read(i))), np.asarray(image.convert("RGB")))
        assert corpus.label(i) == label


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw


def listed(items):
    return b"](" + b"".join(items) + b"e"


def batch(pixels, label_key, labels):
    """As Python 2 wrote CIFAR's batches: strings of bytes, and an array rebuilt by numpy."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string("b") + b"\x87R("
        b"K\x01K" + bytes([len(pixels)]) + b"M\x00\x0c\x86cnumpy\ndtype\n" + string("u1") + b"K\x00K\x01\x87R("
        b"K\x03" + string("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + string(pixels.tobytes()) + b"tb"
    )
    entries = string("batch_label") + string("testing batch 1 of 1") + string(label_key)
    entries += listed(b"K" + bytes([label]) for label in labels) + string("data") + array
    entries += string("filenames") + listed(string(f"{i}.png") for i in range(len(labels)))
    return b"\x80\x02}(" + entries + b"u."


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def cifar(request, root, monkeypatch, rng):
    """A small CIFAR with checksums of its own; torchvision itself says that the files are right."""
    kind = getattr(datasets, request.param)
    key, folder = "labels" if request.param == "CIFAR10" else "fine_labels", root / kind.base_folder
    folder.mkdir()

    def write(name, data):
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for attribute in ("train_list", "test_list"):
        files = []
        for name, _ in getattr(kind, attribute):
            pixels, labels = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.integers(0, 3, 4).tolist()
            files.append((name, write(name, batch(pixels, key, labels))))
        monkeypatch.setattr(kind, attribute, files)
    names = string(kind.meta["key"]) + listed(string(name) for name in ("ant", "bee", "cat"))
    meta = b"\x80\x02}(" + string("num_cases_per_batch") + b"M\x10'" + names + string("num_vis") + b"M\x00\x0cu."
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": write(kind.meta["filename"], meta)})
    return request.param


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_is_torchvisions_without_unpickling(cifar, root, split, monkeypatch):
    source = getattr(datasets, cifar)(root, train=split == "train")

    def refuse(*given, **named):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    corpus = open_corpus(f"torchvision:{cifar}:{split}")
    assert corpus.class_names == source.classes == ["ant", "bee", "cat"]
    assert corpus.ids[1] == f"{split}/00000001"
    assert_same(corpus, source)
    assert Image.open(io.BytesIO(corpus.read(0))).format == "PNG"


def test_a_damaged_cifar_is_refused(root):
    with pytest.raises(ValueError, match=r"not under .*is missing or damaged.*download=True"):
        open_corpus("torchvision:CIFAR10:test")
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps({"data": b"", "labels": []}))
    with pytest.raises(ValueError, match="missing or damaged"):
        open_corpus("torchvision:CIFAR10:test")


def test_an_array_set(root, rng):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 3)):
        pixels, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    corpus = open_corpus("torchvision:MNIST:test")
    assert_same(corpus, datasets.MNIST(root, train=False))
    assert corpus.class_names[7] == "7 - seven"
    assert len(open_corpus(f"torchvision:MNIST:train:{root}")) == 6


def photographs_in(folder, rng, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(folder / name)


def test_sets_of_files_give_the_files(root, rng):
    photographs_in(root / "eurosat" / "2750", rng, ["River/1.jpg", "Forest/0.jpg", "River/0.jpg"])
    corpus = open_corpus("torchvision:EuroSAT")
    assert corpus.ids == ["eurosat/2750/Forest/0.jpg", "eurosat/2750/River/0.jpg", "eurosat/2750/River/1.jpg"]
    assert corpus.class_names == ["Forest", "River"]
    assert_same(corpus, datasets.EuroSAT(root))
    assert corpus.read(2) == (root / corpus.ids[2]).read_bytes()


def test_sets_of_files_that_keep_labels_apart(root, rng):
    base = root / "food-101"
    photographs_in(base / "images", rng, ["pie/1.jpg", "soup/2.jpg"])
    (base / "meta").mkdir()
    (base / "meta" / "test.json").write_text('{"pie": ["pie/1"], "soup": ["soup/2"]}')
    corpus = open_corpus("torchvision:Food101:test")
    assert_same(corpus, datasets.Food101(root, split="test"))
    assert corpus.class_names == ["pie", "soup"]
    assert corpus.read(1) == (base / "images" / "soup/2.jpg").read_bytes()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("CIFAR:test", "torchvision has no data set 'CIFAR'; did you mean CIFAR10"),
        ("CIFAR10:dev", "give torchvision:CIFAR10:train or torchvision:CIFAR10:test"),
        ("MNIST:test", r"not under .*set TORCHVISION_ROOT .*or fetch it: python -c .*MNIST\('.*', download=True\)"),
        ("MNIST:dev", "give torchvision:MNIST:train or"),
        ("SVHN:dev", "choose a split that SVHN has"),
        ("EuroSAT:test", "EuroSAT has no splits"),
        ("LSUN:test", "LSUN is not read here"),
        ("FakeData", "FakeData is not read here"),
    ],
)
def test_what_is_not_there_is_refused_with_the_remedy(spec, message):
    with pytest.raises(ValueError, match=message) as refusal:
        open_corpus(f"torchvision:{spec}")
    assert "\n" not in str(refusal.value)

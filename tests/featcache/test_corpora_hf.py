"""Hugging Face data sets against their own rows."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from featcache.corpora import open_corpus
from featcache.inputs.images import decode

datasets = pytest.importorskip("datasets", reason="needs featcache[hf]")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def encoded(seed, kind="jpeg"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [encoded(i) for i in range(5)]
LABELS = [1, 0, 1, -1, 0]


def rows(images=IMAGES, column="img", label=None, labels=LABELS):
    features = datasets.Features(
        {
            "note": datasets.Value("string"),
            column: datasets.Image(),
            "label": label or datasets.ClassLabel(names=["bee", "ant"]),
        }
    )
    data = {
        "note": ["x"] * len(images),
        column: [i if i is None or isinstance(i, str) else {"bytes": i, "path": None} for i in images],
    }
    return datasets.Dataset.from_dict({**data, "label": labels}, features=features)


def test_a_saved_data_set(tmp_path):
    rows().save_to_disk(tmp_path / "saved")
    corpus = open_corpus(f"hf:{tmp_path / 'saved'}")
    assert [corpus.read(i) for i in range(5)] == IMAGES
    assert [corpus.label(i) for i in range(5)] == LABELS
    assert corpus.class_names == ["bee", "ant"]
    assert corpus.ids == [f"all/{i:08d}" for i in range(5)]
    for i, row in enumerate(datasets.load_from_disk(tmp_path / "saved")):
        np.testing.assert_array_equal(np.asarray(decode(corpus.read(i))), np.asarray(row["img"]))


def test_a_saved_dictionary_of_splits(tmp_path):
    datasets.DatasetDict(train=rows(), test=rows(IMAGES[:2], labels=[0, 1])).save_to_disk(tmp_path / "saved")
    corpus = open_corpus(f"hf:{tmp_path / 'saved'}:test")
    assert [corpus.read(i) for i in range(len(corpus))] == IMAGES[:2]
    assert corpus.ids == ["test/00000000", "test/00000001"]
    with pytest.raises(ValueError, match=r"several splits; give one of hf:.*saved:train, hf:.*saved:test"):
        open_corpus(f"hf:{tmp_path / 'saved'}")
    with pytest.raises(ValueError, match="no split 'dev'; give one of"):
        open_corpus(f"hf:{tmp_path / 'saved'}:dev")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_folder_of_files(tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, part in enumerate((rows(IMAGES[:3], labels=LABELS[:3]), rows(IMAGES[3:], labels=LABELS[3:]))):
        path = folder / f"train-{number:05d}-of-00002.{kind}"
        if kind == "parquet":
            part.to_parquet(path)
        else:
            part.save_to_disk(tmp_path / f"saved{number}")
            next((tmp_path / f"saved{number}").glob("*.arrow")).rename(path)
    corpus = open_corpus(f"hf:{folder}")
    assert [corpus.read(i) for i in range(5)] == IMAGES
    assert [corpus.label(i) for i in range(5)] == LABELS
    assert (corpus.ids[4], corpus.class_names) == ("train/00000004", ["bee", "ant"])
    assert open_corpus(f"hf:{folder}:train").ids == corpus.ids


def test_rows_with_only_a_path_give_the_file(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(IMAGES[i])
    rows([str(tmp_path / "0.jpg"), str(tmp_path / "1.jpg"), None], labels=[0, 1, None]).save_to_disk(tmp_path / "saved")
    corpus = open_corpus(f"hf:{tmp_path / 'saved'}")
    assert [corpus.read(0), corpus.read(1)] == IMAGES[:2]
    assert corpus.label(2) == -1
    with pytest.raises(ValueError, match="all/00000002 has no image"):
        corpus.read(2)


@pytest.mark.parametrize(
    ("kind", "values", "labels", "names"),
    [("int64", [2, 0, None], [2, 0, -1], ["0", "1", "2"]), ("string", ["b", "a", None], [1, 0, -1], ["a", "b"])],
)
def test_a_plain_label_column(tmp_path, kind, values, labels, names):
    rows(IMAGES[:3], label=datasets.Value(kind), labels=values).save_to_disk(tmp_path / "saved")
    corpus = open_corpus(f"hf:{tmp_path / 'saved'}")
    assert [corpus.label(i) for i in range(3)] == labels
    assert corpus.class_names == names


def test_the_image_column_must_be_clear(tmp_path):
    both = (
        rows().add_column("image", [{"bytes": b, "path": None} for b in IMAGES]).cast_column("image", datasets.Image())
    )
    both.save_to_disk(tmp_path / "both")
    assert open_corpus(f"hf:{tmp_path / 'both'}").read(1) == IMAGES[1]
    both.rename_column("image", "other").save_to_disk(tmp_path / "unclear")
    with pytest.raises(ValueError, match=r"several columns hold images \(img, other\)"):
        open_corpus(f"hf:{tmp_path / 'unclear'}")
    rows().remove_columns("img").save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="no images in note, label"):
        open_corpus(f"hf:{tmp_path / 'none'}")


def test_what_is_not_there_is_refused_with_the_remedy(tmp_path):
    for place, message in [
        (f"{tmp_path}/nowhere", "no such folder; give hf:FOLDER"),
        ("mnist", "no such folder; give hf:FOLDER"),
        ("nobody/nothing:train", r"cannot be had \(.*\); check the name and the network"),
        (str(tmp_path), "no parquet or arrow files in this folder"),
    ]:
        with pytest.raises(ValueError, match=message) as refusal:
            open_corpus(f"hf:{place}")
        assert "\n" not in str(refusal.value)
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="correct the folder, or write it again"):
        open_corpus(f"hf:{tmp_path}")


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'featcache\[hf\]'"):
        open_corpus("hf:mnist:test")


# -- choosing columns, and tables that hold bytes ---------------------------------------------------------


def with_columns(folder, **columns):
    """A saved data set of three images; a column is a list of class names for a ClassLabel, or (type, values)."""
    data, kinds = {"image": [{"bytes": i, "path": None} for i in IMAGES[:3]]}, {"image": datasets.Image()}
    for name, given in columns.items():
        plain = isinstance(given, tuple)
        kinds[name] = datasets.Value(given[0]) if plain else datasets.ClassLabel(names=given)
        data[name] = given[1] if plain else [1, 0, 1]
    datasets.Dataset.from_dict(data, features=datasets.Features(kinds)).save_to_disk(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"domain": ["photo", "sketch"], "label": ["ant", "bee"]}, ["ant", "bee"]),
        ({"domain": ["photo", "sketch"], "labels": ["ant", "bee"]}, ["ant", "bee"]),
        ({"coarse_label": ["x", "y"], "fine_label": ["ant", "bee"]}, ["ant", "bee"]),
        ({"domain": ["photo", "sketch"], "label": ("string", ["b", "a", "b"])}, ["a", "b"]),
        ({"kind": ["ant", "bee"]}, ["ant", "bee"]),
        ({"domain": ["photo", "sketch"], "Label": ("string", ["b", "a", "b"])}, ["a", "b"]),
        ({"other": ("int64", [1, 2, 3])}, None),
    ],
)
def test_the_label_column_is_chosen_by_name(tmp_path, columns, chosen):
    corpus = open_corpus(with_columns(tmp_path / "saved", **columns))
    assert corpus.class_names == chosen
    assert [corpus.label(i) for i in range(3)] == ([1, 0, 1] if chosen else [-1, -1, -1])


def test_two_class_columns_of_which_none_is_called_label_are_refused(tmp_path):
    spec = with_columns(tmp_path / "saved", domain=["photo", "sketch"], species=["ant", "bee"])
    with pytest.raises(
        ValueError, match=r"several columns hold classes \(domain, species\); choose one with hf:.*@label=domain"
    ):
        open_corpus(spec)
    assert open_corpus(f"{spec}@label=species").class_names == ["ant", "bee"]
    assert open_corpus(f"{spec}@label=").class_names is None
    assert open_corpus(f"{spec}:all@image=image@label=domain").class_names == ["photo", "sketch"]
    for option, message in [
        ("@label=specie", "no such column; did you mean species"),
        ("@image=img", "no such column"),
        ("@x=1", "no such option"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_corpus(f"{spec}{option}")


@pytest.mark.parametrize("kind", ["bytes", "struct", "struct without paths"])
def test_parquet_files_of_plain_image_bytes_simply_work(tmp_path, kind):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = IMAGES[:3] if kind == "bytes" else [{"bytes": i, "path": "x.jpg"} for i in IMAGES[:3]]
    if kind == "struct without paths":
        images = [{"bytes": i} for i in IMAGES[:3]]
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/train.parquet"
    parquet.write_table(pa.table({"picture": images, "label": ["2.0", "10", None], "note": ["a", "b", "c"]}), path)
    for spec in (
        str(path),
        f"manifest:{path}",
        f"hf:{path}",
        f"hf:{tmp_path / 'data'}",
        f"{path}@image=picture@label=label",
    ):
        corpus = open_corpus(spec)
        assert [corpus.read(i) for i in range(3)] == IMAGES[:3], spec
        assert [corpus.label(i) for i in range(3)] == [2, 10, -1]
        assert (corpus.ids[0], open_corpus(corpus.spec).ids) == ("train/00000000", corpus.ids)
    assert open_corpus(f"{path}@label=note").class_names == ["a", "b", "c"]


def test_a_pipe_among_paths_fails_as_a_row(tmp_path):
    os.mkfifo(tmp_path / "p.jpg")
    rows().save_to_disk(tmp_path / "saved")
    corpus = open_corpus(f"hf:{tmp_path / 'saved'}")
    corpus._images = [{"img": {"bytes": None, "path": str(tmp_path / "p.jpg")}}]  # saving would wait for the pipe
    with pytest.raises(OSError, match="a pipe, a socket or a device"):
        corpus.read(0)


def test_a_folder_in_it_that_cannot_be_listed_stops(tmp_path, monkeypatch):
    rows().to_parquet(tmp_path / "train.parquet")
    (tmp_path / "more").mkdir()
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match=r"more: cannot be listed \(Permission denied\)"):
        open_corpus(f"hf:{tmp_path}")


def test_a_chosen_column_must_hold_images(tmp_path):
    spec = with_columns(tmp_path / "saved", other=("int64", [1, 2, 3]))
    with pytest.raises(ValueError, match=r"column other holds .*int64.*, no images; choose another with @image=COLUMN"):
        open_corpus(f"{spec}@image=other")

"""Hugging Face data sets against their own rows."""

import io

import numpy as np
import pytest
from PIL import Image

from featcache.corpus import open_corpus
from featcache.views import decode

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

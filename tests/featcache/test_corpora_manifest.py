"""Manifests: what the table says, and a refusal that names the line for what it must not say."""

import csv
import os

import fsspec
import pytest
from PIL import Image

from featcache.corpora import open_corpus
from featcache.inputs.images import decode


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["a.png", "sub/b.png", 'odd, "name".png']):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 3), (i, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(path, header, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([header, *[["" if field is None else field for field in row] for row in rows]])
    else:
        pa = pytest.importorskip("pyarrow", reason="needs featcache[parquet]")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = list(zip(*rows, strict=True)) or [[] for _ in header]
        parquet.write_table(pa.table({name: list(values) for name, values in zip(header, columns, strict=True)}), path)
    return str(path)


def labels(corpus):
    return [corpus.label(i) for i in range(len(corpus))]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_in_their_order_wherever_the_images_are(folder, kind, monkeypatch):
    remote = fsspec.filesystem("memory")
    remote.pipe("/manifest-test/c.png", (folder / "a.png").read_bytes())
    names = ["sub/b.png", str(folder / "a.png"), "memory://manifest-test/c.png", 'odd, "name".png']
    rows = [(i, name, label) for i, (name, label) in enumerate(zip(names, ["dog", "ant", None, "dog"], strict=True))]
    path = write(folder / f"m.{kind}", ["n", "path", "label"], rows)
    monkeypatch.chdir("/")
    corpus = open_corpus(path)
    assert corpus.ids == names
    assert (labels(corpus), corpus.class_names) == ([1, 0, -1, 1], ["ant", "dog"])
    assert [decode(corpus.read(i)).getpixel((0, 0))[0] for i in range(4)] == [1, 0, 0, 2]
    assert open_corpus(f"manifest:{path}").ids == names


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_integer_labels_stay(folder, kind):
    corpus = open_corpus(write(folder / f"m.{kind}", ["path", "label"], [("a.png", 2), ("b.png", -1), ("c.png", None)]))
    assert (labels(corpus), corpus.class_names) == ([2, -1, -1], ["0", "1", "2"])


def test_integers_that_pandas_made_floats_stay_integers(folder):
    path = write(folder / "m.parquet", ["path", "label"], [("a.png", 2.0), ("b.png", float("nan")), ("c.png", 0.0)])
    assert labels(open_corpus(path)) == [2, -1, 0]


def test_numbers_among_words_are_words(folder):
    corpus = open_corpus(write(folder / "m.csv", ["path", "label"], [("a.png", "3"), ("b.png", "b")]))
    assert (labels(corpus), corpus.class_names) == ([0, 1], ["3", "b"])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_labels_are_optional(folder, kind):
    corpus = open_corpus(write(folder / f"m.{kind}", ["path"], [("a.png",), ("sub/b.png",)]))
    assert (labels(corpus), corpus.class_names) == ([-1, -1], None)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_at_a_url_stands_beside_its_images(folder, kind):
    remote = fsspec.filesystem("memory")
    for name in ("a.png", "sub/b.png"):
        remote.pipe(f"/bucket/{name}", (folder / name).read_bytes())
    local = write(folder / f"m.{kind}", ["path"], [("a.png",), ("./sub/../sub/b.png",)])
    remote.put(local, f"/bucket/m.{kind}")
    corpus = open_corpus(f"memory://bucket/m.{kind}")
    assert corpus.read(1) == (folder / "sub/b.png").read_bytes()
    with pytest.raises(ValueError, match=r"memory://bucket/none.csv: cannot be read \(FileNotFoundError"):
        open_corpus("memory://bucket/none.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"m\.csv, line 1: one column must be called path \(the file is empty\)"),
        ("file,label\na.png,1\n", r"m\.csv, line 1: .* called path \(found: file, label\)"),
        ("path\n", r"m\.csv, line 2: no images"),
        ("path,label\na.png,1\nb.png\n", r"m\.csv, line 3: 1 columns where the header has 2"),
        ("path,label\na.png,1\n\n./a.png,2\n", r"m\.csv, line 4: \./a\.png is listed already in line 2"),
        ("path,label\na.png,1\n,2\n", r"m\.csv, line 3: the path is empty"),
        ("path,label\na.png,-4\n", r"m\.csv: -4 is no class number"),
        ('path\n"a.png\n', r"m\.csv, line 2: unexpected end of data"),
        ("path\na.png\n\xe9.png\n", r"m\.csv, line 3: not UTF-8 text"),
    ],
)
def test_what_is_wrong_in_a_csv_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "m.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        open_corpus(str(tmp_path / "m.csv"))


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (["file"], [("a",)], r"m\.parquet: one column must be called path \(found: file\)"),
        (["path"], [], r"m\.parquet, row 1: no images"),
        (["path"], [("a.png",), ("b.png",), ("a.png",)], r"m\.parquet, row 3: a\.png is listed already in row 1"),
        (["path"], [("a.png",), (None,)], r"m\.parquet, row 2: the path is empty"),
    ],
)
def test_what_is_wrong_in_a_parquet_is_named_with_its_row(tmp_path, header, rows, message):
    with pytest.raises(ValueError, match=message):
        open_corpus(write(tmp_path / "m.parquet", header, rows))


def test_what_is_no_manifest_is_refused(tmp_path, monkeypatch):
    (tmp_path / "m.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"m\.parquet: not a parquet file"):
        open_corpus(str(tmp_path / "m.parquet"))
    with pytest.raises(ValueError, match=r"none\.csv: no such file; give the path"):
        open_corpus(str(tmp_path / "none.csv"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'featcache\[parquet\]'"):
        open_corpus(str(tmp_path / "m.parquet"))


def test_pipes_and_devices_fail_as_rows(tmp_path):
    os.mkfifo(tmp_path / "p.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "m.csv").write_text(f"path\np.jpg\nzero.png\nfile://{tmp_path}/p.jpg\n")
    corpus = open_corpus(f"{tmp_path}/m.csv")
    for row in range(3):
        with pytest.raises(OSError, match="a pipe, a socket or a device"):
            corpus.read(row)


def test_a_pipe_is_no_manifest(tmp_path):
    os.mkfifo(tmp_path / "m.csv")
    with pytest.raises(ValueError, match=r"m\.csv: cannot be read \(a pipe, a socket or a device"):
        open_corpus(f"{tmp_path}/m.csv")


def test_a_table_with_tabs(folder):
    (folder / "m.tsv").write_text(
        'path\tlabel\nodd, "name".png\tant, red\na.png\tbee\n'.replace('odd, "name"', '"odd, ""name"""').replace(
            '""".png', '"".png"'
        )
    )
    corpus = open_corpus(f"{folder}/m.tsv")
    assert (corpus.ids, corpus.class_names) == (['odd, "name".png', "a.png"], ["ant, red", "bee"])
    (folder / "m.tsv").write_text("path,label\na.png,bee\n")
    with pytest.raises(ValueError, match=r"m\.tsv, line 1: one column must be called path \(found: path,label\)"):
        open_corpus(f"{folder}/m.tsv")


def test_a_pipe_is_no_weights_file(tmp_path):
    from featcache.checkpoint import read_weights

    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: a pipe, a socket or a device, no file; give a"):
        read_weights(str(tmp_path / "w.pt"))

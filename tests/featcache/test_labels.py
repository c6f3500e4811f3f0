"""Labels of tables: one rule for every kind of file, against the rule written out."""

import csv

import numpy as np
import pytest

from featcache.corpora import open_corpus
from featcache.corpora._labels import MISSING, from_values

CASES = {
    "whole numbers": ([2, 10, 0, None, -1], [2, 10, 0, -1, -1], [str(i) for i in range(11)]),
    "whole floats": ([2.0, 10.0, float("nan"), -1.0], [2, 10, -1, -1], [str(i) for i in range(11)]),
    "other numbers": ([2.5, 10.25, 0.5, None, 3.0], [1, 3, 0, -1, 2], ["0.5", "2.5", "3", "10.25"]),
    "negative fractions": ([-0.5, 2.5, -1.0], [0, 1, -1], ["-0.5", "2.5"]),
    "small numbers": ([1e-05, 0.5, 3e-06], [1, 2, 0], ["3e-06", "1e-05", "0.5"]),
    "true and false": ([True, False, None, True], [1, 0, -1, 1], ["False", "True"]),
    "only true": ([True, True], [1, 1], ["False", "True"]),
    "words": (["b", "a", None, "10", "9"], [3, 2, -1, 0, 1], ["10", "9", "a", "b"]),
    "written numbers": (["2.0", "10", " 3 ", ""], [2, 10, 3, -1], [str(i) for i in range(11)]),
    "zeros before": (["007", "010"], [7, 10], [str(i) for i in range(11)]),
    "missing": (["NA", "nan", "None", "null", " ", "ant", "N/A"], [-1, -1, -1, -1, -1, 0, -1], ["ant"]),
    "no labels at all": ([None, None], [-1, -1], None),
    "white space": ([" ant", "ant ", "ant", "bee\t"], [0, 0, 0, 1], ["ant", "bee"]),
    "none among words": (["cat", "-1", "dog", " -1.0"], [0, -1, 1, -1], ["cat", "dog"]),
    "none among true and false": (["True", "-1", "false"], [1, -1, 0], ["False", "True"]),
    "powers as spreadsheets write them": (["1E+01", "2", "0E+00"], [10, 2, 0], [str(i) for i in range(11)]),
    "codes that look like powers": (["1e5", "2e7", "00e1"], [1, 2, 0], ["00e1", "1e5", "2e7"]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["values", "csv", "tsv", "parquet", "pandas", "hf"])
def test_labels_are_the_same_whatever_kind_of_file_the_table_is(tmp_path, name, kind):
    values, labels, names = CASES[name]
    assert found(kind, values, tmp_path) == (labels, names)


def found(kind, values, folder):
    rows = [(f"{i}.png", value) for i, value in enumerate(values)]
    if kind == "values":
        return from_values(values, "here")
    if kind in ("csv", "tsv"):
        with open(folder / f"m.{kind}", "w", newline="") as file:
            csv.writer(file, delimiter="\t" if kind == "tsv" else ",").writerows(
                [("path", "label"), *[(path, "" if label is None else label) for path, label in rows]]
            )
        corpus = open_corpus(str(folder / f"m.{kind}"))
    elif kind == "hf":
        datasets = pytest.importorskip("datasets", reason="needs featcache[hf]")
        table = datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}] * len(values), "label": values})
        table.cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
        corpus = open_corpus(f"hf:{folder / 'saved'}")
    else:
        pa = pytest.importorskip("pyarrow", reason="needs featcache[parquet]")
        path = str(folder / "m.parquet")
        if kind == "pandas":
            pd = pytest.importorskip("pandas", reason="needs pandas")
            pd.DataFrame(rows, columns=["path", "label"]).to_parquet(path)
        else:
            table = pa.table({"path": [path for path, _ in rows], "label": values})
            pytest.importorskip("pyarrow.parquet").write_table(table, path)
        corpus = open_corpus(path)
    return [corpus.label(i) for i in range(len(corpus))], corpus.class_names


@pytest.mark.parametrize(
    "kind", ["int8", "uint16", "int64", "float16", "float32", "bool", "dictionary", "large_string", "binary"]
)
def test_columns_of_every_type(tmp_path, kind):
    pa = pytest.importorskip("pyarrow", reason="needs featcache[parquet]")
    if kind == "dictionary":
        column = pa.array(["b", "a", None]).dictionary_encode()
    elif kind in ("large_string", "binary"):
        column = pa.array(["b", "a", None], getattr(pa, kind)())
    elif kind == "bool":
        column = pa.array([True, False, None])
    else:
        values = np.array([1, 0], getattr(np, kind))
        column = pa.concat_arrays([pa.array(values), pa.nulls(1, pa.array(values).type)])
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.table({"path": ["0", "1", "2"], "label": column}), tmp_path / "m.parquet"
    )
    corpus = open_corpus(str(tmp_path / "m.parquet"))
    assert [corpus.label(i) for i in range(3)] == [1, 0, -1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-4, 0], "m: -4 is no class number"),
        (["-4", "0"], "m: -4 is no class number"),
        ([2_000_000], "m: 2000000 is no class number"),
        ([float("inf")], "m: inf is no label"),
        ([[1, 2]], "m: a list is no label; choose a column"),
        ([{"a": 1}], "m: a dict is no label"),
    ],
)
def test_what_is_no_label_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_values(values, "m")


def test_missing_texts_are_those_of_pandas():
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    from pandas._libs.parsers import STR_NA_VALUES

    assert pandas
    assert MISSING == STR_NA_VALUES


def test_columns_are_chosen_by_name(tmp_path):
    (tmp_path / "m.csv").write_text("File,Label,species\na.png,0,bee\nb.png,1,ant\n")
    with pytest.raises(
        ValueError, match=r"found: File, Label, species\); name it in the header, or choose one with @path="
    ):
        open_corpus(f"{tmp_path}/m.csv")
    corpus = open_corpus(f"{tmp_path}/m.csv@path=File")
    assert (corpus.ids, [corpus.label(0), corpus.label(1)]) == (["a.png", "b.png"], [0, 1])  # however capitalised
    corpus = open_corpus(f"{tmp_path}/m.csv@path=File@label=species")
    assert ([corpus.label(0), corpus.label(1)], corpus.class_names) == ([1, 0], ["ant", "bee"])
    assert open_corpus(corpus.spec).class_names == ["ant", "bee"]
    assert open_corpus(f"{tmp_path}/m.csv@path=File@label=").class_names is None
    for options, message in [
        ("@path=File@label=specie", "@label=specie: no such column; did you mean species"),
        ("@path=File@lable=x", "@lable=x: no such option; did you mean label"),
        ("@path=File@path=File", "@path is given twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_corpus(f"{tmp_path}/m.csv{options}")
    (tmp_path / "twice.csv").write_text("path,label,label\na.png,0,1\n")
    with pytest.raises(ValueError, match="2 columns are called label; rename all but one"):
        open_corpus(f"{tmp_path}/twice.csv")


def test_another_choice_of_labels_is_another_corpus(tmp_path):
    from PIL import Image
    from tiny import tiny_encoder

    from featcache import extract

    for name in "ab":
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    (tmp_path / "m.csv").write_text("path,label,species\na.png,ant,red\nb.png,bee,white\n")
    extract(f"{tmp_path}/m.csv", tiny_encoder(), tmp_path / "s.zarr", device="cpu", precision="fp32")
    with pytest.raises(ValueError, match="from other samples or labels"):  # the same numbers under other names
        extract(f"{tmp_path}/m.csv@label=species", tiny_encoder(), tmp_path / "s.zarr", device="cpu", precision="fp32")

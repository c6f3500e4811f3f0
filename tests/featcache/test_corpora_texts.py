"""Corpora of texts: what they read, and a refusal that names the line for what they do not."""

import csv
import json
import zipfile

import pytest

from featcache.corpora import open_corpus
from featcache.corpora.texts import named_files as files_of_texts
from featcache.plugins import load_plugin

ROWS = [
    ('a "quoted", one\r\nof two lines', "good", "x"),
    ("  plain ", "bad", "y"),
    ("ünï 語", None, "z,1"),
    ("", "bad", "w"),
]


def texts_of(corpus):
    return [corpus.read(i).decode() for i in range(len(corpus))]


def labels_of(corpus):
    return [corpus.label(i) for i in range(len(corpus))]


def write(path, header, rows):
    """A table in the format of the path's ending; csv with a byte order mark and CRLF."""
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            given = [["" if field is None else field for field in row] for row in rows]
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *given])
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) for row in rows]
        path.write_text("\ufeff" + "\r\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    else:
        pa = pytest.importorskip("pyarrow", reason="needs featcache[parquet]")
        columns = {name: list(values) for name, values in zip(header, zip(*rows, strict=True), strict=True)}
        pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_columns_of_every_kind_of_table_are_the_same_texts(tmp_path, ending):
    path = write(tmp_path / f"t.{ending}", ["text", "label", "name"], ROWS)
    corpus = open_corpus(f"texts:{path}")
    assert corpus.kind == "text"
    assert texts_of(corpus) == [row[0] for row in ROWS]
    assert (labels_of(corpus), corpus.class_names) == ([1, 0, -1, 0], ["bad", "good"])
    assert corpus.ids == ["1", "2", "3", "4"]
    chosen = open_corpus(f"texts:{path}@text=name@label=@id=name")
    assert chosen.ids == texts_of(chosen) == [row[2] for row in ROWS]
    assert (labels_of(chosen), chosen.class_names) == ([-1] * 4, None)
    assert files_of_texts(f"{path}@text=name") == [str(path)]


def test_texts_longer_than_a_field_of_csv_is_by_default(tmp_path):
    corpus = open_corpus(f"texts:{write(tmp_path / 't.csv', ['text'], [['word ' * 40_000]])}")
    assert len(corpus.read(0)) == 200_000


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("t.csv", "review\nx\n", "", r"t\.csv, line 1: one column must be called text \(found: review\)"),
        ("t.csv", "review\nx\n", "@text=revew", r"t\.csv, line 1: @text=revew: no such column; did you mean review\?"),
        ("t.csv", "text,label\nx\n", "", "line 2: 1 columns where the header has 2; put quotes"),
        ("t.csv", "text\nx\né\n", "", "line 3: not UTF-8 text; save the table as UTF-8"),
        ("t.csv", 'text\n"x\n', "", "line 2: unexpected end of data"),
        ("t.csv", "text\n", "", "line 2: no texts; give a row for every text"),
        ("t.csv", "text,i\nx,1\ny,1\n", "@id=i", "line 3: id '1' is that of line 2 already"),
        ("t.csv", "text,i\nx,\n", "@id=i", "line 2: '' is no id"),
        ("t.csv", "text\nx\n", "@colour=red", "@colour=red: no such option; known: id, label, text"),
        ("t.jsonl", '{"text": "x"}\n{"text": \n', "", "line 2: no JSON"),
        ("t.jsonl", '{"text": "x"}\n\n{"label": 1}\n', "", r"line 3: no text \(found: label\)"),
        ("t.jsonl", '{"text": "x"}\n[1]\n', "", r"line 2: \[1\] is no record"),
        ("t.jsonl", '{"text": 3}\n', "", "line 1: 3 is no text; choose a column of texts with @text=COLUMN"),
        ("t.jsonl", "\n", "", "no texts; give a record"),
        ("t.parquet", "no parquet", "", "not a parquet file"),
        ("t.txt", "x", "", r"give a table \(\.csv, .*\), or lines:.*t\.txt for a text a line"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_line(tmp_path, name, text, options, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="needs featcache[parquet]")
    (tmp_path / name).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=message):
        open_corpus(f"texts:{tmp_path / name}{options}")


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"none\.csv: no such file; give the path of a \.csv, \.tsv, \.jsonl or \.parquet"
    ):
        open_corpus(f"texts:{tmp_path}/none.csv")


DOCUMENTS = [
    {"_id": "d1", "title": "A wing", "text": "in a slipstream"},
    {"_id": "d,2", "title": "", "text": " no title\n"},
    {"_id": 3, "text": " as it is "},
    {"_id": "ü", "title": "Only a title", "text": None},
]
JOINED = ["A wing in a slipstream", "no title", " as it is ", "Only a title"]


def beir(root, **files):
    """A data set in a folder, and the same in a zip, within a folder there."""
    (root / "set" / "qrels").mkdir(parents=True)
    for name, records in files.items():
        (root / "set" / f"{name.replace('_', '-')}.jsonl").write_text(
            "\n".join(map(json.dumps, records)), encoding="utf-8"
        )
    (root / "set" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq3\td1\t1\nq1\td1\t0\n")
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for path in sorted((root / "set").rglob("*.*")):
            archive.write(path, path.relative_to(root))
    return [root / "set", root / "set.zip"]


def test_parts_of_a_data_set_in_beirs_layout(tmp_path):
    queries = [{"_id": f"q{i}", "text": f"what {i}"} for i in range(4)]
    for place in beir(tmp_path, corpus=DOCUMENTS, queries=queries, queries_dev=queries[:1]):
        corpus = open_corpus(f"beir:{place}:corpus")
        assert (corpus.ids, texts_of(corpus)) == (["d1", "d,2", "3", "ü"], JOINED)
        assert corpus.kind == "text"
        assert open_corpus(f"beir:{place}:queries").ids == ["q0", "q1", "q2", "q3"]
        assert open_corpus(f"beir:{place}:queries-dev").ids == ["q0"]
        judged = open_corpus(f"beir:{place}:queries-test")
        assert (judged.ids, texts_of(judged)) == (["q1", "q3"], ["what 1", "what 3"])
        with pytest.raises(ValueError, match=r"no part 'corpsu'; did you mean corpus\?"):
            open_corpus(f"beir:{place}:corpsu")
        with pytest.raises(ValueError, match=r"has no qrels/train.tsv"):
            open_corpus(f"beir:{place}:queries-train")
    named_files = load_plugin("featcache.corpora", "beir").named_files
    assert named_files(f"{tmp_path}/set.zip:corpus") == [f"{tmp_path}/set.zip"]
    assert named_files(f"{tmp_path}/set:corpus") == [f"{tmp_path}/set/corpus.jsonl"]
    assert f"{tmp_path}/set/qrels/test.tsv" in named_files(f"{tmp_path}/set:queries-test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "d1", "text": "twice"}', "line 2: id 'd1' is that of line 1 already; make ids unique"),
        ('{"id": "d2", "text": "x"}', r"line 2: no _id and text in it \(found: id, text\)"),
        ('{"_id": "d2", "text": ["x"]}', r"line 2: \['x'\] is no text"),
        ('{"_id": "", "text": "x"}', "line 2: '' is no id"),
        ('{"_id": "\\ud800", "text": "x"}', "line 2: id .* is no valid text"),
        ('{"_id": "d2", "text"', "line 2: no JSON"),
    ],
)
def test_what_is_wrong_in_a_data_set_is_named_with_its_line(tmp_path, line, message):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "text": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"corpus.jsonl, {message}"):
        open_corpus(f"beir:{tmp_path}:corpus")


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    (tmp_path / "empty").mkdir()
    for spec, message in (
        (f"{tmp_path}/none.zip:corpus", "no such folder or zip"),
        (f"{tmp_path}/broken.zip:corpus", "neither a folder nor a zip"),
        (f"{tmp_path}/empty:corpus", "no .jsonl in it"),
        (f"{tmp_path}/empty", "is not beir:PATH:PART"),
    ):
        with pytest.raises(ValueError, match=message):
            open_corpus(f"beir:{spec}")


@pytest.mark.parametrize(("length", "stride"), [(7, 7), (7, 3), (100, 100), (9, 1), (1, 1)])
@pytest.mark.parametrize("text", ["a plain text of one line\r\nand another", "zwölf Bücher, 語 für 語 📚📚", "x"])
def test_windows_hold_every_byte_and_whole_characters(tmp_path, text, length, stride):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    corpus = open_corpus(f"windows:{tmp_path / 't.txt'}@length={length}@stride={stride}")
    data, end = text.encode(), 0
    for name, piece in zip(corpus.ids, texts_of(corpus), strict=True):
        start = int(name)
        assert data[start : start + len(piece.encode())] == piece.encode()
        assert start <= end
        assert len(piece.encode()) <= length + 3
        end = max(end, start + len(piece.encode()))
    assert end == len(data)
    if text.isascii():
        assert [len(each) for each in texts_of(corpus)][:-1] == [length] * (len(corpus) - 1)
        assert [int(name) for name in corpus.ids] == list(range(0, len(corpus) * stride, stride))


def test_windows_that_cannot_be_cut(tmp_path):
    (tmp_path / "t.txt").write_text("some text")
    (tmp_path / "b.txt").write_bytes(b"some\0thing")
    (tmp_path / "l.txt").write_bytes(b"caf\xe9")
    (tmp_path / "e.txt").write_bytes(b" \n")
    for spec, message in (
        ("t.txt@length=0", "give a stride from 1 to the length"),
        ("t.txt@length=4@stride=5", "nothing is to be left out"),
        ("t.txt@length=long", "give whole numbers"),
        ("b.txt", "holds NUL characters"),
        ("l.txt", "line 1: not UTF-8"),
        ("e.txt", "is empty"),
        ("n.txt", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            open_corpus(f"windows:{tmp_path}/{spec}")


def test_spans_are_of_their_document_and_of_nothing_else(tmp_path):
    rows = [(" ".join(f"w{i}-{j}" for j in range(30)), "ab"[i % 2]) for i in range(20)] + [("one", "a"), ("", "b")]
    inner = f"texts:{write(tmp_path / 't.csv', ['text', 'label'], rows)}"
    corpus = open_corpus(f"spans:3@seed=1::{inner}")
    words = [text.split() for text in texts_of(corpus)]
    assert corpus.ids[:4] == ["1#0", "1#1", "1#2", "2#0"]
    assert [corpus.label(i) for i in (0, 2, 3)] == [0, 0, 1]
    for name, found in zip(corpus.ids[:60], words[:60], strict=True):
        document = int(name.partition("#")[0]) - 1
        first = int(found[0].partition("-")[2])
        assert found == [f"w{document}-{j}" for j in range(first, first + len(found))]
    assert {len(found) for found in words[:60]} == set(range(2, 9))
    assert words[60:] == [["one"]] * 3 + [[]] * 3
    assert open_corpus(corpus.spec).read(5) == corpus.read(5)
    assert texts_of(open_corpus(f"spans:3::{inner}")) != texts_of(corpus)
    assert {len(text.split()) for text in texts_of(open_corpus(f"spans:2@least=4@most=4::{inner}"))[:40]} == {4}
    named_files = load_plugin("featcache.corpora", "spans").named_files
    assert named_files(f"3::{inner}") == [str(tmp_path / "t.csv")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spans:3:{}", "is not spans:COUNT"),
        ("spans:3@size=2::{}", "@size=2: no such option"),
        ("spans:0::{}", "give a count of 1 or more"),
        ("spans:1@least=5@most=3::{}", "least ≤ most"),
        ("spans:1::digits:test", "is no corpus of texts"),
    ],
)
def test_spans_that_cannot_be_cut(tmp_path, spec, message):
    (tmp_path / "t.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=message):
        open_corpus(spec.format(f"texts:{tmp_path / 't.csv'}"))

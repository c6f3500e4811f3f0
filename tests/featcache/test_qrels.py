"""Judgements as others write them, and what is none."""

import zipfile

import pytest

from featcache.qrels import read_qrels

BEIR = "query-id\tcorpus-id\tscore\nq1\td 1\t2\nq1\td2\t0\n\nq ä\td,2\t1\n"
READ = {"q1": {"d 1": 2, "d2": 0}, "q ä": {"d,2": 1}}


def test_files_of_beir_and_of_trec(tmp_path):
    file = tmp_path / "a:b.tsv"
    for text in (BEIR, BEIR.partition("\n")[2], "\ufeff" + BEIR, BEIR.replace("\n", "\r\n"), BEIR + "q1\td 1\t2\n"):
        file.write_text(text, encoding="utf-8", newline="")
        assert read_qrels(str(file)) == READ
    file.write_text("1 0 a -1\n1 Q0 b 3\n")
    assert read_qrels(str(file)) == {"1": {"a": -1, "b": 3}}


@pytest.mark.parametrize("inside", ["qrels/train.tsv", "qrels-train.tsv"])
def test_a_folder_or_zip_of_beir(tmp_path, inside):
    (tmp_path / inside).parent.mkdir(exist_ok=True)
    (tmp_path / inside).write_text(BEIR, encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr(f"set/{inside}", BEIR)
    for path in (tmp_path, tmp_path / "set.zip"):
        assert read_qrels(f"beir:{path}:train") == READ
        with pytest.raises(ValueError, match=rf"beir:.*:dev: has no qrels/dev.tsv or qrels-dev.tsv; it has .*{inside}"):
            read_qrels(f"beir:{path}:dev")
        with pytest.raises(ValueError, match=r"has no qrels\.tsv; it has"):
            read_qrels(f"beir:{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no judgement"),
        ("query-id\tcorpus-id\tscore\n", "holds no judgement"),
        ("q d 1\nq d", "line 2 is no judgement"),
        ("q\td\tmuch\nq\td\t1", "line 1 is no judgement"),
        ("q d 1.5", "line 1 is no judgement"),
        ("q\td\t1\nq\td\t2", "line 2: d has grade 1 for q already"),
    ],
)
def test_what_is_no_judgement_is_named(tmp_path, text, message):
    (tmp_path / "qrels.tsv").write_text(text)
    with pytest.raises(ValueError, match=f"qrels.tsv: {message}"):
        read_qrels(str(tmp_path / "qrels.tsv"))


def test_what_is_no_file_is_named(tmp_path):
    for spec in (str(tmp_path), str(tmp_path / "none.tsv"), f"beir:{tmp_path}/none.zip:dev"):
        with pytest.raises(ValueError, match=r"; give a"):
            read_qrels(spec)
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "binary.zip").write_bytes(b"\xff\xfe\x00")
    for spec in (str(tmp_path / "binary.tsv"), f"beir:{tmp_path / 'binary.zip'}"):
        with pytest.raises(ValueError, match=r"; give"):
            read_qrels(spec)

"""The day of each image: of tables as people write them, and of files."""

import datetime
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from evalsuite.deployed.days import days_of_files, days_of_table

IDS = ["a,b.png", 'say "x".png', "c/ü.png"]


def table(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_days_of_a_table(tmp_path, suffix):
    path = tmp_path / f"dates{suffix}"
    if suffix == ".parquet":
        times = [datetime.datetime(2026, 5, 1, 23, 59), datetime.datetime(2026, 5, 2), datetime.datetime(2026, 5, 3)]
        pq.write_table(pa.table({"id": IDS, "date": times, "more": [1, 2, 3]}), path)
    else:
        rows = [
            "id,date,more",
            '"a,b.png",2026-05-01T23:59:00+02:00,1',
            '"say ""x"".png", 2026-05-02 ,2',
            "c/ü.png,20260503,3",
        ]
        between = "\t" if suffix == ".tsv" else ","
        text = (
            "\n".join(rows)
            if suffix == ".csv"
            else "\n".join(rows).replace('"a,b.png"', "A").replace(",", between).replace("A", "a,b.png")
        )
        table(path, text)
    assert days_of_table(path, IDS) == ["2026-05-01", "2026-05-02", "2026-05-03"]
    assert days_of_table(path, IDS[::-1]) == ["2026-05-03", "2026-05-02", "2026-05-01"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,date\na,2026-05-01\n", r"no date of 1 of 2 images \(first: 'b'\)"),
        ("id,date\na,2026-05-01\nb,yesterday\n", "line 3: 'yesterday' is no date"),
        ("id,date\na,2026-05-01\nb,2026-02-30\n", "line 3: '2026-02-30' is no date"),
        ("id,date\na,1771120812345\n", "line 2: '1771120812345' is no date"),  # ms: Python's 1771-12-08
        ("id,date\na,2026-05-01\na,2026-05-02\n", "line 3: 'a' has two days"),
        ("path,date\na,2026-05-01\n", "no column 'id'; name another with --id-column"),
        ("id,taken\na,2026-05-01\n", "no column 'date'; name another with --date-column"),
        ("id,date\na\n", "line 2: has too few columns"),
        ("", "no column 'id'"),
    ],
)
def test_tables_that_do_not_suit_are_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        days_of_table(table(tmp_path / "dates.csv", text), ["a", "b"])


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        days_of_table(tmp_path / "none.csv", ["a"])
    with pytest.raises(ValueError, match=r"are read of a \.csv, \.tsv or \.parquet"):
        days_of_table(table(tmp_path / "dates.txt", "id,date\n"), ["a"])
    with pytest.raises(ValueError, match="not a parquet file"):
        days_of_table(table(tmp_path / "dates.parquet", "id,date\n"), ["a"])


def test_days_of_files_are_when_they_were_changed_in_utc(tmp_path):
    for i, time in enumerate(("2026-05-01T23:59:59+00:00", "2026-05-02T00:00:00+00:00")):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{i}.png")
        os.utime(tmp_path / f"{i}.png", (datetime.datetime.fromisoformat(time).timestamp(),) * 2)
    assert days_of_files(str(tmp_path), ["0.png", "1.png"]) == ["2026-05-01", "2026-05-02"]
    manifest = table(tmp_path / "m.csv", "path\n1.png\ngone.png\n")
    assert days_of_files(str(manifest), ["1.png", "gone.png"]) == ["2026-05-02", ""]
    with pytest.raises(ValueError, match="has other images now"):
        days_of_files(str(tmp_path), ["0.png"])
    with pytest.raises(ValueError, match="not files of their own"):
        days_of_files("digits:test", ["0"])

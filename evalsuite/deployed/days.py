"""The day of each image of a stream: of a table, or of its file."""

from __future__ import annotations

import csv
import datetime
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from featcache.corpora import open_corpus, source_of
from featcache.plugins import load_plugin, suggest

_LISTED = {"folder": 0, "manifest": 1}
"""Corpora whose files are one a sample, and how many others `named_files` has before them."""


def days_of_table(
    path: str | os.PathLike[str], ids: Sequence[str], id_column: str = "id", date_column: str = "date"
) -> list[str]:
    """The day, as YYYY-MM-DD, of each of `ids` by a `.csv`, `.tsv` or `.parquet` with a column of ids and one of dates or times
    in ISO 8601; of a time with a zone, the day there.

    Raises:
        ValueError: there is no such table or column, a date cannot be read, an id has two days, or one of `ids` has none.
    """
    known: dict[str, str] = {}
    for where, sample_id, date in _rows(Path(path), id_column, date_column):
        day = _day(date, where)
        if known.setdefault(sample_id, day) != day:
            raise ValueError(f"{where}: {sample_id!r} has two days, {known[sample_id]} and {day}; give each image one")
    lacking = [each for each in ids if each not in known]
    if lacking:
        raise ValueError(
            f"{path}: has no date of {len(lacking):,} of {len(ids):,} images (first: {lacking[0]!r}); its column "
            f"{id_column!r} has to hold their ids, as `detector score` writes them"
        )
    return [known[each] for each in ids]


def days_of_files(spec: str, ids: Sequence[str]) -> list[str]:
    """The day, as YYYY-MM-DD in UTC, on which each file of a corpus was last changed; "" of one that is gone.

    Raises:
        ValueError: the corpus is not of one local file a sample, or no longer has these samples.
    """
    source, rest = source_of(spec)
    files = load_plugin("featcache.corpora", source).named_files(rest) if source in _LISTED else None
    if files is None:
        raise ValueError(
            f"{spec}: its images are not files of their own here, whose times could be told; give --dates TABLE"
        )
    if list(open_corpus(spec).ids) != list(ids):
        raise ValueError(f"{spec}: has other images now; give --dates TABLE")
    return [_changed(file) for file in files[_LISTED[source] :]]


def _changed(file: str) -> str:
    try:
        seconds = os.stat(file).st_mtime
    except OSError:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def _rows(path: Path, id_column: str, date_column: str) -> Iterator[tuple[str, str, Any]]:
    """Where each row is, for messages, its id and its date."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; give a .csv, .tsv or .parquet with the columns {id_column} and {date_column}"
        )
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, id_column, date_column)
        return
    if path.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{path}: dates are read of a .csv, .tsv or .parquet; give one")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            _require_columns(path, reader.fieldnames or [], id_column, date_column)
            for row in reader:
                if row[id_column] is None or row[date_column] is None:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: has too few columns; put quotes around commas in a field"
                    )
                yield f"{path}, line {reader.line_num}", row[id_column], row[date_column]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a table in UTF-8 ({error}); save it as CSV with commas, or TSV with tabs"
        ) from None


def _parquet_rows(path: Path, id_column: str, date_column: str) -> Iterator[tuple[str, str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install 'featcache[parquet]'") from None
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it again") from None
    _require_columns(path, table.column_names, id_column, date_column)
    both = zip(*(table.column(name).to_pylist() for name in (id_column, date_column)), strict=True)
    yield from ((f"{path}, row {i + 1}", str(sample_id), date) for i, (sample_id, date) in enumerate(both))


def _require_columns(path: Path, names: Sequence[str], id_column: str, date_column: str) -> None:
    for name, flag in ((id_column, "--id-column"), (date_column, "--date-column")):
        if name not in names:
            raise ValueError(f"{path}: no column {name!r}; name another with {flag}; {suggest(name, list(names))}")


def _day(date: Any, where: str) -> str:
    if isinstance(date, datetime.datetime):
        return date.date().isoformat()
    if isinstance(date, datetime.date):
        return date.isoformat()
    text = str(date).strip()
    try:
        if text.isdigit() and len(text) != len("20260531"):  # seconds or ms since 1970, of which Python may make a date
            raise ValueError
        return datetime.datetime.fromisoformat(text).date().isoformat()
    except ValueError:
        raise ValueError(f"{where}: {date!r} is no date; write it as 2026-05-31, or 2026-05-31T14:00") from None

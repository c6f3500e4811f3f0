"""Columns of tables of samples: `.csv`, `.tsv`, `.parquet` and `.jsonl` files, local or by URL."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from featcache.disk.plain import read_plain
from featcache.disk.urls import cannot_be_read, is_url, open_filesystem, read_url
from featcache.plugins import suggest

Rows = list[tuple[int, tuple[Any, ...]]]
"""The number of each line or row in its file, and its cells, one for each part that is asked for; None where it has none."""


def read_table(path: str, parts: Sequence[str], options: Mapping[str, str], kind: str, noun: str) -> tuple[Rows, str]:
    """The columns called as `parts` are, or as `options` choose in their place; the first there must be. And whether rows are
    counted by `line` or `row`. `kind` of file and `noun` of a sample are for messages.

    Raises:
        ValueError: no such file or column, no row, or what is no such table; says in which line.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".parquet":
        return _parquet_rows(path, parts, options, kind, noun), "row"
    if suffix == ".jsonl":
        return _json_rows(path, parts, options, kind, noun), "line"
    return _csv_rows(path, parts, options, kind, noun), "line"


def _csv_rows(path: str, parts: Sequence[str], options: Mapping[str, str], kind: str, noun: str) -> Rows:
    between = "\t" if path.lower().endswith(".tsv") else ","
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 131,072 characters that it is by default
    reader = csv.reader(
        io.StringIO(decoded(read_file(path, kind), path, kind), newline=""), strict=True, delimiter=between
    )
    rows: Rows = []
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = _columns(header, parts, options, f"{path}, line 1")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} columns where the header has {len(header)}; "
                    f"put quotes around fields that hold a {'tab' if between != ',' else 'comma'}"
                )
            rows.append((reader.line_num, tuple(None if at is None else fields[at] for at in columns)))
    except csv.Error as error:
        told = "TSV with tabs" if between != "," else "CSV with commas"
        raise ValueError(f"{path}, line {reader.line_num}: {error}; save the {kind} as {told}") from None
    if not rows:
        raise ValueError(f"{path}, line 2: no {noun}s; give a row for every {noun} under the header")
    return rows


def _parquet_rows(path: str, parts: Sequence[str], options: Mapping[str, str], kind: str, noun: str) -> Rows:
    table, pa = opened_parquet(path, kind)
    try:
        names = table.schema_arrow.names
        columns = [
            None if at is None else table.read(columns=[names[at]]).column(names[at]).to_pylist()
            for at in _columns(names, parts, options, path)
        ]
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it again") from None
    if not columns[0]:
        raise ValueError(f"{path}, row 1: no {noun}s; give a row for every {noun}")
    filled = [[None] * len(columns[0]) if column is None else column for column in columns]
    return list(enumerate(zip(*filled, strict=True), 1))


def _json_rows(path: str, parts: Sequence[str], options: Mapping[str, str], kind: str, noun: str) -> Rows:
    records = list(json_lines(decoded(read_file(path, kind), path, kind), path))
    for number, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: {record!r:.40} is no record; write one in braces a line")
    if not records:
        raise ValueError(f"{path}, line 1: no {noun}s; give a record for every {noun}")
    names = list(dict.fromkeys(name for _, record in records for name in record))
    columns = _columns(names, parts, options, path)
    wanted = [None if at is None else names[at] for at in columns]
    for number, record in records:
        if wanted[0] not in record:
            raise ValueError(
                f"{path}, line {number}: no {wanted[0]} (found: {', '.join(record)}); give every record one"
            )
    return [(number, tuple(record.get(name) for name in wanted)) for number, record in records]


def _columns(header: list[str], parts: Sequence[str], options: Mapping[str, str], where: str) -> list[int | None]:
    """The position of each part's column."""
    found = [_column(header, part, options.get(part), where) for part in parts]
    if found[0] is None:
        there = f"found: {', '.join(header)}" if any(header) else "the file is empty"
        raise ValueError(
            f"{where}: one column must be called {parts[0]} ({there}); name it in the header, or choose one with "
            f"@{parts[0]}=COLUMN"
        )
    return found


def _column(header: list[str], part: str, chosen: str | None, where: str) -> int | None:
    """Position of the column called `part`, however capitalised, or `chosen` in its place; None without one."""
    found = [i for i, name in enumerate(header) if name == (part if chosen is None else chosen)]
    if not found and chosen is None:
        found = [i for i, name in enumerate(header) if name.lower() == part]
    if chosen and not found:
        raise ValueError(f"{where}: @{part}={chosen}: no such column; {suggest(chosen, header)}")
    if len(found) > 1:
        raise ValueError(f"{where}: {len(found)} columns are called {header[found[0]]}; rename all but one")
    return found[0] if found and chosen != "" else None


def opened_parquet(path: str, kind: str) -> tuple[Any, Any]:
    """The opened file, and pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install 'featcache[parquet]'") from None
    try:
        return pq.ParquetFile(io.BytesIO(read_file(path, kind))), pa
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it again") from None


def read_file(path: str, kind: str) -> bytes:
    """Raises ValueError where there is no such file, or it cannot be read."""
    if not is_url(path):
        if not os.path.exists(path):
            endings = ".csv, .tsv or .parquet" if kind == "manifest" else ".csv, .tsv, .jsonl or .parquet"
            raise ValueError(f"{path}: no such file; give the path of a {endings} {kind}")
        try:
            return read_plain(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); make it a readable file") from None
    open_filesystem(path)
    try:
        return read_url(path)
    except Exception as error:
        raise ValueError(f"{path}: {cannot_be_read(error)}") from None


def decoded(data: bytes, source: str, kind: str) -> str:
    """Text without a byte order mark, line ends as they are.

    Raises:
        ValueError: it is no UTF-8; says in which line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{source}, line {line}: not UTF-8 text; save the {kind} as UTF-8") from None


def json_lines(text: str, source: str) -> Iterator[tuple[int, Any]]:
    """The value of every line that is not blank, with the line's number from 1.

    Raises:
        ValueError: a line is no JSON; says which.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            said = getattr(error, "msg", "nested too deeply")
            raise ValueError(f"{source}, line {number}: no JSON ({said}); write one record a line") from None


def unique_ids(ids: Iterable[Any], numbers: Iterable[int], source: str, unit: str) -> list[str]:
    """The ids as text. Raises ValueError, which names the `unit` (line, row) by its number, for one that is empty, no text or
    number, or there twice."""
    seen: dict[str, int] = {}
    for number, given in zip(numbers, ids, strict=True):
        where = f"{source}, {unit} {number}"
        if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
            raise ValueError(f"{where}: {given!r:.40} is no id; give every text one, as text")
        name = str(given)
        if name.encode("utf-8", "replace").decode() != name:
            raise ValueError(f"{where}: id {given!r:.40} is no valid text; write it as UTF-8")
        if name in seen:
            raise ValueError(f"{where}: id {name!r} is that of {unit} {seen[name]} already; make ids unique")
        seen[name] = number
    return list(seen)

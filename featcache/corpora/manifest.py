"""A table of images, `.csv` or `.parquet`, with the columns `path` and, if there are labels, `label`."""

import csv
import io
import math
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from featcache.corpora._labels import from_names, from_numbers
from featcache.corpora._urls import is_url, open_filesystem, read_url

Rows = list[tuple[int, Any, Any]]  # line or row number in the file, path, label


class Manifest:
    """The images that a `.csv` or `.parquet` file lists, in its order; other columns are passed over.

    A path is absolute, a URL, or relative to the manifest's own directory; as written, it is the sample id.
    Labels that are all integers stay as they are; anything else is a class name, numbered in sorted order.
    An empty label, and -1, mean none. Images are looked for when they are read, not when this is opened.
    """

    def __init__(self, path: str):
        self.spec = str(path)
        rows, unit = (_parquet_rows(path), "row") if path.lower().endswith(".parquet") else (_csv_rows(path), "line")
        self.ids = ["" if name is None else str(name) for _, name, _ in rows]
        self._places = [_place(name, path) for name in self.ids]
        seen: dict[str, int] = {}
        for (number, name, _), place in zip(rows, self._places, strict=True):
            if not name:
                raise ValueError(f"{path}, {unit} {number}: the path is empty; give every image's path")
            if place in seen:
                raise ValueError(
                    f"{path}, {unit} {number}: {name} is listed already in {unit} {seen[place]}; list every image once"
                )
            seen[place] = number
        labels = [label for _, _, label in rows]
        if all(label is None or isinstance(label, int) for label in labels):
            self._labels, self.class_names = from_numbers(labels, path)
        else:
            self._labels, self.class_names = from_names([None if label is None else str(label) for label in labels])

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        place = self._places[i]
        return read_url(place) if is_url(place) else Path(place).read_bytes()

    def label(self, i: int) -> int:
        return self._labels[i]


def _place(name: str, manifest: str) -> str:
    """Where the image called `name` in the manifest is."""
    if is_url(name) or os.path.isabs(name):
        return name
    if is_url(manifest):
        directory, normal = manifest.rsplit("/", 1)[0], posixpath.normpath(name)
        return f"{directory}/{normal}"
    return os.path.normpath(os.path.join(os.path.dirname(manifest), name))


def _csv_rows(path: str) -> Rows:
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save the manifest as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: Rows = []
    try:
        header = [name.strip() for name in next(reader, [])]
        at, label_at = _columns(header, f"{path}, line 1")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} columns where the header has {len(header)}; "
                    "put quotes around fields that hold a comma"
                )
            label = fields[label_at].strip() if label_at is not None else ""
            rows.append((reader.line_num, fields[at], label or None))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; save the manifest as CSV with commas") from None
    if not rows:
        raise ValueError(f"{path}, line 2: no images; give a row for every image under the header")
    if all(label is None or re.fullmatch(r"-?\d+", label) for _, _, label in rows):
        return [(number, name, None if label is None else int(label)) for number, name, label in rows]
    return rows


def _parquet_rows(path: str) -> Rows:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install 'featcache[parquet]'") from None
    try:
        table = pq.ParquetFile(io.BytesIO(_read(path)))
        names = table.schema_arrow.names
        at, label_at = _columns(names, path)
        wanted = [names[column] for column in (at, label_at) if column is not None]
        columns = table.read(columns=wanted).to_pydict()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it again") from None
    paths, labels = columns["path"], columns.get("label", [None] * len(columns["path"]))
    if not paths:
        raise ValueError(f"{path}, row 1: no images; give a row for every image")
    if all(label is None or isinstance(label, float) for label in labels):  # how pandas writes integers with gaps
        labels = [None if label is None or math.isnan(label) else int(label) for label in labels]
    return list(zip(range(1, len(paths) + 1), paths, labels, strict=True))


def _columns(header: list[str], where: str) -> tuple[int, int | None]:
    """Positions of `path` and `label`."""
    if header.count("path") != 1:
        found = f"found: {', '.join(header)}" if any(header) else "the file is empty"
        raise ValueError(f"{where}: one column must be called path ({found}); name it in the header")
    return header.index("path"), header.index("label") if "label" in header else None


def _read(path: str) -> bytes:
    if not is_url(path):
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give the path of a .csv or .parquet manifest")
        return Path(path).read_bytes()
    open_filesystem(path)
    try:
        return read_url(path)
    except Exception as error:  # every service raises its own kinds; to the user they are one
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}); check the address, the network and credentials"
        ) from None


open_corpus = Manifest

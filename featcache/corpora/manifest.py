"""A table of images, `.csv`, `.tsv` or `.parquet`, with the columns `path` and, if there are labels, `label`."""

import csv
import io
import os
import posixpath
from typing import Any, cast

from featcache.corpora import Corpus, Listed
from featcache.corpora._labels import from_values
from featcache.corpora._options import split_options
from featcache.disk.plain import read_plain
from featcache.disk.urls import cannot_be_read, is_url, open_filesystem, read_url
from featcache.plugins import load_plugin, suggest

Rows = list[tuple[int, Any, Any]]  # line or row number in the file, path, label


class Manifest(Listed):
    """The images that a `.csv`, `.tsv` or `.parquet` file lists, in its order; other columns are passed over.

    Spec: the file's path or URL; `m.csv@path=file@label=species` chooses other columns, `@label=` none.
    A path is absolute, a URL, or relative to the manifest's own directory; as written, it is the sample id.
    Labels are read by one rule, `featcache.corpora._labels.from_values`, whatever the kind of file.
    Images are looked for when they are read, not when this is opened.
    """

    def __init__(self, rest: str):
        self.spec = str(rest)
        path, options = split_options("manifest", self.spec, ("path", "label"))
        self.file = path
        is_parquet = path.lower().endswith(".parquet")
        rows, unit = (_parquet_rows(path, options), "row") if is_parquet else (_csv_rows(path, options), "line")
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
        self.labels, self.class_names = from_values([label for _, _, label in rows], path)

    def read(self, i: int) -> bytes:
        place = self._places[i]
        return read_url(place) if is_url(place) else read_plain(place)


def _place(name: str, manifest: str) -> str:
    """Where the image called `name` in the manifest is."""
    if is_url(name) or os.path.isabs(name):
        return name
    if is_url(manifest):
        directory, normal = manifest.rsplit("/", 1)[0], posixpath.normpath(name)
        return f"{directory}/{normal}"
    return os.path.normpath(os.path.join(os.path.dirname(manifest), name))


def _csv_rows(path: str, options: dict[str, str]) -> Rows:
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save the manifest as UTF-8") from None
    between = "\t" if path.lower().endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=between)
    rows: Rows = []
    try:
        header = [name.strip() for name in next(reader, [])]
        at, label_at = _columns(header, options, f"{path}, line 1")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} columns where the header has {len(header)}; "
                    f"put quotes around fields that hold a {'tab' if between != ',' else 'comma'}"
                )
            rows.append((reader.line_num, fields[at], fields[label_at] if label_at is not None else None))
    except csv.Error as error:
        kind = "TSV with tabs" if between != "," else "CSV with commas"
        raise ValueError(f"{path}, line {reader.line_num}: {error}; save the manifest as {kind}") from None
    if not rows:
        raise ValueError(f"{path}, line 2: no images; give a row for every image under the header")
    return rows


def _parquet_rows(path: str, options: dict[str, str]) -> Rows:
    table, pa = _parquet(path)
    try:
        names = table.schema_arrow.names
        wanted = [names[column] for column in _columns(names, options, path) if column is not None]
        columns = [table.read(columns=[name]).column(name).to_pylist() for name in wanted]
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it again") from None
    paths, labels = columns[0], columns[1] if len(columns) > 1 else [None] * len(columns[0])
    if not paths:
        raise ValueError(f"{path}, row 1: no images; give a row for every image")
    return list(zip(range(1, len(paths) + 1), paths, labels, strict=True))


def _parquet(path: str) -> tuple[Any, Any]:
    """The opened file, and pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install 'featcache[parquet]'") from None
    try:
        return pq.ParquetFile(io.BytesIO(_read(path))), pa
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it again") from None


def _columns(header: list[str], options: dict[str, str], where: str) -> tuple[int, int | None]:
    """Positions of the paths and the labels."""
    at, label_at = (_column(header, part, options.get(part), where) for part in ("path", "label"))
    if at is None:
        found = f"found: {', '.join(header)}" if any(header) else "the file is empty"
        raise ValueError(
            f"{where}: one column must be called path ({found}); name it in the header, or choose one with @path=COLUMN"
        )
    return at, label_at


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


def _read(path: str) -> bytes:
    if not is_url(path):
        if not os.path.exists(path):
            raise ValueError(f"{path}: no such file; give the path of a .csv, .tsv or .parquet manifest")
        try:
            return read_plain(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); make it a readable file") from None
    open_filesystem(path)
    try:
        return read_url(path)
    except Exception as error:
        raise ValueError(f"{path}: {cannot_be_read(error)}") from None


def open_corpus(rest: str) -> Corpus:
    """Open the table; one that holds the images themselves as a Hugging Face data set."""
    path, options = split_options("manifest", rest, ("path", "image", "label"))
    if path.lower().endswith(".parquet") and "path" not in options:
        columns = [name.lower() for name in _parquet(path)[0].schema_arrow.names]
        if "image" in options or ("path" not in columns and _holds_images(path)):
            return load_plugin("featcache.corpora", "hf").open_file(rest)
    return cast(Corpus, Manifest(rest))


def _holds_images(path: str) -> bool:
    """Whether some column holds bytes, as such or beside a path."""
    table, pa = _parquet(path)
    kinds = [field.type for field in table.schema_arrow]
    return any(
        _is_bytes(kind, pa) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0) for kind in kinds
    )


def _is_bytes(kind: Any, pa: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def named_files(rest: str) -> list[str] | None:
    corpus = None if is_url(rest) else open_corpus(rest)
    if not isinstance(corpus, Manifest) or any(map(is_url, corpus._places)):  # else a Hugging Face data set
        return None
    return [corpus.file, *corpus._places]

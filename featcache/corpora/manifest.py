"""A table of images, `.csv`, `.tsv` or `.parquet`, with the columns `path` and, if there are labels, `label`."""

import os
import posixpath
from typing import Any, cast

from featcache.corpora import Corpus, Listed
from featcache.corpora._labels import from_values
from featcache.corpora._options import split_options
from featcache.corpora._tables import opened_parquet, read_table
from featcache.disk.plain import read_plain
from featcache.disk.urls import is_url, read_url
from featcache.plugins import load_plugin


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
        rows, unit = read_table(path, ("path", "label"), options, "manifest", "image")
        self.ids = ["" if name is None else str(name) for _, (name, _) in rows]
        self._places = [_place(name, path) for name in self.ids]
        seen: dict[str, int] = {}
        for (number, (name, _)), place in zip(rows, self._places, strict=True):
            if not name:
                raise ValueError(f"{path}, {unit} {number}: the path is empty; give every image's path")
            if place in seen:
                raise ValueError(
                    f"{path}, {unit} {number}: {name} is listed already in {unit} {seen[place]}; list every image once"
                )
            seen[place] = number
        self.labels, self.class_names = from_values([label for _, (_, label) in rows], path)

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


def open_corpus(rest: str) -> Corpus:
    """Open the table; one that holds the images themselves as a Hugging Face data set."""
    path, options = split_options("manifest", rest, ("path", "image", "label"))
    if path.lower().endswith(".parquet") and "path" not in options:
        columns = [name.lower() for name in opened_parquet(path, "manifest")[0].schema_arrow.names]
        if "image" in options or ("path" not in columns and _holds_images(path)):
            return load_plugin("featcache.corpora", "hf").open_file(rest)
    return cast(Corpus, Manifest(rest))


def _holds_images(path: str) -> bool:
    """Whether some column holds bytes, as such or beside a path."""
    table, pa = opened_parquet(path, "manifest")
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

"""`beir:PATH:PART`: the texts of a retrieval data set in BEIR's layout, a folder or a `.zip`."""

import io
import os
import zipfile
import zlib
from collections.abc import Sequence

from featcache.corpora import Listed
from featcache.corpora._tables import decoded, json_lines, unique_ids
from featcache.disk.plain import read_plain
from featcache.plugins import suggest
from featcache.qrels import read_qrels

LAYOUT = "corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"


class Beir(Listed):
    """`beir:PATH:corpus` are the documents, `beir:PATH:queries` the queries; and so on of any other `.jsonl` there, as
    `beir:PATH:queries-train`. Where a data set keeps all its queries in one file, `queries-SPLIT` are those that its qrels of that
    split judge.

    A document is its title, a blank and its text, without white space at either end, as BEIR joins them; what has no title is
    its text as it is. Ids are those of the files, in their order. A zip may hold all in one folder. The texts are held in memory.

    Raises:
        ValueError: no such data set or part, a line that is no such record, an id that is there twice.
    """

    kind = "text"
    class_names: Sequence[str] | None = None

    def __init__(self, rest: str):
        self.spec = f"beir:{rest}"
        path, part = _parted(rest)
        parts = _parts(path)
        judged = None
        if part not in parts:
            split = part.removeprefix("queries-")
            if split == part or "queries" not in parts:
                raise ValueError(f"{path}: no part {part!r}; {suggest(part, list(parts))}")
            judged = read_qrels(f"beir:{path}:{split}")
        name = parts["queries" if judged is not None else part]
        source = f"{path}: {name}"
        lines = list(json_lines(decoded(_read(path, name), source, "file"), source))
        records = [_record(record, f"{source}, line {number}") for number, record in lines]
        ids = unique_ids([sample for sample, _ in records], [number for number, _ in lines], source, "line")
        kept = [
            (sample, text) for sample, (_, text) in zip(ids, records, strict=True) if judged is None or sample in judged
        ]
        if not kept:
            raise ValueError(f"{source}: no texts{'' if judged is None else f' that the qrels of {part} judge'}")
        self.ids, self._texts = [sample for sample, _ in kept], [text for _, text in kept]
        self.labels = [-1] * len(kept)

    def read(self, i: int) -> bytes:
        return self._texts[i].encode("utf-8", "surrogatepass")


def _parted(rest: str) -> tuple[str, str]:
    path, _, part = rest.rpartition(":")
    if not (path and part) or os.path.exists(rest):
        raise ValueError(f"beir:{rest} is not beir:PATH:PART; give beir:PATH:corpus, beir:PATH:queries, …")
    return path, part


def _parts(path: str) -> dict[str, str]:
    """Name of every part → its file in the folder or zip; in a zip perhaps in the one folder there."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such folder or zip; give a data set in BEIR's layout ({LAYOUT})")
    files = sorted(os.listdir(path)) if os.path.isdir(path) else sorted(_zip(path).namelist())
    found = [name for name in files if name.endswith(".jsonl") and not os.path.basename(name).startswith(".")]
    top = min((name.count("/") for name in found), default=0)
    parts = {os.path.basename(name).removesuffix(".jsonl"): name for name in found if name.count("/") == top}
    if not parts:
        raise ValueError(f"{path}: no .jsonl in it; give a data set in BEIR's layout ({LAYOUT})")
    return parts


def _zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(read_plain(path)))
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: neither a folder nor a zip that can be read ({error}); give one of the two"
        ) from None


def _read(path: str, name: str) -> bytes:
    try:
        return read_plain(os.path.join(path, name)) if os.path.isdir(path) else _zip(path).read(name)
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: {name} cannot be read ({error}); get the data set again") from None


def _record(record: object, where: str) -> tuple[object, str]:
    """Id and text of one line."""
    if not isinstance(record, dict) or "_id" not in record or "text" not in record:
        found = f"found: {', '.join(record)}" if isinstance(record, dict) else f"{record!r:.40}"
        raise ValueError(
            f"{where}: no _id and text in it ({found}); give BEIR's records, with _id, text and perhaps title"
        )
    title, text = record.get("title"), record["text"]
    for given in (title, text):
        if not isinstance(given, str | None):
            raise ValueError(f"{where}: {given!r:.40} is no text; write it in quotes")
    return record["_id"], (text or "") if title is None else f"{title} {text or ''}".strip()


open_corpus = Beir


def named_files(rest: str) -> list[str]:
    path, part = _parted(rest)
    if not os.path.isdir(path):
        return [path]
    split = part.removeprefix("queries-")
    names = [f"{part}.jsonl", *(["queries.jsonl", f"qrels/{split}.tsv", f"qrels-{split}.tsv"] if split != part else [])]
    return [os.path.join(path, name) for name in names]

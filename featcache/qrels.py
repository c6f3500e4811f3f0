"""Which documents answer which query: judgements as BEIR and TREC write them."""

import io
import os
import zipfile
import zlib
from pathlib import Path

from featcache.disk.plain import read_plain
from featcache.specs import naming

Qrels = dict[str, dict[str, int]]
"""Query id → document id → grade: 0 or less is judged irrelevant."""


def read_qrels(spec: str) -> Qrels:
    """The judgements of a file, in its order.

    Args:
        spec: a file: lines `query document grade` between tabs, below a header where there is one (BEIR), or `query 0 document
            grade` between blanks (TREC). Or `beir:PATH[:NAME]`, a BEIR folder or zip: there `qrels/NAME.tsv` or `qrels-NAME.tsv`,
            without a name `qrels.tsv`.

    Raises:
        ValueError: there is no such file, or a line of it is no judgement, or says another grade of a pair than an earlier one.
    """
    with naming(spec):
        data = _in_beir(spec.removeprefix("beir:")) if spec.startswith("beir:") else _file(spec)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 (byte {error.start + 1}); give the qrels as text") from None
        return _parsed(text)


def _parsed(text: str) -> Qrels:
    found: Qrels = {}
    for number, line in enumerate(io.StringIO(text), 1):
        fields = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if not line.strip() or (number == 1 and fields[-1].lower() in ("score", "relevance", "rel", "grade")):
            continue
        try:
            query, *_, document, grade = fields if len(fields) in (3, 4) else [""]
            judged = found.setdefault(query, {}).setdefault(document, int(grade))
        except ValueError:
            raise ValueError(
                f"line {number} is no judgement ({line.strip()[:60]!r}); give lines of query, document and grade, a whole number, "
                "between tabs"
            ) from None
        if judged != int(grade):
            raise ValueError(f"line {number}: {document} has grade {judged} for {query} already; keep one of the lines")
    if not found:
        raise ValueError("holds no judgement; give lines of query, document and grade")
    return found


def _file(path: str) -> bytes:
    try:
        return read_plain(path)
    except OSError as error:
        raise ValueError(f"{error.strerror or error}; give a file of qrels, or beir:PATH:NAME") from None


def _in_beir(rest: str) -> bytes:
    """Of `PATH[:NAME]`, a folder or a zip; a path may hold colons."""
    path, name = rest, ""
    if not os.path.exists(path):
        path, _, name = rest.rpartition(":")
    wanted = [f"qrels/{name}.tsv", f"qrels-{name}.tsv"] if name else ["qrels.tsv"]
    if os.path.isdir(path):
        for each in wanted:
            if (Path(path) / each).exists():
                return _file(str(Path(path) / each))
        there = [each.relative_to(path).as_posix() for each in sorted(Path(path).glob("qrels*/*.tsv"))]
        there += sorted(each.name for each in Path(path).glob("qrels*.tsv"))
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                # Some archives hold one folder, and all in it.
                there = [each for each in archive.namelist() if "qrels" in each and each.endswith(".tsv")]
                for each in wanted:
                    if inside := [member for member in there if member == each or member.endswith(f"/{each}")]:
                        return archive.read(inside[0])
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{getattr(error, 'strerror', None) or error}; give a BEIR folder or zip") from None
    raise ValueError(f"has no {' or '.join(wanted)}; it has {', '.join(there) or 'no qrels'}")

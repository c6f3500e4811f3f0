"""Which encoder each result is about, and how the page calls it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evalsuite.result import Metric, Result

_EVALUATED = ("student", "encoder", "query", "test", "id_test", "id_train", "train", "bank", "store")
"""Which input is the encoder that a result is about: the first that is there, else the first of any name."""


@dataclass
class ResultFile:
    """One result and where it came from; `row` is the number of its encoder's row, -1 where it is about several."""

    result: Result
    file: str
    row: int = -1

    @classmethod
    def of(cls, given: Result | str | os.PathLike[str], number: int) -> ResultFile:
        if isinstance(given, Result):
            return cls(given, f"result {number}")
        return cls(Result.read(given), os.fspath(given))

    @property
    def encoder(self) -> tuple[str, str] | None:
        """Fingerprint and name of the encoder that the result is about; None for a comparison of several."""
        return None if self.result.command == "compare" else encoder_of(self.result.inputs)

    @property
    def teacher(self) -> tuple[str, str] | None:
        return _encoder(self.result.inputs, "teacher")

    def record(self) -> dict[str, Any]:
        result = self.result
        return {
            "file": self.file,
            "command": result.command,
            "encoder": None if self.row < 0 else self.row,
            "inputs": result.inputs,
            "parameters": result.parameters,
            "versions": result.versions,
            "remarks": result.remarks,
            "metrics": {name: [each.value, *(each.ci95 or ())] for name, each in result.metrics.items()},
        }


@dataclass
class Row:
    """What the page shows as one encoder; `taught_by` is the number of its teacher's row."""

    fingerprint: str
    encoder: str
    given: str | None
    name: str = ""
    teacher: bool = False
    taught_by: int | None = None

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "given"}


def encoder_of(inputs: Mapping[str, Any]) -> tuple[str, str] | None:
    """Fingerprint and name of the encoder that a result with these inputs is about."""
    others = (key for key, record in inputs.items() if isinstance(record, Mapping) and "fingerprint" in record)
    return next((found for key in (*_EVALUATED, *others) if (found := _encoder(inputs, key))), None)


def _encoder(inputs: Mapping[str, Any], key: str) -> tuple[str, str] | None:
    """Fingerprint and name in an input's record, as far as it has them."""
    record = inputs.get(key)
    if isinstance(record, str):  # a spec; its fingerprint may stand beside it
        record = {"encoder": record, "fingerprint": inputs.get("fingerprint")}
    if not isinstance(record, Mapping):
        return None
    name = record.get("encoder") or record.get("name") or record.get("path") or record.get("fingerprint")
    return (str(record.get("fingerprint") or f"of {name}"), str(name)) if name else None


def group(sources: Sequence[ResultFile], names: Mapping[str, str]) -> list[Row]:
    """The rows, teachers first; sets each source's `row`. Raises `ValueError` where one name is given to two encoders."""
    rows: list[Row] = []
    row_of = [_row(source, name, rows) for source, name in zip(sources, _given(sources, names), strict=True)]
    taught: dict[str, str] = {}  # fingerprint of a student → its teacher's
    for source in sources:
        student, teacher = source.encoder, source.teacher
        if student and teacher and student[0] != teacher[0]:
            taught[student[0]] = teacher[0]
    for row in rows:
        row.teacher = (row.fingerprint in taught.values() and row.fingerprint not in taught) or row.given == "teacher"
    rows.sort(key=lambda row: not row.teacher)
    teachers = [number for number, row in enumerate(rows) if row.teacher]
    for row in rows:
        fits = [n for n, other in enumerate(rows) if other.fingerprint == taught.get(row.fingerprint)]
        if not row.teacher:
            row.taught_by = fits[0] if fits else teachers[0] if len(teachers) == 1 else None
    _call(rows)
    for source, found in zip(sources, row_of, strict=True):
        source.row = next((n for n, other in enumerate(rows) if other is found), -1)
    return rows


def _given(sources: Sequence[ResultFile], names: Mapping[str, str]) -> list[str | None]:
    """What each result's encoder is to be called, None where nobody says: what `names` have for its file, fingerprint or
    name; else what they have for its other results, where that is one name."""
    by_file = {os.fspath(key): name for key, name in names.items()}
    of_encoder: dict[str, set[str]] = {}  # fingerprint → the names given to its results
    chosen: list[str | None] = []
    for source in sources:
        encoder = source.encoder or ()
        chosen.append(next((by_file[key] for key in (source.file, *encoder) if key in by_file), None))
        if encoder and chosen[-1] is not None:
            of_encoder.setdefault(encoder[0], set()).add(chosen[-1])
    only = {fingerprint: of.pop() for fingerprint, of in of_encoder.items() if len(of) == 1}
    return [
        only.get(source.encoder[0]) if name is None and source.encoder else name
        for source, name in zip(sources, chosen, strict=True)
    ]


def _row(source: ResultFile, name: str | None, rows: list[Row]) -> Row | None:
    """Of `rows` the one of this result's encoder under this name, put there where it is not; None for a result of several."""
    if source.encoder is None:
        return None
    fingerprint, spec = source.encoder
    other = next((row for row in rows if name is not None and row.given == name), None)
    if other is not None and other.fingerprint != fingerprint:
        raise ValueError(
            f"{name} names two encoders, {other.encoder} and {spec} (of {source.file}); give each its own name"
        )
    row = next((row for row in rows if (row.fingerprint, row.given) == (fingerprint, name)), None)
    if row is None:
        rows.append(row := Row(fingerprint, spec, name))
    return row


def _call(rows: Sequence[Row]) -> None:
    """Give each its name: the one that is given, or the encoder's; of two that would be called alike, with the fingerprint."""
    for row in rows:
        row.name = row.given or short(row.encoder)
    for shown, count in Counter(row.name for row in rows).items():
        for row in rows:
            if count > 1 and row.name == shown and row.given is None:
                row.name = f"{row.encoder} ({row.fingerprint[:8]})"


def short(encoder: str) -> str:
    """A student's run folder without what leads there, of a commit on the hub the first digits; other encoders' names as they
    are."""
    if not encoder.startswith("run:"):
        return encoder
    return re.sub(r"@([0-9a-f]{8})[0-9a-f]{32}$", r"@\1", encoder.rstrip("/").rpartition("/")[2])


def held(sources: Sequence[ResultFile], rows: int) -> list[dict[str, Metric]]:
    """Each row's metrics by name; of several results the last counts."""
    found: list[dict[str, Metric]] = [{} for _ in range(rows)]
    for source in sources:
        if source.row >= 0:
            found[source.row] |= source.result.metrics
    return found


def conflicts(rows: Sequence[Row], sources: Sequence[ResultFile]) -> Iterator[str]:
    """One line for each metric that a row's results disagree on."""
    before: dict[tuple[int, str], tuple[float, str]] = {}
    for source in sources:
        if source.row < 0:
            continue
        for name, metric in source.result.metrics.items():
            value, file = before.get((source.row, name), (metric.value, source.file))
            if value != metric.value:
                yield (
                    f"{rows[source.row].name} has two values for {name}: {value:.6g} in {file} and "
                    f"{metric.value:.6g} in {source.file}; the latter counts"
                )
            before[source.row, name] = metric.value, source.file

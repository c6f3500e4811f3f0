"""The manifest: what a store says of itself, the attribute `featcache` of its zarr.json, as frozen typed records.

A store may be a stranger's, so all that is in it is checked where it is read, before anything becomes a file's name or a
size in memory.
"""

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from importlib.metadata import version
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import numpy as np

from featcache.inputs.images import PARAMETERS, KeptPixels
from featcache.store.layout import COSINE, DTYPES, EMBEDDING, FLOAT16, INTEGERS, PIXELS, STATE, ArrayLayout, chunk_rows
from featcache.store.top_k import words

FORMAT, WIDE_FORMAT, TOP_FORMAT, WHOLE_FORMAT = 2, 3, 4, 5
"""Of a store of float16 features, of one where some are wider, of one that keeps a field's largest values only, and of one with
whole numbers, or the largest values of each of many positions: what knows only the first must not read the others."""
_NAME = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # files that Windows does not make
_TAKEN = {"label", "sample_id", "content", "view", "reason", STATE, PIXELS, "image_size", COSINE} | {
    "zarr.json", "unfinished.npz", "manifest", "class_name", "image_path", "__metadata__", "c", "rows", "views",
}  # fmt: skip
"""Names, in lower case, that mean something else in a store or in an export."""
AnyRecord = TypeVar("AnyRecord", bound="Record")
MOST_ROWS, MOST_UNITS, MOST_ROW_BYTES = 10**11, 2**22, 2**31


@dataclass(frozen=True, kw_only=True)
class Record:
    """A part of the manifest, which becomes the very JSON that it was read from.

    Attributes:
        other: what this featcache does not know; it is kept.
        written: the names that are in the JSON, in its order: those given when it was made. An absent one has its default.

    Raises (`from_json`, `changed`):
        ValueError, TypeError: something is of another kind, or missing.
    """

    other: Mapping[str, Any] = field(default_factory=dict)
    written: tuple[str, ...] = field(init=False, compare=False, repr=False)

    def __new__(cls: type[AnyRecord], **given: Any) -> AnyRecord:
        made = super().__new__(cls)
        object.__setattr__(
            made, "written", tuple(each for each in {**given, **given.get("other", {})} if each != "other")
        )
        return made

    @classmethod
    def from_json(cls: type[AnyRecord], record: Mapping[str, Any]) -> AnyRecord:
        kinds: dict[str, Any] = {each.name: each.type for each in fields(cls) if each.init and each.name != "other"}
        known = {name: _parsed(name, record[name], kinds[name]) for name in record if name in kinds}
        made = cls(**known, other={name: value for name, value in record.items() if name not in kinds})
        object.__setattr__(made, "written", tuple(record))
        return made

    def to_json(self) -> dict[str, Any]:
        """Plain values, as zarr.json has them."""
        return {name: _plain(self.other[name] if name in self.other else getattr(self, name)) for name in self.written}

    def changed(self: AnyRecord, **to: Any) -> AnyRecord:
        """The same with other values; what is new comes last."""
        return self.from_json({**Record.to_json(self), **{name: _plain(value) for name, value in to.items()}})

    def without(self: AnyRecord, *names: str) -> AnyRecord:
        """The same, with these absent."""
        return self.from_json({name: value for name, value in Record.to_json(self).items() if name not in names})


def _parsed(name: str, value: Any, kind: Any) -> Any:
    """A JSON value as the kind that a record's attribute is of."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for each in kinds:
        if isinstance(each, type) and is_dataclass(each) and isinstance(value, dict):
            return each.from_json(value) if issubclass(each, Record) else each(**value)
    if not any(_is(value, each) for each in kinds):
        raise ValueError(f"{name} is {value!r:.80}")
    return value


def _is(value: Any, kind: Any) -> bool:
    of, inner = get_origin(kind) or kind, get_args(kind)
    if of is Mapping:
        return isinstance(value, dict) and all(_is(each, inner[1]) for each in value.values())
    if of is Sequence:
        return isinstance(value, list | tuple) and all(_is(each, inner[0]) for each in value)
    return of is Any or (isinstance(value, of) and (of is bool or not isinstance(value, bool)))


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return dict(value) if isinstance(value, Mapping) else value


@dataclass(frozen=True, kw_only=True)
class EncoderRecord(Record):
    """Which encoder made the features: `preprocess` as `Input.to_dict` has it, `output` in words, `classes` the names of
    the columns of its logits, where known."""

    name: str
    fingerprint: str
    embedding_dim: int | None = None
    output: str | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class DerivationRecord(Record):
    """How features were computed from other stores: the derivation's `name` and `options`, and of each of `inputs` the
    encoder, its fingerprint and the digest that its store was sealed with; `said` is what it says of the result, in lines."""

    name: str
    options: Mapping[str, Any]
    inputs: Sequence[Any]
    said: Sequence[str] = ()

    def __str__(self) -> str:
        """Name and options, in words."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True, kw_only=True)
class CorpusRecord(Record):
    """What the rows are of: `rows` samples of `spec` (None: not known), `digest` of their ids and labels, and `passed_over`,
    the files that are no samples, by kind."""

    spec: str | None
    rows: int
    digest: str | None = None
    class_names: Sequence[str] | None
    passed_over: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ViewsRecord(Record):
    """The views of a row: `count` of them, the rest of the recipe (`Views.record`) where it is known, and the columns of
    the array `view`."""

    count: int
    augment: str | None = None
    seed: int | None = None
    crop_area: float | int | None = None
    parameters: Sequence[str] = PARAMETERS


@dataclass(frozen=True, kw_only=True)
class ExtractionRecord(Record):
    """How the features were computed, as far as it is known.

    Attributes:
        precision: exact name, see `featcache.precision`; `machine`: kind of machine; `batch_size`: samples a forward pass.
        cosine: the worst of an embedding to that in fp32; None where it was not (yet) computed.
        checked: rows that it was computed of. Written in half precision only: then there is an array `cosine`.
        outside_mean, outside_worst: where only the largest logits are kept, the probability of the others, over rows and views.
        truncated: of texts, how many are longer than the encoder takes, and were cut.
        canary: while units may still be written by several processes, the bits that each must compute (`featcache.extraction.canary`).
        imported, dtype: of features that another program made, the file's name and dtype.
    """

    batch_size: int | None = None
    device: str | None = None
    machine: str | None = None
    precision: str | None = None
    cosine: float | int | None = None
    checked: int | None = None
    outside_mean: float | int | None = None
    outside_worst: float | int | None = None
    truncated: int | None = None
    canary: Mapping[str, str] | None = None
    imported: str | None = None
    dtype: str | None = None

    @property
    def spot_checked(self) -> bool:
        """Whether some rows' cosines to fp32 are in the store."""
        return "checked" in self.written


@dataclass(frozen=True, kw_only=True)
class Seal(Record):
    """Of a store that is finished: counts of rows, and `digest` over all its files."""

    rows: int | None = None
    ok: int | None = None
    failed: int | None = None
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """All that a store says of itself; where each array's chunks lie follows from it.

    Attributes:
        fields: shape of one view's feature, by field.
        derivation: of what was computed from other stores; None: an encoder's.
        dtypes: of the fields that are not float16; not written where all are.
        top_k: how many of its largest values, along its last axis, each of these fields keeps (`featcache.store.top_k`); not written where none does.
        pixels: how the images are kept; None: they are not.
        chunk_rows: rows of a unit. wide_chunk_rows: rows of a chunk of each wide array; by default as many, or fewer, so
            that no chunk is over 16 MiB.
        versions: of Python and the libraries that made it.
        sealed: None while rows may still be written.

    Raises:
        ValueError: what no store has.
    """

    encoder: EncoderRecord
    derivation: DerivationRecord | None = None
    corpus: CorpusRecord
    views: ViewsRecord
    fields: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    top_k: Mapping[str, int] = field(default_factory=dict)
    pixels: KeptPixels | None = None
    chunk_rows: int
    wide_chunk_rows: Mapping[str, int] = field(default_factory=dict)
    extraction: ExtractionRecord = field(default_factory=ExtractionRecord)
    versions: Mapping[str, str] = field(default_factory=dict)
    sealed: Seal | None = None

    def __post_init__(self) -> None:
        for name in self.fields:
            refuse_field_name(name)
        if len({name.lower() for name in self.fields}) != len(self.fields):
            raise ValueError(f"fields that differ in upper and lower case alone: {', '.join(self.fields)}")
        if EMBEDDING not in self.fields or len(self.fields[EMBEDDING]) != 1:
            raise ValueError("no field `embedding` that is a vector")
        rows, unit = self.corpus.rows, self.chunk_rows
        sides = [side for shape in self.fields.values() for side in shape]
        if min(rows, unit, self.views.count, *sides, *self.wide_chunk_rows.values()) < 1:
            raise ValueError("a size that is no whole number above 0")
        if unknown := {*self.dtypes.values()} - {*DTYPES, *INTEGERS} or {*self.dtypes} - {*self.fields}:
            raise ValueError(f"dtypes name {unknown.pop()!r}")
        for name, k in self.top_k.items():
            shape = self.fields.get(name, ())
            if not (shape and 0 < k < shape[-1] and self.dtype(name) in DTYPES):
                raise ValueError(f"the {k} largest of {name}, which is {list(shape)}")
        if rows > MOST_ROWS or rows / unit > MOST_UNITS or max(self.field_bytes.values()) > MOST_ROW_BYTES:
            raise ValueError(f"sizes that no store has ({rows:,} rows in units of {unit:,}, fields {self.fields})")
        if "wide_chunk_rows" not in self.written:
            bytes_of = {**self.field_bytes, **({PIXELS: self.pixels.typical_bytes} if self.pixels else {})}
            fitting = {name: min(unit, chunk_rows(width, rows)) for name, width in bytes_of.items()}
            object.__setattr__(self, "wide_chunk_rows", fitting)
        if missing := {*self.wide_arrays} - {*self.wide_chunk_rows}:
            raise ValueError(f"no chunk length of {missing.pop()}")
        for name in self.wide_arrays:
            if (per_chunk := self.wide_chunk_rows[name]) > unit or (unit % per_chunk and unit < rows):
                raise ValueError(f"chunks of {per_chunk} rows of {name}, units of {unit}")

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Manifest":
        return super().from_json({name: value for name, value in record.items() if name != "format"})

    def to_json(self) -> dict[str, Any]:
        """Plain values, as zarr.json has them."""
        first = {"format": self.format, "wide_chunk_rows": dict(self.wide_chunk_rows)}
        whole = {**first, **super().to_json(), "sealed": _plain(self.sealed)}
        return {name: value for name, value in whole.items() if value or name not in ("dtypes", "top_k")}

    @property
    def format(self) -> int:
        return format_of({"dtypes": self.dtypes, "top_k": self.top_k, "fields": self.fields})

    def dtype(self, field: str) -> str:
        """Of a feature array: one of `DTYPES` or `INTEGERS`."""
        return self.dtypes.get(field, FLOAT16)

    @property
    def field_dtypes(self) -> dict[str, str]:
        """Of every feature array."""
        return {name: self.dtype(name) for name in self.fields}

    @property
    def field_bytes(self) -> dict[str, int]:
        """Bytes of a row of each feature array, all views."""
        kept = {name: self._kept(name) for name in self.fields}
        return {
            name: np.dtype(dtype).itemsize * self.views.count * math.prod(shape)
            for name, (shape, dtype) in kept.items()
        }

    def _kept(self, name: str) -> tuple[Sequence[int], str]:
        """Shape and dtype of one view of a feature as it is on the disk."""
        shape, dtype = self.fields[name], self.dtype(name)
        if name not in self.top_k:
            return shape, dtype
        return [*shape[:-1], words(shape[-1], self.top_k[name], dtype)], "uint16"

    @property
    def wide_arrays(self) -> list[str]:
        """The arrays that may have smaller chunks than the unit: features, and images that are kept."""
        return [*self.fields, *([PIXELS] if self.pixels else [])]

    @cached_property
    def layout(self) -> dict[str, ArrayLayout]:
        """Every array of the store; `STATE` is the last."""
        unit, views, wide = self.chunk_rows, self.views.count, self.wide_chunk_rows
        kept = {name: self._kept(name) for name in self.fields}
        arrays = {name: ArrayLayout((views, *shape), dtype, wide[name]) for name, (shape, dtype) in kept.items()}
        if self.pixels:
            arrays |= {PIXELS: ArrayLayout((), "variable_length_bytes", wide[PIXELS])}
            arrays |= {"image_size": ArrayLayout((2,), "int32", unit)}
        narrow: dict[str, tuple[tuple[int, ...], str]] = {
            "label": ((), "int64"),
            "sample_id": ((), "string"),
            "content": ((16,), "uint8"),
            "view": ((views, len(self.views.parameters)), "float32"),
            "reason": ((), "string"),
            **({COSINE: ((), "float32")} if self.extraction.spot_checked else {}),
            STATE: ((), "uint8"),
        }
        return arrays | {name: ArrayLayout(tail, dtype, unit) for name, (tail, dtype) in narrow.items()}


def format_of(record: Mapping[str, Any]) -> int:
    """The format that a manifest of this JSON is of."""
    dtypes, top_k = record.get("dtypes") or {}, record.get("top_k") or {}
    if {*dtypes.values()} & {*INTEGERS} or any(len(record["fields"][name]) > 1 for name in top_k):
        return WHOLE_FORMAT
    return TOP_FORMAT if top_k else WIDE_FORMAT if dtypes else FORMAT


def versions_of(*packages: str) -> dict[str, str]:
    """Of Python and these packages, as a manifest records them."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def refuse_field_name(name: str) -> None:
    """A field's name becomes a folder of the store, and a file, column or tensor of an export.

    Raises:
        ValueError: it is no plain name, or means something else there.
    """
    if not (len(name) <= 80 and _NAME.fullmatch(name)):
        raise ValueError(f"a field is named {name!r}; its name may have letters, digits, _, and . or - between them")
    if name.lower() in _TAKEN or _DEVICE.fullmatch(name.lower()):
        raise ValueError(f"a field is named {name!r}, which means something else in a store; give it another name")

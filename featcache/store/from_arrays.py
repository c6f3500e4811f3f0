"""A store from arrays in memory: for features that another program made. And what such arrays must be, wherever they
come from: `featcache import` asks the same of files."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int64, Num, Shaped

from featcache.disk.durable import appearing
from featcache.disk.refusals import writing
from featcache.disk.urls import is_url
from featcache.inputs.images import PARAMETERS, Preprocess
from featcache.store.layout import DTYPES, EMBEDDING, FAILED, FLOAT16, INTEGERS, OK, STATE, chunk_rows
from featcache.store.manifest import CorpusRecord, EncoderRecord, Manifest, ViewsRecord
from featcache.store.read import FeatureStore, open_store
from featcache.store.rounding import Rounding, rounded_to
from featcache.store.write import create_store

AnyPath: TypeAlias = str | os.PathLike[str]
"""A path or a URL."""
_BLOCK = 8192  # rows that are looked at together


def write_store(
    path: AnyPath,
    embedding: Shaped[np.ndarray, "n d"] | Shaped[np.ndarray, "n v d"],
    *,
    logits: Shaped[np.ndarray, "n c"] | Shaped[np.ndarray, "n v c"] | None = None,
    fields: Mapping[str, np.ndarray] | None = None,
    labels: Sequence[int] | np.ndarray | None = None,
    sample_ids: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    failed: Mapping[int, str] | None = None,
    encoder_name: str = "arrays",
    fingerprint: str = "arrays",
    preprocess: Mapping[str, Any] | None = None,
    per_chunk: int | None = None,
    dtype: str = "auto",
) -> FeatureStore:
    """A sealed store from arrays in memory: for features that another program made.

    All is checked before anything is written, and the store is there whole or not at all.

    Args:
        path: where, a path or URL; must not exist.
        embedding: (N, D), or (N, V, D) with V views; finite, but in rows that failed, which may hold anything.
        logits: (N, C) or (N, V, C) of the same images.
        fields: more features of the same images, by name: (N, …), or (N, V, …) where the embedding has views. They are kept as
            they are, in float16, float32, uint8, int16, int32 or int64.
        labels: (N,) whole numbers, index into `class_names` where there are any; -1 or NaN for none.
        sample_ids: (N,) unique strings; row numbers when left out.
        class_names: strings, by number; two classes may have one name, as in ImageNet.
        failed: row → reason, for rows without features.
        fingerprint: of the encoder that made the embeddings. Stores compare only when theirs are equal.
        preprocess: as `Preprocess.to_dict` has it.
        per_chunk: rows a chunk, by default 8–16 MiB of them.
        dtype: "float16", "float32", or "auto": float16 where rounding to it loses nothing that matters (see
            `featcache.store.rounding`), of each field by itself; else float32.

    Raises:
        ValueError: what is wrong with the arrays, or that something is at `path` already.
        OSError: the disk is full or cannot be written.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"{path}: unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    features = {EMBEDDING: _features(path, EMBEDDING, embedding)}
    rows, views, width = features[EMBEDDING].shape
    reason = _reasons(path, failed, rows)
    for what, text in (("encoder_name", encoder_name), ("fingerprint", fingerprint)):
        if not isinstance(text, str):
            raise ValueError(f"{path}: {what} is {text!r:.80}; give text")
    if logits is not None:
        features["logits"] = _features(path, "logits", logits, (rows, views))
    names = checked_class_names(path, class_names)
    label = np.full(rows, -1) if labels is None else checked_labels(path, labels, rows, names)
    ids = checked_ids(path, map(str, range(rows)) if sample_ids is None else sample_ids, rows)
    if not (per_chunk is None or (isinstance(per_chunk, Integral) and per_chunk > 0)):
        raise ValueError(f"{path}: per_chunk {per_chunk!r}: give a whole number of rows, 1 or more")
    ok = reason == ""
    dtypes = {
        name: fitting_dtype(path, name, _blocks(values, ok), views * int(ok.sum()), values.dtype.name, dtype)
        for name, values in features.items()
    }
    for name, given in (fields or {}).items():
        features[name] = _as_given(path, name, given, (rows, views), np.ndim(embedding) == 3, ok)
        dtypes[name] = features[name].dtype.name
    wide = {name: each for name, each in dtypes.items() if each != FLOAT16}
    fitting = chunk_rows(np.dtype(dtypes[EMBEDDING]).itemsize * views * width, rows)
    manifest = Manifest(
        encoder=EncoderRecord(name=encoder_name, fingerprint=fingerprint, preprocess=_preprocess(path, preprocess)),
        corpus=CorpusRecord(spec=None, rows=rows, class_names=names),
        views=ViewsRecord(count=views),
        fields={name: list(values.shape[2:]) for name, values in features.items()},
        dtypes=wide,
        chunk_rows=min(int(per_chunk), rows) if per_chunk else fitting,
    )
    with writing(path, "write it again", "path"), _whole(path) as place:
        store = create_store(place, manifest)
        with _removed_on_failure(store):
            for chunk in range(store.chunks):
                here = slice(store.rows_of(chunk).start, store.rows_of(chunk).stop)
                kept = {name: rounded_to(values[here], dtypes[name]) for name, values in features.items()}
                store.write_chunk(chunk, bare_unit(kept, label[here], ids[here], reason[here]))
            store.seal()
    return open_store(path)


def bare_unit(
    features: Mapping[str, np.ndarray], label: np.ndarray, sample_id: np.ndarray, reason: np.ndarray
) -> dict[str, np.ndarray]:
    """Every array of a unit of which no image and no view is known; rows with a `reason` failed."""
    rows, views, _ = features[EMBEDDING].shape
    return {
        **features,
        "label": label,
        "sample_id": sample_id,
        "content": np.zeros((rows, 16), np.uint8),
        "view": np.zeros((rows, views, len(PARAMETERS)), np.float32),
        "reason": reason,
        STATE: np.where(reason == "", OK, FAILED).astype(np.uint8),
    }


@contextlib.contextmanager
def _whole(path: AnyPath) -> Iterator[str | Path]:
    """Where to make the store: on this machine beside `path`, to appear there in one step; at a URL in its place."""
    if is_url(str(path)):
        yield str(path)
    else:
        with appearing(Path(path), folder=True) as building:
            yield building


@contextlib.contextmanager
def _removed_on_failure(store: FeatureStore) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # at a URL that cannot be reached
            store.remove()
        raise


# -- what arrays must be ----------------------------------------------------------------------------------


def checked_labels(path: AnyPath, labels: Any, rows: int, class_names: Sequence[str] | None) -> Int64[np.ndarray, " n"]:
    """Whole numbers, -1 for none; those of a class name each, where there are names.

    Raises:
        ValueError: they are not.
    """
    given = _array(path, "label", labels)
    if given.dtype.kind == "f":  # how pandas writes whole numbers with gaps
        given = np.where(np.isnan(given), -1, given)
        if not (np.isfinite(given).all() and (given == np.round(given)).all()):
            raise ValueError(f"{path}: label holds fractions; write whole numbers, or names")
    if given.shape != (rows,) or given.dtype.kind not in "biuf":
        raise ValueError(
            f"{path}: label is {given.dtype} of shape {given.shape}; write a whole number a row, -1 for none"
        )
    most = len(class_names) if class_names is not None else 2**31
    wrong = np.flatnonzero(~((given >= -1) & (given < most)))
    if len(wrong):
        among = f"one of the {most} class names" if class_names is not None else "a class"
        raise ValueError(
            f"{path}: label {given[wrong[0]]} of row {wrong[0]} is not {among}; number them from 0, -1 for none"
        )
    return given.astype(np.int64)


def checked_ids(path: AnyPath, ids: Any, rows: int) -> np.ndarray:
    """(rows,) unique strings.

    Raises:
        ValueError: they are not.
    """
    given = _listed(path, "sample ids", ids)
    if len(given) != rows:
        raise ValueError(f"{path}: {len(given)} sample ids for {rows} rows; give one a row, or leave all out")
    missing = next((row for row, text in enumerate(given) if not isinstance(text, str)), None)
    if missing is not None:
        raise ValueError(
            f"{path}: a sample id is missing, or no text ({given[missing]!r} in row {missing}); fill it in, or leave all "
            "out to number the rows"
        )
    _refuse_twice(path, "sample id", given)
    return np.array([str(text) for text in given], dtype=object)


def checked_class_names(path: AnyPath, names: Any) -> list[str] | None:
    """Strings, or None.

    Raises:
        ValueError: they are not.
    """
    if names is None:
        return None
    given = _listed(path, "class names", names)
    if not all(isinstance(name, str) for name in given):
        raise ValueError(f"{path}: class names are {names!r:.80}; give a list of text")
    for name in given:
        _refuse_no_text(path, "class name", name)
    return [str(name) for name in given]


def _listed(path: AnyPath, what: str, given: Any) -> list[Any]:
    """What is given in order: not a text, whose letters it would be, nor a set or a dictionary."""
    if isinstance(given, str | bytes | Set | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{path}: {what} are {given!r:.80}; give a list of text")
    return list(given)


def _array(path: AnyPath, name: str, given: Any) -> np.ndarray:
    """`given` as numpy has it; values that are masked are none, so they are refused."""
    try:
        array = np.asanyarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {name} is no array of numbers ({error}); give one") from None
    if np.ma.is_masked(array):
        raise ValueError(f"{path}: {name} has masked values; fill them in, or leave their rows out")
    return np.asarray(array)


def _refuse_no_text(path: AnyPath, what: str, text: str) -> None:
    """Surrogates, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: {what} {text!r} is no valid text; write it as UTF-8") from None


def _refuse_twice(path: AnyPath, what: str, texts: list[str]) -> None:
    """Names that are not unique, or that no file can hold."""
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            raise ValueError(
                f"{path}: {what} {text!r} stands {texts.count(text)} times; make {what}s unique, or leave all out"
            )
        seen.add(text)
        _refuse_no_text(path, what, text)


def _features(path: AnyPath, name: str, given: Any, of: tuple[int, int] | None = None) -> Float[np.ndarray, "n v d"]:
    values = _array(path, name, given)
    if not values.size:
        raise ValueError(
            f"{path}: {'an' if name == EMBEDDING else 'a'} {name} of shape {values.shape} has no rows to write; give at least one"
        )
    if values.dtype.kind not in "fiu" or values.ndim not in (2, 3):
        raise ValueError(
            f"{path}: {name} is {values.dtype} of shape {values.shape}; give numbers of shape (rows, dimensions), or "
            "(rows, views, dimensions)"
        )
    values = values[:, None] if values.ndim == 2 else values
    if of and values.shape[:2] != of:
        raise ValueError(
            f"{path}: {name} has {values.shape[0]} rows of {values.shape[1]} views, embedding {of[0]} of {of[1]}; give as many"
        )
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def _as_given(
    path: AnyPath, name: str, given: Any, of: tuple[int, int], several: bool, ok: np.ndarray
) -> Shaped[np.ndarray, "n v ..."]:
    """A further field, to be kept as it is; where there are `several` views, its second axis is of them.

    Raises:
        ValueError: another dtype or number of rows or views, a name that is taken, or a value that is not finite.
    """
    values = _array(path, name, given)
    if name in (EMBEDDING, "logits"):
        raise ValueError(f"{path}: fields has {name}, which is an argument of its own; give it there")
    if values.dtype.name not in (*DTYPES, *INTEGERS):
        raise ValueError(f"{path}: {name} is {values.dtype}; give one of {', '.join((*DTYPES, *INTEGERS))}")
    values = values if several else values[:, None] if values.ndim else values
    if values.shape[:2] != of:
        raise ValueError(f"{path}: {name} has shape {np.shape(given)}, embedding {of[0]} rows of {of[1]}; give as many")
    flat = values[ok].reshape(int(ok.sum()), -1)
    refuse_not_finite(path, name, flat, np.flatnonzero(ok))
    return values.astype(values.dtype.newbyteorder("="))


def _blocks(values: Float[np.ndarray, "n v d"], ok: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows that did not fail, a view a row, with their numbers."""
    for start in range(0, len(values), _BLOCK):
        here = start + np.flatnonzero(ok[start : start + _BLOCK])
        yield values[here].reshape(-1, values.shape[-1]), np.repeat(here, values.shape[1])


def _reasons(path: AnyPath, failed: Mapping[int, str] | None, rows: int) -> np.ndarray:
    """(rows,) why each failed, "" where it did not."""
    reason = np.full(rows, "", dtype=object)
    if not isinstance(failed, Mapping | None):
        raise ValueError(f"{path}: failed is {failed!r:.80}; give a dictionary, row number → reason")
    for row, why in (failed or {}).items():
        if not (isinstance(row, Integral) and 0 <= row < rows):
            raise ValueError(f"{path}: failed names row {row!r} of {rows}; give row numbers from 0")
        if not (isinstance(why, str) and why):
            raise ValueError(f"{path}: failed row {row} has no reason ({why!r}); give one in words")
        _refuse_no_text(path, "reason", why)
        reason[row] = why
    return reason


def _preprocess(path: AnyPath, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if not given:
        return {}
    try:
        record = json.loads(json.dumps(Preprocess.from_dict(dict(given)).to_dict()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: preprocess {given!r:.200} is no record of one ({error}); see Preprocess") from None
    assert isinstance(record, dict)
    return record


def fitting_dtype(
    path: AnyPath,
    name: str,
    blocks: Iterable[tuple[Float[np.ndarray, "n d"], np.ndarray]],
    rows: int,
    held: str,
    dtype: str = "auto",
) -> str:
    """The dtype to keep a field in, of `DTYPES`: the one asked for, or by what rounding loses.

    Args:
        blocks: its values, and the numbers of their rows, for messages.
        rows: of all blocks.
        held: dtype of the values.
        dtype: "auto", or the one that is asked for.

    Raises:
        ValueError: a value is not finite, or beyond the dtype, or not even float32 keeps what tells rows apart.
    """
    width = {"float16": 2, "bfloat16": 3, "float32": 4}.get(held, 8)
    tried = {each: Rounding(rows, each) for each in DTYPES if dtype == "auto" and np.dtype(each).itemsize < width}
    for values, numbers in blocks:
        refuse_not_finite(path, name, values, numbers)
        if dtype != "auto":
            refuse_beyond(path, name, values, dtype, numbers)
        for each in tried.values():
            each.update(values)
    if dtype != "auto":
        return dtype
    lost = {each: rounding.loses() for each, rounding in tried.items()}
    if not lost.get(FLOAT16):
        return FLOAT16
    if lost.get("float32"):
        raise ValueError(f"{path}: {name}: {lost['float32']}; subtract what all rows have in common, or scale it")
    return "float32"


def refuse_not_finite(path: AnyPath, name: str, values: Num[np.ndarray, "n d"], numbers: np.ndarray) -> None:
    """`numbers` are those of the rows, for the message."""
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{path}: row {numbers[finite.argmin()]} of {name} holds NaN or infinity; leave such rows out, or name them as failed"
        )


def refuse_beyond(path: AnyPath, name: str, values: Float[np.ndarray, "n d"], dtype: str, numbers: np.ndarray) -> None:
    """Values that `dtype` cannot hold, or rows of which it holds nothing."""
    rounded = rounded_to(values, dtype)
    large = ~np.isfinite(rounded).all(axis=1)
    for wrong, what in (
        (large, f"is beyond {dtype} (±{np.finfo(dtype).max:g})"),
        (values.any(axis=1) & ~rounded.any(axis=1), f"vanishes in {dtype}"),
    ):
        if wrong.any():
            remedy = "keep it as float32 (--dtype float32)" if dtype == FLOAT16 else "scale the values"
            raise ValueError(f"{path}: row {numbers[wrong.argmax()]} of {name} {what}; {remedy}")

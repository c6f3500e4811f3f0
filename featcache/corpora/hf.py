"""Hugging Face data sets: on the hub, saved to disk, or a folder of parquet or arrow files."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from featcache import hub
from featcache.corpora import Listed
from featcache.corpora._labels import from_values
from featcache.corpora._options import split_options
from featcache.disk.plain import read_plain, require_listable
from featcache.disk.urls import is_url, read_url
from featcache.plugins import suggest

LABELS = ("label", "labels", "fine_label")
"""What a label column is called, the surest first."""


class HuggingFace(Listed):
    """`hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT` from the hub; `hf:PATH` or `hf:PATH:SPLIT` from a local folder.

    A local folder holds parquet or arrow files, or what `save_to_disk` wrote; `hf:FILE.parquet` is one file. The image is
    the column of type Image, or else of bytes (if there are several, the one called "image"), taken as stored and never
    decoded here. The label is the column called "label", "labels" or "fine_label", else the one of type ClassLabel.
    `@image=COLUMN` and `@label=COLUMN` after all choose others, `@label=` none. The sample id is SPLIT/ROW.

    What the hub sends, and arrow copies of parquet files, lie where `datasets` puts them ($HF_HOME).
    """

    def __init__(self, rest: str, spec: str = ""):
        self.spec = spec or f"hf:{rest}"
        try:
            import datasets
        except ImportError:
            raise ValueError(f"{self.spec}: needs the datasets package: pip install 'featcache[hf]'") from None
        place, options = split_options("hf", rest, ("image", "label"))
        table, split = _open(place)
        column = _image_column(self.spec, table.features, options.get("image"))
        self._images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column
        self.ids = [f"{split}/{row:08d}" for row in range(len(table))]
        if not self.ids:
            raise ValueError(f"{self.spec}: this split is empty; choose another")
        self.labels, self.class_names = _labels(
            self.spec, table, _label_column(self.spec, table.features, options.get("label"))
        )

    def read(self, i: int) -> bytes:
        image = self._images[i][self._column]
        if image is None or (image["bytes"] is None and not image["path"]):
            raise ValueError(f"{self.ids[i]} has no image")
        if image["bytes"] is not None:
            return image["bytes"]
        return read_url(image["path"]) if is_url(image["path"]) else read_plain(image["path"])


def _open(rest: str) -> tuple[Any, str]:
    """The table of one split, and the split's name."""
    if rest.lower().endswith(".parquet") and not os.path.isdir(rest):
        return _open_file(rest), "train"
    place, _, split = (rest, "", "") if Path(rest).is_dir() else rest.rpartition(":")
    if place and Path(place).is_dir():
        tables = _open_folder(place)
        if not split and len(tables) == 1:
            split = next(iter(tables))
        _refuse_unknown_split(place, split, tables)
        return tables[split], split
    name, _, config = place.partition(":")
    if not name or name[0] in "./~":
        raise ValueError(
            f"hf:{rest}: no such folder; give hf:FOLDER[:SPLIT] with parquet or arrow files, or hf:NAME:SPLIT of the hub"
        )
    return _open_hub(rest, name, config or None, split), split


def _open_hub(rest: str, name: str, config: str | None, split: str) -> Any:
    import datasets

    remedy = "check the name and the network, or give a local folder"
    with hub.fetching(f"hf:{rest}", "cannot be had", remedy):
        splits = datasets.get_dataset_split_names(name, config)
    _refuse_unknown_split(f"{name}:{config}" if config else name, split, splits)
    with hub.fetching(f"hf:{rest}", "cannot be had", remedy):
        return datasets.load_dataset(name, config, split=split)


def _open_folder(path: str) -> dict[str, Any]:
    """The splits of a local folder."""
    import datasets

    require_listable(path)
    with _reading(f"hf:{path}", "correct the folder, or write it again"):
        if (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists():
            found = datasets.load_from_disk(path)
        else:
            kinds = {file.suffix for file in Path(path).rglob("*") if file.suffix in (".parquet", ".arrow")}
            if len(kinds) != 1:
                what = "both parquet and arrow files" if kinds else "no parquet or arrow files"
                raise ValueError(f"{what} in this folder; give one kind, or a folder of save_to_disk")
            found = datasets.load_dataset(kinds.pop()[1:], data_dir=path)
    return found if isinstance(found, dict) else {str(found.split or "all"): found}


def _open_file(path: str) -> Any:
    """The table of one parquet file, local or at a URL."""
    import datasets

    with _reading(path, "correct the path, or write the file again"):
        return datasets.load_dataset("parquet", data_files=path, split="train")


@contextlib.contextmanager
def _reading(where: str, remedy: str) -> Iterator[None]:
    """Whatever `datasets` raises is one line."""
    import datasets

    try:
        yield
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(f"{where}: {' '.join(str(error.__cause__ or error).split())}; {remedy}") from None


def _refuse_unknown_split(place: str, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        known = ", ".join(f"hf:{place}:{name}" for name in splits)
        raise ValueError(f"hf:{place}: {f'no split {split!r}' if split else 'several splits'}; give one of {known}")


def _image_column(spec: str, kinds: dict[str, Any], chosen: str | None) -> str:
    import datasets

    if chosen is not None:
        kind = kinds[_chosen(spec, "image", chosen, kinds)]
        if not (isinstance(kind, datasets.Image) or _is_bytes(kind) or getattr(kind, "dtype", "") == "string"):
            raise ValueError(f"{spec}: column {chosen} holds {kind}, no images; choose another with @image=COLUMN")
        return chosen
    found = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name, kind in kinds.items() if _is_bytes(kind)]
    if len(found) > 1 and "image" in found:
        return "image"
    if len(found) != 1:
        what = f"several columns hold images ({', '.join(found)})" if found else f"no images in {', '.join(kinds)}"
        raise ValueError(
            f"{spec}: {what}; one column, or one of them called image, must be of type Image, or choose one with @image=COLUMN"
        )
    return found[0]


def _is_bytes(kind: Any) -> bool:
    """Whether a column holds files: bytes, as such or beside a path, as Image columns are written."""
    if isinstance(kind, dict):
        kind = kind.get("bytes")
    return getattr(kind, "dtype", "") in ("binary", "large_binary")


def _label_column(spec: str, kinds: dict[str, Any], chosen: str | None) -> str | None:
    import datasets

    if chosen is not None:
        return _chosen(spec, "label", chosen, kinds) if chosen else None
    named = next((name for wanted in LABELS for name in kinds if name.lower() == wanted), None)
    classes = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    if named is None and len(classes) > 1:
        raise ValueError(
            f"{spec}: several columns hold classes ({', '.join(classes)}); choose one with {spec}@label={classes[0]}"
        )
    return named or (classes[0] if classes else None)


def _chosen(spec: str, part: str, name: str, kinds: dict[str, Any]) -> str:
    if name not in kinds:
        raise ValueError(f"{spec}: @{part}={name}: no such column; {suggest(name, list(kinds))}")
    return name


def _labels(spec: str, table: Any, name: str | None) -> tuple[list[int], list[str] | None]:
    if name is None:
        return [-1] * len(table), None
    values, names = table.select_columns([name])[:][name], getattr(table.features[name], "names", None)
    if names is None:
        return from_values(values, f"{spec}, column {name}")
    labels = [-1 if value is None else int(value) for value in values]
    wrong = next((label for label in labels if not -1 <= label < len(names)), None)
    if wrong is not None:
        raise ValueError(f"{spec}: column {name} holds {wrong} and has {len(names)} classes; write the data set again")
    return labels, list(names)


def open_file(rest: str) -> HuggingFace:
    """Open one parquet file that holds its images, under its own path as the spec."""
    return HuggingFace(rest, spec=rest)


open_corpus = HuggingFace

"""Hugging Face data sets: on the hub, saved to disk, or a folder of parquet or arrow files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from featcache.corpora._labels import from_names, from_numbers
from featcache.corpora._urls import is_url, read_url


class HuggingFace:
    """`hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT` from the hub; `hf:PATH` or `hf:PATH:SPLIT` from a local folder.

    A local folder holds parquet or arrow files, or what `save_to_disk` wrote. The image is the column of type
    Image (if there are several, the one called "image"), taken as stored and never decoded here. The label is
    the first column of type ClassLabel, else a column called "label". The sample id is SPLIT/ROW.

    What the hub sends, and arrow copies of parquet files, lie where `datasets` puts them ($HF_HOME).
    """

    def __init__(self, rest: str):
        try:
            import datasets
        except ImportError:
            raise ValueError(f"hf:{rest}: needs the datasets package: pip install 'featcache[hf]'") from None
        self.spec = f"hf:{rest}"
        table, split = _open(rest)
        kinds = table.features
        column = _image_column(self.spec, kinds)
        labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)] + ["label"]
        self._images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column
        self.ids = [f"{split}/{row:08d}" for row in range(len(table))]
        if not self.ids:
            raise ValueError(f"{self.spec}: this split is empty; choose another")
        self._labels, self.class_names = _labels(self.spec, table, labels[0])

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        image = self._images[i][self._column]
        if image is None or (image["bytes"] is None and not image["path"]):
            raise ValueError(f"{self.ids[i]} has no image")
        if image["bytes"] is not None:
            return image["bytes"]
        return read_url(image["path"]) if is_url(image["path"]) else Path(image["path"]).read_bytes()

    def label(self, i: int) -> int:
        return self._labels[i]


def _open(rest: str) -> tuple[Any, str]:
    """The table of one split, and the split's name."""
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

    try:
        splits = datasets.get_dataset_split_names(name, config)
        _refuse_unknown_split(f"{name}:{config}" if config else name, split, splits)
        return datasets.load_dataset(name, config, split=split)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"hf:{rest}: cannot be had ({reason}); check the name and the network, or give a local folder"
        ) from None


def _open_folder(path: str) -> dict[str, Any]:
    """The splits of a local folder."""
    import datasets

    try:
        if (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists():
            found = datasets.load_from_disk(path)
        else:
            kinds = {file.suffix for file in Path(path).rglob("*") if file.suffix in (".parquet", ".arrow")}
            if len(kinds) != 1:
                what = "both parquet and arrow files" if kinds else "no parquet or arrow files"
                raise ValueError(f"{what} in this folder; give one kind, or a folder of save_to_disk")
            found = datasets.load_dataset(kinds.pop()[1:], data_dir=path)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"hf:{path}: {reason}; correct the folder, or write it again") from None
    return found if isinstance(found, dict) else {str(found.split or "all"): found}


def _refuse_unknown_split(place: str, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        known = ", ".join(f"hf:{place}:{name}" for name in splits)
        raise ValueError(f"hf:{place}: {f'no split {split!r}' if split else 'several splits'}; give one of {known}")


def _image_column(spec: str, kinds: dict[str, Any]) -> str:
    import datasets

    found = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    if len(found) > 1 and "image" in found:
        return "image"
    if len(found) != 1:
        what = f"several columns hold images ({', '.join(found)})" if found else f"no images in {', '.join(kinds)}"
        raise ValueError(f"{spec}: {what}; one column, or one of them called image, must be of type Image")
    return found[0]


def _labels(spec: str, table: Any, name: str) -> tuple[list[int], list[str] | None]:
    kind = table.features.get(name)
    values = table.select_columns([name])[:][name] if kind is not None else [None] * len(table)
    if hasattr(kind, "names"):
        return [-1 if value is None else int(value) for value in values], list(kind.names)
    if all(value is None or isinstance(value, int) for value in values):
        return from_numbers(values, spec)
    if all(value is None or isinstance(value, str) for value in values):
        return from_names(values)
    raise ValueError(f"{spec}: column {name} holds {kind}, no labels; make it a ClassLabel or rename it")


open_corpus = HuggingFace

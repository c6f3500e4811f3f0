"""hf-dataset: a folder as data sets of the Hugging Face hub are, a row a sample in shards of parquet, with a card."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from featcache.interchange import Format
from featcache.interchange._arrays import Arrays, Checksums, Source
from featcache.interchange._arrow import pa, require_pyarrow, to_table
from featcache.interchange._dataset_card import dataset_card
from featcache.interchange._own import manifest_text
from featcache.interchange.parquet import read_shards, writer_of
from featcache.store import FeatureStore

SHARD_BYTES = 500_000_000
"""The hub's own advice for parquet files."""


class HuggingFaceDataset(Format):
    folder = True
    reads = "a folder of .parquet with `embedding`"

    def recognises(self, path: Path, head: bytes) -> bool:
        return path.is_dir() and bool(_shards(path))

    def require(self, path: Path) -> None:
        require_pyarrow(path)

    def write(self, store: FeatureStore, units: Iterator[Arrays], out: Path, *, as_is: bool) -> None:
        (out / "data").mkdir(parents=True)
        unit_rows, row_bytes = store.manifest.chunk_rows, sum(store.manifest.field_bytes.values())
        rows = max(1, SHARD_BYTES // (unit_rows * row_bytes)) * unit_rows
        count, sums, start, writer = -(-len(store) // rows), Checksums(), 0, None
        try:
            for unit in units:
                sums.update(unit)
                table = _table(unit, list(store.manifest.fields), store.class_names)
                if start % rows == 0:
                    if writer:
                        writer.close()
                    writer = writer_of(out / "data" / f"train-{start // rows:05}-of-{count:05}.parquet", table.schema)
                assert writer
                writer.write_table(table, row_group_size=len(table))
                start += len(table)
        finally:
            if writer:
                writer.close()
        (out / "manifest.json").write_text(
            manifest_text(store.manifest, "hf-dataset", sums.to_dict()), encoding="utf-8"
        )
        (out / "README.md").write_text(dataset_card(store, "."), encoding="utf-8")

    def read(self, path: Path) -> Source:
        shards, manifest = _shards(path), path / "manifest.json"
        splits = sorted({re.sub(r"-\d{5}-of-\d{5}$", "", shard.stem) for shard in shards})
        if len(splits) > 1:
            raise ValueError(
                f"{path}: holds several splits ({', '.join(splits)}); copy the files of one into a folder, and import that"
            )
        return read_shards(path, shards, manifest.read_text(encoding="utf-8") if manifest.is_file() else None)


def _shards(path: Path) -> list[Path]:
    return sorted([*path.glob("data/*.parquet"), *path.glob("*.parquet")])


def _table(unit: Arrays, fields: Sequence[str], class_names: Sequence[str] | None) -> Any:
    """A unit as the package `datasets` reads it: bytes of any length, and what labels stand for in the metadata."""
    table, names = to_table(unit, fields, class_names), list(class_names or ())
    content = table.column_names.index("content")
    table = table.set_column(content, "content", table["content"].cast(pa.binary()))
    if len(set(names)) < len(names):  # datasets has no such ClassLabel
        return table
    features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
    told = json.dumps({"info": {"features": features}}, ensure_ascii=False)
    return table.drop_columns(["class_name"]).replace_schema_metadata({"huggingface": told} if names else None)

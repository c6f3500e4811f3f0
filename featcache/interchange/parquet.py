"""parquet: one file, a row a sample."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from featcache.interchange import Format
from featcache.interchange._arrays import Arrays, Checksums, Source
from featcache.interchange._arrow import of_tables, pa, pq, regrouped, require_pyarrow, to_table, whole
from featcache.interchange._own import manifest_text
from featcache.store import FeatureStore


class Parquet(Format):
    reads = "a .parquet with `embedding`"

    def recognises(self, path: Path, head: bytes) -> bool:
        return head.startswith(b"PAR1")

    def require(self, path: Path) -> None:
        require_pyarrow(path)

    def write(self, store: FeatureStore, units: Iterator[Arrays], out: Path, *, as_is: bool) -> None:
        sums, writer = Checksums(), None
        with contextlib.ExitStack() as opened:
            for unit in units:
                sums.update(unit)
                table = to_table(unit, list(store.manifest.fields), store.class_names)
                if writer is None:
                    writer = opened.enter_context(writer_of(out, table.schema))
                writer.write_table(table, row_group_size=len(table))
            assert writer is not None
            writer.add_key_value_metadata({"featcache": manifest_text(store.manifest, "parquet", sums.to_dict())})

    def read(self, path: Path) -> Source:
        return read_shards(path, [path])


def writer_of(path: Path, schema: Any) -> Any:
    """Of tables as `to_table` makes them. Features do not get smaller by compression."""
    numbers = {name for name in schema.names if pa.types.is_fixed_size_list(schema.field(name).type)}
    return pq.ParquetWriter(
        path,
        schema,
        use_dictionary=["class_name", "reason"],
        compression={name: "none" if name in numbers else "zstd" for name in schema.names},
    )


def read_shards(path: Path, shards: Sequence[Path], text: str | None = None) -> Source:
    """Of parquet files whose rows follow each other; `text`: the manifest, where it is not in the first of them."""
    with whole(path):
        files = [pq.ParquetFile(shard, memory_map=True) for shard in shards]
    schema = files[0].schema_arrow
    if odd := next((each.schema_arrow for each in files if not each.schema_arrow.equals(schema)), None):
        raise ValueError(f"{path}: its files have different columns ({', '.join(odd.names)}); write them alike")
    inside = (files[0].metadata.metadata or {}).get(b"featcache")

    def tables(columns: list[str] | None, size: int) -> Iterator[Any]:
        with whole(path):
            batches = (each for file in files for each in file.iter_batches(batch_size=size, columns=columns))
            yield from regrouped(batches, size)

    rows = sum(file.metadata.num_rows for file in files)
    return of_tables(path, rows, schema, text or (inside and inside.decode()), tables)

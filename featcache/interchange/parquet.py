"""parquet: one file, a row a sample."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache.interchange import Format
from featcache.interchange._arrays import Arrays, Checksums, Source
from featcache.interchange._arrow import (
    DESCRIBING,
    describe,
    from_table,
    list_values,
    pa,
    pq,
    require_pyarrow,
    to_table,
    whole,
)
from featcache.interchange._foreign import check_embeddings, foreign_manifest, identify
from featcache.interchange._own import manifest_text, parse_manifest
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
                    numbers = {
                        name for name in table.column_names if pa.types.is_fixed_size_list(table.field(name).type)
                    }
                    writer = opened.enter_context(
                        pq.ParquetWriter(
                            out,
                            table.schema,
                            use_dictionary=["class_name", "reason"],
                            compression={name: "none" if name in numbers else "zstd" for name in table.column_names},
                        )
                    )
                writer.write_table(table, row_group_size=len(table))
            assert writer is not None
            writer.add_key_value_metadata({"featcache": manifest_text(store.manifest, "parquet", sums.to_dict())})

    def read(self, path: Path) -> Source:
        with whole(path):
            file = pq.ParquetFile(path, memory_map=True)
        rows, text = file.metadata.num_rows, (file.metadata.metadata or {}).get(b"featcache")
        return _read_foreign(path, file, rows) if text is None else _read_own(path, file, rows, text.decode())


def _read_own(path: Path, file: Any, rows: int, text: str) -> Source:
    manifest = parse_manifest(text, path)

    def blocks(size: int) -> Iterator[Arrays]:
        for table in _tables(file, None, size, path):
            yield from_table(table, manifest, path)

    return Source(rows, manifest, blocks)


def _read_foreign(path: Path, file: Any, rows: int) -> Source:
    names = file.schema_arrow.names
    if "embedding" not in names:
        raise ValueError(f"{path}: no column `embedding`, only {', '.join(names)}; rename the column that holds it")
    kind = file.schema_arrow.field("embedding").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ValueError(f"{path}: embedding is {kind}, not lists of floats; write it as lists")
    first = next(_tables(file, ["embedding"], 1, path), None)
    width = 0 if first is None else len(first["embedding"][0].as_py() or [])
    dtype = str(kind.value_type.to_pandas_dtype().__name__) if pa.types.is_floating(kind.value_type) else str(kind)
    check_embeddings(path, (rows, width), dtype)
    beside = describe(file.read(columns=[name for name in DESCRIBING if name in names]))
    class_names = identify(beside, path)

    def blocks(size: int) -> Iterator[Arrays]:
        start = 0
        for table in _tables(file, ["embedding"], size, path):
            here = slice(start, start := start + len(table))
            described = {name: array[here] for name, array in beside.items()}
            yield {"embedding": list_values(table["embedding"], width, path), **described}

    return Source(rows, foreign_manifest(path, rows, width, dtype, class_names), blocks)


def _tables(file: Any, columns: list[str] | None, size: int, path: Path) -> Iterator[Any]:
    """`columns` of a parquet file, exactly `size` rows at a time, however its row groups are cut."""
    waiting: Any = None
    with whole(path):
        for batch in file.iter_batches(batch_size=size, columns=columns):
            table = pa.Table.from_batches([batch])
            waiting = table if waiting is None else pa.concat_tables([waiting, table])
            while len(waiting) >= size:
                yield waiting.slice(0, size)
                waiting = waiting.slice(size)
    if waiting is not None and len(waiting):
        yield waiting

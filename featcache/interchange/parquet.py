"""parquet: one file, a row a sample."""

import contextlib
from collections.abc import Iterator
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
        text = (file.metadata.metadata or {}).get(b"featcache")

        def tables(columns: list[str] | None, size: int) -> Iterator[Any]:
            with whole(path):
                yield from regrouped(file.iter_batches(batch_size=size, columns=columns), size)

        return of_tables(path, file.metadata.num_rows, file.schema_arrow, text and text.decode(), tables)

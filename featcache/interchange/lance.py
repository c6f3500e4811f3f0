"""lance: a Lance dataset, a row a sample, in which LanceDB searches."""

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache.interchange import Format
from featcache.interchange._arrays import Arrays, Checksums, Source
from featcache.interchange._arrow import Lazy, of_tables, pa, regrouped, to_table, whole
from featcache.interchange._own import manifest_text
from featcache.store import FeatureStore

lance: Any = Lazy("lance")


class Lance(Format):
    """The columns are those of parquet, the manifest is in the schema's metadata. No index is made: search is exact."""

    folder = True
    reads = "a Lance dataset with `embedding`"
    by_chance = "Lance names its files by chance, and notes when"

    def recognises(self, path: Path, head: bytes) -> bool:
        return (path / "_versions").is_dir()

    def require(self, path: Path) -> None:
        try:
            importlib.import_module("lance")
        except ModuleNotFoundError:
            raise ValueError(f"{path}: Lance needs pylance: pip install 'featcache[lance]'") from None

    def write(self, store: FeatureStore, units: Iterator[Arrays], out: Path, *, as_is: bool) -> None:
        sums, fields = Checksums(), list(store.manifest.fields)
        failed: list[BaseException] = []

        def batches() -> Iterator[Any]:
            try:
                for unit in units:
                    sums.update(unit)
                    yield from to_table(unit, fields, store.class_names).to_batches()
            except BaseException as error:  # Lance makes a line of it
                failed.append(error)
                raise

        found = batches()
        first = next(found)
        reader = pa.RecordBatchReader.from_batches(first.schema, itertools.chain([first], found))
        try:
            fragments = lance.fragment.write_fragments(reader, str(out), first.schema, mode="create")
        except Exception as error:
            raise (failed or [error])[0] from None
        text = manifest_text(store.manifest, "lance", sums.to_dict())
        schema = first.schema.with_metadata({"featcache": text})
        lance.LanceDataset.commit(str(out), lance.LanceOperation.Overwrite(schema, fragments))

    def read(self, path: Path) -> Source:
        with whole(path, kind="Lance dataset"):
            file = lance.dataset(str(path))
            rows = file.count_rows()
        text = (file.schema.metadata or {}).get(b"featcache")

        def tables(columns: list[str] | None, size: int) -> Iterator[Any]:
            with whole(path, kind="Lance dataset"):
                yield from regrouped(file.to_batches(columns=columns, batch_size=size), size)

        return of_tables(path, rows, file.schema, text and text.decode(), tables)

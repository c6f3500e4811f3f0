"""What every interchange format must do."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from featcache.interchange import Format, export_store, format_of, import_store, load_format
from featcache.store import FeatureStore, open_store
from featcache.store.from_arrays import write_store


def files_in(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class FormatContract:
    """Of the format `name`."""

    name: str

    @pytest.fixture
    def registered(self) -> str:
        return self.name

    @pytest.fixture
    def format(self, registered: str) -> Format:
        return load_format(registered)

    @pytest.fixture
    def store(self, tmp_path: Path) -> FeatureStore:
        """Classes, and ids that are no file names."""
        rows = np.random.default_rng(0).normal(size=(7, 5))
        label = np.array([0, 1, -1, 1, 0, 0, 1])
        ids = ["a/ü.png", "back\\slash", "line\nbreak", " x ", 'q"', "日本.jpg", "z"]
        return write_store(tmp_path / "s.zarr", rows, labels=label, class_names=["ant", "béé"], sample_ids=ids)

    def test_it_says_what_it_reads(self, format: Format) -> None:
        assert format.reads

    def test_what_it_writes_is_known_as_its_own(
        self, registered: str, format: Format, store: FeatureStore, tmp_path: Path
    ) -> None:
        exported = export_store(store, tmp_path / "out", registered)
        assert exported.path.is_dir() == format.folder
        assert type(format_of(exported.path)) is type(format)
        assert format_of(exported.path).read(exported.path).rows == exported.rows

    def test_a_store_comes_back_but_for_what_is_left_out(
        self, registered: str, store: FeatureStore, tmp_path: Path
    ) -> None:
        exported = export_store(store, tmp_path / "out", registered, as_is=True)
        back = import_store(exported.path, tmp_path / "back.zarr")
        assert back.encoder_name == store.encoder_name
        assert back.sample_ids.tolist() == store.sample_ids.tolist()
        np.testing.assert_array_equal(back.labels, store.labels)
        rows = np.arange(len(store))
        np.testing.assert_array_equal(back.gather(rows), store.gather(rows))
        if not exported.left_out:
            assert files_in(Path(back.path)) == files_in(Path(store.path))

    def test_the_same_store_gives_the_same_bytes(
        self, registered: str, format: Format, store: FeatureStore, tmp_path: Path
    ) -> None:
        if format.by_chance:
            pytest.skip(format.by_chance)
        for name in ("one", "two"):
            export_store(open_store(store.path), tmp_path / name / "out", registered)
        assert files_in(tmp_path / "one") == files_in(tmp_path / "two")

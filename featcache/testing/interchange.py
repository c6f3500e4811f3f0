"""What every interchange format must do."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.corpora import Listed
from featcache.interchange import ExportedStore, Format, export_store, format_of, import_store, load_format
from featcache.store import FeatureStore, open_store
from featcache.store.from_arrays import write_store

Exporting = Callable[..., ExportedStore]


def files_in(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Grey(Listed):
    """A corpus of images of one grey each, of any ids."""

    spec, class_names = "grey", None

    def __init__(self, ids: list[str]):
        self.ids, self.labels = ids, [-1] * len(ids)

    def read(self, i: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (8, 8), i).save(file, "PNG")
        return file.getvalue()


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

    @pytest.fixture
    def exporting(self, registered: str, format: Format) -> Exporting:
        """`export_store` to a path that its ending is put behind, with images where it shows some."""

        def export(store: FeatureStore, out: Path, **options: Any) -> ExportedStore:
            images = Grey(store.sample_ids.tolist()) if format.shows else None
            return export_store(store, f"{out}{format.ending}", registered, images=images, **options)

        return export

    @pytest.fixture
    def comes_back(self, format: Format) -> None:
        if not format.reads:
            pytest.skip("it is only written, to be looked at")

    def test_it_is_a_file_or_a_folder_as_it_says(
        self, format: Format, exporting: Exporting, store: FeatureStore, tmp_path: Path
    ) -> None:
        exported = exporting(store, tmp_path / "out")
        assert exported.path.is_dir() == format.folder
        assert exported.rows == len(store)

    @pytest.mark.usefixtures("comes_back")
    def test_what_it_writes_is_known_as_its_own(
        self, format: Format, exporting: Exporting, store: FeatureStore, tmp_path: Path
    ) -> None:
        exported = exporting(store, tmp_path / "out")
        assert type(format_of(exported.path)) is type(format)
        assert format_of(exported.path).read(exported.path).rows == exported.rows

    @pytest.mark.usefixtures("comes_back")
    def test_a_store_comes_back_but_for_what_is_left_out(
        self, exporting: Exporting, store: FeatureStore, tmp_path: Path
    ) -> None:
        exported = exporting(store, tmp_path / "out", as_is=True)
        back = import_store(exported.path, tmp_path / "back.zarr")
        assert back.encoder_name == store.encoder_name
        assert back.sample_ids.tolist() == store.sample_ids.tolist()
        np.testing.assert_array_equal(back.labels, store.labels)
        rows = np.arange(len(store))
        np.testing.assert_array_equal(back.gather(rows), store.gather(rows))
        if not exported.left_out:
            assert files_in(Path(back.path)) == files_in(Path(store.path))

    @pytest.mark.usefixtures("comes_back")
    def test_fields_of_any_shape_and_dtype_come_back(self, exporting: Exporting, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        fields: dict[str, np.ndarray] = {
            "length": np.array([3, 1, 0, 2**30, 2]).astype(np.int32),
            "nll": rng.normal(size=5).astype(np.float32),
            "hidden": rng.normal(size=(5, 3, 2)).astype(np.float16),
            "mask": rng.integers(0, 256, size=(5, 3, 3)).astype(np.uint8),
            "count": np.array([2**60, 1, 2, 3, -4]),
        }
        store = write_store(tmp_path / "s.zarr", rng.normal(size=(5, 3)), fields=fields)
        exported = exporting(store, tmp_path / "out", as_is=True)
        back = import_store(exported.path, tmp_path / "back.zarr")
        for name in back.manifest.fields.keys() & fields.keys():
            found = back.gather(np.arange(5), name)
            np.testing.assert_array_equal(found, fields[name])
            assert found.dtype == fields[name].dtype
        if not exported.left_out:
            assert files_in(Path(back.path)) == files_in(Path(store.path))

    def test_the_same_store_gives_the_same_bytes(
        self, format: Format, exporting: Exporting, store: FeatureStore, tmp_path: Path
    ) -> None:
        if format.by_chance:
            pytest.skip(format.by_chance)
        for name in ("one", "two"):
            exporting(open_store(store.path), tmp_path / name / "out")
        assert files_in(tmp_path / "one") == files_in(tmp_path / "two")

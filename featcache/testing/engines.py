"""What every engine must do."""

import itertools
from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featcache.store.layout
from featcache.engines import Engine, Report, open_engine
from featcache.extraction.extract import extract
from featcache.testing.interchange import files_in

TEACHER = "featcache.testing.models:small_teacher"
ROWS = 45


class Counted:
    """Work that reports each span it was given, as rows; and that fails where it is told to."""

    def __init__(self, fails: bool = False):
        self.fails = fails

    def __call__(self, spans: Iterable[range]) -> Generator[Report, None, None]:
        for span in spans:
            if self.fails:
                raise OSError(f"span {span.start}")
            yield Report(rows=len(span), failures=(f"{span.start}-{span.stop}",))


class EngineContract:
    """Of the engine that `spec` opens: `NAME` or `NAME:REST`."""

    spec: str

    @pytest.fixture
    def engine(self) -> Engine:
        return open_engine(self.spec)

    @pytest.fixture
    def images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """Of two classes; one cannot be read. Units are of few rows."""
        monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 8 * 6 * 2)
        rng = np.random.default_rng(0)
        for row in range(ROWS):
            path = tmp_path / "images" / ("ant", "bee")[row % 2] / f"{row:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
        path.write_bytes(b"no image")
        return str(tmp_path / "images")

    def test_every_span_is_computed_once(self, engine: Engine) -> None:
        spans = [range(first, first + 4) for first in range(0, 40, 4)]
        reports = list(engine.map(spans, Counted()))
        assert sum(each.rows for each in reports) == 40
        seen = itertools.chain.from_iterable(each.failures for each in reports)
        assert sorted(seen) == sorted(f"{span.start}-{span.stop}" for span in spans)

    def test_no_spans_are_no_work(self, engine: Engine) -> None:
        assert sum(each.rows for each in engine.map([], Counted())) == 0

    def test_what_work_raises_it_raises(self, engine: Engine) -> None:
        with pytest.raises(OSError, match="span 0"):
            list(engine.map([range(4)], Counted(fails=True)))

    def test_a_store_has_the_same_bytes(
        self, engine: Engine, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = []
        for name, by in (("local", open_engine("local")), ("own", engine)):
            monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / f"home-{name}"))  # nothing to copy from
            out = tmp_path / name / "s.zarr"
            store = extract(images, TEACHER, out, engine=by, device="cpu", precision="fp32", batch_size=4)
            assert len(store.failed) == 1
            made.append(files_in(out))
        assert made[0] == made[1]

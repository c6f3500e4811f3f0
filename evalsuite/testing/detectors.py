"""What every OOD detector must do."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from jaxtyping import Float

from evalsuite.detectors import Detector, build, load, parameters
from featcache.head import Head
from featcache.rows import Rows

HEAD = Head(3 * np.eye(4, 8), np.full(4, -0.1), np.arange(4))
"""It knows the four clusters."""

Make = Callable[[], Detector]


def score(detector: Detector, embedding: Float[np.ndarray, "n 8"]) -> Float[np.ndarray, " n"]:
    fields = {"embedding": embedding, "logits": HEAD.logits(embedding).astype(np.float32)}
    return detector.score(*(fields[field] for field in detector.needs))


class DetectorContract:
    """Of the detector `name`, on clusters in 8 dimensions with a head that knows them."""

    name: str

    @pytest.fixture
    def registered(self) -> str:
        return self.name

    @pytest.fixture
    def arguments(self) -> Mapping[str, Any]:
        """What it must be given; override it for one that needs a file."""
        return {}

    @pytest.fixture
    def make(self, registered: str, arguments: Mapping[str, Any]) -> Make:
        """An unfitted detector."""
        return lambda: build(registered, **arguments)

    @pytest.fixture
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(0)

    @pytest.fixture
    def clusters(self, rng: np.random.Generator) -> Callable[..., Float[np.ndarray, "n 8"]]:
        """So many rows around each of some centres, none of them negative, as some detectors need."""

        def near(centres: np.ndarray, rows: int) -> Float[np.ndarray, "n 8"]:
            drawn = [centre + 0.5 * rng.normal(size=(rows, 8)) for centre in centres]
            return np.abs(np.concatenate(drawn)).astype(np.float32)

        return near

    @pytest.fixture
    def bank(self, clusters: Callable[..., np.ndarray]) -> Rows:
        """Labelled ID rows in four clusters of 40."""
        return Rows.from_arrays(clusters(4 * np.eye(4, 8), 40), np.repeat(np.arange(4), 40), head=HEAD)

    @pytest.fixture
    def id_rows(self, bank: Rows, clusters: Callable[..., np.ndarray]) -> Float[np.ndarray, "n 8"]:
        """Held out, of the same clusters."""
        return clusters(4 * np.eye(4, 8), 6)

    @pytest.fixture
    def far_rows(self, id_rows: np.ndarray, clusters: Callable[..., np.ndarray]) -> Float[np.ndarray, "n 8"]:
        """A cluster in another direction."""
        return clusters(5 * np.eye(1, 8, 7), 5)

    def test_it_needs_fields_that_stores_can_have(self, registered: str) -> None:
        assert set(load(registered).needs) <= {"embedding", "logits"}

    def test_construction_only_stores_parameters(self, registered: str) -> None:
        detector = build(registered)
        assert vars(detector) == parameters(detector)

    def test_fit_returns_self_and_keeps_what_it_learned_in_trailing_underscores(self, make: Make, bank: Rows) -> None:
        detector = make()
        assert detector.fit(bank) is detector
        learned = vars(detector).keys() - parameters(detector).keys()
        assert all(attribute.endswith("_") or attribute.startswith("_") for attribute in learned)

    def test_scores_are_one_finite_float_a_row(self, make: Make, bank: Rows, id_rows: np.ndarray) -> None:
        scores = score(make().fit(bank), id_rows)
        assert scores.shape == (len(id_rows),)
        assert np.issubdtype(scores.dtype, np.floating)
        assert np.isfinite(scores).all()
        assert len(np.unique(scores)) > 1

    def test_far_rows_score_higher_than_id_rows(
        self, make: Make, bank: Rows, id_rows: np.ndarray, far_rows: np.ndarray
    ) -> None:
        detector = make().fit(bank)
        assert score(detector, far_rows).min() > score(detector, id_rows).max()

    def test_a_row_scores_the_same_in_any_batch(
        self, make: Make, bank: Rows, id_rows: np.ndarray, far_rows: np.ndarray
    ) -> None:
        detector = make().fit(bank)
        rows = np.concatenate([id_rows, far_rows])
        batches = np.concatenate([score(detector, rows[:11]), score(detector, rows[11:])])
        np.testing.assert_allclose(batches, score(detector, rows), rtol=1e-6)

    def test_fitting_again_forgets(self, make: Make, bank: Rows, id_rows: np.ndarray, far_rows: np.ndarray) -> None:
        labels = np.repeat(np.arange(4), 40)
        detector = make().fit(Rows.from_arrays(np.tile(far_rows, (32, 1)), labels, head=HEAD))
        again = score(detector.fit(bank), id_rows)
        np.testing.assert_array_equal(again, score(make().fit(bank), id_rows))

    def test_a_zero_row_has_a_finite_score(self, make: Make, bank: Rows) -> None:
        assert np.isfinite(score(make().fit(bank), np.zeros((1, 8), dtype=np.float32))).all()

"""What every derivation must do."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from featcache.derivations import Derivation, from_text, load_derivation, made, options_of
from featcache.rows import Rows
from featcache.store.from_arrays import write_store

ROWS, VIEWS = 7, 2


class DerivationContract:
    """Of the derivation `name` with `options`, of `stores` stores with embeddings (5) and logits (3) of the same samples
    of three classes."""

    name: str
    options: ClassVar[dict[str, Any]] = {}
    stores = 2

    @pytest.fixture
    def derivation(self, tmp_path: Path) -> Derivation:
        rng = np.random.default_rng(0)
        derivation = made(self.name, self.options)
        inputs = []
        for number in range(self.stores):
            embedding, logits = rng.normal(size=(ROWS, VIEWS, 5)), rng.normal(size=(ROWS, VIEWS, 3))
            inputs.append(
                Rows.of(write_store(tmp_path / f"{number}.zarr", embedding, logits=logits, labels=np.arange(ROWS) % 3))
            )
        derivation.open(inputs)
        return derivation

    def test_it_says_what_it_is_and_what_its_options_are(self) -> None:
        cls, built = load_derivation(self.name), made(self.name, self.options)
        assert cls.__doc__
        assert built.options == json.loads(json.dumps(built.options))
        assert built.options.keys() == options_of(cls).keys()
        for option, kind in options_of(cls).items():
            value = getattr(built, option)
            assert from_text(",".join(map(str, value)) if isinstance(value, tuple) else str(value), kind) == value
            assert cls.__dataclass_fields__[option].metadata["help"]

    def test_its_fields_are_what_its_rows_hold(self, derivation: Derivation) -> None:
        fields = {field: list(shape) for field, shape in derivation.fields.items()}
        assert len(fields["embedding"]) == 1
        for view in range(VIEWS):
            rows = derivation.rows(np.arange(ROWS), view)
            assert {field: list(values.shape[1:]) for field, values in rows.items()} == fields
            assert all(values.dtype == np.float32 and len(values) == ROWS for values in rows.values())

    def test_it_labels_every_row_and_says_it_in_lines(self, derivation: Derivation) -> None:
        labels = derivation.labels(np.arange(ROWS) % 3, np.ones(ROWS, bool))
        assert labels.shape == (ROWS,)
        assert labels.min() >= -1
        assert derivation.class_names is None or labels.max() < len(derivation.class_names)
        assert all(line and "\n" not in line for line in derivation.said)

    def test_each_row_is_computed_by_itself(self, derivation: Derivation) -> None:
        order = np.array([3, 0, 3, 6])
        together = derivation.rows(order, 1)
        for at, row in enumerate(order):
            for field, values in derivation.rows(np.array([row]), 1).items():
                np.testing.assert_array_equal(together[field][at], values[0])

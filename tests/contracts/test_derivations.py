"""What every registered derivation must do, with its default options."""

import json

import numpy as np
import pytest

from featcache.derivations import from_text, load_derivation, made, options_of
from featcache.plugins import plugin_names
from featcache.rows import Rows
from featcache.store.from_arrays import write_store

ROWS, VIEWS = 7, 2


@pytest.fixture(params=plugin_names("featcache.derivations"))
def name(request):
    return request.param


@pytest.fixture
def opened(name, tmp_path):
    """Of two stores of the same samples."""
    rng = np.random.default_rng(0)
    stores = [
        write_store(
            tmp_path / f"{each}.zarr", rng.normal(size=(ROWS, VIEWS, 5)), logits=rng.normal(size=(ROWS, VIEWS, 3))
        )
        for each in "ab"
    ]
    derivation = made(name, {})
    derivation.open([Rows.of(store) for store in stores])
    return derivation


def test_it_says_what_it_is_and_what_its_options_are(name):
    cls = load_derivation(name)
    assert cls.__doc__
    options = made(name, {}).options
    assert options == json.loads(json.dumps(options))
    assert options.keys() == options_of(cls).keys()
    for option, kind in options_of(cls).items():
        default = getattr(made(name, {}), option)
        text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert from_text(text, kind) == default
        assert cls.__dataclass_fields__[option].metadata["help"]


def test_its_fields_are_what_its_rows_hold(opened):
    fields = {field: list(shape) for field, shape in opened.fields.items()}
    assert len(fields["embedding"]) == 1
    for view in range(VIEWS):
        rows = opened.rows(np.arange(ROWS), view)
        assert {field: list(values.shape[1:]) for field, values in rows.items()} == fields
        assert all(values.dtype == np.float32 and len(values) == ROWS for values in rows.values())


def test_each_row_is_computed_by_itself(opened):
    order = np.array([3, 0, 3, 6])
    together = opened.rows(order, 1)
    for at, row in enumerate(order):
        for field, values in opened.rows(np.array([row]), 1).items():
            np.testing.assert_array_equal(together[field][at], values[0])

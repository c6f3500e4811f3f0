"""Embeddings so alike that what tells them apart is rounding."""

from __future__ import annotations

import numpy as np

from evalsuite.neighbours.index import evenly_spread
from featcache.geometry import Nearest, unit_rows
from featcache.identical import embedding_hashes, numbered
from featcache.rows import Rows

_ROWS = 4096  # that neighbours are looked for among
_EVERY = 16  # of them, whose neighbours are looked for
_LEAST_ROWS = 32  # of fewer, a median says little


def collapse_remarks(role: str, rows: Rows) -> list[str]:
    """One line where the rows, `role` being the store's part, are nearer to each other than their encoder's precision can
    tell; no line as a rule. Looks at no more than 4,096 rows; `featcache check` looks at all."""
    from featcache.store.comparable import FAITHFUL  # brings zarr

    drawn = evenly_spread(len(rows), _ROWS)
    if len(drawn) < _LEAST_ROWS:
        return []
    x = rows.take(drawn)
    images, unit = numbered(rows.content[drawn] if rows.hashed else embedding_hashes([x])), unit_rows(x)
    nearest = Nearest(unit[::_EVERY], images[::_EVERY])
    nearest.add(unit, images)
    if not len(nearest.distances) or not (median := float(np.median(nearest.distances))) < 1 - FAITHFUL:
        return []
    return [
        f"{role} {rows.name} has collapsed: the median distance (1 − cosine) to the nearest other image is {median:.2g}, less than "
        f"the {1 - FAITHFUL:.3f} that precision may change; `featcache check` says more"
    ]

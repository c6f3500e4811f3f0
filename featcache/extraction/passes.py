"""Forward passes: which samples that wait share one, and who sits where in it. Never does it depend on what was computed
before: a resumed run makes the same passes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from featcache.extraction.samples import Seen
from featcache.inputs import Input
from featcache.store.manifest import Manifest

Pass = tuple[Shaped[Tensor, "n ..."], dict[int, int]]
"""What goes through the encoder, and by position in the unit the place of its first view."""
WINDOW, WINDOW_BYTES = 32, 2**26
"""Of samples of different widths so many forward passes' worth are sorted at a time, or fewer of very wide features."""


def by_place(waiting: Mapping[int, np.ndarray], places: int, views: int, batch: int, pinned: bool) -> Iterator[Pass]:
    """One pass, in which a sample's place is its position in the unit modulo the `places` that there are.

    Args:
        waiting: what is rendered of the samples, by position.
        views: of each sample.
        batch: samples a forward pass.
        pinned: in memory that a GPU copies from while it works.
    """
    some = next(iter(waiting.values()))[0]
    passes = -(-places * views // batch)  # more than one for very many views
    images = torch.empty((passes * batch, *some.shape), dtype=getattr(torch, some.dtype.name), pin_memory=pinned)
    pixels, filled = images.numpy(), np.zeros(len(images), bool)
    at = {position: position % places * views for position in waiting}
    for position, place in at.items():
        pixels[place : place + views] = waiting[position]
        filled[place : place + views] = True
    pixels[~filled] = some
    yield images, at


def by_width(waiting: Sequence[tuple[int, Seen]], like: Input[Any, Any], batch: int, pinned: bool) -> Iterator[Pass]:
    """Passes of samples of one width each, in the order of their rows. One that is known already keeps its place empty; a
    pass of such alone is left out.

    Args:
        waiting: positions, and what the encoder gets of each.
    """
    of_width: dict[int, list[tuple[int, Seen]]] = {}
    for position, seen in waiting:
        of_width.setdefault(like.width(seen.parameters[0].tolist()), []).append((position, seen))
    for width, members in sorted(of_width.items()):
        for start in range(0, len(members), batch):
            new = {
                place: (position, seen.pixels[0])
                for place, (position, seen) in enumerate(members[start : start + batch])
                if seen.pixels is not None
            }
            if not new:
                continue
            some = next(iter(new.values()))[1]
            given = torch.empty((batch, width), dtype=getattr(torch, some.dtype.name), pin_memory=pinned)
            rows = given.numpy()
            rows[:] = some[:width]
            for place, (_, rendered) in new.items():
                rows[place] = rendered[:width]
            yield given, {position: place for place, (position, _) in new.items()}


def window_of(manifest: Manifest, batch: int) -> int:
    """Rows of a unit that are sorted by width at a time."""
    fitting = WINDOW_BYTES // sum(manifest.field_bytes.values()) // batch
    return batch * max(1, min(WINDOW, fitting))

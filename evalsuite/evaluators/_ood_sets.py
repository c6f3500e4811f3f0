"""What the samples of an ood result hold of each set, and how sets are called and look."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from evalsuite.charts import Named, Samples, Tone
from evalsuite.metrics import place_of_95
from evalsuite.result import Result
from featcache.rows import Rows

GROUPS: tuple[Tone, ...] = ("id", "csid", "near", "far")


def title(key: str) -> str:
    group, _, name = key.partition("/")
    return {"id_test": "ID test", "csid": f"ID, shifted: {name}"}.get(group) or f"{group}-OOD: {name}"


def tones(keys: Iterable[str]) -> dict[str, Tone]:
    return {title(key): next(group for group in GROUPS if key.startswith(group)) for key in keys}


def sets(result: Result, kind: str) -> dict[str, np.ndarray]:
    """What samples hold for each set, under `kind/`: `id_test` first, then csid, near, far."""
    found = {
        name.removeprefix(f"{kind}/"): values
        for name, values in result.samples.items()
        if name.startswith(f"{kind}/") and len(values) and values.dtype.kind in "fiu"
    }
    order = ("id_test", *GROUPS[1:])
    known = {name: values for name, values in found.items() if name.partition("/")[0] in order}
    return dict(sorted(known.items(), key=lambda each: order.index(each[0].partition("/")[0])))


def detectors(result: Result) -> list[str]:
    """Those that scored `id_test`."""
    ending = "/id_test"
    scored = (name for name in result.samples if name.startswith("score/") and name.endswith(ending))
    return [name.removeprefix("score/").removesuffix(ending) for name in scored]


def threshold(of_id: Float[np.ndarray, " n"]) -> float:
    """The strictest one that accepts at least 95 % of the ID scores, that of `fpr95_id`; rows up to it are taken for ID."""
    return float(np.sort(of_id)[place_of_95(len(of_id))])


def rows_of(each: Named, key: str) -> Rows | None:
    """The rows of a set's store in the order of its samples, where it may be read, and is still the one that was measured."""
    group, _, name = key.partition("/")
    record, samples = each.result.inputs.get(group), Samples.of(each.result, f"/{key}")
    record = record.get(name) if name and isinstance(record, dict) else record
    return None if samples is None else each.stores.measured(record, samples.ids, samples.content)

"""The maps of embeddings that the page shows of ood results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from evalsuite.charts import Axis, Chart, Cloud, Named, Samples, Section, Tone, evenly
from evalsuite.evaluators._ood_sets import rows_of, sets, title, tones
from evalsuite.result import Result
from featcache.classes import Classes
from featcache.geometry import unit

_ABOUT = (
    "Unit embeddings on the two principal directions of the ID training rows, one scale for both axes, and each "
    "encoder has its own; at most 2,000 rows a set, evenly spread over it. Two directions show little of a space: sets "
    "that overlap here may be far apart in it."
)
_ABOUT_CLASSES = " By class: the ID test rows, those of the {} most frequent classes in colours of their own."
_ABOUT_ACROSS = (
    " ID against OOD: to the right from the mean of the ID test rows to the mean of the OOD sets, each set counting the same; "
    "up, the principal direction of the ID test rows across that. Both are of every other row; only the others are drawn."
)
_POINTS, _LEAST_POINTS = 2000, 50  # of each set on a map
_ALL_POINTS = 80_000  # of all maps, some 10 bytes each
_CLASSES = 12  # with a colour of their own
_READ = 2000  # rows of a set that a direction is found with: of every other one


@dataclass
class _View:
    """A map of an encoder, as its control names it."""

    encoder: str
    kind: str
    x: Axis = field(default_factory=lambda: Axis(name="1st direction", column="x"))
    y: Axis = field(default_factory=lambda: Axis(name="2nd direction", column="y"))
    places: dict[str, Float[np.ndarray, "_ 2"]] = field(default_factory=dict)
    tones: dict[str, Tone] = field(default_factory=dict)
    samples: dict[str, Samples | None] = field(default_factory=dict)

    def add(self, name: str, tone: Tone, places: np.ndarray, samples: Samples | None) -> None:
        while name in self.places:  # a class that is called as a set
            name += " (set)"
        self.places[name], self.tones[name], self.samples[name] = places, tone, samples


def section(results: Sequence[Named]) -> Section:
    """Of each encoder by set, and, where its stores may be read, by class and from ID to OOD."""
    last = {each.encoder: each for each in results if _placed(each.result)}
    kinds = [
        [_by_set(each) for each in last.values()],
        [view for each in last.values() if (view := _by_class(each))],
        [view for each in last.values() if (view := _tried(each))],
    ]
    views = [view for of_kind in kinds for view in of_kind]
    points = _ALL_POINTS // max(1, sum(len(view.places) for view in views))
    points = int(np.clip(points, _LEAST_POINTS, _POINTS))
    about = _ABOUT + (_ABOUT_CLASSES.format(_CLASSES) if kinds[1] else "") + (_ABOUT_ACROSS if kinds[2] else "")
    drawn: list[Chart] = [
        Cloud.of(
            view.places, view.tones, points, view.samples,
            title=view.encoder, where={"Map": view.kind} if kinds[1] or kinds[2] else {}, x=view.x, y=view.y,
        )
        for view in views
    ]  # fmt: skip
    return Section("map", "Map", "Map of embeddings", about, drawn)


def _placed(result: Result) -> dict[str, np.ndarray]:
    return {
        key: values
        for key, values in sets(result, "map").items()
        if values.ndim == 2 and values.shape[1] == 2 and np.isfinite(values).all()
    }


def _by_set(each: Named) -> _View:
    view, found = _View(each.encoder, "by set"), _placed(each.result)
    of_tones = tones(found)
    for key, places in found.items():
        view.add(title(key), of_tones[title(key)], places, Samples.of(each.result, f"/{key}"))
    return view


def _by_class(each: Named) -> _View | None:
    """The ID test rows by class, the others in grey; None where their classes are not known."""
    found = _placed(each.result)
    rows = rows_of(each, "id_test") if "id_test" in found else None
    if rows is None or len(found["id_test"]) != len(rows) or not (rows.labels >= 0).any():
        return None
    view, samples, classes = _View(each.encoder, "by class"), Samples.of_rows(rows), Classes.of(rows)
    numbers, counts = np.unique(rows.labels[rows.labels >= 0], return_counts=True)
    own = np.sort(numbers[np.argsort(-counts, kind="stable")][:_CLASSES])
    for number in own.tolist():
        at = rows.labels == number
        view.add(classes.distinct_name(number), "class", found["id_test"][at], samples.picked(at))
    others = ~np.isin(rows.labels, own)
    if others.any():
        view.add("other ID test rows", "rest", found["id_test"][others], samples.picked(others))
    for key in list(found)[1:]:
        view.add(title(key), "rest", found[key], Samples.of(each.result, f"/{key}"))
    return view


def _tried(each: Named) -> _View | None:
    with each.stores.trying(each.result.inputs.get("id_test")):
        return _across(each)
    return None


def _across(each: Named) -> _View | None:
    """The sets on the direction from ID to OOD and one across it; None where their embeddings are not at hand."""
    keys = [key for key in _placed(each.result) if key.startswith(("id_test", "csid/", "near/", "far/"))]
    rows = {key: found for key in keys if (found := rows_of(each, key)) is not None and len(found) > 3}
    ood = [key for key in rows if key.startswith(("near/", "far/"))]
    if "id_test" not in rows or not ood:
        return None
    read = {key: evenly(len(of), _READ) for key, of in rows.items()}
    embeddings = {key: unit(of.take(read[key]).astype(np.float64)) for key, of in rows.items()}
    plane = _directions(embeddings["id_test"][::2], [embeddings[key][::2] for key in ood])
    if plane is None:
        return None
    origin, directions = plane
    view = _View(
        each.encoder, "ID against OOD",
        x=Axis(name="from ID to OOD", column="from_id_to_ood"), y=Axis(name="1st direction across", column="across"),
    )  # fmt: skip
    of_tones = tones(rows)
    for key, of in embeddings.items():
        samples = Samples.of_rows(rows[key]).picked(read[key][1::2])
        view.add(title(key), of_tones[title(key)], (of[1::2] - origin) @ directions, samples)
    return view


def _directions(
    of_id: Float[np.ndarray, "n d"], of_ood: Sequence[Float[np.ndarray, "_ d"]]
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d 2"]] | None:
    """The mean of the ID rows, and two unit directions at right angles: from it to the mean of the OOD sets' means, and the
    one across of the most variance of the ID rows. None where the means are one."""
    origin = of_id.mean(axis=0)
    to_ood = np.mean([each.mean(axis=0) for each in of_ood], axis=0) - origin
    length = float(np.linalg.norm(to_ood))
    if length < 1e-6:
        return None
    first = to_ood / length
    rest = of_id - origin
    second = np.linalg.svd(rest - np.outer(rest @ first, first), full_matrices=False)[2][0]
    second -= (second @ first) * first
    second *= np.sign(second[np.abs(second).argmax()]) / max(float(np.linalg.norm(second)), 1e-12)
    return origin, np.stack([first, second], axis=1)

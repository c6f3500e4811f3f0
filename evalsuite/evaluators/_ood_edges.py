"""The images that a detector takes for what they are not, and how it fares by class, as the page shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from evalsuite.charts import Chart, Gallery, Named, Picture, Samples, Section, Strip, Table, knn_first
from evalsuite.evaluators._ood_sets import detectors, rows_of, sets, threshold, title
from evalsuite.intervals import share
from evalsuite.result import Metric
from featcache.classes import Classes

_PICTURES, _LEAST_PICTURES = 8, 4  # of a strip
_ALL_PICTURES = 800  # of all strips
_ALL_CLASSES = 4000  # rows of all tables


def sections(results: Sequence[Named]) -> list[Section]:
    """Strips of pictures, and tables of classes, of each encoder and detector: of the first ones, where there are many."""
    scored = {(each.encoder, spec): each for each in results for spec in detectors(each.result)}
    chosen = [key for spec in knn_first(spec for _, spec in scored) for key in scored if key[1] == spec]
    strips = sum(len(sets(scored[key].result, f"score/{key[1]}")) for key in chosen)
    pictures = int(np.clip(_ALL_PICTURES // max(1, strips), _LEAST_PICTURES, _PICTURES))
    galleries: list[Chart] = []
    tables: list[Chart] = []
    room_for_pictures, room_for_classes = _ALL_PICTURES, _ALL_CLASSES
    for encoder, spec in chosen:
        each, where = scored[encoder, spec], {"Detector": spec}
        if room_for_pictures > 0:
            gallery = Gallery(title=encoder, where=where, strips=list(_strips(each, spec, pictures)), wide=True)
            galleries.append(gallery)
            room_for_pictures -= pictures * len(gallery.strips)
        if room_for_classes > 0 and (rows := list(_classes(each, spec))):
            columns = ["set and class", "rows", "taken for OOD"]
            tables.append(Table(title=encoder, where=where, columns=columns, rows=rows, wide=True))
            room_for_classes -= len(rows)
    about = (
        "Of each OOD set the images that look most like ID to a detector, and of ID the images that it rejects first. Framed "
        "are those on the wrong side of the threshold that keeps 95 % of the ID test rows."
    )
    about_classes = (
        "How many rows of each class are beyond the threshold that keeps 95 % of all ID test rows: of ID classes too many "
        "where their share is well above 5 %, of OOD classes the more the better. With 95 % intervals, the threshold taken as it is."
    )
    cut = " Where there are many encoders and detectors, as here, of the first ones only."
    about += cut if len(galleries) < len(chosen) else ""
    about_classes += cut if room_for_classes <= 0 else ""
    return [
        Section("edges", "Images", "Images on the wrong side", about, galleries),
        Section("ood-classes", "By class", "OOD detection by class", about_classes, tables),
    ]


def _strips(each: Named, spec: str, pictures: int) -> Iterator[Strip]:
    """A strip a set: of OOD sets the lowest scores, of ID sets the highest."""
    scores = sets(each.result, f"score/{spec}")
    of_id = _known(scores.get("id_test", np.empty(0)))
    if not len(of_id):
        return
    limit = threshold(of_id)
    for key, values in sorted(scores.items(), key=lambda one: not one[0].startswith(("near/", "far/"))):
        ood = key.startswith(("near/", "far/"))
        samples, known = Samples.of(each.result, f"/{key}"), np.flatnonzero(~np.isnan(values))
        if samples is None:
            continue
        first = known[np.argsort(values[known] if ood else -values[known], kind="stable")][:pictures]
        wrong = values <= limit if ood else values > limit
        shown = [
            Picture(
                picture=sample,
                words=f"{values[row]:.4g}, {'rejected' if wrong[row] != ood else 'accepted'}",
                mark="wrong" if wrong[row] else "",
            )
            for row, sample in zip(first, samples.at(first), strict=True)
        ]
        count, what = int(wrong[known].sum()), "accepted" if ood else "rejected"
        yield Strip(
            name=title(key),
            groups={"most like ID" if ood else "least like ID": shown},
            note=f"{count:,} of {len(known):,} {what} ({100 * count / max(1, len(known)):.1f} %)",
        )


def _classes(each: Named, spec: str) -> Iterator[list[str | int | Metric]]:
    """A row a set and class: its rows, and the share beyond the threshold."""
    scores = sets(each.result, f"score/{spec}")
    of_id = _known(scores.get("id_test", np.empty(0)))
    for key, values in scores.items() if len(of_id) else ():
        rows = rows_of(each, key)
        if rows is None or len(rows) != len(values):
            continue
        beyond, classes = values > threshold(of_id), Classes.of(rows)
        for number in np.unique(rows.labels[rows.labels >= 0]).tolist():
            of = (rows.labels == number) & ~np.isnan(values)
            if of.any():
                yield [f"{title(key)}: {classes.distinct_name(number)}", int(of.sum()), share(beyond[of]).metric()]


def _known(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " _"]:
    return values[~np.isnan(values)]

"""What the page shows of select results: the stores as teachers, in the order that they were given in, and ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from evalsuite.charts import Axis, Chart, Headline, Lines, Named, Section, Series
from evalsuite.evaluators.select import Select

_INFORMATION: Mapping[str, str] = {"sum": "sum", "of_labels": "I(Y; F)", "of_inputs": "I(X; F)"}


def headlines(results: Sequence[Named]) -> list[Headline]:
    """None: a result is about several encoders."""
    return []


def charts(results: Sequence[Named]) -> list[Section]:
    about = (
        "How much stores, of checkpoints say, tell of the labels and of the images: I(Y; F) by a probe's cross-entropy, I(X; F) by "
        "what a ridge regression reconstructs of the images. The best teacher is the one with the largest sum, as far as stores tell; "
        "the student is not considered. Lines through a point are 95 % intervals over the images held out."
    )
    return [
        Section(
            "select",
            "Teachers",
            "Which store is the best teacher",
            about,
            [each for of in results for each in _drawn(of)],
        )
    ]


def _drawn(each: Named) -> list[Chart]:
    """The measures over the stores as they were given, of a training in its order, and the table that the command prints."""
    result, stores = each.result, list(each.result.inputs["stores"])
    given = Axis(name="store, as given", column="store")
    note = " · ".join(f"{number} {name}" for number, name in enumerate(stores, 1))

    def series(what: str, said: str) -> Series:
        return Series.of(said, {number: result.metrics[f"{name}/{what}"] for number, name in enumerate(stores, 1)})

    def lines(title: str, y: Axis, names: Mapping[str, str]) -> Lines:
        drawn = [series(what, said) for what, said in names.items()]
        ticks = list(range(1, len(stores) + 1))
        return Lines(title=title, x=given, y=y, series=drawn, by="measure", marked=True, ticks=ticks, note=note)

    counts = result.parameters["rows"]
    return [
        lines(f"{each.encoder}: information", Axis(name="nats", better="higher"), _INFORMATION),
        lines(f"{each.encoder}: probe", Axis.of("top1", "probe top‑1"), {"probe_top1": "probe top‑1"}),
        replace(
            Select.table(result),
            title=each.encoder,
            note=f"the best first; {counts['fitted']:,} images fitted, {counts['held_out']:,} held out; X: {result.parameters['inputs']}",
            wide=True,
        ),
    ]

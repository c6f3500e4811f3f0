"""What an evaluator has drawn: plain records, which the report's page draws without knowing any evaluator.

An evaluator gives `headlines(results)`, its columns in the page's summary, and `charts(results)`, its sections, both of
the results of its command. Charts without samples name metrics: the page has every encoder's value and interval. The
others hold the numbers they draw. A `Table` is what the command line prints, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped, UInt64

from evalsuite.metrics import lower_is_better
from evalsuite.recorded import Recorded
from evalsuite.result import Metric, Result, content_of
from featcache.rows import Rows

Tone = Literal["", "id", "csid", "near", "far", "class", "rest", "quiet", "strong"]
"""How a series looks: "" as the encoder of its name, or in the next colour; of ID or OOD rows as such; of one class in the
next colour of classes; grey, as what is no class of those (`rest`); pale and without a key (`quiet`), or in ink (`strong`)."""
Better = Literal["", "higher", "lower"]

BINS = 48  # of a histogram
STEPS = 4095  # places of a cloud are whole numbers from 0 to this

WORDS = {
    "auroc": "AUROC",
    "aupr_in": "AUPR, ID positive",
    "aupr_out": "AUPR, OOD positive",
    "ap_in": "average precision, ID positive",
    "ap_out": "average precision, OOD positive",
    "fpr95_id": "FPR95_id",
    "fpr95_ood": "FPR95_ood",
    "gram_pearson": "Gram correlation",
    "gram_pearson_centred": "Gram correlation, centred",
    "cka_debiased": "CKA",
    "cka_debiased_unit": "CKA of unit embeddings",
    "agreement/top1": "agreement",
    "agreement/kappa": "kappa",
    "kappa": "kappa",
    "agreement": "agreement",
    "spearman": "rank correlation",
    "cosine_mapped": "cosine, mapped",
    "procrustes": "Procrustes distance",
    "nll": "NLL, nats",
    "ece": "calibration error",
    "aurc": "area under risk-coverage",
}
"""Metrics, or the last part of their names, in words."""


@dataclass(frozen=True)
class Named:
    """A result, under which name the page shows the encoder it is about, and the stores that it names, as far as they may
    be read again."""

    encoder: str
    result: Result
    stores: Recorded = field(default_factory=Recorded.none)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis or a column shows.

    `share`: values in [0, 1] are written in percent. The axis never goes below `least` or above `most`, and takes in
    `line`, where a dashed line stands: what chance reaches, say. With `range` it goes from there to there. `column` is its
    name in saved tables.
    """

    name: str
    share: bool = False
    better: Better = ""
    least: float | None = None
    most: float | None = None
    line: float | None = None
    range: tuple[float, float] | None = None
    column: str = ""

    @classmethod
    def of(cls, metric: str, name: str | None = None) -> Axis:
        """The axis of a metric of ours, known by the last part of its name."""
        last = metric.rpartition("/")[2].lower()
        share = bool(re.match(r"((macro|selective)_)?top\d+(@[\d.]+)?$|fpr95_|agreement$", last))
        ranked = re.match(r"(ndcg|recall|precision|hit|mrr|map)(@\d+)?$", last)
        within = share or ranked or re.match(r"auroc|aupr_|ap_|gram_|cka|mutual_knn|kappa|cosine|spearman", last)
        return cls(
            name=name or WORDS.get(metric) or WORDS.get(last) or metric,
            share=share,
            better="lower" if lower_is_better(metric) else "higher",
            least=0.0 if share or ranked or re.match(r"auroc|aupr_|ap_|mutual_knn|nll$|ece$|aurc$", last) else None,
            most=1.0 if within else None,
            line=0.5 if last == "auroc" else None,
        )

    def over(self, metrics: Iterable[Metric]) -> Axis:
        """The same axis with one range for all of these values and intervals, for charts that are looked at together."""
        ends = [end for metric in metrics for end in (metric.value, *(metric.ci95 or ()))]
        ends += [] if self.line is None else [self.line]
        margin = (max(ends) - min(ends) or 0.1) * 0.06
        least = -np.inf if self.least is None else self.least
        most = np.inf if self.most is None else self.most
        return replace(self, range=(max(min(ends) - margin, least), min(max(ends) + margin, most)))


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A column of the summary: `metric` of every encoder that has it. `note` stands in its head; below the table stand
    `about`, where there is more to say, and `rows`, of how many samples it is. Where headlines have different `where`,
    the reader picks."""

    metric: str
    axis: Axis
    note: str = ""
    about: str = ""
    rows: str = ""
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What all charts have. Of a section's charts those are shown whose `where`, by the label of a control, is what the
    reader picked, the first ones at first. `note` is small print; `wide` ones have a row of their own."""

    title: str
    where: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Dots(Chart):
    """A row for each entry of `rows`, label to metric, and in it a point and its interval for each encoder."""

    axis: Axis
    rows: Mapping[str, str]
    label: str = "row"


@dataclass(frozen=True, kw_only=True)
class Scatter(Chart):
    """A point an encoder, one metric against another. Of several the reader picks; without `y`, of all headlines."""

    x: Mapping[str, Axis]
    y: Mapping[str, Axis] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line's points, and their intervals' ends where it has `low` and `high`; `note` stands in its key."""

    name: str
    x: Sequence[int | float]
    y: Sequence[int | float]
    low: Sequence[int | float | None] = ()
    high: Sequence[int | float | None] = ()
    note: str = ""
    tone: Tone = ""

    @classmethod
    def of(cls, name: str, metrics: Mapping[int, Metric], tone: Tone = "") -> Series:
        """Of metrics by x, in its order."""
        at = sorted(metrics)
        ends = [metrics[x].ci95 or (None, None) for x in at]
        low, high = [low for low, _ in ends], [high for _, high in ends]
        return cls(name=name, x=at, y=[metrics[x].value for x in at], low=low, high=high, tone=tone)


@dataclass(frozen=True, kw_only=True)
class Lines(Chart):
    """Lines over numbers. `by` is what a line is, in saved tables. `marked`: a mark at every point; `ticks`: where the
    x axis has numbers; `diagonal`: a dashed line from corner to corner."""

    x: Axis
    y: Axis
    series: Sequence[Series]
    by: str = "encoder"
    marked: bool = False
    ticks: Sequence[int | float] = ()
    diagonal: bool = False


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of `rows` values how many are in each bin, and how many `below` and `above` all of them."""

    name: str
    counts: Sequence[int]
    rows: int
    below: int
    above: int
    tone: Tone = ""


@dataclass(frozen=True, kw_only=True)
class Histogram(Chart):
    """How values spread over equal bins from `low` to `high`, as shares of each set."""

    axis: Axis
    low: float
    high: float
    sets: Sequence[Counts]

    @classmethod
    def of(cls, values: Mapping[str, Float[np.ndarray, " _"]], tones: Mapping[str, Tone], **given: Any) -> Histogram:
        """Of each set's values. A few far ones do not squash the rest: the axis has the middle 99 % of every set, but nothing
        farther from the middle half of all, each set weighing the same, than twice that half's width."""
        finite = [each[np.isfinite(each)] for each in values.values()]
        finite = [each for each in finite if each.size]
        if not finite:
            raise ValueError("a histogram needs a finite value")
        low = min(float(np.quantile(each, 0.005)) for each in finite)
        high = max(float(np.quantile(each, 0.995)) for each in finite)
        even = np.concatenate([np.quantile(each, np.linspace(0, 1, 1001)) for each in finite])
        first, third = (float(x) for x in np.quantile(even, [0.25, 0.75]))
        if third > first:
            low, high = max(low, first - 2 * (third - first)), min(high, third + 2 * (third - first))
        if not high > low:  # half a unit around the one value, and wider where that would be lost in rounding
            margin = max(0.5, abs(low) * 1e-6)
            low, high = low - margin, high + margin
        sets = [
            Counts(
                name=name,
                counts=np.histogram(each, BINS, (low, high))[0].tolist(),
                rows=len(each),
                below=int((each < low).sum()),
                above=int((each > high).sum()),
                tone=tones.get(name, ""),
            )
            for name, each in values.items()
        ]
        return cls(low=low, high=high, sets=sets, **given)


class Sample(NamedTuple):
    """Which image: its sample's id, and the first 8 bytes of its hash as `Result.samples` has them, 0 where there is none."""

    id: str
    content: int


@dataclass(frozen=True)
class Samples:
    """Those of a set of rows, by arrays that `Result.samples` holds, or stores."""

    ids: Shaped[np.ndarray, " n"]
    content: UInt64[np.ndarray, " n"]

    @classmethod
    def of(cls, result: Result, key: str = "") -> Samples | None:
        """Of a result's set (`/id_test`); None where it does not say. `content` in files of before it was kept is unknown."""
        ids = result.samples.get(f"sample_id{key}")
        return None if ids is None else cls(ids, result.samples.get(f"content{key}", np.zeros(len(ids), np.uint64)))

    @classmethod
    def of_rows(cls, rows: Rows) -> Samples:
        return cls(rows.sample_ids, content_of(rows))

    def picked(self, rows: Shaped[np.ndarray, " _"]) -> Samples:
        """Those of some rows, by their numbers or by whether each is among them."""
        return Samples(self.ids[rows], self.content[rows])

    def at(self, rows: Int[np.ndarray, " _"] | Sequence[int]) -> list[Sample]:
        return [Sample(str(self.ids[row]), int(self.content[row])) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sample's picture with words below; `mark` frames it: as one that should not be here (`wrong`), or is on the other
    side too (`shared`). In the page it is a number among its pictures."""

    picture: Sample | int
    words: str = ""
    mark: Literal["", "wrong", "shared"] = ""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Pictures in a row, or side by side in several `groups` by their names; at its head its name and perhaps a picture."""

    name: str
    groups: Mapping[str, Sequence[Picture]]
    head: Picture | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Gallery(Chart):
    """Strips of pictures. What has no picture (no corpus or store gives one) is left out of the page."""

    strips: Sequence[Strip]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Some of `rows` points; `x` and `y` are whole numbers, from 0 to `STEPS` over the chart's `low` to `high`."""

    name: str
    x: Sequence[int]
    y: Sequence[int]
    rows: int
    tone: Tone = ""
    pictures: Sequence[Sample | int] = ()


@dataclass(frozen=True, kw_only=True)
class Cloud(Chart):
    """Sets of many points, both axes on one scale; of some the `pictures` of the samples that they are, shown to who points
    at them."""

    x: Axis
    y: Axis
    low: Sequence[float]
    high: Sequence[float]
    sets: Sequence[Places]
    steps: int = STEPS

    @classmethod
    def of(
        cls,
        places: Mapping[str, Shaped[np.ndarray, "_ 2"]],
        tones: Mapping[str, Tone],
        points: int,
        samples: Mapping[str, Samples | None] | None = None,
        **given: Any,
    ) -> Cloud:
        """Of each set's points, at most `points` of them, evenly spread over its rows; `samples` are theirs."""
        chosen = {name: evenly(len(each), points) for name, each in places.items()}
        kept = {name: each[chosen[name]] for name, each in places.items()}
        pooled = np.concatenate(list(kept.values())).astype(np.float64)
        low, high = pooled.min(axis=0), pooled.max(axis=0)
        width = np.where(high > low, high - low, 1.0)
        sets = []
        for name, each in kept.items():
            x, y = np.rint((each - low) / width * STEPS).astype(int).T.tolist()
            pictures = of.at(chosen[name]) if (of := (samples or {}).get(name)) else ()
            tone = tones.get(name, "")
            sets.append(Places(name=name, x=x, y=y, rows=len(places[name]), tone=tone, pictures=pictures))
        return cls(low=low.tolist(), high=(low + width).tolist(), sets=sets, **given)


@dataclass(frozen=True, kw_only=True)
class Table(Chart):
    """Rows of cells, the first of each its name: text, whole numbers, or metrics with their intervals. A terminal that has
    no room for all columns leaves out `spare`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | Metric | None]]
    spare: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: `key` is its place in links, `short` its name in the list of parts."""

    key: str
    short: str
    title: str
    about: str
    charts: Sequence[Chart]


def evenly(rows: int, points: int) -> Int64[np.ndarray, " _"]:
    """At most `points` row numbers, evenly spread over the rows."""
    spread: Int64[np.ndarray, " _"] = np.linspace(0, rows - 1, min(rows, points)).round().astype(np.int64)
    return spread


def rows_said(counts: Sequence[int], noun: str) -> str:
    """`9,000 images`, or `9,000 to 10,000 images` where they differ; "" where nothing is known."""
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f"{low:,} {noun}" if low == high else f"{low:,} to {high:,} {noun}"


def rows_of(results: Sequence[Named], role: str, noun: str) -> str:
    """`rows_said`, of the stores that have this role in the results."""
    records = [each.result.inputs.get(role) for each in results]
    return rows_said([of["rows"] for of in records if isinstance(of, dict) and "rows" in of], noun)


def repeated_means(metrics: Mapping[str, Metric]) -> set[str]:
    """Names `WHERE/mean/METRIC` that repeat the only other `WHERE/NAME/METRIC`: means of one set, or of one severity."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in metrics:
        parts = name.split("/")
        for i in range(1, len(parts) - 1):
            found.setdefault(("/".join(parts[:i]), "/".join(parts[i + 1 :])), []).append(name)
    return {
        mean
        for (where, what), of in found.items()
        if len(of) == 2 and (mean := f"{where}/mean/{what}") in of and metrics[of[0]].value == metrics[of[1]].value
    }


def knn_first(detectors: Iterable[str]) -> list[str]:
    """Each detector once, in their order."""
    return sorted(dict.fromkeys(detectors), key=lambda each: each != "knn")


def at_k(results: Sequence[Named], stem: str, name: str, rows: str) -> list[Headline]:
    """Of the metrics STEM@K the one that most encoders have, then K = 20, then the lowest K."""
    found = most_held((name for each in results for name in each.result.metrics), stem)
    return [
        Headline(metric=f"{stem}@{k}", axis=Axis.of(f"{stem}@{k}", name), note=f"k = {k}", rows=rows) for k in found
    ]


def most_held(names: Iterable[str], stem: str) -> list[int]:
    """The K of the one of STEM@K that is most often among the names, or else 20, or else the lowest; [] for none."""
    counts = Counter(int(match[1]) for name in names if (match := re.fullmatch(rf"{re.escape(stem)}@(\d+)", name)))
    return sorted(counts, key=lambda k: (-counts[k], k != 20, k))[:1]

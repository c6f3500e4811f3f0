"""The pictures on a page: small copies of the images that charts ask for, from the corpora and stores that have them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, features

from evalsuite.charts import Chart, Cloud, Gallery, Picture, Places, Sample, Section, Strip
from featcache.corpora import Corpus, open_corpus
from featcache.corpora.store import KeptImages
from featcache.extraction.samples import content_hash
from featcache.inputs.images import decode
from featcache.rows import Rows

SIDE = 64  # px, of the longer side
MOST = 1000
"""Pictures of a page: decoding takes time, 5 ms each of ImageNet's, and more of a camera's."""
_FORMAT, _QUALITY = ("WEBP", 60) if features.check("webp") else ("JPEG", 60)
_NAMED = 3  # samples in a message
_STEP = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are evenly spread however many there are

Progress = Callable[[int, int], None]


class Pictures:
    """Numbered pictures of samples, each once, as long as there is room.

    A corpus is asked by a sample's id, and its image is taken only where its hash is that of the measured one; where that is not
    known (stores made from arrays keep none) there is no picture: sets may well have samples of the same ids. Pictures are made
    of decoded pixels and nothing else: what else a file held (EXIF, colour profiles, scripts) is gone.

    Attributes:
        corpora: those that are asked.
        shown: names and data URLs of the pictures.
        unhashed: samples of whose image no hash is known.
        others: samples whose id is that of other images than the measured ones.
        unreadable: samples whose image cannot be read any more.
        missing: samples that no corpus has.
        crowded: samples for which there was no room.
    """

    def __init__(self, corpora: Sequence[Corpus], most_bytes: int) -> None:
        self.corpora, self._room = list(corpora), most_bytes
        self._number: dict[Sample, int] = {}
        self._places: dict[str, list[tuple[Corpus, int]]] = {}
        self.shown: list[dict[str, str]] = []
        self.unhashed: list[Sample] = []
        self.others: list[Sample] = []
        self.unreadable: list[Sample] = []
        self.missing: list[Sample] = []
        self.crowded: list[Sample] = []

    def find(self, wanted: Iterable[str]) -> None:
        """Look where images of these ids are: one pass over each corpus's ids."""
        ids = set(wanted)
        for corpus in self.corpora:
            for row, sample_id in enumerate(corpus.ids):
                if sample_id in ids:
                    self._places.setdefault(sample_id, []).append((corpus, row))

    def number(self, sample: Sample) -> int:
        """The number of the sample's picture, −1 where it has none."""
        if sample not in self._number:
            self._number[sample] = self._made(sample)
        return self._number[sample]

    def _made(self, sample: Sample) -> int:
        places = self._places.get(sample.id, [])
        if not places:
            self.missing.append(sample)
        elif not sample.content:
            self.unhashed.append(sample)
        elif self._room <= 0 or len(self.shown) >= MOST:
            self.crowded.append(sample)
        elif (source := self._source(sample, places)) is not None:
            self._room -= len(source) + 6 * len(sample.id) + 30  # as JSON in HTML has them, at most
            self.shown.append({"name": sample.id, "source": source})
            return len(self.shown) - 1
        return -1

    def _source(self, sample: Sample, places: Sequence[tuple[Corpus, int]]) -> str | None:
        """The data URL of the sample's picture; where it has none, it is put on the list that says why."""
        why = self.others
        for corpus, row in places:
            try:
                encoded = corpus.read(row)
                whole = corpus.content(row) if isinstance(corpus, KeptImages) else content_hash(encoded)
                if int(np.frombuffer(whole[:8], np.uint64)[0]) == sample.content:
                    return thumbnail(decode(encoded))
            except Exception:  # whatever a corpus, a service or Pillow raises of one image
                why = self.unreadable
        why.append(sample)
        return None

    def remarks(self) -> list[str]:
        """What to know of them, a line each."""
        lines = [
            (self.others, "are in no corpus with the image that was measured; other images have their ids"),
            (self.unreadable, "have an image that cannot be read"),
            (self.unhashed, "are of stores that keep no hash of their images, by which the right one would be known"),
            (self.missing, "are in no corpus that was given, and in no store that keeps images"),
            (self.crowded, f"have no room: a page has {MOST:,} pictures at most, and is to stay under 3 MB"),
        ]
        return [f"{len(of):,} samples {what}{_some(of)}" for of, what in lines if of]


def thumbnail(image: Image.Image) -> str:
    """A data URL of the whole image, no side longer than `SIDE` px, never enlarged."""
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, _FORMAT, quality=_QUALITY, method=4)
    return f"data:image/{_FORMAT.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def opened(given: Sequence[str | Corpus], stores: Iterable[Rows]) -> list[Corpus]:
    """The corpora that are given, and after them the stores that keep images."""
    corpora = [open_corpus(each) if isinstance(each, str) else each for each in given]
    kept = [store for rows in stores for store in rows.stores if store.manifest.pixels]
    return [*corpora, *(KeptImages(store) for store in kept)]


def illustrated(sections: Sequence[Section], pictures: Pictures, progress: Progress = lambda *_: None) -> list[Section]:
    """The sections with the pictures' numbers in place of samples, and without what has none. Galleries come first; of clouds
    points evenly spread have a picture as long as there is room."""
    charts = [chart for section in sections for chart in section.charts]
    clouds = [of_set for chart in charts if isinstance(chart, Cloud) for of_set in chart.sets]
    asked = dict.fromkeys([*(sample for chart in charts for sample in _asked(chart)), *_in_turn(clouds)])
    pictures.find(sample.id for sample in asked)
    for number, sample in enumerate(asked, 1):
        pictures.number(sample)
        progress(number, len(asked))
    return [replace(section, charts=list(_shown(section.charts, pictures))) for section in sections]


def _asked(chart: Chart) -> Iterator[Sample]:
    for strip in chart.strips if isinstance(chart, Gallery) else ():
        for each in (*([strip.head] if strip.head else ()), *(each for of in strip.groups.values() for each in of)):
            if isinstance(each.picture, Sample):
                yield each.picture


def _in_turn(sets: Sequence[Places]) -> Iterator[Sample]:
    """One of each set after the other; however many are taken, those of a set are evenly spread over it."""
    orders = [np.argsort(np.arange(len(each.pictures)) * _STEP % 1) for each in sets]
    for turn in range(max(map(len, orders), default=0)):
        for each, order in zip(sets, orders, strict=True):
            if turn < len(order) and isinstance(sample := each.pictures[order[turn]], Sample):
                yield sample


def _shown(charts: Sequence[Chart], pictures: Pictures) -> Iterator[Chart]:
    def of(picture: Picture) -> Picture:
        return (
            replace(picture, picture=pictures.number(picture.picture))
            if isinstance(picture.picture, Sample)
            else picture
        )

    def strip(each: Strip) -> Strip:
        groups = {
            name: [made for one in several if (made := of(one)).picture != -1] for name, several in each.groups.items()
        }
        head = of(each.head) if each.head else None
        return replace(each, groups=groups, head=head if head and head.picture != -1 else None)

    for chart in charts:
        if isinstance(chart, Gallery):
            strips = [made for each in chart.strips if any((made := strip(each)).groups.values())]
            if strips:
                yield replace(chart, strips=strips)
        elif isinstance(chart, Cloud):
            numbers = [
                [pictures.number(each) for each in of_set.pictures if isinstance(each, Sample)] for of_set in chart.sets
            ]
            # None has a picture: no word of them.
            kept = [found if max(found, default=-1) >= 0 else () for found in numbers]
            yield replace(chart, sets=[replace(one, pictures=of) for one, of in zip(chart.sets, kept, strict=True)])
        else:
            yield chart


def _some(samples: Sequence[Sample]) -> str:
    named = ", ".join(sample.id for sample in samples[:_NAMED])
    return f" ({named}{', …' if len(samples) > _NAMED else ''})"

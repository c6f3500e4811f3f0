"""Pairs: the pixels of a (sample, view), or the token ids of a text, joined with what the teacher saw in them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped, UInt8

from distill.augment import photometric
from distill.masks import Masks
from distill.methods import Pairing
from distill.rendered import Renderings
from featcache.corpora import Corpus
from featcache.corpora.store import KeptImages
from featcache.extraction.samples import content_hash, prefetch
from featcache.inputs import Input, Views, input_of
from featcache.inputs.images import Preprocess
from featcache.machine import cores
from featcache.masks import NONE, render
from featcache.rows import Rows
from featcache.store import FeatureStore
from featcache.store.layout import EMBEDDING

CHECKED = 16
"""Images of each corpus that are compared with what the teacher saw, before training starts."""


@dataclass(frozen=True)
class Drawn:
    """Samples of one step, in memory.

    Attributes:
        pixels: that the student sees; of texts, token ids, as many as the longest of the batch needs.
        features: of the teacher by field (b, …), as stored.
        row, view: which of the rows, and which of its views the teacher's features are of.
        label: −1 where there is none.
        weight: 1 where the stores have none.
        mask: coded as `featcache.masks` has it, `NONE` all over where a sample has none; None where none are asked for.
    """

    pixels: Shaped[np.ndarray, "b ..."]
    features: dict[str, np.ndarray]
    row: Int64[np.ndarray, " b"]
    view: Int64[np.ndarray, " b"]
    label: Int64[np.ndarray, " b"]
    weight: Float32[np.ndarray, " b"]
    mask: UInt8[np.ndarray, "b s s"] | None = None


class Pairs:
    """Batches of (pixels, teacher features) of the same samples.

    Stored views are replayed from the store's recipe, so the student sees the very box and mirroring that the teacher
    saw, at the student's own resolution. Failed rows are left out.

    Args:
        rows: of one or several stores, with their preprocessing recorded.
        corpus: the one that the store was made from, or the images that a store keeps of it; one for each store.
        preprocess: the student's input.
        workers: threads that read and render; by default one a core.
        views: "all", "plain" or "student", as in `FitConfig`.
        student_augment: "photometric" or "crops", with views "student".
        processes: that share this machine's memory.
        renderings: what was rendered before, which is not rendered again.
        masks: with the masks that the corpora have, rendered as the pixels are.

    Raises:
        ValueError: a corpus is not the one that its store was made from.
    """

    def __init__(
        self,
        rows: Rows | FeatureStore,
        corpus: Corpus | Sequence[Corpus],
        preprocess: Input[Any, Any],
        workers: int | None = None,
        *,
        views: str = "all",
        student_augment: str = "photometric",
        processes: int = 1,
        renderings: Renderings | None = None,
        masks: bool = False,
    ):
        self.rows, self.preprocess = Rows.of(rows), preprocess
        self.corpora: list[Corpus] = list(corpus) if isinstance(corpus, list | tuple) else [corpus]  # type: ignore[list-item]
        assert len(self.corpora) == len(self.rows.stores)
        self._recipes = [_Recipe(store) for store in self.rows.stores]
        self._sample = [
            _join(store, corpus, [self.rows.locate(index)[1] for index in self.rows.of_store(number).tolist()])
            for number, (store, corpus) in enumerate(zip(self.rows.stores, self.corpora, strict=True))
        ]
        self.masks = self._masks_of_corpora() if masks else None
        self._views, self._augment = views, student_augment if views == "student" else None
        self.view_counts = self.rows.view_counts if views == "all" else np.ones(len(self.rows), np.int64)
        self._workers = workers or cores()
        self.renderings = renderings or Renderings()
        self._rendered = self.renderings.of(
            self.rows.stores, self.corpora, preprocess, every_view=views == "all", processes=processes
        )

    def __len__(self) -> int:
        """Samples with features; each is seen once an epoch, in one view."""
        return len(self.rows)

    @property
    def description(self) -> str:
        """Which views are trained on, in words."""
        if self._views == "student":
            how = {"photometric": "colours changed, nothing moved", "crops": "random crops and mirroring"}
            return f"the teacher's plain view against views of the student's own ({how[self._augment or '']})"
        most = int(self.view_counts.max())
        if self.preprocess.kind != "image":
            return f"each {self.preprocess.kind} as it is"
        return "the plain view only" if most == 1 else f"all {most} stored views, replayed"

    @property
    def pixels(self) -> str:
        """Which pixels are rendered once, in words."""
        return "rendered every epoch" if self._augment == "crops" else self._rendered.description

    def renderings_in(self, epochs: int) -> int:
        """How many images are read and rendered in so many epochs, about."""
        again = self._augment == "crops" or not self._rendered.all_kept
        return len(self) * epochs if again else min(int(self.view_counts.sum()), len(self) * epochs)

    def check(self) -> None:
        """Compare some images of each corpus with what the teacher saw.

        Raises:
            ValueError: an image is no longer the one that the teacher saw.
        """
        for number in range(len(self.corpora)):
            mine = self.rows.of_store(number)
            for index in mine[:: max(1, len(mine) // CHECKED)].tolist():
                self._read(index)
        if self.masks:
            self.masks.check(lambda index: self.preprocess.decode(self._read(index)[0], seen=True).size)

    def epoch(
        self,
        number: int,
        *,
        batch_size: int,
        seed: int,
        fields: Sequence[str] = (EMBEDDING,),
        pairing: Pairing = "one",
        group: int = 0,
        weights: Float[np.ndarray, " samples"] | None = None,
        start: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> Iterator[Drawn]:
        """Shuffled batches, each sample in one view drawn at random; a pure function of (seed, number, weights).

        The last, short batch is left out unless it is the only one. The next batch is prepared meanwhile.

        Args:
            number: of the epoch.
            batch_size: samples a batch, of all processes together.
            fields: of the teacher.
            pairing, group: as in `distill.methods.Method`; with "group" a batch has each of its samples in several views.
            weights: samples are drawn in proportion, with replacement; each once when None.
            start: batches to leave out at the beginning.
            process, processes: which of how many equal parts of every batch is wanted.

        Raises:
            ValueError: the views do not allow this pairing, or the weights are not such.
        """
        self.refuse_pairing(pairing, group)
        rng = np.random.default_rng([seed, number])
        order, views = rng.permutation(len(self)), rng.integers(self.view_counts)
        shown = rng.integers(self.view_counts) if pairing == "independent" else views
        if weights is not None:
            order = rng.choice(len(self), len(self), p=self._shares(weights))
        batches = [
            np.array_split(order[first : first + batch_size], processes)[process]
            for first in range(start * batch_size, self.batches(batch_size) * batch_size, batch_size)
        ]
        with ThreadPoolExecutor(self._workers) as readers, ThreadPoolExecutor(1) as ahead:

            def prepare(batch: Int64[np.ndarray, " b"]) -> Drawn:
                if pairing == "group":
                    size = group or int(self.view_counts[0])
                    rows, first = np.repeat(batch, size), views[batch] // size * size
                    view = np.add.outer(first, np.arange(size)).ravel()
                    pixels = self._pixels(rows, view, readers, seed, number)
                    return self._drawn(rows, view, fields, pixels, self._mask(rows, view, readers, seed, number))
                pixels = self._pixels(batch, shown[batch], readers, seed, number)
                mask = self._mask(batch, shown[batch], readers, seed, number)
                return self._drawn(batch, views[batch], fields, pixels, mask)

            yield from prefetch(prepare, batches, ahead, ahead=2)

    def _drawn(
        self,
        rows: Int64[np.ndarray, " b"],
        view: Int64[np.ndarray, " b"],
        fields: Sequence[str],
        pixels: np.ndarray,
        mask: UInt8[np.ndarray, "b s s"] | None,
    ) -> Drawn:
        features = {field: self.rows.gather(rows, field, view) for field in fields}
        shown, label, weight = self.preprocess.trimmed(pixels), self.rows.labels[rows], self.rows.weight(rows, view)
        return Drawn(shown, features, rows, view, label, weight, mask)

    def refuse_pairing(self, pairing: Pairing, group: int = 0) -> None:
        """Raises ValueError where the views that there are cannot be paired so."""
        if pairing == "one":
            return
        if self._views != "all":
            raise ValueError(f"the method pairs views ({pairing}), and views={self._views} has one; leave views out")
        uneven = self.view_counts[self.view_counts % group > 0] if group else self.view_counts[:0]
        if len(uneven):
            raise ValueError(
                f"the method takes {group} views of a sample together, and a store has {uneven[0]}; extract with "
                f"--views {group}, {2 * group} or another multiple"
            )
        if self.view_counts.min() < 2:
            raise ValueError(
                f"the method pairs views ({pairing}), and a store has only one of each sample; extract with --views 2 or more"
            )
        if pairing == "group" and not group and len(np.unique(self.view_counts)) > 1:
            raise ValueError(
                "the method takes all views of a sample together, and the stores have different numbers of them; extract "
                "them with the same --views"
            )

    def _shares(self, weights: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
        total = weights.sum()
        if len(weights) != len(self) or not (weights >= 0).all() or not 0 < total < np.inf:
            raise ValueError(
                f"the method's weights must be {len(self)} finite numbers, none negative and not all 0; correct the method"
            )
        return weights / total

    def batches(self, batch_size: int) -> int:
        """In an epoch."""
        return max(1, len(self) // batch_size)

    def plain(
        self, index: Sequence[int] | np.ndarray, *, batch_size: int, fields: Sequence[str] = (EMBEDDING,)
    ) -> Iterator[Drawn]:
        """These samples in order, in the teacher's plain view."""
        index = np.asarray(index, np.int64)
        batches = [index[start : start + batch_size] for start in range(0, len(index), batch_size)]
        with ThreadPoolExecutor(self._workers) as readers, ThreadPoolExecutor(1) as ahead:

            def prepare(batch: Int64[np.ndarray, " b"]) -> Drawn:
                plain = np.zeros(len(batch), np.int64)
                pixels = self._as_seen(batch, plain, readers)
                return self._drawn(batch, plain, fields, pixels, self._mask(batch, plain, readers))

            yield from prefetch(prepare, batches, ahead, ahead=2)

    def _pixels(
        self, batch: np.ndarray, views: np.ndarray, readers: ThreadPoolExecutor, seed: int, epoch: int
    ) -> np.ndarray:
        if self._augment == "crops":
            return np.stack(list(readers.map(lambda index: self._cropped(index, seed, epoch), batch.tolist())))
        pixels = self._as_seen(batch, views, readers)
        if self._augment == "photometric":
            ids = [self._id(index) for index in batch.tolist()]
            pixels = np.stack(list(readers.map(lambda image, name: photometric(image, seed, epoch, name), pixels, ids)))
        return pixels

    def _masks_of_corpora(self) -> Masks:
        located = [self.rows.locate(index) for index in range(len(self.rows))]
        number = np.array([store for store, _ in located], np.int64)
        sample = np.array([self._sample[store][row] for store, row in located], np.int64)
        return Masks(self.corpora, number, sample)

    def _mask(
        self, batch: np.ndarray, views: np.ndarray, readers: ThreadPoolExecutor, seed: int = 0, epoch: int | None = None
    ) -> UInt8[np.ndarray, "b s s"] | None:
        """As `_pixels`; of no epoch as `_as_seen`."""
        masks, like = self.masks, self.preprocess
        if masks is None:
            return None
        assert isinstance(like, Preprocess)

        def rendered(index: int, view: int) -> UInt8[np.ndarray, "s s"]:
            if not masks.known[index]:
                return np.full((like.size, like.size), NONE, np.uint8)
            mask, recipe = masks.of(index), self._recipes[self.rows.locate(index)[0]].views
            if epoch is not None and self._augment == "crops":
                recipe, view = self._own_crop(seed, epoch)
            return render(mask, like, self._draw(index, mask.shape[::-1], recipe, view))

        return np.stack(list(readers.map(rendered, batch.tolist(), views.tolist())))

    def _as_seen(self, batch: np.ndarray, views: np.ndarray, readers: ThreadPoolExecutor) -> np.ndarray:
        """The views that the teacher saw."""

        def render(fresh: np.ndarray) -> Iterator[np.ndarray]:
            return readers.map(self.render, batch[fresh].tolist(), views[fresh].tolist())

        return self._rendered.take(self.rows.place[batch], views, render)

    def render(self, index: int, view: int) -> Shaped[np.ndarray, "..."]:
        """Pixels, or token ids, of the `index`-th sample with features, in the given stored view.

        Raises:
            ValueError: the image is no longer the one that the teacher saw.
        """
        recipe = self._recipes[self.rows.locate(index)[0]]
        return self._seen(index, recipe.views, view)

    def _cropped(self, index: int, seed: int, epoch: int) -> np.ndarray:
        """A random crop that no store knows: the same recipe as stored ones, under the run's seed."""
        return self._seen(index, *self._own_crop(seed, epoch))

    @staticmethod
    def _own_crop(seed: int, epoch: int) -> tuple[Views, int]:
        return Views(count=2, augment="rrc", seed=seed), epoch + 1

    def _seen(self, index: int, recipe: Views, view: int) -> np.ndarray:
        encoded, size = self._read(index)
        image = self.preprocess.decode(encoded, seen=True)
        size = size or self.preprocess.size_of(image)
        return self.preprocess.render(image, self._draw(index, size, recipe, view), size)

    def _draw(self, index: int, size: tuple[int, int], recipe: Views, view: int) -> Any:
        teacher = self._recipes[self.rows.locate(index)[0]].preprocess
        return teacher.draw(size, recipe, self._id(index), view)

    def _id(self, index: int) -> str:
        number, row = self.rows.locate(index)
        return str(self.rows.stores[number].sample_ids[row])

    def _read(self, index: int) -> tuple[bytes, tuple[int, int] | None]:
        """The encoded image, and the size in px of the one that the teacher saw where this is a smaller copy."""
        number, row = self.rows.locate(index)
        store, corpus, sample = self.rows.stores[number], self.corpora[number], int(self._sample[number][row])
        seen, encoded = store.content[row].tobytes(), corpus.read(sample)
        if isinstance(corpus, KeptImages) and corpus.content(sample) == seen:
            return encoded, corpus.original_size(sample)
        # Of kept images, the teacher saw the kept one itself, if anything: its store was extracted from `store:PATH`.
        if any(seen) and content_hash(encoded) != seen:
            raise ValueError(
                f"{corpus.ids[sample]}: has changed since {store.path} was extracted; put the image back, or extract again "
                "and train with another --out"
            )
        return encoded, None


class _Recipe:
    """How a store's views were drawn."""

    def __init__(self, store: FeatureStore):
        self.preprocess = teacher_input(store)
        self.views = Views.from_record(store.manifest.views.to_json())


def _join(store: FeatureStore, corpus: Corpus, rows: list[int]) -> Int64[np.ndarray, " n"]:
    """Number in `corpus` of each of the store's rows; -1 where it is not among `rows`.

    Raises:
        ValueError: the corpus lacks some of `rows`.
    """
    sample_of = {sample_id: i for i, sample_id in enumerate(corpus.ids)}
    sample = np.full(len(store), -1, np.int64)
    sample[rows] = [sample_of.get(str(sample_id), -1) for sample_id in store.sample_ids[rows]]
    missing = [row for row in rows if sample[row] < 0]
    if missing:
        raise ValueError(
            f"{corpus.spec} does not match {store.path}: it lacks {len(missing)} of the store's {len(rows)} samples "
            f"(first: {store.sample_ids[missing[0]]}); give the corpus that the store was extracted from"
        )
    return sample


def teacher_input(store: FeatureStore) -> Input[Any, Any]:
    """Of the encoder that made `store`.

    Raises:
        ValueError: the store does not record it, or not the views, so its samples cannot be replayed.
    """
    record = store.manifest.encoder.preprocess
    if not record or store.manifest.views.augment is None:
        raise ValueError(
            f"{store.path}: does not record how its images were cropped, so they cannot be replayed; extract it with featcache"
        )
    return input_of(record)

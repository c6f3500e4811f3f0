"""What to know of stores before believing a number that is measured with them."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from featcache.geometry import Nearest, Values, effective_rank, median_apart, unit_rows
from featcache.identical import embedding_hashes, numbered
from featcache.store.layout import EMBEDDING
from featcache.store.read import FeatureStore
from featcache.store.remarks import Checked, Pair, Remark, remarks_on_pairs, remarks_on_stores

SAMPLED = 1_000
"""Rows of each store whose nearest rows are looked for, among all rows."""
RANKED = 4_096
"""Rows of each store that the effective rank is taken of."""
_BLOCK_FLOATS = 2**22

NEAR = 0.05
"""Rows are near-identical where 1 − cosine is at most so much of its median over pairs of images. With EfficientNet-Lite0, copies
saved again as JPEG, made smaller, cropped by 5 % or mirrored are at 0.01 to 0.1, and no two different CIFAR-10 images of 300
below 0.3."""


@dataclass
class Report:
    """Of all stores, of the pairs of one encoder's, and what follows."""

    stores: list[Checked]
    pairs: list[Pair]
    remarks: list[Remark]

    @property
    def falsified(self) -> bool:
        """Whether an evaluation with these stores would be wrong."""
        return any(remark.falsifies for remark in self.remarks)

    def record(self) -> dict[str, Any]:
        """All of it in what JSON has."""
        stores = [{**asdict(store), "extraction": store.extraction.to_json()} for store in self.stores]
        return {**asdict(self), "stores": stores, "falsified": self.falsified}


def check(stores: Sequence[Any] | Any, *, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> Report:
    """What to know of these stores before believing a number that is measured with them; `featcache.store.remarks` says what.

    One pass over the plain view's embeddings; nearest rows are looked for of a sample only, drawn by `seed`, but among all
    rows. Chunks are not verified: `featcache verify` does that.

    Args:
        stores: a `FeatureStore` or its path or URL, or several; those of one encoder are held against each other.
        progress: called with (rows done, of how many).

    Raises:
        ValueError: one is no store, or none is given.
    """
    given: list[Any] = list(stores) if isinstance(stores, list | tuple) else [stores]
    if not given:
        raise ValueError("no store was given; name at least one")
    opened = [each if isinstance(each, FeatureStore) else FeatureStore(each) for each in given]
    looked = [_Looked(store, seed) for store in {store.identity: store for store in opened}.values()]
    of_encoder: dict[tuple[str, int], list[_Looked]] = {}
    for each in looked:
        of_encoder.setdefault((each.store.fingerprint, each.store.embedding_dim), []).append(each)
    done, total = 0, sum(len(each.rows) for each in looked)
    pairs: list[Pair] = []
    for group in of_encoder.values():
        _number_images(group)
        for each in group:
            for rows in each.look(group):
                done += rows
                if progress:
                    progress(done, total)
        pairs += [_pair(a, b) for a, b in combinations(group, 2)]
    found = [each.checked() for each in looked]
    return Report(found, pairs, [*remarks_on_stores(found), *remarks_on_pairs(found, pairs)])


class _Looked:
    """One store while it is looked through.

    Attributes:
        rows: numbers of its usable rows; below, n of them.
        images: (n,) a number for each row's image, the same in all stores of the encoder.
        sample, queries: positions (0…n−1) of sampled rows, finite ones, and these rows of norm 1.
        among: for each store of the encoder, by its identity, the sample's nearest rows there.
    """

    def __init__(self, store: FeatureStore, seed: int):
        self.store, self.rows = store, store.ok
        self.content = np.ascontiguousarray(store.content[self.rows])
        self.hashed = bool(self.content.any(axis=1).all())
        self.images: Int64[np.ndarray, " n"] = np.zeros(0, np.int64)
        drawn = np.random.default_rng(seed).permutation(len(self.rows))
        ranked, sample = np.sort(drawn[:RANKED]), np.sort(drawn[:SAMPLED])
        rows = self.take(ranked)
        rows = rows[np.isfinite(rows).all(axis=1)]
        self.effective_rank, self.ranked = effective_rank(unit_rows(rows)), len(rows)
        rows = self.take(sample)
        finite = np.isfinite(rows).all(axis=1)
        self.sample, self.queries = sample[finite], unit_rows(rows[finite])
        self.among: dict[str, Nearest] = {}
        self.values = Values(store.embedding_dim)

    def take(self, positions: Int64[np.ndarray, " b"]) -> Float32[np.ndarray, "b d"]:
        return self.store.gather(self.rows[positions]).astype(np.float32)

    def blocks(self) -> Iterator[Float32[np.ndarray, "_ d"]]:
        """All usable rows in order."""
        size = max(1, _BLOCK_FLOATS // self.store.embedding_dim)
        for start in range(0, len(self.rows), size):
            yield self.take(np.arange(start, min(start + size, len(self.rows))))
            self.store.release(EMBEDDING)

    def look(self, group: Sequence["_Looked"]) -> Iterator[int]:
        """Read all rows once, as neighbours of every store's sample too; yields how many were read."""
        for other in group:
            other.among[self.store.identity] = Nearest(other.queries, other.images[other.sample])
        start = 0
        for block in self.blocks():
            finite = self.values.add(block)
            images, rows = self.images[start : start + len(block)][finite], unit_rows(block[finite])
            for other in group:
                other.among[self.store.identity].add(rows, images)
            start += len(block)
            yield len(block)

    @property
    def apart(self) -> float | None:
        return median_apart(self.queries, self.images[self.sample])

    def near(self, other: "_Looked") -> float | None:
        """Share of the sample with a near-identical row of another image in the other store; None without a sample."""
        distances, apart = self.among[other.store.identity].distances, self.apart
        return None if apart is None else float((distances <= NEAR * apart).sum() / len(self.sample))

    def checked(self) -> Checked:
        store, extraction = self.store, self.store.manifest.extraction
        failures = Counter(re.sub(r"0x[0-9a-f]+", "0x…", reason) for reason in store.reasons.values())
        distances = self.among[store.identity].distances
        return Checked(
            store=str(store.path),
            encoder=store.encoder_name,
            fingerprint=store.fingerprint,
            sealed=store.sealed,
            precision=extraction.precision,
            cosine=extraction.cosine,
            extraction=extraction,
            rows=len(store),
            failed=len(store.failed),
            pending=len(store) - len(store.failed) - len(self.rows),
            failures=dict(failures.most_common()),
            dtypes=store.manifest.field_dtypes,
            dimensions=store.embedding_dim,
            images_known=self.hashed,
            identical=len(self.images) - len(np.unique(self.images)),
            sampled=len(self.sample),
            near_identical=self.near(self),
            nearest=float(np.median(distances)) if len(distances) else None,
            nearest_90=float(np.quantile(distances, 0.9)) if len(distances) else None,
            apart=self.apart,
            effective_rank=self.effective_rank,
            ranked=self.ranked,
            zero_rows=self.values.zero,
            not_finite=self.values.not_finite,
            zero_dimensions=self.values.always_zero,
            constant_dimensions=self.values.constant,
            unlabelled=int((store.labels[self.rows] < 0).sum()),
            classes=_classes(store, self.rows),
            class_names=store.class_names is not None,
        )


def _number_images(group: Sequence[_Looked]) -> None:
    """By the hashes of images, or, where one store keeps none, by all of the embedding."""
    hashed = all(each.hashed for each in group)
    hashes = [each.content if hashed else embedding_hashes(each.blocks()) for each in group]
    parts = np.split(numbered(np.concatenate(hashes)), np.cumsum([len(each) for each in hashes])[:-1])
    for each, images in zip(group, parts, strict=True):
        each.images = images


def _pair(a: _Looked, b: _Looked) -> Pair:
    return Pair(
        a=str(a.store.path),
        b=str(b.store.path),
        images_known=a.hashed and b.hashed,
        identical_a=int(np.isin(a.images, b.images).sum()),
        identical_b=int(np.isin(b.images, a.images).sum()),
        near_a=a.near(b),
        near_b=b.near(a),
        classes=sorted(_classes(a.store, a.rows).keys() & _classes(b.store, b.rows).keys()),
    )


def _classes(store: FeatureStore, rows: Int64[np.ndarray, " n"]) -> dict[str, int]:
    """Class → rows, of the classes that have rows: by name where the store names them, else by number."""
    labels, names = store.labels[rows], store.class_names
    numbers, counts = np.unique(labels[labels >= 0], return_counts=True)
    found: dict[str, int] = {}
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        name = names[number] if names is not None and number < len(names) else str(number)
        found[name] = found.get(name, 0) + count
    return found

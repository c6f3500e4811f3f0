"""What a fit is given, opened and checked before anything is written."""

from typing import Any

from distill.config import FitConfig
from featcache.corpora.store import KeptImages
from featcache.corpus import Corpus, open_corpus
from featcache.store import EMBEDDING, FeatureStore, open_store


def open_all(store: Any, corpus: Any) -> tuple[list[FeatureStore], list[Corpus]]:
    """Opened stores and corpora, one corpus for each store.

    Args:
        store: a store or its path, or a list of them.
        corpus: a corpus or its spec, None for the images that the store keeps, or a list of these.

    Raises:
        ValueError: not as many corpora as stores.
    """
    given = list(store) if isinstance(store, list | tuple) else [store]
    images = list(corpus) if isinstance(corpus, list | tuple) else [corpus] * (1 if corpus is not None else len(given))
    if not given or len(images) != len(given):
        raise ValueError(
            f"{len(given)} stores, {len(images)} corpora: give each store its corpus, in the same order, or no corpus at all"
        )
    stores = [each if isinstance(each, FeatureStore) else open_store(each) for each in given]
    return stores, [
        KeptImages(kept) if each is None else open_corpus(each) if isinstance(each, str) else each
        for kept, each in zip(stores, images, strict=True)
    ]


def refuse_unequal_parts(settings: FitConfig, samples: int, processes: int) -> None:
    """Every process and every accumulated part gets as many samples as the others.

    Raises:
        ValueError: that is not possible.
    """
    parts = processes * settings.accumulate
    how = f"{processes} processes" + (f" × {settings.accumulate} accumulated parts" if settings.accumulate > 1 else "")
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size {settings.batch_size} cannot be shared equally by {how}; choose a multiple of {parts}"
        )
    if parts > 1 and samples < settings.batch_size:
        raise ValueError(
            f"batch_size {settings.batch_size}, shared by {how}, is more than the {samples} samples; lower it"
        )


def refuse_missing_fields(method: Any, student: Any, stores: list[FeatureStore]) -> None:
    """Features that the method reads, of the teacher and of the student.

    Raises:
        ValueError: one of them is not there.
    """
    for store in stores:
        for name in method.fields:
            if name != EMBEDDING and name not in store.manifest["fields"]:
                raise ValueError(
                    f"{store.path}: holds no {name}, which this method needs; extract with --fields {name}"
                )
    if set(method.student_fields) != {EMBEDDING}:
        missing = [name for name in method.student_fields if name not in student.shapes()]
        if missing:
            raise ValueError(f"this student gives no {', '.join(missing)}, which the method needs; choose another")

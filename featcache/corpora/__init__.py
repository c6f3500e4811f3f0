"""Corpora: sized, ordered, random-access collections of encoded images, or of texts, one file a kind.

A plugin has `open_corpus(rest_of_spec) -> Corpus`. It may have, for receipts, `named_files(rest_of_spec) -> list[str] | None`:
the files that a corpus consists of, in its order; None when they are not local, or not known to be all. And where every
sample is one of another corpus in another guise, under the same id, `made_of(rest_of_spec) -> str`: the spec of that.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from featcache.plugins import load_plugin, plugin_names, suggest


@runtime_checkable
class Corpus(Protocol):
    """What stage one and stage two need of a collection of images, or of texts.

    It may also have `kind`, "image" or "text", of what it holds (see `kind_of`); `passed_over`: how many files that it found
    it left out, by kind, in words; and `target`, `has_target` and, of masks, `mask_classes`: see `target`.
    """

    spec: str
    """What `open_corpus` was given."""
    ids: Sequence[str]
    """One unique, stable id a sample, in row order."""
    class_names: Sequence[str] | None
    """Name of each label, or None without labels."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The encoded image file of sample `i`, or the UTF-8 bytes of that text."""

    def label(self, i: int) -> int:
        """Index into `class_names`, or -1."""


class Listed(Corpus):
    """A corpus whose ids and `labels` are known when it is opened."""

    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, i: int) -> int:
        return self.labels[i]


def open_corpus(spec: str) -> Corpus:
    """Open a corpus by its spec.

    A spec is a directory or its URL, a `.csv`, `.tsv` or `.parquet` manifest or its URL, or `SOURCE:REST` with a source
    from `featcache/corpora/`. Where a sample has several parts, `@image=NAME` and `@label=NAME` after it choose.

    Raises:
        ValueError: no such source or place, or no images in it; the message names the remedy.
        OSError: a folder in it cannot be listed, so that images would be missing.
    """
    source, rest = source_of(spec)
    known = plugin_names("featcache.corpora")
    if source not in known:
        raise ValueError(
            f"{spec}: unknown kind of corpus {source!r} (for a folder with a colon in its name write ./{spec}); "
            f"{suggest(source, known)}"
        )
    corpus: Corpus = load_plugin("featcache.corpora", source).open_corpus(rest)
    return corpus


def source_of(spec: str) -> tuple[str, str]:
    """The source from `featcache/corpora/` that a spec names, and what that source is to open."""
    match = re.match(r"([a-z][a-z0-9_]+):(?!//)(.+)", str(spec))
    is_manifest = re.search(r"\.(csv|tsv|parquet)(@\w+=[^@/]*)*$", str(spec), re.IGNORECASE)
    plain = "manifest" if is_manifest and not os.path.isdir(spec) else "folder"
    return (match[1], match[2]) if match else (plain, str(spec))


def original(spec: str) -> str | None:
    """The corpus whose samples those of `spec` are in another guise (corrupted, attacked), under the same ids; None where they
    are nobody's but their own, or not known to be."""
    source, rest = source_of(spec)
    if source not in plugin_names("featcache.corpora"):
        return None
    made_of = getattr(load_plugin("featcache.corpora", source), "made_of", None)
    try:
        of = made_of(rest) if made_of else None
    except ValueError:  # of another version, say
        return None
    return of and (original(of) or of)


def kind_of(corpus: Corpus) -> str:
    """Of what it holds: "image", where it says nothing else, or "text"."""
    return getattr(corpus, "kind", "image")


def refuse_other_kind(corpus: Corpus, encoder: str, kind: str) -> None:
    """Raises ValueError where the corpus holds samples of another `kind` than that encoder takes."""
    if kind_of(corpus) != kind:
        raise ValueError(
            f"{corpus.spec}: is of {kind_of(corpus)}s, and {encoder} takes {kind}s; give a corpus of {kind}s, or an encoder of "
            f"{kind_of(corpus)}s"
        )


def passed_over(corpus: Corpus) -> Mapping[str, int]:
    """How many files that `corpus` found it left out, by kind, in words; the most frequent first."""
    return getattr(corpus, "passed_over", {})


def target(corpus: Corpus, i: int, name: str) -> bytes | None:
    """What the corpus has of sample `i` beside the sample itself, to be learned: "mask", the file of a mask. None where it has
    some, but not of this sample.

    Raises:
        ValueError: it has none; the message says which corpora have.
    """
    if not hasattr(corpus, "target"):
        raise ValueError(f"{corpus.spec}: has no {name} of any sample; give masks:FOLDER, or a corpus that has some")
    found: bytes | None = corpus.target(i, name)
    return found


def has_target(corpus: Corpus, i: int, name: str) -> bool:
    """Whether `target` gives something; nothing is read."""
    return hasattr(corpus, "has_target") and corpus.has_target(i, name)


def in_words(kinds: Mapping[str, int]) -> str:
    """`.txt files (1,200), hidden files and folders (3)`: the counts of `passed_over`, of eight kinds at most."""
    some = [f"{kind} ({count:,})" for kind, count in kinds.items()]
    return ", ".join([*some[:8], *([f"{len(some) - 8} other kinds"] if len(some) > 8 else [])])

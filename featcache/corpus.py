"""Corpora: sized, ordered, random-access collections of encoded images."""

import os
import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from featcache.plugins import load_plugin, plugin_names, suggest


@runtime_checkable
class Corpus(Protocol):
    """What stage one and stage two need of a collection of images."""

    spec: str
    """What `open_corpus` was given."""
    ids: Sequence[str]
    """One unique, stable id a sample, in row order."""
    class_names: Sequence[str] | None
    """Name of each label, or None without labels."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes:
        """The encoded image file of sample `i`."""

    def label(self, i: int) -> int:
        """Index into `class_names`, or -1."""


def open_corpus(spec: str) -> Corpus:
    """Open a corpus by its spec.

    A spec is a directory or its URL, a `.csv` or `.parquet` manifest or its URL, or `SOURCE:REST` with a source
    from `featcache/corpora/`.

    Raises:
        ValueError: no such source or place, or no images in it; the message names the remedy.
    """
    source, rest = source_of(spec)
    known = plugin_names("featcache.corpora")
    if source not in known:
        raise ValueError(
            f"{spec}: unknown kind of corpus {source!r} (for a folder with a colon in its name write ./{spec}); "
            f"{suggest(source, known)}"
        )
    return load_plugin("featcache.corpora", source).open_corpus(rest)


def source_of(spec: str) -> tuple[str, str]:
    """The source from `featcache/corpora/` that a spec names, and what that source is to open."""
    match = re.match(r"([a-z][a-z0-9_]+):(?!//)(.+)", str(spec))
    is_manifest = str(spec).lower().endswith((".csv", ".parquet")) and not os.path.isdir(spec)
    return (match[1], match[2]) if match else ("manifest" if is_manifest else "folder", str(spec))

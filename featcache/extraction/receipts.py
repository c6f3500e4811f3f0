"""Receipts: by them a repeated `featcache extract` knows, from file times alone, that there is nothing to do.

A receipt is kept under $FEATCACHE_HOME/receipts for every finished command. It marks how every file stood that the
result depends on: the corpus, the teacher's weights, the store. Whatever cannot be marked or differs in the least
means that there is no receipt, and the whole check is made: the weights and images hashed, the store read.

Like git's index, a receipt distrusts young times: a file that changed so shortly before it was marked that another
change may bear the same time is compared by content. Nothing here imports PyTorch or Zarr.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from featcache.corpora import source_of
from featcache.disk.durable import whole_file
from featcache.disk.home import cache_home, found_under
from featcache.disk.urls import is_url
from featcache.plugins import load_plugin, plugin_names
from featcache.specs import names_code

YOUNG_NS = 2_000_000_000
"""No file system in use records times more coarsely."""
_PACKAGES = (
    "featcache",
    "torch",
    "timm",
    "open_clip_torch",
    "onnxruntime",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "pillow",
    "pillow-heif",
    "scikit-learn",
)
_ENVIRONMENT = (
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "TIMM_USE_OLD_CACHE", "FEATCACHE_MAX_PIXELS",
)  # fmt: skip
log = logging.getLogger("featcache")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".npz")


class Mark(NamedTuple):
    """How files stood: when they were looked at, in ns since 1970, and a digest over name, size and times of each, and over
    the content of those that were young then."""

    taken: int
    digest: str

    @classmethod
    def of(cls, files: Iterable[str], taken: int | None = None) -> "Mark":
        taken = time.time_ns() if taken is None else taken
        digest = hashlib.blake2b(digest_size=16)
        for path in files:
            digest.update(f"\0{path}\0".encode("utf-8", "surrogateescape"))
            try:
                stat = os.stat(path)
            except FileNotFoundError:
                digest.update(b"missing")
                continue
            digest.update(f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}".encode())
            if max(stat.st_mtime_ns, stat.st_ctime_ns) >= taken - YOUNG_NS:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "blake2b").digest())
        return cls(taken, digest.hexdigest())

    def holds(self, files: Iterable[str] | None) -> bool:
        """Whether they stand as they did."""
        return files is not None and Mark.of(files, self.taken) == self


@dataclass(frozen=True)
class Watch:
    """How the files that a command reads stood before it read them.

    Attributes:
        request: what was asked for.
        began: when, in ns since 1970.
        corpus, code: marks of the corpus's files, and of this package's own.
        teachers: by spec, mark and names of the teacher's files, where it says them; hub models are named by their libraries.
    """

    request: dict[str, Any]
    began: int
    corpus: Mark
    code: Mark
    teachers: dict[str, tuple[Mark, list[str]]]


def recall(request: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The summaries of the stores that this very request made, if nothing that they depend on has changed since.

    Args:
        request: plain values; "corpus" is a corpus spec, "teachers" a list of encoder specs, the rest is whatever
            else tells one result from another. Paths may be relative: a receipt holds for one working directory.

    Returns:
        As given to `remember`, with "reused" true; None when that is not certain.
    """
    try:
        receipt = json.loads(_place(request).read_text(encoding="utf-8"))
        whole = (
            receipt["software"] == _software()
            and Mark(*receipt["code"]).holds(_code_files())
            and all(Mark(*mark).holds(files) for mark, files in receipt["teachers"])
            and all(Mark(*each["mark"]).holds(_store_files(each["store"])) for each in receipt["stores"])
            and Mark(*receipt["corpus"]).holds(_corpus_files(request["corpus"]))
        )
        return [each["summary"] for each in receipt["stores"]] if whole else None
    except (OSError, ValueError, KeyError, TypeError):  # no receipt, or a damaged one
        return None


def watch(request: Mapping[str, Any]) -> Watch | None:
    """Mark what `request` (see `recall`) is about to read; None when not all of it is files on this machine."""
    began = time.time_ns()
    try:
        files = _corpus_files(request["corpus"])
        if files is None or any(_teacher_library(spec) is None for spec in request["teachers"]):
            return None
        named = {spec: _named_files(spec) for spec in request["teachers"]}
        teachers = {spec: (Mark.of(paths), paths) for spec, paths in named.items() if paths}
        return Watch(dict(request), began, Mark.of(files), Mark.of(_code_files()), teachers)
    except (OSError, ValueError):  # the extraction itself will say what is wrong
        return None


def remember(watched: Watch | None, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Keep the receipt of a finished request; where one would not be certain, keep none.

    Args:
        watched: of the request, from before anything was read.
        summaries: one for each store: "store" its path, "reused" whether it was complete before, and other plain values.
    """
    if watched is None or any(is_url(summary["store"]) for summary in summaries):
        return
    with contextlib.suppress(OSError):  # the stores are finished, with a receipt or without
        place = _place(watched.request)
        place.unlink(missing_ok=True)
        teachers = dict(watched.teachers)
        for spec in watched.request["teachers"]:
            if spec not in teachers:
                files = _hub_files(spec, watched.began)
                if files is None:
                    return
                teachers[spec] = Mark.of(files), files
        stores = []
        for summary in summaries:
            path = os.path.abspath(summary["store"])
            if not os.path.isfile(os.path.join(path, "zarr.json")):  # it is at a URL
                return
            files = _store_files(path)
            # A store that was only checked must not have changed since the check may have begun.
            if summary["reused"] and any(_changed(file) >= watched.began - YOUNG_NS for file in files):
                return
            stores.append({"store": path, "mark": Mark.of(files), "summary": {**summary, "reused": True}})
        receipt = {
            "request": watched.request,
            "software": _software(),
            "code": watched.code,
            "corpus": watched.corpus,
            "teachers": list(teachers.values()),
            "stores": stores,
        }
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place) as file:
            file.write(json.dumps(receipt).encode())


def void(store: str | os.PathLike[str]) -> None:
    """Forget every receipt for the store at this path: it is damaged, or gone."""
    for receipt in found_under(cache_home() / "receipts", "*.json"):
        try:
            paths = [each["store"] for each in json.loads(receipt.read_text(encoding="utf-8"))["stores"]]
        except (OSError, ValueError, KeyError, TypeError):
            paths = []
        if not paths or os.path.realpath(store) in map(os.path.realpath, paths):
            try:
                receipt.unlink(missing_ok=True)
            except OSError as error:
                log.warning(
                    "%s: cannot be deleted (%s): `featcache extract` may take the store for whole",
                    receipt,
                    error.strerror,
                )


def _place(request: Mapping[str, Any]) -> Path:
    """The receipt's file, named by the request and by what else decides which files it means."""
    means = [dict(request), os.getcwd(), sys.prefix, {name: os.environ.get(name) for name in _ENVIRONMENT}]
    digest = hashlib.blake2b(json.dumps(means, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_home() / "receipts" / f"{digest}.json"


def _changed(path: str) -> int:
    """When a file last changed, in ns since 1970."""
    stat = os.stat(path)
    return max(stat.st_mtime_ns, stat.st_ctime_ns)


# -- what is marked ---------------------------------------------------------------------------------------


def _software() -> dict[str, Any]:
    """What computes, but for its own code: versions, and other people's plugins."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    plugins = [str(entry) for group in ("corpora", "models") for entry in entry_points(group=f"featcache.{group}")]
    return {"versions": versions, "plugins": sorted(plugins)}


def _code_files() -> list[str]:
    """This package's own: in a checkout they change and the version does not."""
    return sorted(str(path) for path in Path(__file__).parents[1].rglob("*.py"))


def _store_files(path: str) -> list[str]:
    """Every file of a store."""
    return sorted(os.path.join(directory, name) for directory, _, names in os.walk(path) for name in names)


def _corpus_files(spec: str) -> list[str] | None:
    """The files that a corpus consists of, in its order; None when they are not local, or not known to be all.

    Raises:
        ValueError: the corpus cannot be opened.
    """
    source, rest = source_of(spec)
    if source not in plugin_names("featcache.corpora"):
        return None
    plugin = load_plugin("featcache.corpora", source)
    if plugin.__name__ != f"featcache.corpora.{source}":  # somebody else's, whose code is not watched
        return None
    files: list[str] | None = plugin.named_files(rest) if hasattr(plugin, "named_files") else None
    return files


def _teacher_library(spec: str) -> tuple[ModuleType, str] | None:
    """The library of an encoder's spec, if it is one of ours whose weights are files, and the rest of the spec."""
    match = re.fullmatch(r"([\w-]+)[/:](.+)", spec)
    source = match[1].replace("-", "_") if match else ""
    if not match or names_code(spec) or source not in plugin_names("featcache.models"):
        return None
    if any(entry.name == source for entry in entry_points(group="featcache.models")):
        return None
    library = load_plugin("featcache.models", source)
    return (library, match[2]) if hasattr(library, "named_files") else None


def _named_files(spec: str) -> list[str] | None:
    """The files that a teacher's spec names; None when it names a model on a hub.

    Raises:
        ValueError: it has an option that there is not.
    """
    found = _teacher_library(spec)
    return found[0].named_files(found[1]) if found else None


def _hub_files(spec: str, began: int) -> list[str] | None:
    """The hub's local files of a teacher that has been loaded since `began`; None when they cannot be told.

    The hub's cache never changes a file in place: a new revision is a new folder, and `refs/main` says which one holds.
    """
    try:
        found = _teacher_library(spec)
        repository = found[0].hub_repository(found[1]) if found and hasattr(found[0], "hub_repository") else ""
    except Exception:  # whatever their libraries raise, the files cannot be told
        return None
    if not repository or "@" in repository:
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    reference = folder / "refs" / "main"
    if not reference.is_file():
        return None
    moved_meanwhile = _changed(str(reference)) >= began - YOUNG_NS and len(list(folder.glob("snapshots/*"))) > 1
    snapshot = sorted(str(file) for file in (folder / "snapshots" / reference.read_text().strip()).rglob("*"))
    if moved_meanwhile or not any(file.endswith(_WEIGHTS) for file in snapshot):
        return None
    return [str(reference), *(file for file in snapshot if os.path.isfile(file))]

"""Results that were measured before: read back where all that they follow from is as it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import evalsuite
import featcache
from evalsuite.evaluators import Evaluator, inputs
from evalsuite.result import Result, versions, whole_file


def measured(evaluator: Evaluator, path: str | os.PathLike[str]) -> Result:
    """The result in the file `path`, where it is the one that `evaluator` would measure; else it is measured, and written.

    A result follows from its stores' digests, the options and the files that they name, and from the code: this package's and
    featcache's, versions of others. All this is kept beside the result (of `r.json` in r.inputs), with the digest of the
    result itself: one that somebody else wrote there since is measured again.

    Args:
        evaluator: its stores are sealed ones, open or named by their paths.

    Raises:
        ValueError: as `evaluator.run` and `Result.write`.
    """
    target = Path(path)
    beside, now = target.with_suffix(".inputs"), json.loads(json.dumps(made_of(evaluator)))
    try:
        kept = json.loads(beside.read_text(encoding="utf-8"))
        if kept == {"made_of": now, "result": _digest([target])}:
            return Result.read(target)
    except (OSError, ValueError):  # never measured, or damaged
        pass
    result = evaluator.run()
    result.write(target)
    with whole_file(beside) as file:
        file.write((json.dumps({"made_of": now, "result": _digest([target])}, indent=2) + "\n").encode())
    return result


def made_of(evaluator: Evaluator) -> dict[str, Any]:
    """All that the evaluator's result follows from, as plain values."""
    given = {each.name: getattr(evaluator, each.name) for each in fields(evaluator)}  # type: ignore[arg-type]
    stores = {name: _stores(given.pop(name)) for name in inputs(type(evaluator))}
    words = {word for text in _texts(given) for word in re.split(r"[:=,]", text)}
    # A head, one within the spec of a detector (mcm:text=names.npy), or what a folder has of qrels (beir:FOLDER:dev).
    folders = [Path(word) for word in words if os.path.isdir(word)]
    qrels = [str(file) for folder in folders for file in (*folder.glob("qrels/*.tsv"), *folder.glob("qrels*.tsv"))]
    named = sorted({*filter(os.path.isfile, words), *qrels})
    plugins = entry_points(group="evalsuite.detectors")
    return {
        "evaluator": type(evaluator).__module__,
        "stores": stores,
        "options": {
            name: value if isinstance(value, int | float | None) else repr(value) for name, value in given.items()
        },
        "files": {name: _digest([Path(name)]) for name in named},
        "code": _code(),
        "versions": versions("faiss-cpu", "faiss-gpu", "torch"),
        "plugins": sorted(f"{each} {each.dist.version if each.dist else ''}" for each in plugins),
    }


def _stores(given: Any) -> Any:
    """Path and digest of a store, or of several by name."""
    if given is None:
        return None
    if isinstance(given, dict):
        return {name: _stores(each) for name, each in given.items()}
    store = featcache.open_store(given) if isinstance(given, str | os.PathLike) else given
    return [str(store.path), store.digest]


def _texts(given: Any) -> Iterable[str]:
    if isinstance(given, str | os.PathLike):
        yield os.fspath(given)
    elif isinstance(given, dict | list | tuple):
        for each in given.values() if isinstance(given, dict) else given:
            yield from _texts(each)


@cache
def _code() -> str:
    """In a checkout the code changes, and the version does not."""
    packages = (Path(str(package.__file__)).parent for package in (evalsuite, featcache))
    return _digest(sorted(file for package in packages for file in package.rglob("*.py")))


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()

"""One precision for each encoder and kind of machine: chosen once, kept under $FEATCACHE_HOME/precision.

Every later store of the encoder takes it, whatever the load of the machine then; to have it chosen anew, delete the
file. The stores that are known already come first: where there are some, nothing is measured.
"""

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock

from featcache.disk.durable import whole_file
from featcache.disk.home import cache_home
from featcache.store.comparable import NAMES, exact_name
from featcache.store.index import recorded_extractions

log = logging.getLogger("featcache")
MEASURED = "measured, once for this encoder on this kind of machine"


def settle(
    fingerprint: str, machine: str, requested: str, measure: Callable[[], str], *, keep: bool = True
) -> tuple[str, str]:
    """The precision of an encoder's new store on this kind of machine, and why, in words.

    Args:
        fingerprint: the encoder's.
        machine: as `machine_kind` names it.
        requested: "auto", or a precision, for this store alone unless it is the first.
        measure: finds the precision for an encoder that has none yet; one process at a time does.
        keep: for later stores; else nothing is written.

    Raises:
        ValueError: an unknown precision.
    """
    asked = None if requested == "auto" else exact_name(requested)
    place = _place(fingerprint, machine)
    if not keep:
        found = _read(place, mend=False) or _of_known_stores(fingerprint, machine)
        if not (found or asked):
            return measure(), MEASURED
    elif (found := _read(place)) is None:
        with contextlib.ExitStack() as held:
            refused = None
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(filelock.FileLock(f"{place}.lock"))
            except (OSError, NotImplementedError) as error:  # a disk without locks, too
                refused = error
            found = _read(place) or _of_known_stores(fingerprint, machine)
            chosen = found or asked or (measure() if refused is None else None)
            try:
                if chosen and refused is None:
                    _write(place, {"precision": chosen, "machine": machine, "encoder": fingerprint})
            except OSError as error:
                refused = error
            if not (found or asked):
                if chosen and refused is None:
                    return chosen, MEASURED
                log.warning(
                    "%s cannot be written (%s): a precision that is measured could not be kept for later stores, so it is "
                    "fp32; make it writable, set FEATCACHE_HOME, or give --precision",
                    place.parent,
                    refused,
                )
                return "fp32", "exact"
    return (asked, "as asked for") if asked else (str(found), "as in this encoder's other stores")


def _place(fingerprint: str, machine: str) -> Path:
    name = hashlib.blake2b(f"{fingerprint}\0{machine}".encode(), digest_size=16).hexdigest()
    return cache_home() / "precision" / f"{name}.json"


def _read(place: Path, mend: bool = True) -> str | None:
    try:
        name = json.loads(place.read_text())["precision"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if name not in NAMES:
        log.warning("%s: damaged; the precision is chosen anew", place)
        with contextlib.suppress(OSError):
            if mend:
                place.unlink()
        return None
    return str(name)


def _of_known_stores(fingerprint: str, machine: str) -> str | None:
    """What most rows of the encoder's known stores were made in on this kind of machine."""
    rows: Counter[str] = Counter()
    device = "cpu" if machine.startswith("cpu ") else "cuda"
    for made, count in recorded_extractions(fingerprint):
        same = made.machine == machine if made.machine else made.device == device
        if same and made.precision in NAMES:
            rows[made.precision] += count
    return min(rows, key=lambda name: (-rows[name], name)) if rows else None


def _write(place: Path, record: Mapping[str, Any]) -> None:
    with whole_file(place) as file:
        file.write(json.dumps(record).encode())

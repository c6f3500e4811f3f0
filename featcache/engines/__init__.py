"""Engines: where the units of an extraction are computed. What is written does not depend on it, byte for byte.

A plugin is a file with `open_engine(rest_of_spec) -> Engine`; others join through the entry-point group
`featcache.engines`. Nothing here imports PyTorch.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from featcache.plugins import load_plugin


@dataclass(frozen=True, kw_only=True)
class Report:
    """What has become of some more samples; an engine may hand on several as one.

    Attributes:
        rows: samples that were read, for every teacher.
        batches: completed ones, of some teacher.
        reused: those of them found in another store by the content of their image.
        failures: "ID: REASON" of each whose image could not be read.
        wait, encode, write: seconds spent waiting for pixels, in the encoder, and writing and syncing chunks.
        tails: by store and file, the checksums that the chunks of finished units end with: sealing need not read them.
    """

    rows: int = 0
    batches: int = 0
    reused: int = 0
    failures: tuple[str, ...] = ()
    wait: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    tails: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)


@runtime_checkable
class Work(Protocol):
    """What is to be done with spans, each a range of rows that holds whole units of every store.

    Pickled it is specs and paths, without a model or an open file; it is opened where it is first called.
    """

    def __call__(self, spans: Iterable[range]) -> Generator[Report, None, None]:
        """Compute and write spans, one after the other, and report after every batch and failure. Closed, it saves what it
        has."""


class Engine:
    """Computes spans, here or elsewhere.

    Attributes:
        in_order: all spans are computed by one worker, in their order. Then a unit in progress is saved when the run is
            interrupted, and gone on with; otherwise it is made again.
    """

    in_order = False

    def map(self, spans: Sequence[range], work: Work) -> Generator[Report, None, None]:
        """Have `work` done for every span once, in any order; closed, it stops. What `work` raises it raises.

        A span that a worker was lost over is given to another: units are written whole, and their bytes are the same.
        """
        raise NotImplementedError


def open_engine(spec: str) -> Engine:
    """The engine of a spec, `NAME` or `NAME:REST`.

    Raises:
        ValueError: no such engine; the message has all.
    """
    name, _, rest = spec.partition(":")
    engine: Engine = load_plugin("featcache.engines", name).open_engine(rest)
    return engine

"""`local`: this process, one span after the other."""

from collections.abc import Generator, Sequence

from featcache.engines import Engine, Report, Work


class Local(Engine):
    """All spans in one call: images of the next are read while the last is encoded."""

    in_order = True

    def map(self, spans: Sequence[range], work: Work) -> Generator[Report, None, None]:
        return work(spans)


def open_engine(rest: str) -> Engine:
    if rest:
        raise ValueError(f"engine local:{rest}: takes no options")
    return Local()

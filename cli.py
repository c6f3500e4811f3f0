"""The three programs: `featcache`, `distill`, `evalsuite`; what they do is in `commands/`."""

from commands import distill, evalsuite, featcache
from commands.screen import run

APPS = {"featcache": featcache.app, "distill": distill.app, "evalsuite": evalsuite.app}


def run_featcache() -> None:
    run(featcache.app)


def run_distill() -> None:
    run(distill.app)


def run_evalsuite() -> None:
    run(evalsuite.app)

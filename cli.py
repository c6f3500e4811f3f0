"""The three programs: `featcache`, `distill`, `evalsuite`; what they do is in `featcache_cli/`."""

import sys

from featcache_cli import distill, evalsuite, featcache
from featcache_cli.screen import run

APPS = {"featcache": featcache.app, "distill": distill.app, "evalsuite": evalsuite.app}


def run_featcache() -> None:
    run(featcache.app)


def run_distill() -> None:
    run(distill.app)


def run_evalsuite() -> None:
    run(evalsuite.app)


if __name__ == "__main__":  # from a checkout: python cli.py featcache …
    if sys.argv[1:2] == [] or sys.argv[1] not in APPS:
        sys.exit(f"python cli.py PROGRAM …: one of {', '.join(APPS)}")
    program = sys.argv.pop(1)
    sys.argv[0] = program
    run(APPS[program])

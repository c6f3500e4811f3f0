"""The three programs, `featcache`, `distill` and `evalsuite`, as they are installed and as `cli.py` starts them."""

import sys

from featcache_cli import demo, distill, evalsuite, featcache
from featcache_cli.screen import run

APPS = {"featcache": featcache.app, "distill": distill.app, "evalsuite": evalsuite.app}
featcache.app.command()(demo.demo)  # here, above all three: it runs commands of each


def run_featcache() -> None:
    run(featcache.app)


def run_distill() -> None:
    run(distill.app)


def run_evalsuite() -> None:
    run(evalsuite.app)


def run_named() -> None:
    """The program that the first argument names."""
    if sys.argv[1:2] == [] or sys.argv[1] not in APPS:
        sys.exit(f"python cli.py PROGRAM …: one of {', '.join(APPS)}")
    program = sys.argv.pop(1)
    sys.argv[0] = program
    run(APPS[program])

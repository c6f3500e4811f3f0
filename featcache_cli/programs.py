"""The three programs, `featcache`, `distill` and `evalsuite`, as they are installed and as `cli.py` starts them."""

import importlib
import sys

import typer

from featcache_cli.screen import run

NAMES = ("featcache", "distill", "evalsuite")


def app(program: str) -> typer.Typer:
    """Its commands; the other two programs' are not imported."""
    found: typer.Typer = importlib.import_module(f"featcache_cli.{program}").app
    return found


def run_featcache() -> None:
    run(app("featcache"))


def run_distill() -> None:
    run(app("distill"))


def run_evalsuite() -> None:
    run(app("evalsuite"))


def run_named() -> None:
    """The program that the first argument names."""
    if sys.argv[1:2] == [] or sys.argv[1] not in NAMES:
        sys.exit(f"python cli.py PROGRAM …: one of {', '.join(NAMES)}")
    sys.argv[0] = sys.argv.pop(1)
    run(app(sys.argv[0]))

"""`distill ls` and `distill watch`: runs beside each other, and while they train."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from featcache_cli.screen import Json, duration, make_table, printable, results, screen, shown, write_json

if TYPE_CHECKING:
    from distill.training.runs import RunState

BLOCKS = "▁▂▃▄▅▆▇█"
WIDEST = 24
"""Of a curve, characters."""
COLOURS = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red", "damaged": "red"}
COLUMNS: dict[str, Callable[["RunState"], Any]] = {
    "run": lambda run: str(run.path),
    "state": lambda run: run.state,
    "method": lambda run: run.method,
    "student": lambda run: run.student,
    "epochs": lambda run: run.epochs,
    "seed": lambda run: run.seed,
    "parameters": lambda run: run.parameters,
    "loss": lambda run: run.loss,
}
"""What `--sort` goes by besides held-out figures: ascending."""

Folders = Annotated[
    list[str] | None,
    typer.Argument(metavar="FOLDER…", help="Runs, or folders of runs.", show_default="the working folder"),
]


def ls(
    folders: Folders = None,
    sort: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help=f"One of {', '.join(COLUMNS)}, or a held-out figure (gram_pearson, top1 …), of which the best comes first.",
        ),
    ] = "run",
    to_json: Json = None,
) -> None:
    """The runs there are: method, student, epochs, where each stands, and what it measured on held-out samples.

    [dim]distill ls runs/[/dim]
    [dim]distill ls runs/ sweeps/ --sort gram_pearson --json runs.json[/dim]
    """
    from distill.training.runs import runs

    found = _sorted(runs(*(folders or ())), sort)
    if not found:
        where = ", ".join(folders or ["here"])
        screen.print(f"no runs in {shown(where)}; `distill fit --out FOLDER` makes one")
    elif to_json != "-":
        results.print(_listed(found))
    write_json({"command": "ls", "runs": [run.to_json() for run in found]}, to_json)


def watch(
    folders: Folders = None,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How often to look.")] = 2.0,
    to_json: Json = None,
) -> None:
    """The curves of runs while they train: loss, held-out figures, time left. Ends when none is running any more.

    On a terminal one table that is redrawn; through a pipe a line for each epoch. Exit code 1 where one did not finish.
    `tensorboard --logdir FOLDER` shows the same in a browser.

    [dim]distill watch runs/a[/dim]
    [dim]distill watch runs/ --every 10 | tee curves.txt[/dim]
    """
    from distill.training.runs import watch as watched

    screen.print(
        f"the same curves in a browser: tensorboard --logdir {shown(' '.join(folders or ['.']))}", highlight=False
    )
    looked = watched(*(folders or ()), every=every)
    out = screen if to_json == "-" else results
    now = _redrawn(looked, out) if out.is_terminal else _told(looked, out)
    write_json({"command": "watch", "runs": [run.to_json() for run in now]}, to_json)
    if any(run.state != "finished" for run in now):
        raise typer.Exit(1)


def _redrawn(looked: Iterator[list["RunState"]], out: Any) -> list["RunState"]:
    """One table, until there is nothing more to see; the runs as they then are."""
    now: list[RunState] = []
    with Live(console=out, auto_refresh=False) as live:
        for now in looked:
            live.update(_curves(now), refresh=True)
    return now


def _told(looked: Iterator[list["RunState"]], out: Any) -> list["RunState"]:
    """A line for each epoch, and one for how a run ends."""
    told: dict[Any, int] = {}
    now: list[RunState] = []
    for now in looked:
        for run in now:
            epochs = [record for record in run.records if "epoch" in record]
            for record in epochs[told.get(run.path, 0) :]:
                figures = {key.partition("/")[2]: value for key, value in record.items() if key.startswith("holdout/")}
                parts = [f"epoch {record['epoch']}/{run.epochs}", f"loss {number(record['loss'])}", *_named(figures)]
                if record is epochs[-1] and run.seconds_left is not None:
                    parts.append(f"{duration(run.seconds_left)} left")
                _line(out, run, " · ".join(parts))
            told[run.path] = len(epochs)
    for run in now:
        _line(out, run, " · ".join(filter(None, [run.state, f"{run.done} of {run.epochs} epochs", run.reason])))
    return now


def _line(out: Any, run: "RunState", text: str) -> None:
    out.print(printable(f"{run.path}: {text}"), highlight=False, markup=False, soft_wrap=True)


def _curves(now: Sequence["RunState"]) -> Table:
    figures = list(dict.fromkeys(name for run in now for name in run.held_out))
    table = make_table("", "run", "state", "epoch", "left", "loss", *figures)
    for run in now:
        left = "" if run.seconds_left is None else duration(run.seconds_left)
        cells = [_curve(run.curve("loss")), *(_curve(run.curve(f"holdout/{name}")) for name in figures)]
        table.add_row(shown(run.path), _state(run), f"{run.done}/{run.epochs}", left, *cells)
    return table


def _curve(values: Sequence[float]) -> str:
    return f"{spark(values)} {number(values[-1])}" if values else ""


def spark(values: Sequence[float], width: int = WIDEST) -> str:
    """A curve as blocks, the least value the lowest; of more values than `width`, the mean of as many equal parts."""
    if len(values) > width:
        ends = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    finite = [value for value in values if math.isfinite(value)]
    least, span = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    heights = (round((value - least) / span * (len(BLOCKS) - 1)) if span else 0 for value in finite)
    drawn = iter([BLOCKS[height] for height in heights])
    return "".join(next(drawn) if math.isfinite(value) else "?" for value in values)


def _listed(found: Sequence["RunState"]) -> Table:
    figures = list(dict.fromkeys(name for run in found for name in run.held_out))
    table = make_table("", "run", "state", "method", "student", "epochs", "seed", "params", "loss", *figures)
    for run in found:
        table.add_row(
            shown(run.path), _state(run), shown(run.method or ""), shown(run.student or ""),
            f"{run.done}/{run.epochs}" if run.epochs else "", "" if run.seed is None else str(run.seed),
            f"{run.parameters / 1e6:.2f} M" if run.parameters else "", "" if run.loss is None else number(run.loss),
            *(number(run.held_out[name]) if name in run.held_out else "" for name in figures),
        )  # fmt: skip
    return table


def _state(run: "RunState") -> str:
    why = f": {shown(run.reason)}" if run.reason else ""
    return f"[{COLOURS[run.state]}]{run.state}[/]{why}"


def _named(figures: dict[str, float]) -> list[str]:
    return [", ".join(f"{name} {number(value)}" for name, value in figures.items())] if figures else []


def number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def _sorted(found: Sequence["RunState"], key: str) -> list["RunState"]:
    """Runs that lack it come last. Raises ValueError where none has it."""
    figures = {name for run in found for name in run.held_out}
    if key not in COLUMNS and key not in figures and found:
        raise ValueError(f"--sort {key}: no such column; known: {', '.join([*COLUMNS, *sorted(figures)])}")
    of: Callable[[RunState], Any] = COLUMNS.get(key) or (lambda run: run.held_out.get(key))
    known = [run for run in found if of(run) is not None]
    best_first = key not in COLUMNS and key != "nll"
    return [*sorted(known, key=of, reverse=best_first), *(run for run in found if of(run) is None)]

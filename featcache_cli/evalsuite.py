"""`evalsuite`: a command for each evaluator, made of what the evaluator says of itself; and those about results."""

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from evalsuite import evaluators
from featcache_cli import detector
from featcache_cli.flags import parameter, parameters, takes, values
from featcache_cli.result_tables import show
from featcache_cli.screen import (
    DryRun,
    Json,
    ListsPlugins,
    bar,
    numbered,
    program,
    screen,
    shown,
    would,
    writable,
    write_json,
)


class _Evaluators(TyperGroup):
    """Every registered evaluator is a command; its file is imported when its name or its help is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        found = {name: self.get_command(ctx, name) for name in self._evaluators}
        usable = [name for name, command in found.items() if command is not None]
        return [*evaluators.in_order(usable), *(name for name in super().list_commands(ctx) if name not in usable)]

    @cached_property
    def _evaluators(self) -> list[str]:
        return evaluators.names()

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in self.commands and name in self._evaluators:
            try:
                self.add_command(_command(name), name)
            except Exception as error:  # of one; the others, and help on them, are none the worse
                warnings.warn(f"evaluator {name} cannot be used: {error}", RuntimeWarning, stacklevel=2)
        return super().get_command(ctx, name)


def _command(name: str) -> Any:
    evaluator = evaluators.load(name)
    info = CommandInfo(
        name=name,
        cls=ListsPlugins,
        callback=_callback(name, evaluator),
        help=f"{evaluator.summary}\n\n" + "\n".join(f"[dim]{line}[/dim]" for line in evaluator.examples),
        epilog=evaluator.below_help(),
    )
    return get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode="rich")


app = program("evalsuite", "Evaluate teachers and students from their stores.", cls=_Evaluators)
app.add_typer(detector.app, name="detector")


def _callback(name: str, evaluator: type[evaluators.Evaluator]) -> Any:
    """What the command does."""
    flags = evaluators.flags(evaluator)
    reports = "progress" in {each.name for each in fields(evaluator)}  # type: ignore[arg-type]

    def run(dry_run: bool, to_json: str | None, **given: Any) -> None:
        made = evaluator(**values(evaluator, given))
        written, read = (
            [given[each] for each, flag in flags.items() if flag.file == kind] for kind in ("written", "read")
        )
        _keep_apart([*written, to_json], read)
        if dry_run:
            _would_measure(name, made, to_json)
            return
        if reports:
            with bar(name, evaluator.unit) as update:

                def progress(done: int, of: int, what: str = "") -> None:
                    update(done, of, what or evaluator.step(done, of))

                result = replace(made, progress=progress).run()  # type: ignore[type-var]
        else:
            with screen.status(evaluator.doing):
                result = made.run()
        show(result, to_json)

    return takes(
        run, [*parameters(evaluator), parameter("dry_run", DryRun, None, False), parameter("to_json", Json, None)]
    )


def _would_measure(name: str, made: evaluators.Evaluator, to_json: str | None) -> None:
    """The rows that it would read; what would be wrong with its options, or with its stores, is said as it would be."""
    found = made.look()
    for part, rows in found.items():
        failed = f", {rows.failed:,} failed ones left out" if rows.failed else ""
        screen.print(f"{shown(part)}: {len(rows):,} rows × {rows.embedding_dim}-d of {shown(rows.name)}{failed}")
    would(name, {"inputs": {part: rows.record() for part, rows in found.items()}}, to_json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A.json", help="A result that holds samples, as --json writes them.")],
    b: Annotated[str, typer.Argument(metavar="B.json", help="Another of the same command, on the same samples.")],
    resamples: Annotated[int, typer.Option(min=1, hidden=True, help="No effect.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, hidden=True, help="No effect.")] = 0,
    to_json: Json = None,
) -> None:
    """Is B better than A? The difference of every metric, with an interval over the samples that both have.

    [dim]evalsuite compare teacher-ood.json student-ood.json[/dim]
    """
    import evalsuite

    _keep_apart([to_json], [a, b])
    with screen.status("comparing"):
        result = evalsuite.compare(a, b, resamples=resamples, seed=seed)
    show(result, to_json)


@app.command()
def report(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RESULT.json …",
            help="Results of any command; NAME is shown for their encoder ('teacher' marks the teacher).",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PAGE.html", help="The page to write.", callback=writable)] = Path(
        "report.html"
    ),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Evaluation report",
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CORPUS",
            help="Show images of this corpus that the results are about, small; repeat for more. Stores that keep images "
            "(extract --pixels) need none.",
        ),
    ] = None,
    stores: Annotated[
        bool,
        typer.Option(help="Read the stores that results name, where they still are: classes, neighbours, kept images."),
    ] = True,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """One HTML page about results: tables, images, score histograms, ROC curves, maps. It needs no network.

    [dim]evalsuite report runs/*.json teacher=teacher.ood.json --images photos-test/ --out report.html[/dim]
    """
    import evalsuite

    names: dict[str, str] = {}
    paths = []
    for item in given:
        name, equals, path = item.partition("=")
        if equals and not os.path.exists(item):
            if not (name and path):
                raise typer.BadParameter(f"{item}: give RESULT.json or NAME=RESULT.json")
            if names.setdefault(path, name) != name:
                raise typer.BadParameter(f"{item}: {path} is called {names[path]} already; give each result one name")
        else:
            path = item
        paths.append(path)
    _keep_apart([out, to_json], paths)
    with bar("report", "images") as progress, tempfile.TemporaryDirectory() as nowhere:
        place = Path(nowhere) / "page.html" if dry_run else out
        page = evalsuite.report(
            paths, place, names=names, title=title, images=images or (), stores=stores, progress=progress
        )
        size = page.stat().st_size
    if dry_run:
        screen.print(f"would write {shown(out)}: {numbered(len(paths), 'result')}, {size / 1e6:.1f} MB")
        would("report", {"out": str(out), "results": paths, "bytes": size}, to_json)
        return
    screen.print(
        f"[green]written[/] {shown(page)}: {numbered(len(paths), 'result')}, {page.stat().st_size / 1e6:.1f} MB"
    )
    write_json({"command": "report", "out": str(page), "results": paths, "bytes": page.stat().st_size}, to_json)


def _keep_apart(written: Sequence[str | Path | None], read: Sequence[str | None]) -> None:
    """Before any work: no file to be written is one of the files to read, or another one to be written."""
    from evalsuite.result import refuse_inputs

    outputs = [str(path) for path in written if path is not None and str(path) != "-"]
    for number, path in enumerate(outputs):
        refuse_inputs(path, [*(each for each in read if each is not None), *outputs[:number]])

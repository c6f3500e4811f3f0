"""What all commands share: the consoles, common options, progress, tables, and how a command ends."""

import contextlib
import json
import logging
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from typer.core import TyperCommand, TyperGroup

# Without emoji: corrupted:fog:3 is a corpus, and :fog: no picture.
screen = Console(stderr=True, soft_wrap=True, emoji=False)  # progress and remarks, never wrapped; results go to stdout
results = Console(emoji=False)

NAMED_VERSIONS = ("torch", "zarr", "numpy", "timm", "open_clip_torch", "faiss-cpu", "faiss-gpu")
"""Distributions that `--version` tells of besides, where they are installed."""


def program(name: str, about: str, cls: type[TyperGroup] | None = None) -> typer.Typer:
    """One of the programs, yet without commands, but for those that `cls` finds."""
    app = typer.Typer(
        cls=cls, help=about, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich"
    )

    def tell(asked: bool) -> None:
        if asked:
            others = [f"{each} {found}" for each in NAMED_VERSIONS if (found := installed_version(each))]
            print(f"{name} {installed_version('featcache') or '(not installed: a checkout)'}")
            print(" · ".join([f"Python {platform.python_version()}", *others]))
            raise typer.Exit

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=tell, is_eager=True, help="Show versions and exit.")
        ] = False,
    ) -> None:
        pass

    return app


class ListsPlugins(TyperCommand):
    """A command in whose help `{featcache.corpora}` becomes the names registered there, and so of every kind of plugin."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for param in self.params:
            if text := getattr(param, "help", None):
                param.help = re.sub(r"\{(\w+\.\w+)\}", _names, text)  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def _names(group: re.Match[str]) -> str:
    from featcache.plugins import plugin_names

    names = plugin_names(group[1])
    return ", ".join(name.replace("_", "-") for name in names) if group[1] == INTERCHANGE else ", ".join(names)


INTERCHANGE = "featcache.interchange"
"""Whose names have a "-" for each "_"."""


def installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


class Device(StrEnum):
    auto, cpu, cuda = "auto", "cpu", "cuda"


def writable(option: typer.CallbackParam, path: Any) -> Any:
    """`path`, once it is known that a file can be made there: not only after all the work."""
    if path not in (None, "-"):
        from featcache.disk.refusals import require_writable

        require_writable(path, f"{option.opts[0]} path")
    return path


Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="PATH|-",
        help="Also write a machine-readable summary ('-': to stdout).",
        callback=writable,
    ),
]
DeviceOption = Annotated[Device, typer.Option(help="'auto' takes a GPU when there is one.")]


DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check it, say what would be done, and write nothing; with --json -, as JSON."),
]


def count_or_auto(text: str) -> int | None:
    """The value of an option `N|auto`; auto is None, the same as leaving the option out."""
    if text == "auto":
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) == 0:
        raise typer.BadParameter(f"{text}: give a whole number, 1 or more, or auto")
    return int(text)


Workers = Annotated[
    int | None,
    typer.Option(
        parser=count_or_auto,
        metavar="N|auto",
        help="Threads that read, decode and resize.",
        show_default="auto: one a core",
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Let MODULE:CALLABLE run that a run folder or a file names: whose code you know."
    ),
]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="A feature store (…​.zarr), or its URL.")]
"""Paths that may be URLs are strings: pathlib would make s3:/bucket of s3://bucket."""


def printable(text: object) -> str:
    """Text from data, such as a sample's id, on one line: line breaks, control characters and the like are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown(text: object) -> str:
    """`printable`, for the consoles: no part of it is markup."""
    return escape(printable(text))


@contextmanager
def bar(description: str, unit: str) -> Iterator[Callable[..., None]]:
    """Progress with count and ETA; yields update(done, total, remark, description).

    A live bar on a terminal; elsewhere (a log file, a cluster) a line every 30 seconds.
    """
    began = said = time.monotonic()
    whole = Column(no_wrap=True)
    columns = (  # on a narrow screen the remark is cut, then the description and the bar get short; count and ETA stay
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=24)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8, max_width=40)),
        TextColumn("{task.fields[count]}", table_column=whole),
        TimeRemainingColumn(table_column=whole),
        TextColumn("{task.fields[remark]}", table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=screen, transient=True, expand=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(description, total=None, remark="", count="")  # of what, nobody knows yet

        def update(done: int, total: int, remark: str = "", now: str = description) -> None:
            nonlocal said
            count = f"{done:{len(str(total))}}/{total} {unit} ETA"
            progress.update(task, completed=done, total=total, remark=remark, description=now, count=count)
            if not screen.is_terminal and time.monotonic() - said > 30:
                said = time.monotonic()
                eta = (said - began) * (total - done) / max(done, 1)
                parts = [f"{now} {done:,}/{total:,} {unit}", remark, f"ETA {eta:,.0f} s"]
                screen.print(" · ".join(filter(None, parts)), highlight=False)

        yield update


def make_table(title: str, *columns: str) -> Table:
    table = Table(title=shown(title) or None, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or len(columns) == 2 else "right", overflow="fold")
    return table


def rows_and_failed(store: Any) -> str:
    return counted(len(store), len(store.failed))


def numbered(count: int, one: str, many: str = "") -> str:
    return f"{f'{count:,}' if count else 'no'} {one if count == 1 else many or f'{one}s'}"


def rate(a_second: float) -> str:
    """Of a slow encoder too, never 0: `1,234`, `12`, `3.4`, `0.021`."""
    return f"{a_second:,.0f}" if a_second >= 9.95 else f"{a_second:.2g}"


def duration(seconds: float) -> str:
    """Such as `40 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for size, unit, until in ((1, "s", 120), (60, "min", 7200), (3600, "h", 172_800)):
        if seconds < until:
            return f"{rate(seconds / size)} {unit}"
    return f"{rate(seconds / 86_400)} days"


def counted(rows: int, failed: int, where: str = "`featcache info` lists them") -> str:
    return numbered(rows, "row") + (f", [yellow]{failed:,} failed[/] ({where})" if failed else "")


def store_summary(store: Any) -> dict[str, Any]:
    counts = {"rows": len(store), "ok": len(store.ok), "failed": len(store.failed), "reasons": store.reasons}
    return {
        **counts,
        "corpus": store.manifest.corpus.spec,
        "encoder": store.encoder_name,
        "fingerprint": store.fingerprint,
        "extraction": store.manifest.extraction.to_json(),
    }


def write_json(summary: dict[str, Any], to: str | None) -> None:
    text = json.dumps(_strict(summary), indent=2, ensure_ascii=False, allow_nan=False)
    if to == "-":
        print(text)
    elif to:
        write_whole(to, text + "\n")


def _strict(value: Any) -> Any:
    """With null for NaN and infinities, which JSON has no numbers for."""
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def would(command: str, plan: dict[str, Any], to_json: str | None) -> None:
    """The end of a dry run, which writes no file."""
    screen.print("[bold]dry run[/]: nothing was written", highlight=False)
    if to_json == "-":
        write_json({"command": command, "dry_run": True, **plan}, to_json)


def write_whole(path: str | Path, text: str) -> None:
    """A file that appears whole, in a folder that is made; where a link stands, what it leads to."""
    from featcache.disk.durable import whole_file
    from featcache.disk.refusals import destination

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(destination(path)) as file:
        file.write(text.encode())


def _one_line(message: object) -> str:
    return printable(" ".join(str(message).split()))


def _warning_line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {_one_line(message)}\n"


class _LogLine(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return _one_line(record.message)


def _signal_of(error: BaseException | None) -> int:
    """Number of the signal whose `Stopped` led to this error; 0 for none."""
    while error:
        if number := getattr(error, "signal", 0):
            return int(number)
        error = error.__cause__ or error.__context__
    return 0


def run(app: typer.Typer) -> None:
    """Exit code 0 ok · 1 the run failed · 2 wrong usage · 130 interrupted, 143 by SIGTERM, 129 by SIGHUP; one line instead
    of a traceback, and for a warning. With FEATCACHE_DEBUG set, the traceback."""
    from featcache.stop import stoppable

    warnings.formatwarning = _warning_line
    handler = RichHandler(console=screen, show_path=False, show_time=False)
    handler.setFormatter(_LogLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not screen.is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a log has no use for them
    try:
        with stoppable():
            app()
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C, SIGTERM and SIGHUP
            number = _signal_of(ended)
            by = f"stopped by {signal.Signals(number).name}" if number else "interrupted"
            with contextlib.suppress(OSError):  # the terminal may be gone
                screen.print(
                    f"{by}; what is done is kept, the same command (`distill fit`: with --resume) goes on from there"
                )
            sys.exit(128 + number if number else 130)
        raise
    except Exception as error:
        if number := _signal_of(error):  # the closed terminal that it came from takes no last word
            sys.exit(128 + number)
        if os.environ.get("FEATCACHE_DEBUG"):
            raise
        kind, said = type(error).__name__, re.sub(r"^\[Errno \d+\] ", "", str(error))
        if kind == "OutOfMemoryError":  # torch's, whose own words are of its allocator
            said = "the GPU's memory is full; take a smaller --batch-size, or --device cpu"
        if not isinstance(error, (ValueError, OSError, RuntimeError, MemoryError)):
            said = f"{kind}: {said} (a bug, or in your own code; set FEATCACHE_DEBUG=1 for the traceback)"
        screen.print(f"[red]error:[/] {escape(_one_line(said or kind))}", highlight=False)
        sys.exit(2 if isinstance(error, ValueError) else 1)

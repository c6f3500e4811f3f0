"""`featcache derive`: a command for each derivation, its options as flags."""

import inspect
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any, get_origin

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from featcache_cli.flags import plugin_option, takes
from featcache_cli.screen import DryRun, Json, bar, rows_and_failed, screen, shown, store_summary, would, write_json


class Dtype(StrEnum):
    float16, float32 = "float16", "float32"


class _Derivations(TyperGroup):
    """Every registered derivation is a command; its file is imported when its help or its name is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        from featcache.plugins import plugin_names

        return plugin_names("featcache.derivations")

    def get_command(self, ctx: Any, name: str) -> Any:
        from featcache.derivations import load_derivation

        cls = load_derivation(name)
        info = CommandInfo(name=name, callback=_callback(name, cls), help=inspect.getdoc(cls), no_args_is_help=True)
        return get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode="rich")


app = typer.Typer(
    cls=_Derivations,
    help="""Compute features from stores alone, of the same samples, into a store like any other.

    [dim]featcache derive mean a.zarr b.zarr c.zarr --of logits --out ensemble.zarr[/dim]
    [dim]featcache derive join clip.zarr dino.zarr --unit true --out both.zarr[/dim]
    """,
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def _callback(name: str, cls: Any) -> Any:
    """What the command does."""
    from featcache.derivations import from_text, options_of

    kinds = options_of(cls)

    def run(
        stores: Annotated[list[str], typer.Argument(metavar="STORE…", help="Sealed stores, or their URLs.")],
        out: Annotated[
            str | None,
            typer.Option(metavar="STORE", help="Where to.", show_default="under $FEATCACHE_HOME, named by content"),
        ] = None,
        settings: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of it.")
        ] = None,
        dtype: Annotated[
            Dtype | None,
            typer.Option(help="What features are kept in.", show_default="float32 where a STORE has it, else float16"),
        ] = None,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace a store made from something else.")
        ] = False,
        dry_run: DryRun = False,
        to_json: Json = None,
        **flags: str | None,
    ) -> None:
        import featcache

        given: dict[str, str] = {}
        for setting in settings or ():
            key, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"--set {setting}: give KEY=VALUE")
            given[key] = value
        given |= {key: value for key, value in flags.items() if value is not None}
        options = {key: from_text(value, kinds.get(key, str)) for key, value in given.items()}
        kept = dtype.value if dtype else None
        if dry_run:
            from featcache.derivations._store import preview

            plan = preview(name, stores, out, dtype=kept, overwrite=overwrite, **options)
            screen.print(
                f"{plan.rows_to_do:,} of {plan.rows:,} rows to do · writes {plan.bytes_to_write / 1e6:,.1f} MB to "
                f"{shown(plan.path)} · {shown(plan.encoder)}",
                highlight=False,
            )
            would("derive", asdict(plan), to_json)
            return
        with bar(f"derive {name}", "rows") as update:
            made: list[int] = []

            def show(done: int, total: int) -> None:
                made.append(done)
                update(done, total)

            store = featcache.derive(name, stores, out, dtype=kept, overwrite=overwrite, progress=show, **options)
        done, rest = ("sealed", "") if made else ("reused", ", nothing to compute")
        screen.print(
            f"[green]{done}[/] {shown(store.path)}: {rows_and_failed(store)}{rest} · {shown(store.encoder_name)}"
        )
        record = store.manifest.derivation
        for line in record.said if record else ():
            screen.print(f"[yellow]note:[/] {shown(line)}", highlight=False)
        summary = {"store": str(store.path), "reused": not made, **store_summary(store)}
        write_json({"command": "derive", "derivation": record and record.to_json(), **summary}, to_json)

    *every, _ = inspect.signature(run).parameters.values()
    return takes(run, [*every, *_flags(name, cls, kinds)])


def _flags(name: str, cls: Any, kinds: dict[str, Any]) -> Iterator[inspect.Parameter]:
    """A flag for each option, of these `kinds`."""
    for each in cls.__dataclass_fields__.values():
        if each.name in kinds:
            listed = get_origin(kinds[each.name]) is tuple
            default = ",".join(map(str, each.default)) if listed else str(each.default)
            default = default.lower() if each.default in (True, False) else default
            metavar = "VALUE,…" if listed else "VALUE"
            yield plugin_option(each.name, name, each.metadata.get("help", ""), default, metavar)

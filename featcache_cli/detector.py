"""`evalsuite detector`: a detector to deploy, fitted, put to work, and watched."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache_cli.flags import named
from featcache_cli.screen import (
    DryRun,
    Json,
    ListsPlugins,
    TrustCode,
    Workers,
    bar,
    make_table,
    numbered,
    results,
    screen,
    shown,
    would,
    write_json,
)

app = typer.Typer(
    help="""A detector to deploy: one folder of encoder, detector and threshold, which loads without featcache.

    [dim]evalsuite detector fit teacher.zarr --detector mahalanobis++ --keep 0.95 --out detector/[/dim]
    [dim]evalsuite detector score detector/ --images new/ --out scores.csv[/dim]
    [dim]evalsuite detector drift detector/ --images stream/[/dim]
    """,
    no_args_is_help=True,
    rich_markup_mode="rich",
)


class EncoderFormat(StrEnum):
    onnx, safetensors = "onnx", "safetensors"


Folder = Annotated[Path, typer.Argument(metavar="DETECTOR", help="The folder that `evalsuite detector fit` made.")]
Images = Annotated[
    str | None, typer.Option(metavar="CORPUS", help="New images: a folder, or what `featcache extract` takes.")
]
OfStore = Annotated[str | None, typer.Option(metavar="STORE", help="Or a store that the same encoder made.")]
AnyPrecision = Annotated[
    bool, typer.Option("--any-precision", help="Compare stores in whatever precision they were made and kept.")
]


@app.command(cls=ListsPlugins)
def fit(
    store: Annotated[str, typer.Argument(metavar="STORE", help="ID rows.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to.")],
    detector: Annotated[
        str, typer.Option(metavar="NAME", help="NAME:k=1 sets an argument. Names: {evalsuite.detectors}.")
    ] = "knn",
    k: Annotated[
        int | None, typer.Option(min=1, help="Neighbours, for detectors that use them.", show_default="50")
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="FILE", help="A classifier, for detectors that need one: `evalsuite probe`'s.")
    ] = None,
    keep: Annotated[float, typer.Option(metavar="SHARE", help="Of ID images, not to be taken for OOD.")] = 0.95,
    id: Annotated[
        str | None,
        typer.Option(
            "--id", metavar="STORE", help="ID rows that the threshold is found on.", show_default="a part of STORE"
        ),
    ] = None,
    hold_out: Annotated[
        float, typer.Option(metavar="SHARE", help="Of STORE's images for the threshold, without --id.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Of which images these are.")] = 0,
    ood: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=STORE", help="An OOD set: how much of it is found; repeat for more."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Where the encoder is now; none leaves it out, for stores alone.",
            show_default="as STORE says",
        ),
    ] = None,
    format: Annotated[
        EncoderFormat, typer.Option(help="Of the encoder: a graph of its own, or weights alone, which need featcache.")
    ] = EncoderFormat.onnx,
    nearest: Annotated[int, typer.Option(min=0, help="Bank images named beside a score.")] = 3,
    bank_rows: Annotated[int, typer.Option(min=1, help="The most that these are sought among.")] = 20_000,
    any_precision: AnyPrecision = False,
    trust_code: TrustCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a detector at --out.")] = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Fit a detector to ID rows, find its threshold on held-out ones, and write a folder to deploy.

    [dim]evalsuite detector fit train.zarr --detector mahalanobis++ --keep 0.95 --id test.zarr --ood pets=pets.zarr --out detector/[/dim]
    """
    import evalsuite
    from evalsuite.intervals.order import Threshold

    given: dict[str, Any] = {
        "detector": detector, "k": k, "head": head, "keep": keep, "id": id, "hold_out": hold_out, "seed": seed,
        "ood": named("--ood", ood or []), "encoder": encoder, "format": format.value, "nearest": nearest,
        "bank_rows": bank_rows, "any_precision": any_precision, "trust_code": trust_code, "overwrite": overwrite,
    }  # fmt: skip
    if dry_run:
        from evalsuite.deployed.fit import preview

        rows = preview(store, out, **given)
        told = ", ".join(f"{name} {count:,}" for name, count in rows.items())
        screen.print(f"would write {shown(out)}: {shown(detector)}; rows: {shown(told)}", highlight=False)
        would("detector fit", {"out": str(out), "detector": detector, "rows": rows}, to_json)
        return
    with screen.status("reading") as status:
        made = evalsuite.fit_detector(store, out, **given, say=lambda what: status.update(what))
    record = made.record
    limit = Threshold(**record["threshold"])
    size = sum(file.stat().st_size for file in made.path.iterdir())
    screen.print(f"[green]written[/] {shown(made.path)}: {shown(record['detector'])}, {size / 1e6:,.1f} MB")
    if to_json != "-":
        results.print(f"threshold {limit.value:.6g}, 95 % interval {_interval(limit.low, limit.high)}", highlight=False)
        results.print(
            f"keeps {limit.kept_low:.1%} … {limit.kept_high:.1%} of ID images (95 %), by {limit.rows:,} held-out rows",
            highlight=False,
        )
        if record["ood"]:
            table = make_table("found of OOD sets", "set", "images", "found", "95 % interval")
            for name, of in record["ood"].items():
                interval = _interval(*of["ci95"]) if of["ci95"] else of["no_ci95"]
                table.add_row(shown(name), f"{of['rows']:,}", f"{of['found']:.4f}", interval)
            results.print(table)
    checked = (record["encoder"] or {}).get("checked", {"images": 0})
    if checked["images"]:
        screen.print(
            f"checked with {numbered(checked['images'], 'held-out image')} through the folder's own encoder: "
            f"{checked['same_decision']} decided alike, scores within {checked['largest_score_difference']:.1g} standard "
            "deviations"
        )
    for line in record["remarks"]:
        screen.print(f"[yellow]note:[/] {shown(line)}", highlight=False)
    summary = {
        key: record[key]
        for key in ("detector", "arguments", "keep", "threshold", "held_out", "ood", "encoder", "remarks")
    }
    write_json({"command": "detector fit", "out": str(made.path), **summary}, to_json)


@app.command()
def score(
    detector: Folder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to: a .csv, .json or .parquet, a row an image.")],
    images: Images = None,
    store: OfStore = None,
    any_precision: AnyPrecision = False,
    workers: Workers = None,
    trust_code: TrustCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Score new images: how OOD each is, whether beyond the threshold, and the bank images most like it.

    [dim]evalsuite detector score detector/ --images new/ --out scores.csv[/dim]
    """
    from evalsuite.deployed.detector import ids_of
    from evalsuite.deployed.scored import quantiles, refuse_table

    target = refuse_table(out, overwrite)
    opened, given = _opened(detector, images, store, any_precision, trust_code)
    if dry_run:
        rows = len(ids_of(given))
        screen.print(f"would write {shown(target)}: {numbered(rows, 'row')}", highlight=False)
        would("detector score", {"detector": str(detector), "out": str(target), "rows": rows}, to_json)
        return
    scored = _scored(opened, given, any_precision, workers)
    scored.write(target, overwrite=overwrite)
    failed, ood = int(scored.failed.sum()), int(scored.is_ood.sum())
    done = len(scored) - failed
    of = f"{ood:,} of {done:,} beyond the threshold {opened.threshold:.6g}" + (f" ({ood / done:.1%})" if done else "")
    why = f", [yellow]{failed:,} failed[/] (reasons are in the table)" if failed else ""
    screen.print(f"[green]written[/] {shown(target)}: {numbered(len(scored), 'row')}{why}")
    if to_json != "-":
        results.print(
            f"{of}; keep {opened.keep:g} would give {1 - opened.record['threshold']['kept']:.1%}", highlight=False
        )
    write_json(
        {
            "command": "detector score", "detector": str(detector), "out": str(target), "rows": len(scored), "failed": failed,
            "ood": ood, "threshold": opened.threshold, "keep": opened.keep, "scores": quantiles(scored.score),
        },
        to_json,
    )  # fmt: skip


@app.command()
def drift(
    detector: Folder,
    images: Images = None,
    store: OfStore = None,
    dates: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE", help="A .csv, .tsv or .parquet of ids and dates.", show_default="when files were changed"
        ),
    ] = None,
    id_column: Annotated[str, typer.Option(metavar="NAME", help="Of --dates.")] = "id",
    date_column: Annotated[str, typer.Option(metavar="NAME", help="Of --dates.")] = "date",
    any_precision: AnyPrecision = False,
    workers: Workers = None,
    trust_code: TrustCode = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Watch a stream of images: the share taken for OOD by day, and which days have more than --keep would give.

    [dim]evalsuite detector drift detector/ --images stream/[/dim]
    [dim]evalsuite detector drift detector/ --store stream.zarr --dates taken.csv --date-column taken[/dim]
    """
    from evalsuite.deployed.days import days_of_files, days_of_table
    from evalsuite.deployed.detector import ids_of
    from evalsuite.deployed.drift import drift as measured

    opened, given = _opened(detector, images, store, any_precision, trust_code)
    ids = ids_of(given)  # days come first: a table that lacks one is refused before all the work
    if dates is not None:
        days = days_of_table(dates, ids, id_column, date_column)
        of = f"days by the column {date_column} of {dates}"
    else:
        days, of = days_of_files(_corpus_of(images, store), ids), "days by when files were last changed, in UTC"
    if dry_run:
        told = f"{numbered(len(ids), 'image')} of {numbered(len(set(days)), 'day')}, {of}"
        screen.print(f"would score {shown(told)}", highlight=False)
        would(
            "detector drift",
            {"detector": str(detector), "rows": len(ids), "days": sorted(set(days)), "dates": of},
            to_json,
        )
        return
    scored = _scored(opened, given, any_precision, workers)
    found = measured(opened, scored, days, of)
    if to_json != "-":
        table = make_table(of, "day", "images", "OOD", "share", "95 % interval", "by chance", "")
        for day in found.days:
            cells = ("", "", "") if day.share is None else (
                f"{day.share:.4f}", _interval(*day.ci95) if day.ci95 else "", f"{day.by_chance:.2g}"
            )  # fmt: skip
            failed = f" (+ {day.failed:,} failed)" if day.failed else ""
            table.add_row(
                day.day, f"{day.scored:,}{failed}", f"{day.ood:,}", *cells, "[red]beyond[/]" if day.beyond else ""
            )
        results.print(table)
        results.print(shown(found.statement()), highlight=False)
    write_json({"command": "detector drift", "detector": str(detector), **found.to_json()}, to_json)


def _opened(folder: Path, images: str | None, store: str | None, any_precision: bool, trust_code: bool) -> Any:
    """The detector, and the corpus or the rows that it is to score."""
    import evalsuite

    opened = evalsuite.load_detector(folder, trust_code=trust_code)
    return opened, opened.look(images, store=store, any_precision=any_precision)


def _scored(opened: Any, given: Any, any_precision: bool, workers: int | None) -> Any:
    """Scores, with a bar."""
    from featcache.rows import Rows

    of = {"store" if isinstance(given, Rows) else "images": given}
    with bar("score", "images") as update:
        return opened.score(**of, any_precision=any_precision, workers=workers, progress=update)


def _corpus_of(images: str | None, store: str | None) -> str:
    """The spec of the images, of a store too."""
    if images is not None:
        return images
    from featcache.store import open_store

    assert store is not None
    return str(open_store(os.fspath(store)).manifest.corpus.spec)


def _interval(low: float | None, high: float | None) -> str:
    return f"{'−∞' if low is None else f'{low:.4g}'} … {'∞' if high is None else f'{high:.4g}'}"

"""`distill speed`: how long students take on this machine, by format."""

import dataclasses
import re
from typing import Annotated

import typer

from featcache_cli.screen import Json, TrustCode, bar, make_table, results, screen, shown, write_json


def numbers(text: str) -> list[int]:
    """The value of an option `N,…`."""
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise typer.BadParameter(f"{text}: give whole numbers, 1 or more, such as 1,8")
    return [int(each) for each in text.split(",")]


def speed(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Run folders, or FOLDER@epoch=N.")],
    formats: Annotated[
        str,
        typer.Option(
            metavar="NAME,…", help="Of torch, onnx, onnx-fp16 and onnx-int8; all are compared with the first."
        ),
    ] = "torch,onnx,onnx-int8",
    threads: Annotated[str, typer.Option(metavar="N,…", help="That compute.")] = "1",
    batch: Annotated[str, typer.Option(metavar="N,…", help="Images of one pass.")] = "1",
    rounds: Annotated[int, typer.Option(min=1, help="Passes of each that are timed.")] = 50,
    trust_code: TrustCode = False,
    to_json: Json = None,
) -> None:
    """Time students on the CPU, from normalised images to embeddings: passes of all formats and runs alternate.

    Believe the column `time`, each pass beside one of the first format of the first RUN; milliseconds are those of this machine,
    busy as it is now. int8 is calibrated on drawn pictures: that changes what it gives, not how long it takes.

    [dim]distill speed runs/a runs/b --threads 1,2 --batch 1,8[/dim]
    """
    from distill.exporting.speed import speed as timed

    with bar("speed", "rounds") as update:
        found = timed(
            runs,
            formats=formats.split(","),
            threads=numbers(threads),
            batches=numbers(batch),
            rounds=rounds,
            trust_code=trust_code,
            progress=lambda done, total, what: update(done, total, "", shown(what)),
        )
    for each in {each.run: each for each in found}.values():
        screen.print(
            f"{shown(each.run)}: {shown(each.architecture)}, {each.parameters / 1e6:,.2f} M parameters, "
            f"{each.multiply_adds / 1e6:,.1f} M multiply-adds an image",
            highlight=False,
        )
    if to_json != "-":
        columns = ("run", "format", "threads", "batch", "time", "p50 ms", "p95 ms", "images/s", "MB")
        table = make_table("", *columns)
        for each in found:
            table.add_row(
                shown(each.run), each.format, str(each.threads), str(each.batch),
                "×{:.2f} ({:.2f}–{:.2f})".format(each.ratio, *each.ratio_quartiles),
                f"{1e3 * each.p50:.2f}", f"{1e3 * each.p95:.2f}", f"{each.images_per_second:,.0f}",
                f"{each.file_bytes / 1e6:.1f}",
            )  # fmt: skip
        results.print(table)
    write_json({"command": "speed", "speeds": [dataclasses.asdict(each) for each in found]}, to_json)

"""`featcache demo`: the whole pipeline on digits."""

import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from featcache_cli.programs import app
from featcache_cli.screen import Json, make_table, results, screen, shown, write_json

_MAPPED = " --set mapping_steps=100 --set mapping_batch_size=256"
STUDENTS = {"centred": _MAPPED, "tintem": _MAPPED, "proteus": ""}
"""Methods, the default first, and what else their fits are given."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for images, stores and runs.")] = Path("featcache-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Of each student.")] = 15,
    to_json: Json = None,
) -> None:
    """The whole pipeline on scikit-learn's digits, offline, in about a minute and a half; ends with a report to look at.

    [dim]featcache demo --out demo/ --epochs 5[/dim]
    """
    from featcache.demo import write_demo_images

    began = time.perf_counter()
    results.quiet = to_json == "-"
    counts = write_demo_images(out / "images")
    screen.print(f"Images in {out / 'images'}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    at = shlex.quote(str(out))
    encoders = {"teacher": "builtin/efficientnet_lite0"} | {name: f"run:{out}/runs/{name}" for name in STUDENTS}
    reused, measured = [], []
    for name, spec in encoders.items():
        if name != "teacher":
            run_shown(
                f"distill fit --store {at}/stores/teacher-id-train.zarr --corpus {at}/images/id-train --student tiny "
                f"--method {name} --out {at}/runs/{name} --epochs {epochs} --batch-size 64 --lr 0.003 --resume{STUDENTS[name]}"
            )
        for images in counts:
            store, summary = f"{out}/stores/{name}-{images}.zarr", out / "results" / f"{name}-{images}.json"
            overwrite = "" if name == "teacher" else " --overwrite"
            run_shown(
                f"featcache extract {at}/images/{images} --teacher {shlex.quote(spec)} --out {shlex.quote(store)} "
                f"--json {shlex.quote(str(summary))}{overwrite}"
            )
            if json.loads(summary.read_text())["reused"]:
                reused.append(store)
        measured += _evaluated(at, name)
    images = " ".join(f"--images {at}/images/{each}" for each in counts)
    title = shlex.quote("Digits 0–7; OOD: 8 and 9, photographs")
    run_shown(f"evalsuite report teacher={' '.join(measured)} {images} --title {title} --out {at}/report.html")
    results.print(_demo_table(out, encoders))
    screen.print(
        f"{time.perf_counter() - began:.0f} s. Paste any command above with your own folder in place of {out}/images/…."
    )
    if reused:
        screen.print(f"[green]reused[/] the cached features of {len(reused)} stores: delete {out} to start afresh")
    page = out / "report.html"
    screen.print(
        f"Look at it in a browser, which needs no network for it: [bold]{shown(page.resolve().as_uri())}[/]",
        soft_wrap=True,
    )
    found = sorted(str(path) for path in (out / "results").glob("*.json"))
    write_json({"command": "demo", "out": str(out), "results": found, "reused": reused, "report": str(page)}, to_json)


def _evaluated(at: str, name: str) -> list[str]:
    """Evaluate one encoder of the demo at `at`, quoted for a shell; the files of the results, likewise."""
    bank, query = f"{at}/stores/{name}-id-train.zarr", f"{at}/stores/{name}-id-test.zarr"
    given = {
        "knn": f"--bank {bank} --query {query} --k 20",
        "ood": f"--id-train {bank} --id-test {query} --near digits89={at}/stores/{name}-near.zarr "
        f"--far photos={at}/stores/{name}-far.zarr --detector knn --k 20",
    }
    if name != "teacher":
        given["fidelity"] = f"--teacher {at}/stores/teacher-id-test.zarr --student {query}"
    for command, options in given.items():
        run_shown(f"evalsuite {command} {options} --json {at}/results/{name}-{command}.json")
    return [f"{at}/results/{name}-{command}.json" for command in given]


def _demo_table(out: Path, encoders: dict[str, str]) -> Table:
    from featcache.encoder import load_encoder

    columns = ("params", "dim", "kNN top-1", "near AUROC", "far AUROC", "Gram r", "images/s")
    table = make_table("Digits 0–7 (near OOD: 8 and 9; far OOD: photographs)", "encoder", *columns)
    for name, spec in encoders.items():

        def metric(evaluator: str, key: str, name: str = name) -> str:
            return (
                f"{json.loads((out / 'results' / f'{name}-{evaluator}.json').read_text())['metrics'][key]['value']:.3f}"
            )

        encoder = load_encoder(spec)
        table.add_row(
            name,
            f"{encoder.parameters / 1e6:.2f} M",
            str(encoder.embedding_dim),
            metric("knn", "top1@20"),
            metric("ood", "knn/near/mean/auroc"),
            metric("ood", "knn/far/mean/auroc"),
            metric("fidelity", "gram_pearson") if name != "teacher" else "1.000",
            f"{_images_per_second(encoder):,.0f}",
        )
    return table


def _images_per_second(encoder: Any) -> float:
    """Of the encoder alone, on pixels in memory, fp32."""
    import torch

    pixels = torch.randint(0, 256, (16, encoder.image_input.size, encoder.image_input.size, 3), dtype=torch.uint8)
    encoder.encode(pixels)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < 0.5:
        encoder.encode(pixels)
        images += len(pixels)
    return images / (time.perf_counter() - began)


def run_shown(command: str) -> None:
    """Print a command, then run exactly that."""
    screen.print(f"[bold cyan]$[/] {shown(command)}", highlight=False)
    program, *arguments = shlex.split(command)
    if code := app(program)(arguments, standalone_mode=False):  # it failed, or was interrupted
        raise typer.Exit(code)

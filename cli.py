"""The three commands: `featcache`, `distill`, `evalsuite`. Thin wrappers that print what the libraries return.

The only module that prints, and the only one that imports all three packages. Heavy imports stand inside the
commands, so that `--help` answers at once.
"""

import json
import logging
import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# Without emoji: corrupted:fog:3 is a corpus, and :fog: no picture.
screen = Console(stderr=True, soft_wrap=True, emoji=False)  # progress and remarks, never wrapped; results go to stdout
results = Console(emoji=False)

HELP: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "rich_markup_mode": "rich",
}
featcache_app = typer.Typer(help="Stage one: run a frozen teacher once over your images and keep what it saw.", **HELP)
distill_app = typer.Typer(help="Stage two: train small students against the kept features.", **HELP)
evalsuite_app = typer.Typer(help="Evaluate teachers and students from their stores.", **HELP)


class Device(StrEnum):
    auto, cpu, cuda = "auto", "cpu", "cuda"


class Augment(StrEnum):
    none, flip, rotate4, rrc = "none", "flip", "rotate4", "rrc"


class PixelsFormat(StrEnum):
    jpeg, raw = "jpeg", "raw"


class EncoderPrecision(StrEnum):
    auto, fp32, bf16, fp16 = "auto", "fp32", "bf16", "fp16"


class ExportFormat(StrEnum):
    npy, parquet, safetensors, clip_retrieval = "npy", "parquet", "safetensors", "clip-retrieval"


class Preset(StrEnum):
    dinov2, cospress = "dinov2", "cospress"


class TrainingPrecision(StrEnum):
    auto, fp32, bf16 = "auto", "fp32", "bf16"


Json = Annotated[
    str | None, typer.Option("--json", metavar="PATH|-", help="Also write a machine-readable summary ('-': to stdout).")
]
DeviceOption = Annotated[Device, typer.Option(help="'auto' takes a GPU when there is one.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads that read, decode and resize.", show_default="one a core")
]
StorePath = Annotated[str, typer.Argument(metavar="STORE", help="A feature store (…​.zarr), or its URL.")]
"""Paths that may be URLs are strings: pathlib would make s3:/bucket of s3://bucket."""

# -- featcache --------------------------------------------------------------------------------------------


@featcache_app.command()
def extract(
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="CORPUS",
            help="A folder of images (class sub-folders give labels) or its URL, wds:SHARDS.tar, hf:NAME:SPLIT, "
            "torchvision:NAME:SPLIT, a .csv or .parquet of paths, or digits:train|test.",
        ),
    ],
    teacher: Annotated[
        str,
        typer.Option(
            metavar="SPEC[,SPEC]",
            help="timm/NAME, open_clip/NAME:TAG, builtin/efficientnet_lite0, run:PATH, or MODULE:CALLABLE. "
            "Several, with commas, make one pass over the images.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="STORE[,STORE]",
            help="Where to: a path or URL for each teacher.",
            show_default="under $FEATCACHE_HOME, named by content",
        ),
    ] = None,
    views: Annotated[int, typer.Option(min=1, help="Views a sample; view 0 is always the plain one.")] = 1,
    augment: Annotated[
        Augment, typer.Option(help="What views 1, 2, … are: mirrored, turned by 90°, or random resized crops.")
    ] = Augment.none,
    fields: Annotated[
        str, typer.Option(help="Comma list of embedding, tokens (of patches), prefix_tokens (class token …), logits.")
    ] = "embedding",
    pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="SIZE",
            help="Keep the images in the store too, shorter side at most SIZE px, for `distill fit` without --corpus.",
        ),
    ] = None,
    pixels_format: Annotated[
        PixelsFormat, typer.Option(help="How --pixels keeps them: JPEG of quality 95, or exact.")
    ] = PixelsFormat.jpeg,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images a forward pass.", show_default="16 on a CPU, 256 on a GPU")
    ] = None,
    workers: Workers = None,
    device: DeviceOption = Device.auto,
    precision: Annotated[
        EncoderPrecision, typer.Option(help="'auto' measures, and takes the fastest that stays faithful to fp32.")
    ] = EncoderPrecision.auto,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="Stop when more images cannot be read.", show_default="never")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store made from something else.")] = False,
    to_json: Json = None,
) -> None:
    """Embed a corpus. Run it again to resume after an interruption; a finished store is reused.

    [dim]featcache extract photos/ --teacher timm/vit_small_patch14_dinov2.lvd142m --out teacher.zarr[/dim]
    [dim]featcache extract photos/ --teacher timm/vit_small_patch16_224@pool=avg --fields embedding,tokens --pixels 256[/dim]
    """
    from featcache import receipts

    teachers, outs = teacher.split(","), out.split(",") if out else None
    request = {
        "corpus": corpus, "teachers": teachers, "outs": outs, "views": views, "augment": augment.value,
        "fields": fields, "pixels": pixels, "pixels_format": pixels_format.value, "device": device.value,
    }  # fmt: skip
    known = None if overwrite else receipts.recall(request)
    if known is not None:
        _say_extracted(known, None, to_json)
        return
    watched = receipts.watch(request)

    import featcache

    encoders, images = [featcache.load_encoder(spec) for spec in teachers], featcache.open_corpus(corpus)
    described = (f"{e.name} ({e.parameters / 1e6:.1f} M parameters, {e.embedding_dim}-d)" for e in encoders)
    screen.print(f"{', '.join(described)} · {len(images):,} images × {views} views", highlight=False)
    last: list[Any] = []
    with bar("extract", "images") as update:

        def show(at: Any) -> None:
            last[:] = [at]
            failed = f" · {at.failed} failed" if at.failed else ""
            update(at.done, at.rows, f"{at.images_per_second:,.0f} images/s{failed}")

        stores = featcache.extract_all(
            images, encoders, outs, views=views, augment=augment.value, fields=fields.split(","),
            pixels=featcache.KeptPixels(size=pixels, format=pixels_format.value) if pixels else None,
            batch_size=batch_size, workers=workers, device=device.value, precision=precision.value,
            max_failures=max_failures, overwrite=overwrite, announce=_announce, progress=show,
        )  # fmt: skip
    summaries = [{"store": str(store.path), "reused": not last, **_store_summary(store)} for store in stores]
    receipts.remember(watched, summaries)
    _say_extracted(summaries, last[0] if last else None, to_json)


def _say_extracted(summaries: list[dict[str, Any]], at: Any | None, to_json: str | None) -> None:
    """What became of each store, and where the time went if there was anything `at` all to do."""
    summary: dict[str, Any] = {"command": "extract"} | (summaries[0] if len(summaries) == 1 else {"stores": summaries})
    for made in summaries:
        done, rest = ("reused", ", nothing to compute") if at is None else ("sealed", "")
        rows = _counted(made["rows"], made["failed"])
        screen.print(f"[green]{done}[/] {made['store']}: {rows}{rest} · {made['extraction']['precision']}")
    if at is not None:
        spent = max(at.wait + at.encode + at.write, 1e-9)  # zero where only left-over files had to go
        shares = {name: getattr(at, name) / spent for name in ("wait", "encode", "write")}
        where = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        screen.print(f"{at.images_per_second:,.0f} images/s ({where})")
        summary |= {
            "resumed_rows": at.resumed,
            "reused_rows": at.reused,
            "images_per_second": at.images_per_second,
            "time_shares": shares,
        }
        if at.resumed:
            screen.print(f"resumed: {at.resumed:,} rows were already done")
        if at.reused:
            screen.print(f"reused: {at.reused:,} rows whose images other stores had already seen")
    _write_json(summary, to_json)


def _announce(plan: Any) -> None:
    """The preflight: what will be written, where, and how long it may take."""
    where = ", ".join(str(store.path) for store in plan.stores)
    screen.print(
        f"{plan.rows - plan.done:,} of {plan.rows:,} rows to do · writes {plan.bytes_to_write / 1e6:,.1f} MB to {where} "
        f"({plan.bytes_free / 1e9:,.1f} GB free) · about {plan.seconds:,.0f} s at {plan.samples_per_second:,.0f} rows/s",
        highlight=False,
    )


@featcache_app.command()
def info(store: StorePath, to_json: Json = None) -> None:
    """What a store holds, who made it, and which images failed."""
    from featcache.store import FeatureStore

    opened = FeatureStore(store)
    summary = {
        "command": "info",
        "store": str(store),
        "sealed": opened.sealed,
        **_store_summary(opened),
        "manifest": opened.manifest,
    }
    if to_json != "-":
        manifest, table = opened.manifest, _table(str(store), "", "")
        state = (
            "sealed"
            if opened.sealed
            else f"[yellow]unfinished: {len(opened.pending_chunks())} of {opened.chunks} chunks pending[/]"
        )
        for name, value in (
            ("state", state),
            ("encoder", f"{opened.encoder_name} (fingerprint {opened.fingerprint[:12]})"),
            ("corpus", str(manifest["corpus"]["spec"])),
            ("rows", _rows(opened)),
            ("classes", str(len(opened.class_names or []))),
            ("views", " ".join(f"{k}={v}" for k, v in manifest["views"].items() if k != "parameters")),
            ("output", str(manifest["encoder"].get("output", ""))),
            ("fields", ", ".join(f"{k} ({' × '.join(map(str, v))})" for k, v in manifest["fields"].items())),
            ("pixels", "{size} px, {format}".format(**manifest["pixels"]) if manifest.get("pixels") else "not kept"),
            ("preprocess", " ".join(f"{k}={v}" for k, v in manifest["encoder"]["preprocess"].items())),
            ("extraction", " ".join(f"{k}={v}" for k, v in manifest.get("extraction", {}).items())),
            ("size", f"{opened.size_bytes / 1e6:,.1f} MB"),
        ):
            table.add_row(name, value)
        results.print(table)
        for sample_id, reason in opened.reasons.items():
            results.print(f"[red]failed[/] {sample_id}: {reason}", highlight=False, soft_wrap=True)
    _write_json(summary, to_json)


@featcache_app.command()
def verify(store: StorePath, to_json: Json = None) -> None:
    """Read every byte of a store and name whatever is damaged, missing or left over."""
    from featcache.receipts import void
    from featcache.store import FeatureStore

    try:
        opened = FeatureStore(store)
    except ValueError:
        void(store)
        raise
    problems = opened.verify()
    if problems:
        void(store)
    if not opened.sealed:
        problems.append("extraction has not finished; run the same `featcache extract` command again")
    _write_json({"command": "verify", "store": str(store), "problems": problems}, to_json)
    for problem in problems:
        screen.print(f"[red]{store}[/]: {problem}", highlight=False)
    if problems:
        raise typer.Exit(1)
    screen.print(f"[green]whole[/] {store}: {_rows(opened)}")


@featcache_app.command()
def export(
    store: StorePath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file or folder to write; must not exist.")],
    format: Annotated[ExportFormat, typer.Option(help="One file, or for npy and clip-retrieval a folder.")],
    as_is: Annotated[
        bool, typer.Option("--as-is", help="clip-retrieval: keep the embeddings' lengths instead of making them 1.")
    ] = False,
    to_json: Json = None,
) -> None:
    """Write a store as files that other programs read. `featcache import` brings it back, bit for bit.

    [dim]featcache export teacher.zarr teacher.parquet --format parquet[/dim]
    """
    from featcache.interchange import export_store

    with bar("export", "rows") as update:
        exported = export_store(store, out, format.value, as_is=as_is, progress=update)
    left_out = f"; [yellow]left out: {', '.join(exported.left_out)}[/]" if exported.left_out else ""
    screen.print(f"[green]exported[/] {out}: {exported.rows:,} rows as {format.value}{left_out}")
    summary = {"store": str(store), "out": str(out), "format": format.value, "rows": exported.rows}
    _write_json({"command": "export", **summary, "left_out": exported.left_out}, to_json)


@featcache_app.command("import")
def import_(
    src: Annotated[
        str,
        typer.Argument(metavar="SRC", help="An export, a .npy, .parquet or .safetensors, or a clip-retrieval folder."),
    ],
    store: Annotated[str, typer.Argument(metavar="STORE", help="The store to make; must not exist.")],
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The model that made them. Stores compare only when theirs is the same.",
            show_default="an export says it itself",
        ),
    ] = None,
    to_json: Json = None,
) -> None:
    """Make a store from an export, or from embeddings that another program made.

    [dim]featcache import embeddings.npy bank.zarr --encoder open_clip/ViT-B-32:laion2b_s34b_b79k[/dim]
    """
    from featcache.interchange import import_store

    with bar("import", "rows") as update:
        made = import_store(src, store, encoder_name=encoder, progress=update)
    screen.print(f"[green]sealed[/] {store}: {_rows(made)} × {made.embedding_dim}-d of {made.encoder_name}")
    if made.encoder_name == "imported":
        screen.print("its encoder has no name: it compares with no other store; import both under one --encoder NAME")
    _write_json({"command": "import", "source": str(src), "store": str(store), **_store_summary(made)}, to_json)


@featcache_app.command()
def ls(to_json: Json = None) -> None:
    """The stores there are: those under $FEATCACHE_HOME, and any other that was made here."""
    from featcache.cache import known_stores
    from featcache.store import FeatureStore

    listed: list[dict[str, Any]] = []
    for path in known_stores():
        try:
            listed.append({"store": str(path), "sealed": (store := FeatureStore(path)).sealed, **_store_summary(store)})
        except ConnectionError as error:
            listed.append({"store": str(path), "error": str(error), "state": "unreachable"})
        except (ValueError, OSError) as error:
            listed.append({"store": str(path), "error": str(error), "state": "damaged"})
    if to_json != "-":
        table = _table("", "store", "encoder", "corpus", "rows", "state")
        for item in listed:
            state = item.get("state") or ("sealed" if item["sealed"] else "unfinished")
            table.add_row(item["store"], item.get("encoder"), item.get("corpus"), f"{item.get('rows', 0):,}", state)
        results.print(table)
    _write_json({"command": "ls", "stores": listed}, to_json)


@featcache_app.command()
def rm(store: StorePath) -> None:
    """Delete a store, and nothing that is not one."""
    from featcache.cache import forget
    from featcache.receipts import void
    from featcache.store import FeatureStore

    opened = FeatureStore(store)
    forget(opened)
    void(store)
    opened.remove()
    Path(f"{opened.path}.lock").unlink(missing_ok=True)
    screen.print(f"removed {store}")


@featcache_app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for images, stores and runs.")] = Path("featcache-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Of each student.")] = 20,
) -> None:
    """The whole pipeline on scikit-learn's digits, offline, in about a minute."""
    from featcache.demo import write_demo_images

    began = time.perf_counter()
    counts = write_demo_images(out / "images")
    screen.print(f"Images in {out / 'images'}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    teacher = "builtin/efficientnet_lite0"
    encoders = {"teacher": teacher, "tintem": f"run:{out}/runs/tintem", "proteus": f"run:{out}/runs/proteus"}
    reused = []
    for name, spec in encoders.items():
        if name != "teacher":
            _run_shown(
                f"distill fit --store {out}/stores/teacher-id-train.zarr --corpus {out}/images/id-train --student tiny "
                f"--method {name} --out {out}/runs/{name} --epochs {epochs} --batch-size 64 --resume"
                + (" --set mapping_steps=100 --set mapping_batch_size=256" if name == "tintem" else "")
            )
        for images in counts:
            store, summary = f"{out}/stores/{name}-{images}.zarr", out / "results" / f"{name}-{images}.json"
            overwrite = "" if name == "teacher" else " --overwrite"
            _run_shown(
                f"featcache extract {out}/images/{images} --teacher {spec} --out {store} --json {summary}{overwrite}"
            )
            if json.loads(summary.read_text())["reused"]:
                reused.append(store)
        bank, query = f"{out}/stores/{name}-id-train.zarr", f"{out}/stores/{name}-id-test.zarr"
        _run_shown(f"evalsuite knn --bank {bank} --query {query} --k 20 --json {out}/results/{name}-knn.json")
        _run_shown(
            f"evalsuite ood --id-train {bank} --id-test {query} --near digits89={out}/stores/{name}-near.zarr "
            f"--far photos={out}/stores/{name}-far.zarr --detector knn --k 20 --json {out}/results/{name}-ood.json"
        )
        if name != "teacher":
            _run_shown(
                f"evalsuite fidelity --teacher {out}/stores/teacher-id-test.zarr --student {query} --json {out}/results/{name}-fidelity.json"
            )
    results.print(_demo_table(out, encoders))
    screen.print(
        f"{time.perf_counter() - began:.0f} s. Paste any command above with your own folder in place of {out}/images/…."
    )
    if reused:
        screen.print(f"[green]reused[/] the cached features of {len(reused)} stores: delete {out} to start afresh")


def _demo_table(out: Path, encoders: dict[str, str]) -> Table:
    import featcache

    columns = ("params", "dim", "kNN top-1", "near AUROC", "far AUROC", "Gram r", "images/s")
    table = _table("Digits 0–7 (near OOD: 8 and 9; far OOD: photographs)", "encoder", *columns)
    for name, spec in encoders.items():

        def metric(evaluator: str, key: str, name: str = name) -> str:
            return (
                f"{json.loads((out / 'results' / f'{name}-{evaluator}.json').read_text())['metrics'][key]['value']:.3f}"
            )

        encoder = featcache.load_encoder(spec)
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

    pixels = torch.randint(0, 256, (16, encoder.preprocess.size, encoder.preprocess.size, 3), dtype=torch.uint8)
    encoder.encode(pixels)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < 0.5:
        encoder.encode(pixels)
        images += len(pixels)
    return images / (time.perf_counter() - began)


# -- distill ----------------------------------------------------------------------------------------------


@distill_app.command()
def fit(
    store: Annotated[
        list[str] | None,
        typer.Option(metavar="STORE", help="The teacher's features; repeat, with its CORPUS, to train on several."),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CORPUS", help="The images they were extracted from.", show_default="those that STORE keeps"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="The run folder.")] = None,
    student: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="tiny, timm/NAME[:WEIGHTS], open_clip/NAME[:CHECKPOINT] or MODULE:CALLABLE."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="See `distill methods`.", show_default="tintem")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.", show_default="100")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step.", show_default="256")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW.", show_default="0.003")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and mapping.", show_default="0")] = None,
    device: DeviceOption = Device.auto,
    precision: Annotated[
        TrainingPrecision | None, typer.Option(help="'auto' is bf16 on a GPU, else fp32.", show_default="auto")
    ] = None,
    workers: Workers = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run in RUN.")] = False,
    config: Annotated[
        Path | None, typer.Option(metavar="RUN.TOML", help="Start from a run's config.toml; flags win over it.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting or method option.")
    ] = None,
    to_json: Json = None,
) -> None:
    """Train a student so that it behaves like the teacher.

    [dim]distill fit --store teacher.zarr --corpus photos/ --student timm/resnet18 --method tintem --out runs/a[/dim]

    On several GPUs: [dim]torchrun --nproc-per-node 8 --no-python distill fit …[/dim]
    """
    import distill

    first_process = os.environ.get("RANK", "0") == "0"  # of those that torchrun started: it alone tells
    screen.quiet = not first_process
    given: dict[str, Any] = _read_config(config) if config else {}
    flags = {
        "store": _one_or_all(store), "corpus": _one_or_all(corpus), "out": out, "student": student, "method": method,
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
        "precision": precision.value if precision else None,
    }  # fmt: skip
    given |= {key: value for key, value in flags.items() if value is not None}
    for setting in settings or []:
        _set(given, setting)
    missing = [f"--{name}" for name in ("store", "out", "student") if name not in given]
    if missing:
        raise typer.BadParameter(f"give {', '.join(missing)}")
    with bar("fit", "steps") as update:

        def show(at: Any) -> None:
            rest = f"{at.images_per_second:,.0f} images/s · waits {at.wait:.0%}" if at.stage == "training" else ""
            if at.terms:
                terms = " + ".join(f"{name} {value:.4f}" for name, value in at.terms.items())
                rest = f"loss {terms if len(at.terms) == 1 else f'{at.loss:.4f} = {terms}'} · {rest}"
            update(at.done, at.total, rest, at.stage)

        run = distill.fit(
            given.pop("store"),
            given.pop("corpus", None),
            device=device.value,
            workers=workers,
            resume=resume,
            announce=_announce_fit,
            progress=show,
            **given,
        )
    if not first_process:
        return
    final = run.metrics[-1]
    screen.print(
        f"[green]finished[/] {run.path}: loss {final['loss']:.4f} after {final['epoch']} epochs, {final['images_per_second']:,.0f} images/s"
    )
    if "holdout/gram_pearson" in final:
        named = {name.partition("/")[2]: value for name, value in final.items() if name.startswith("holdout/")}
        screen.print("held-out samples: " + ", ".join(f"{name} {value:.4f}" for name, value in named.items()))
    if "mapping/deviation" in final:
        loss = (
            f"SNE loss {final['mapping/sne_start']:.4f} (spectral) → {final['mapping/sne']:.4f}, "
            if "mapping/sne_start" in final
            else ""
        )
        screen.print(
            f"mapping: {loss}singular values {final['mapping/singular_min']:.2f}–{final['mapping/singular_max']:.2f}, "
            f"deviation from orthogonal {final['mapping/deviation']:.3f}"
        )
    screen.print(f"embed with it: featcache extract CORPUS --teacher run:{run.path}")
    _write_json({"command": "fit", "run": str(run.path), "config": run.config, "metrics": final}, to_json)


@distill_app.command()
def methods(to_json: Json = None) -> None:
    """The methods there are, a line each."""
    from distill import load_method
    from featcache.plugins import plugin_names

    described = {name: (load_method(name).__doc__ or "").splitlines()[0] for name in plugin_names("distill.methods")}
    if to_json != "-":
        table = _table("", "method", "what it does")
        for name, line in described.items():
            table.add_row(name, line)
        results.print(table)
    _write_json({"command": "methods", "methods": described}, to_json)


class RunFormat(StrEnum):
    safetensors, onnx = "safetensors", "onnx"


@distill_app.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")],
    format: Annotated[
        RunFormat, typer.Option(help="safetensors for plain timm or torch; ONNX for any batch size.")
    ] = RunFormat.safetensors,
    result: Annotated[
        list[Path] | None,
        typer.Option(metavar="RESULT.json", help="Of evalsuite, for the model card; repeat for more."),
    ] = None,
    to_json: Json = None,
) -> None:
    """Write a student as files that load without featcache, with a model card.

    [dim]distill export runs/a student/ --format onnx --result knn.json[/dim]
    """
    import distill

    with screen.status(f"exporting to {format.value}"):
        made = distill.export(run, out, format=format.value, results=result or [])
    screen.print(
        f"[green]exported[/] {made.path}: {', '.join(made.files)}; loaded again, it differs from the student by at most "
        f"{made.max_difference:.1e}",
        highlight=False,
    )
    summary = {"run": str(run), "out": str(made.path), "format": format.value, "files": list(made.files)}
    _write_json({"command": "export", **summary, "max_difference": made.max_difference}, to_json)


@distill_app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.TOML", help="See the head of distill/sweep.py.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For runs and results.", show_default="`out` in the file")
    ] = None,
    device: DeviceOption = Device.auto,
    workers: Workers = None,
    to_json: Json = None,
) -> None:
    """Train every combination of methods, students, seeds and dimensions from one cache, and tell mean ± sd.

    Run it again to resume: finished runs are kept, a failed one is tried again.

    [dim]distill sweep sweep.toml --out sweeps/first[/dim]
    """
    import distill
    from distill.sweep import cells, expand, markdown, read_sweep, tabulate

    asked = read_sweep(file)
    if out is None and asked.out is None:
        raise ValueError(f"{file}: names no out folder; add out = … or give --out FOLDER")
    folder = out or Path(str(asked.out))
    runs, failed, rows = expand(asked), {}, []
    evaluate = _SweepEvaluation(asked, folder, device.value, workers) if asked.evaluate else None
    if evaluate and evaluate.teacher:
        rows.append(("teacher", evaluate.measure("teacher", evaluate.teacher)))
    for number, named in enumerate(runs, 1):
        try:
            with bar(named.name, "steps") as update:

                def show(
                    at: Any, update: Callable[..., None] = update, label: str = f"{number}/{len(runs)} {named.name}"
                ) -> None:
                    update(at.done, at.total, "" if math.isnan(at.loss) else f"loss {at.loss:.4f}", label)

                run = distill.fit(
                    asked.store, asked.corpus, out=folder / "runs" / named.name, device=device.value, workers=workers,
                    resume=True, progress=show, **named.settings,
                )  # fmt: skip
            final = {k: v for k, v in run.metrics[-1].items() if k == "loss" or k.startswith("holdout/")}
            rows.append((named.group, evaluate.measure(named.name, f"run:{run.path}") if evaluate else final))
            screen.print(f"[green]finished[/] {named.name} ({number} of {len(runs)})", highlight=False)
        except (ValueError, OSError, RuntimeError) as error:
            failed[named.name] = " ".join(str(error).split())
            screen.print(f"[red]failed[/] {named.name}: {escape(failed[named.name])}", highlight=False)
    table = tabulate(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(table))
    (folder / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    if to_json != "-":
        header, *body = cells(table)
        shown = _table(str(folder), *header)
        for line in body:
            shown.add_row(*line)
        results.print(shown)
    _write_json({"command": "sweep", "out": str(folder), "failed": failed, **table}, to_json)
    if failed:
        screen.print(f"[red]{len(failed)} of {len(runs)} runs failed[/]: {', '.join(failed)}", highlight=False)
        raise typer.Exit(1)


class _SweepEvaluation:
    """Embeds the test corpora of a sweep with each student, and measures.

    Attributes:
        teacher: spec of the encoder to compare with, "" for none.
    """

    def __init__(self, asked: Any, folder: Path, device: str, workers: int | None):
        import featcache

        given = asked.evaluate
        self._folder, self._options = folder, {"device": device, "workers": workers}
        self._near, self._far = given.get("near", {}), given.get("far", {})
        self._corpora = {"bank": given["bank"], "query": given["query"], **self._near, **self._far}
        self._k, self._detectors = given.get("k", 20), given.get("detectors", ["knn"])
        first = asked.store if isinstance(asked.store, str) else asked.store[0]
        self.teacher = given["teacher"] if "teacher" in given else featcache.open_store(first).encoder_name
        self._teacher_query: Any = None
        for corpus in self._corpora.values():
            featcache.open_corpus(corpus)  # refuses before anything is trained

    def measure(self, name: str, encoder: str) -> dict[str, float]:
        """kNN accuracy, AUROC and, where there is a teacher, fidelity to it; result files are left in `results/`."""
        import evalsuite
        import featcache

        loaded = featcache.load_encoder(encoder)
        with bar(f"{name}: embed", "images") as update:
            stores = {
                part: featcache.extract(
                    corpus, loaded, self._folder / "stores" / f"{name}-{part}.zarr", overwrite=True,
                    progress=lambda at: update(at.done, at.rows), **self._options,
                )
                for part, corpus in self._corpora.items()
            }  # fmt: skip
        if encoder == self.teacher:
            self._teacher_query = stores["query"]
        found = {"knn": evalsuite.knn(stores["bank"], stores["query"], k=[self._k])}
        if self._near or self._far:
            found["ood"] = evalsuite.ood(
                id_train=stores["bank"],
                id_test=stores["query"],
                near={part: stores[part] for part in self._near},
                far={part: stores[part] for part in self._far},
                detectors=self._detectors,
            )
        if self._teacher_query is not None:
            found["fidelity"] = evalsuite.fidelity(self._teacher_query, stores["query"])
        for command, result in found.items():
            result.write(self._folder / "results" / f"{name}-{command}.json")
        shown = re.compile(r"top1@\d+|.*/mean/auroc|gram_pearson|cka_debiased|mutual_knn@\d+")
        metrics = {key: metric.value for result in found.values() for key, metric in result.metrics.items()}
        return {key: value for key, value in metrics.items() if shown.fullmatch(key)}


def _read_config(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        given = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
    given.pop("teacher", None)
    return given


def _one_or_all(given: list[str] | None) -> str | list[str] | None:
    return given[0] if given and len(given) == 1 else given or None


def _announce_fit(plan: Any) -> None:
    left_out = f", {plan.failed:,} failed rows left out" if plan.failed else ""
    held_out = f", {plan.held_out:,} held out for evaluation" if plan.held_out else ""
    screen.print(f"{plan.samples:,} samples{left_out}{held_out}; views: {plan.views}")
    shared = f", shared by {plan.processes} processes" if plan.processes > 1 else ""
    done = f", {plan.done:,} of them done" if plan.done else ""
    screen.print(
        f"student of {plan.student_weights / 1e6:,.2f} M weights; {plan.steps:,} steps{done}{shared}; "
        f"checkpoints of {plan.checkpoint_bytes / 1e6:,.1f} MB"
    )


def _set(given: dict[str, Any], setting: str) -> None:
    """Put `key=value` (the value in TOML, or a bare word) where `distill.fit` looks for it."""
    import inspect
    import tomllib

    from distill import FitConfig, load_method
    from featcache.plugins import suggest

    key, equals, text = setting.partition("=")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    options = inspect.signature(load_method(given.get("method", "tintem"))).parameters
    settings = {*FitConfig.__dataclass_fields__, "checkpoint_minutes", "trackers"} - {"method_options"}
    if key == "trackers":
        value = [value] if isinstance(value, str) else value
    if key in settings and equals:
        given[key] = value
    elif key in options and equals:
        given["method_options"] = {**given.get("method_options", {}), key: value}
    else:
        raise ValueError(
            f"--set {setting}: no such setting; {suggest(key, {*settings, *options} - {'teacher_dim', 'student_dim'})}"
        )


# -- evalsuite --------------------------------------------------------------------------------------------


@evalsuite_app.command()
def knn(
    bank: Annotated[str, typer.Option(metavar="STORE", help="Labelled rows that vote.")],
    query: Annotated[str, typer.Option(metavar="STORE", help="Rows to classify.")],
    preset: Annotated[
        Preset,
        typer.Option(help="Whose k and temperature: DINOv2's (10, 20, 100, 200; 0.07) or CosPress's (10; 0.07)."),
    ] = Preset.dinov2,
    k: Annotated[str | None, typer.Option(help="Comma list of neighbours.", show_default="the preset's")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the softmax over cosines that weighs the votes.", show_default="the preset's"),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Bank rows a class, drawn by --seed.", show_default="all")
    ] = None,
    index: Annotated[
        str, typer.Option(metavar="SPEC", help="exact, or a FAISS index: HNSW32, 'IVF4096,Flat;nprobe=16' (quoted), …")
    ] = "exact",
    seed: Annotated[int, typer.Option(help="Of the few-shot draw and of the intervals.")] = 0,
    to_json: Json = None,
) -> None:
    """k-nearest-neighbour classification: micro (top1, top5) and macro accuracy."""
    import evalsuite

    with screen.status("searching"):
        result = evalsuite.knn(
            bank,
            query,
            _integers(k, "--k") if k else None,
            temperature,
            preset=preset.value,
            shots=shots,
            index=index,
            seed=seed,
        )
    _show(result, to_json)


@evalsuite_app.command()
def ood(
    id_train: Annotated[str | None, typer.Option(metavar="STORE", help="ID rows that detectors are fitted on.")] = None,
    id_test: Annotated[str | None, typer.Option(metavar="STORE", help="ID rows held out.")] = None,
    near: Annotated[
        list[str] | None, typer.Option(metavar="NAME=STORE", help="A near-OOD set; repeat for more.")
    ] = None,
    far: Annotated[list[str] | None, typer.Option(metavar="NAME=STORE", help="A far-OOD set; repeat for more.")] = None,
    csid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=STORE",
            help="ID classes under covariate shift: also measure with these rows as ID (near_fs, far_fs).",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="openood-cifar10, -cifar100, -imagenet200 or -imagenet: all sets, from the folder --stores.",
        ),
    ] = None,
    stores: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where a preset's stores are: tin.zarr, cifar10_train.zarr, …"),
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Repeat for more; NAME:k=1 sets an argument, mcm:text=names.npy the class names' embeddings.",
            show_default="knn",
        ),
    ] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Neighbours, for detectors that use them.", show_default="50")
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="FILE", help="A classifier, for detectors that need one: `evalsuite probe`'s.")
    ] = None,
    to_json: Json = None,
) -> None:
    """How well detectors tell ID images from others. AUROC 0.5 is chance, 1 is perfect.

    [dim]evalsuite ood --id-train train.zarr --id-test test.zarr --near tin=tin.zarr --detector knn --detector rmd[/dim]
    [dim]evalsuite ood --preset openood-cifar10 --stores stores/ --detector knn[/dim]
    """
    import evalsuite

    groups = ("near", near), ("far", far), ("csid", csid)
    sets = {group: _named_stores(given, f"--{group}") if given else None for group, given in groups}
    with screen.status("scoring"):
        result = evalsuite.ood(
            id_train=id_train,
            id_test=id_test,
            near=sets["near"],
            far=sets["far"],
            csid=sets["csid"],
            preset=preset,
            stores=stores,
            detectors=detector or ["knn"],
            k=k,
            head=head,
        )
    _show(result, to_json)


@evalsuite_app.command()
def fidelity(
    teacher: Annotated[str, typer.Option(metavar="STORE", help="The teacher's rows.")],
    student: Annotated[str, typer.Option(metavar="STORE", help="The student's rows of the same samples.")],
    k: Annotated[int, typer.Option(min=1, help="Neighbours that are compared, and that vote.")] = 10,
    mapping: Annotated[
        str | None,
        typer.Option(
            metavar="RUN/mapping.safetensors", help="Also measure the cosine to the teacher, mapped as in training."
        ),
    ] = None,
    teacher_bank: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Labelled rows that vote.", show_default="the compared rows themselves"),
    ] = None,
    student_bank: Annotated[str | None, typer.Option(metavar="STORE", help="The same samples of the student.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample of rows, chance levels and intervals.")] = 0,
    to_json: Json = None,
) -> None:
    """How faithfully a student keeps the teacher's angles between images, its neighbours and its votes."""
    import evalsuite

    with screen.status("comparing"):
        result = evalsuite.fidelity(
            teacher, student, k=k, mapping=mapping, teacher_bank=teacher_bank, student_bank=student_bank, seed=seed
        )
    _show(result, to_json)


@evalsuite_app.command()
def probe(
    train: Annotated[str, typer.Option(metavar="STORE", help="Labelled rows that the classifier is fitted to.")],
    test: Annotated[str, typer.Option(metavar="STORE", help="Labelled rows held out.")],
    c: Annotated[
        str | None,
        typer.Option(
            help="Inverse strength of the penalty; of a comma list, the best on a tenth of --train is taken.",
            show_default="0.001,0.01,…,100000",
        ),
    ] = None,
    save: Annotated[
        str | None, typer.Option(metavar="HEAD.safetensors", help="Keep the classifier, for detectors that need one.")
    ] = None,
    device: DeviceOption = Device.auto,
    seed: Annotated[int, typer.Option(help="Of the rows that choose C, and of the intervals.")] = 0,
    to_json: Json = None,
) -> None:
    """Logistic regression on the kept embeddings.

    [dim]evalsuite probe --train teacher.zarr --test teacher-test.zarr --save head.safetensors[/dim]
    """
    import evalsuite

    given: dict[str, Any] = {} if c is None else {"c": _numbers(c, "--c")}
    with bar("probe", "fits") as update:
        result = evalsuite.probe(train, test, save=save, device=device.value, seed=seed, progress=update, **given)
    screen.print(f"C = {result.parameters['c']:g}, {result.parameters['steps']} steps", highlight=False)
    _show(result, to_json)


@evalsuite_app.command()
def robustness(
    encoder: Annotated[str, typer.Option(metavar="SPEC", help="A teacher, as for `featcache extract`, or run:PATH.")],
    corpus: Annotated[str, typer.Option(metavar="CORPUS", help="Labelled images, as for `featcache extract`.")],
    bank: Annotated[str, typer.Option(metavar="STORE", help="The encoder's clean labelled rows, which vote.")],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where a store for each corruption and severity goes.")],
    corruptions: Annotated[
        str, typer.Option(metavar="all|NAME,…", help="'all' are ImageNet-C's 15; its 4 extra ones by name.")
    ] = "all",
    severity: Annotated[str, typer.Option(metavar="1-5", help="A range or a comma list; 5 is the heaviest.")] = "1-5",
    size: Annotated[
        int, typer.Option(min=32, metavar="PX", help="Larger images are reduced to this shorter side, then corrupted.")
    ] = 256,
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 20,
    near: Annotated[
        list[str] | None, typer.Option(metavar="NAME=STORE", help="A near-OOD set, clean; repeat for more.")
    ] = None,
    far: Annotated[
        list[str] | None, typer.Option(metavar="NAME=STORE", help="A far-OOD set, clean; repeat for more.")
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Repeat for more; NAME:k=1 sets an argument.", show_default="knn"),
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="FILE", help="A classifier, for detectors and --pgd: `evalsuite probe`'s.")
    ] = None,
    pgd: Annotated[
        str | None,
        typer.Option(metavar="EPS,…", help="Attack encoder and --head: at most so many 1/255ths a pixel, such as 4,8."),
    ] = None,
    pgd_steps: Annotated[int, typer.Option(min=1, help="Of each attack.")] = 20,
    reference: Annotated[
        str | None,
        typer.Option(metavar="RESULT.json", help="Another encoder's result, that errors are relative to: mce."),
    ] = None,
    workers: Workers = None,
    device: DeviceOption = Device.auto,
    seed: Annotated[int, typer.Option(help="Of the intervals, and where --pgd starts.")] = 0,
    to_json: Json = None,
) -> None:
    """Accuracy, and AUROC, on corrupted images. Run it again to resume: finished stores are not made again.

    [dim]evalsuite robustness --encoder run:runs/a --corpus photos-test/ --bank student.zarr --out runs/a/corrupted[/dim]
    """
    import evalsuite

    sets = {group: _named_stores(stores or [], f"--{group}") for group, stores in (("near", near), ("far", far))}
    with bar("robustness", "images") as update:
        result = evalsuite.robustness(
            encoder, corpus, bank, out, corruptions=corruptions if corruptions == "all" else corruptions.split(","),
            severities=_range(severity, "--severity"), size=size, k=k, near=sets["near"], far=sets["far"],
            detectors=detector or ["knn"], head=head, pgd=_numbers(pgd, "--pgd") if pgd else (), pgd_steps=pgd_steps,
            reference=reference, workers=workers, device=device.value, seed=seed, progress=update,
        )  # fmt: skip
    _show(result, to_json)


@evalsuite_app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A.json", help="A result of knn, probe, ood or robustness: --json.")],
    b: Annotated[str, typer.Argument(metavar="B.json", help="Another of the same command, on the same samples.")],
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    to_json: Json = None,
) -> None:
    """Is B better than A? The difference of every metric, with an interval over the samples that both have.

    [dim]evalsuite compare teacher-ood.json student-ood.json[/dim]
    """
    import evalsuite

    with screen.status("comparing"):
        result = evalsuite.compare(a, b, seed=seed)
    _show(result, to_json)


@evalsuite_app.command()
def report(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RESULT.json …",
            help="Results of any command; NAME is shown for their encoder ('teacher' marks the teacher).",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PAGE.html", help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Evaluation report",
    to_json: Json = None,
) -> None:
    """One HTML page about results: tables, score histograms, ROC curves, maps. It needs no network.

    [dim]evalsuite report runs/*.json teacher=teacher.ood.json --out report.html[/dim]
    """
    import evalsuite

    names: dict[str, str] = {}
    paths = []
    for item in given:
        name, equals, path = item.partition("=")
        if equals and not os.path.exists(item):
            if not (name and path):
                raise typer.BadParameter(f"{item}: give RESULT.json or NAME=RESULT.json")
            names[path] = name
        else:
            path = item
        paths.append(path)
    page = evalsuite.report(paths, out, names=names, title=title)
    screen.print(f"[green]written[/] {escape(str(page))}: {len(paths)} results, {page.stat().st_size / 1e6:.1f} MB")
    _write_json({"command": "report", "out": str(page), "results": paths, "bytes": page.stat().st_size}, to_json)


def _named_stores(given: list[str], flag: str) -> dict[str, str]:
    named = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not (name and equals and path) or name in named:
            raise typer.BadParameter(f"{flag} {item}: give NAME=STORE, each NAME once")
        named[name] = path
    return named


def _integers(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{flag} {text}: give whole numbers, separated by commas") from None


def _range(text: str, flag: str) -> list[int]:
    """`1-5`, or a comma list."""
    ends = re.fullmatch(r"(\d+)-(\d+)", text)
    return list(range(int(ends[1]), int(ends[2]) + 1)) if ends else _integers(text, flag)


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text}: give numbers, separated by commas") from None


def _show(result: Any, to_json: str | None) -> None:
    if to_json != "-":
        tables = {"ood": _ood_table, "robustness": _robustness_table, "compare": _comparison_table}
        results.print(tables.get(result.command, _metric_table)(result))
    if to_json not in (None, "-"):
        result.write(to_json)  # and, beside it, what was measured of each sample
    else:
        _write_json(json.loads(result.to_json()), to_json)


def _metric_table(result: Any) -> Table:
    """A row a metric, with what chance would reach; below, the three classes of the lowest values (the rest: JSON)."""
    chance = result.parameters.get("chance", {})
    table = _table(result.command, "metric", "value", "chance", "95 % interval")
    overall = {name: metric for name, metric in result.metrics.items() if not name.startswith("per_class/")}
    for name, metric in overall.items():
        interval = f"{metric.ci95[0]:.4f}–{metric.ci95[1]:.4f}" if metric.ci95 else ""
        table.add_row(name, f"{metric.value:.4f}", f"{chance[name]:.4f}" if name in chance else "", interval)
    lowest = []
    for what in overall:
        classes = [
            (metric.value, name.removeprefix("per_class/").removesuffix(f"/{what}"))
            for name, metric in result.metrics.items()
            if name.startswith("per_class/") and name.endswith(f"/{what}")
        ]
        if classes:
            lowest.append(f"lowest {what}: " + ", ".join(f"{name} {value:.4f}" for value, name in sorted(classes)[:3]))
    table.caption = escape("\n".join(lowest)) or None
    table.caption_justify = "left"
    return table


def _comparison_table(result: Any) -> Table:
    """A row a metric; below, how many samples were paired in each set."""
    given = result.parameters
    table = _table(
        f"A: {result.inputs['a']['path']}   B: {result.inputs['b']['path']}",
        given["command"], "A", "B", "B − A", "95 % interval", "verdict",
    )  # fmt: skip
    table.collapse_padding = True
    for name, metric in result.metrics.items():
        interval = f"{metric.ci95[0]:+.4f} to {metric.ci95[1]:+.4f}"
        verdict = given["verdicts"][name]
        table.add_row(
            name, f"{given['a'][name]:.4f}", f"{given['b'][name]:.4f}", f"{metric.value:+.4f}", interval,
            f"[bold]{verdict}[/]" if verdict.endswith("better") else "–",
        )  # fmt: skip
    said = ["–: no difference shown"]
    for name, count in given["samples"].items():
        left_out = count["only_a"] + count["only_b"]
        said.append(
            f"{name}: {count['paired']:,} samples"
            + (f", left out {count['only_a']:,} only in A and {count['only_b']:,} only in B" if left_out else "")
        )
    table.caption, table.caption_justify = escape("\n".join(said)), "left"
    return table


def _ood_table(result: Any) -> Table:
    """A row a detector and set, a column a metric; intervals are in the JSON."""
    rows: dict[str, dict[str, str]] = {}
    for name, metric in result.metrics.items():
        where, _, what = name.rpartition("/")
        rows.setdefault(where, {})[what] = f"{metric.value:.4f}"
    columns = list(next(iter(rows.values())))
    headings = (column.replace("_", "\n") for column in columns)
    table = _table(
        ", ".join(f"{name} {given}" for name, given in result.parameters["detectors"].items()), "ood", *headings
    )
    table.collapse_padding = True
    for where, values in rows.items():
        table.add_row(where, *(values[column] for column in columns))
    return table


def _robustness_table(result: Any) -> Table:
    """A row a metric and corruption, a column a severity; intervals are in the JSON."""
    levels = [*map(str, result.parameters["severities"]), "mean"]
    rows: dict[str, dict[str, str]] = {}
    for name, metric in result.metrics.items():
        corruption, _, rest = name.partition("/")
        level, _, what = rest.partition("/")
        if corruption == "pgd" or level not in levels:  # of the clean images, attacked, or a mean over all
            corruption, level, what = name, "mean", ""
        rows.setdefault(f"{corruption}/{what}".rstrip("/"), {})[level] = f"{metric.value:.4f}"
    table = _table("robustness", "", *levels)
    for row, values in rows.items():
        table.add_row(row, *(values.get(level, "") for level in levels))
    return table


# -- on screen --------------------------------------------------------------------------------------------


@contextmanager
def bar(description: str, unit: str) -> Iterator[Callable[..., None]]:
    """Progress with count, elapsed time and ETA; yields update(done, total, remark, description).

    A live bar on a terminal; elsewhere (a log file, a cluster) a line every 30 seconds.
    """
    began = said = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=None, remark="")

        def update(done: int, total: int, remark: str = "", now: str = description) -> None:
            nonlocal said
            progress.update(task, completed=done, total=total, remark=remark, description=now)
            if not screen.is_terminal and time.monotonic() - said > 30:
                said = time.monotonic()
                eta = (said - began) * (total - done) / max(done, 1)
                screen.print(f"{now} {done:,}/{total:,} {unit} · {remark} · ETA {eta:,.0f} s", highlight=False)

        yield update


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or len(columns) == 2 else "right", overflow="fold")
    return table


def _rows(store: Any) -> str:
    return _counted(len(store), len(store.failed))


def _counted(rows: int, failed: int) -> str:
    return f"{rows:,} rows" + (f", [yellow]{failed:,} failed[/] (`featcache info` lists them)" if failed else "")


def _store_summary(store: Any) -> dict[str, Any]:
    counts = {"rows": len(store), "ok": len(store.ok), "failed": len(store.failed), "reasons": store.reasons}
    return {
        **counts,
        "corpus": store.manifest["corpus"]["spec"],
        "encoder": store.encoder_name,
        "fingerprint": store.fingerprint,
        "extraction": store.manifest.get("extraction", {}),
    }


def _write_json(summary: dict[str, Any], to: str | None) -> None:
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    if to == "-":
        print(text)
    elif to:
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        Path(to).write_text(text + "\n")


def _run_shown(command: str) -> None:
    """Print a command, then run exactly that."""
    screen.print(f"[bold cyan]$[/] {command}", highlight=False)
    program, *arguments = shlex.split(command)
    {"featcache": featcache_app, "distill": distill_app, "evalsuite": evalsuite_app}[program](
        arguments, standalone_mode=False
    )


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


def _run(app: typer.Typer) -> None:
    """Exit code 0 ok · 1 the run failed · 2 wrong usage; one line instead of a traceback, and for a warning."""
    warnings.formatwarning = _one_line
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=screen, show_path=False, show_time=False)],
    )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FEATCACHE_DEBUG"):
            raise
        said = re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))
        screen.print(f"[red]error:[/] {escape(said)}", highlight=False)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        screen.print(
            "interrupted; what is done is kept, the same command (`distill fit`: with --resume) goes on from there"
        )
        sys.exit(130)


def run_featcache() -> None:
    _run(featcache_app)


def run_distill() -> None:
    _run(distill_app)


def run_evalsuite() -> None:
    _run(evalsuite_app)

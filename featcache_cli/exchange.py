"""`featcache export`, `featcache import` and `featcache push`: stores as other programs and the hub have them."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from featcache_cli.pushing import (
    Licence,
    Message,
    Overwrite,
    Private,
    RepositoryName,
    Revision,
    push_summary,
    say_pushed,
)
from featcache_cli.screen import (
    DryRun,
    Json,
    StorePath,
    bar,
    rows_and_failed,
    screen,
    shown,
    store_summary,
    would,
    write_json,
)


class ImportDtype(StrEnum):
    auto, float16, float32 = "auto", "float16", "float32"


def export(
    store: StorePath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file or folder to write; must not exist.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="{featcache.interchange}; npy, hf-dataset, lance, fiftyone and clip-retrieval are folders.",
        ),
    ],
    as_is: Annotated[
        bool, typer.Option("--as-is", help="clip-retrieval: keep the embeddings' lengths instead of making them 1.")
    ] = False,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="CORPUS",
            help="embedding-atlas, fiftyone: the images of the store; 'none' for none.",
            show_default="those it keeps, or of the corpus it was made of",
        ),
    ] = None,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Write a store as files that other programs read. `featcache import` brings it back, bit for bit, but for
    embedding-atlas and fiftyone, which are to be looked at.

    [dim]featcache export teacher.zarr teacher.parquet --format parquet[/dim]
    """
    from featcache.interchange import export_store, preview_export

    with bar("export", "rows") as update:
        if dry_run:
            exported = preview_export(store, out, format, as_is=as_is, images=images)
        else:
            exported = export_store(store, out, format, as_is=as_is, images=images, progress=update)
    left_out = f"; [yellow]left out: {', '.join(exported.left_out)}[/]" if exported.left_out else ""
    done = "would export" if dry_run else "[green]exported[/]"
    screen.print(f"{done} {shown(out)}: {exported.rows:,} rows as {format}{left_out}")
    if exported.opened_by and not dry_run:
        screen.print(f"open it: {shown(exported.opened_by)}", highlight=False, soft_wrap=True)
    summary: dict[str, Any] = {"store": str(store), "out": str(out), "format": format, "rows": exported.rows}
    summary |= {"left_out": exported.left_out, "opened_by": exported.opened_by}
    if dry_run:
        would("export", summary, to_json)
        return
    write_json({"command": "export", **summary}, to_json)


def push(
    store: StorePath,
    repository: RepositoryName,
    private: Private = False,
    revision: Revision = "",
    message: Message = "",
    licence: Licence = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Push a store to the Hugging Face hub as a data set, with a card; `featcache import hf:USER/NAME` brings it back, bit for bit.

    The token is the hub's own: HF_TOKEN, or what `hf auth login` left. It is written under $FEATCACHE_HOME first.

    [dim]featcache push teacher.zarr USER/NAME --private[/dim]
    """
    from featcache.interchange import preview_push, push_store
    from featcache.public import public

    place, opened = preview_push(store, repository, revision=revision)
    named = [text for text in (opened.encoder_name, opened.manifest.corpus.spec or "") if public(text) != text]
    if named:
        screen.print(f"its manifest.json goes as it is, and names {shown(', '.join(named))}", highlight=False)
    if opened.manifest.pixels:
        screen.print("the images that it keeps are not pushed")
    if dry_run:
        screen.print(f"would push {shown(place)}: {rows_and_failed(opened)}", highlight=False)
        would("push", {"store": str(store), "rows": len(opened), "repository": place.name}, to_json)
        return
    with bar("write", "rows") as update:
        pushed = push_store(
            opened, repository, private=private, revision=revision, message=message, licence=licence,
            overwrite=overwrite, progress=update,
        )  # fmt: skip
    say_pushed(pushed)
    screen.print(f"bring it back: featcache import hf:{shown(pushed.repository)} STORE", highlight=False)
    write_json({"command": "push", "store": str(store), "rows": len(opened), **push_summary(pushed)}, to_json)


def import_(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="An export, a .npy, .parquet or .safetensors, a Lance dataset, a clip-retrieval folder, or hf:USER/NAME[@REVISION] "
            "of the hub. Formats: {featcache.interchange}.",
        ),
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
    dtype: Annotated[
        ImportDtype, typer.Option(help="What to keep them in; 'auto': float16 where that loses nothing that matters.")
    ] = ImportDtype.auto,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Make a store from an export, or from embeddings that another program made.

    [dim]featcache import embeddings.npy bank.zarr --encoder open_clip/ViT-B-32:laion2b_s34b_b79k[/dim]
    """
    from featcache.interchange import import_store, preview_import

    if dry_run:
        with bar("import", "rows") as update:
            manifest = preview_import(src, store, encoder_name=encoder, dtype=dtype.value, progress=update)
        rows, width = manifest.corpus.rows, manifest.encoder.embedding_dim
        screen.print(f"would seal {shown(store)}: {rows:,} rows × {width}-d in {manifest.dtype('embedding')}")
        would("import", {"source": src, "store": store, "rows": rows, "embedding_dim": width}, to_json)
        return
    with bar("import", "rows") as update:
        made = import_store(src, store, encoder_name=encoder, dtype=dtype.value, progress=update)
    of = f"{made.embedding_dim}-d of {shown(made.encoder_name)}"
    screen.print(f"[green]sealed[/] {shown(store)}: {rows_and_failed(made)} × {of}")
    if made.encoder_name == "imported":
        screen.print("its encoder has no name: it compares with no other store; import both under one --encoder NAME")
    write_json({"command": "import", "source": str(src), "store": str(store), **store_summary(made)}, to_json)

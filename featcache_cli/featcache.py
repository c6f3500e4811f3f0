"""`featcache`: stage one."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache_cli import derive
from featcache_cli.check_table import check_table
from featcache_cli.demo import demo
from featcache_cli.exchange import export, import_, push
from featcache_cli.new import new
from featcache_cli.screen import (
    Device,
    DeviceOption,
    DryRun,
    Json,
    ListsPlugins,
    StorePath,
    TrustCode,
    Workers,
    bar,
    count_or_auto,
    counted,
    duration,
    make_table,
    numbered,
    program,
    rate,
    results,
    rows_and_failed,
    screen,
    shown,
    store_summary,
    would,
    write_json,
)

if TYPE_CHECKING:
    from featcache.extraction.extract import ExtractionProgress
    from featcache.extraction.plan import ExtractionPlan, Foreseen

app = program("featcache", "Stage one: run a frozen teacher once over your images and keep what it saw.")
app.add_typer(derive.app, name="derive")


class Augment(StrEnum):
    none, flip, rotate4, rotate4_crop, rrc = "none", "flip", "rotate4", "rotate4_crop", "rrc"


class PixelsFormat(StrEnum):
    jpeg, raw = "jpeg", "raw"


class EncoderPrecision(StrEnum):
    auto, fp32, bf16, fp16 = "auto", "fp32", "bf16", "fp16"
    fp32_channels_last, bf16_channels_last = "fp32+channels_last", "bf16+channels_last"
    bf16_autocast, fp16_channels_last = "bf16-autocast+channels_last", "fp16+channels_last"


@app.command(cls=ListsPlugins)
def extract(
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="CORPUS",
            help="A folder of images (class sub-folders give labels) or its URL, wds:SHARDS.tar, hf:NAME:SPLIT, "
            "torchvision:NAME:SPLIT, a .csv, .tsv or .parquet of paths, digits:train|test, mixed:COUNT:CORPUS, "
            "corrupted:NAME:SEVERITY:CORPUS or adversarial:TEACHER::HEAD::CORPUS. @image=NAME and @label=NAME after it choose among several. "
            "Of texts: lines:FILE, texts:TABLE, beir:PATH:PART, windows:FILE, spans:COUNT::CORPUS. "
            "Kinds: {featcache.corpora}.",
        ),
    ],
    teacher: Annotated[
        list[str],
        typer.Option(
            metavar="SPEC",
            help="timm/NAME, open_clip/NAME:TAG, builtin/efficientnet_lite0, run:PATH[@epoch=N], run:hf-hub:USER/NAME, or MODULE:CALLABLE; "
            "timm/NAME.TAG:FILE and open_clip/NAME:TAG:FILE with weights on disk. Of texts: builtin/minilm_l6, sentence-transformers/NAME, "
            "transformers/NAME. "
            "Repeat, or with commas, for several in one pass over the images. Libraries: {featcache.models}.",
        ),
    ],
    out: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STORE",
            help="Where to: a path or URL for each teacher; repeat, or with commas, for several.",
            show_default="under $FEATCACHE_HOME, named by content",
        ),
    ] = None,
    views: Annotated[int, typer.Option(min=1, help="Views a sample; view 0 is always the plain one.")] = 1,
    augment: Annotated[
        Augment,
        typer.Option(
            help="What views 1, 2, … are: mirrored, turned by 90° (each of its own crop, too), or random resized crops."
        ),
    ] = Augment.none,
    crop_area: Annotated[
        float, typer.Option(metavar="SHARE", help="Least area of a random resized crop, of the image's.")
    ] = 0.35,
    fields: Annotated[
        str, typer.Option(help="Comma list of embedding, tokens (of patches), prefix_tokens (class token …), logits.")
    ] = "embedding",
    dtype: Annotated[
        derive.Dtype, typer.Option(help="What features are kept in; float32 where float16 loses what tells them apart.")
    ] = derive.Dtype.float16,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K", help="Keep the K largest logits alone, for --fields logits.", show_default="all"
        ),
    ] = None,
    pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="SIZE",
            help="Keep the images in the store too, shorter side at most SIZE px, for `distill fit` without --corpus.",
        ),
    ] = None,
    pixels_format: Annotated[
        PixelsFormat | None,
        typer.Option(help="How --pixels keeps them: JPEG of quality 95, or exact.", show_default="jpeg"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            parser=count_or_auto,
            metavar="N|auto",
            help="Images a forward pass.",
            show_default="auto: 16 on a CPU, 256 on a GPU",
        ),
    ] = None,
    workers: Workers = None,
    device: DeviceOption = Device.auto,
    precision: Annotated[
        EncoderPrecision,
        typer.Option(
            help="'auto' measures once for each encoder and kind of machine, takes the fastest that stays faithful to "
            "fp32, and the same for every later store. bf16 and fp16 mean those with channels_last."
        ),
    ] = EncoderPrecision.auto,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="Stop when more images cannot be read.", show_default="never")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store made from something else.")] = False,
    engine: Annotated[str, typer.Option(metavar="NAME", help="Where it is computed: {featcache.engines}.")] = "local",
    trust_code: TrustCode = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Embed a corpus. Run it again to resume after an interruption; a finished store is reused.

    [dim]featcache extract photos/ --teacher timm/vit_small_patch14_dinov2.lvd142m --out teacher.zarr[/dim]
    [dim]featcache extract photos/ --teacher timm/vit_small_patch16_224@pool=avg --fields embedding,tokens --pixels 256[/dim]
    [dim]featcache extract photos/ --teacher builtin/efficientnet_lite0 --views 2 --augment flip --out views.zarr[/dim]
    [dim]featcache extract photos/ --teacher timm/resnet50 --teacher run:runs/a --out a.zarr --out b.zarr[/dim]
    [dim]featcache extract 'wds:shards/{000..099}.tar' --teacher open_clip/ViT-B-32:laion2b_s34b_b79k --out shards.zarr[/dim]
    [dim]featcache extract hf:uoft-cs/cifar10:train --teacher timm/resnet50 --out cifar10.zarr[/dim]
    """
    if pixels_format and not pixels:
        raise ValueError(f"--pixels-format {pixels_format.value}: no images are kept; give --pixels SIZE too")
    pixels_format = pixels_format or PixelsFormat.jpeg
    from featcache.engines import open_engine
    from featcache.extraction import receipts

    teachers, outs = _one_each(teacher, out)
    computing = open_engine(engine)
    request = {
        "corpus": corpus, "teachers": teachers, "outs": outs, "views": views, "augment": augment.value,
        "crop_area": crop_area, "fields": fields, "dtype": dtype.value, "pixels": pixels, "pixels_format": pixels_format.value, "device": device.value,
        **({"top_k": top_k} if top_k else {}),
    }  # fmt: skip
    heads = "hidden" in fields.split(",")  # which a language model has to be asked for
    known = None if overwrite or dry_run or heads else receipts.recall(request)
    if known is not None:
        _say_passed_over(known[0].get("passed_over", {}))
        _say_extracted(known, None, precision.value, to_json)
        return
    watched = receipts.watch(request)

    import featcache
    from featcache.corpora import passed_over
    from featcache.extraction.heads import head_beside

    encoders = [featcache.load_encoder(spec, trust_code=trust_code) for spec in teachers]
    images = featcache.open_corpus(corpus)
    _say_begun(encoders, images, views)
    given: dict[str, Any] = {
        "views": views, "augment": augment.value, "crop_area": crop_area, "fields": fields.split(","), "dtype": dtype.value,
        "top_k": top_k, "pixels": featcache.KeptPixels(size=pixels, format=pixels_format.value) if pixels else None,
        "batch_size": batch_size, "workers": workers, "device": device.value, "precision": precision.value,
        "max_failures": max_failures, "overwrite": overwrite,
    }  # fmt: skip
    if dry_run:
        with screen.status(f"first {_kinds(encoders)}, precision"):
            plan = featcache.preview(images, encoders, outs, **given)
        _would_extract(plan, encoders, images, to_json)
        return
    with bar("extract", _kinds(encoders)) as update:
        update(0, len(images), f"first {_kinds(encoders)}, precision", "prepare")
        told = _Told(encoders, update)
        stores = featcache.extract_all(
            images, encoders, outs, **given, engine=computing, announce=told.plan, progress=told.progress
        )
    summaries = [
        {
            "store": path,
            "reused": path not in told.unfinished,
            **store_summary(store),
            "classes": len(store.class_names or []),
            "passed_over": dict(passed_over(images)),
            **({"head": head_beside(store)} if heads and encoder.token_head is not None else {}),
        }
        for encoder, path, store in ((e, str(s.path), s) for e, s in zip(encoders, stores, strict=True))
    ]
    receipts.remember(watched, summaries)
    _say_extracted(summaries, told.at, precision.value, to_json, _kinds(encoders))


def _kinds(encoders: list[Any]) -> str:
    """What the encoders take: "images" or "texts"."""
    return f"{encoders[0].preprocess.kind}s"


class _Told:
    """What `extract` says meanwhile; and to say in the end, the stores that were `unfinished`, and where it is `at` last."""

    at: "ExtractionProgress | None" = None

    def __init__(self, encoders: list[Any], update: Callable[..., None]):
        self.unfinished: set[str] = set()
        self._encoders, self._update = encoders, update

    def plan(self, plan: "ExtractionPlan") -> None:
        """The preflight: what the encoders are shown; what will be written, where, and how long it may take."""
        self.unfinished.update(plan.places)
        _say_plan(plan, self._encoders)

    def progress(self, at: "ExtractionProgress") -> None:
        self.at = at
        speed = f"{rate(at.images_per_second)} {_kinds(self._encoders)}/s" if at.images_per_second else ""
        self._update(at.done, at.rows, " · ".join(filter(None, [speed, f"{at.failed:,} failed" if at.failed else ""])))


def _say_plan(plan: "Foreseen", encoders: list[Any]) -> None:
    """What the encoders are shown; what is written, where, in what precision, and how long it may take."""
    for encoder in encoders:
        of = f" of {encoder.name}" if len(encoders) > 1 else ""
        screen.print(shown(f"input{of}: {encoder.preprocess}"), highlight=False)
    screen.print(
        f"{plan.rows - plan.done:,} of {plan.rows:,} rows to do · writes {plan.bytes_to_write / 1e6:,.1f} MB to "
        f"{shown(', '.join(plan.places))} ({plan.bytes_free / 1e9:,.1f} GB free) · about {duration(plan.seconds)} at "
        f"{rate(plan.samples_per_second)} rows/s, by a few {_kinds(encoders)}",
        highlight=False,
    )
    for line in plan.smaller:
        screen.print(line, highlight=False)
    screen.print(f"precision: {shown(', '.join(plan.precisions))}", highlight=False)


def _would_extract(plan: "Foreseen", encoders: list[Any], images: Any, to_json: str | None) -> None:
    """What a dry run found."""
    from featcache.corpora import passed_over

    if plan.places:
        _say_plan(plan, encoders)
    else:
        screen.print(f"nothing to compute: all {plan.rows:,} rows are there", highlight=False)
    found = {
        "images": len(images), "classes": len(images.class_names or ()), "passed_over": dict(passed_over(images)),
        "inputs": {encoder.name: encoder.preprocess.to_dict() for encoder in encoders}, "stores": plan.places,
        "rows_to_do": plan.rows - plan.done, "bytes": plan.bytes_to_write, "precisions": plan.precisions,
        "seconds": plan.seconds if plan.places else 0.0, **({"smaller": plan.smaller} if plan.smaller else {}),
    }  # fmt: skip
    would("extract", found, to_json)


def _say_begun(encoders: list[Any], images: Any, views: int) -> None:
    """By what and of what, and what of it are no rows."""
    from featcache.corpora import passed_over

    # Those of an ONNX file are none of PyTorch's.
    weights = {e.name: f"{e.parameters / 1e6:.1f} M parameters, " if e.parameters else "" for e in encoders}
    described = (f"{e.name} ({weights[e.name]}{e.embedding_dim}-d)" for e in encoders)
    rows, classes = (
        numbered(len(images), encoders[0].preprocess.kind),
        numbered(len(images.class_names or ()), "class", "classes"),
    )
    screen.print(f"{shown(', '.join(described))} · {rows} ({classes}) × {numbered(views, 'view')}", highlight=False)
    _say_passed_over(passed_over(images))


def _say_passed_over(kinds: Mapping[str, int]) -> None:
    """One line of the files that are no rows, the most frequent kinds first."""
    from featcache.corpora import in_words

    if kinds:
        screen.print(f"passed over: {shown(in_words(kinds))}", highlight=False)


def _one_each(teachers: list[str], outs: list[str] | None) -> tuple[list[str], list[str] | None]:
    """Teachers, and a place for each; as they were repeated, or in comma lists."""
    from featcache.specs import split_specs

    teachers = [spec for given in teachers for spec in split_specs(given)]
    if outs and len(outs) != len(teachers):
        outs = [place for given in outs for place in given.split(",")]
    return teachers, outs or None


def _say_extracted(
    summaries: list[dict[str, Any]],
    at: "ExtractionProgress | None",
    asked: str,
    to_json: str | None,
    kinds: str = "images",
) -> None:
    """What became of each store, whether in the precision `asked` for, and where the time went if there was anything
    `at` all to do."""
    from featcache.store.comparable import exact_name, unfaithful
    from featcache.store.manifest import ExtractionRecord

    summary: dict[str, Any] = {"command": "extract"} | (summaries[0] if len(summaries) == 1 else {"stores": summaries})
    for made in summaries:
        done, rest = ("reused", ", nothing to compute") if made["reused"] else ("sealed", "")
        rows, kept = counted(made["rows"], made["failed"]), made["extraction"]["precision"]
        worst, checked = made["extraction"].get("cosine"), made["extraction"].get("checked")
        faithful = f", cosine to fp32 ≥ {worst:.5f} ({checked:,} rows checked)" if checked and worst is not None else ""
        screen.print(f"[green]{done}[/] {shown(made['store'])}: {rows}{rest} · {kept}{faithful}")
        if cut := made["extraction"].get("truncated"):
            screen.print(f"{numbered(cut, 'text')} cut: longer than the encoder takes", highlight=False)
        if (left := made["extraction"].get("outside_mean")) is not None:
            worst = made["extraction"]["outside_worst"]
            screen.print(f"probability outside the largest logits: mean {left:.4g}, worst {worst:.4g}", highlight=False)
        if "head" in made:
            screen.print(f"head of its hidden states: {shown(made['head'])}", highlight=False)
        if said := unfaithful(ExtractionRecord.from_json(made["extraction"])):
            screen.print(f"[yellow]warning:[/] {shown(made['store'])}: {said}")
        begun = "finished already" if made["reused"] else "begun" if at and at.resumed else ""
        if begun and asked != "auto" and exact_name(asked) != kept:
            screen.print(
                f"[yellow]warning:[/] --precision {asked} is ignored: the store was {begun} in {kept}; "
                "choose another --out, or replace it with --overwrite"
            )
    if at is not None:
        spent = max(at.wait + at.encode + at.write, 1e-9)  # zero where only left-over files had to go
        shares = {name: getattr(at, name) / spent for name in ("wait", "encode", "write")}
        where = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        if at.images_per_second:  # nothing was computed: no rate
            screen.print(f"{rate(at.images_per_second)} {kinds}/s ({where})")
        summary |= {
            "resumed_rows": at.resumed,
            "reused_rows": at.reused,
            "images_per_second": at.images_per_second,
            "time_shares": shares,
        }
        if at.resumed:
            screen.print(f"resumed: {at.resumed:,} rows were already done")
        if at.reused:
            screen.print(f"reused: {at.reused:,} rows whose {kinds} other stores had already seen")
    write_json(summary, to_json)


@app.command()
def info(store: StorePath, to_json: Json = None) -> None:
    """What a store holds, who made it, and which images failed.

    [dim]featcache info teacher.zarr[/dim]
    """
    from featcache.corpora import in_words
    from featcache.store import FeatureStore
    from featcache.store.comparable import unfaithful

    opened = FeatureStore(store)
    summary = {
        "command": "info",
        "store": str(store),
        "sealed": opened.sealed,
        **store_summary(opened),
        "manifest": opened.manifest.to_json(),
    }
    if to_json != "-":
        manifest, table, dtype = opened.manifest, make_table(store, "", ""), opened.manifest.dtype
        top = ", the {} largest kept"
        state = (
            "sealed"
            if opened.sealed
            else f"[yellow]unfinished: {len(opened.pending_chunks())} of {opened.chunks} chunks pending[/]; run the same "
            f"`featcache {opened.made_by}` command again"
        )
        table.add_row("state", state)
        table.add_row("rows", counted(len(opened), len(opened.failed), "listed below"))
        for name, value in (
            ("encoder", f"{opened.encoder_name} (fingerprint {opened.fingerprint[:12]})"),
            ("derived", _derivation_in_words(manifest.derivation)),
            ("corpus", manifest.corpus.spec or "not recorded"),
            ("classes", str(len(opened.class_names)) if opened.class_names else "not named"),
            ("passed over", in_words(manifest.corpus.passed_over)),
            ("views", " ".join(f"{k}={v}" for k, v in manifest.views.to_json().items() if k != "parameters")),
            ("output", manifest.encoder.output or ""),
            (
                "fields",
                ", ".join(
                    f"{k} ({' × '.join(map(str, v)) or 1} {dtype(k)}{top.format(manifest.top_k[k]) if k in manifest.top_k else ''})"
                    for k, v in manifest.fields.items()
                ),
            ),
            ("pixels", f"{kept.size} px, {kept.format}" if (kept := manifest.pixels) else "not kept"),
            ("preprocess", " ".join(f"{k}={v}" for k, v in manifest.encoder.preprocess.items())),
            ("extraction", " ".join(f"{k}={v}" for k, v in manifest.extraction.to_json().items())),
            ("size", f"{opened.size_bytes / 1e6:,.1f} MB"),
        ):
            if value:
                table.add_row(name, shown(value))
        results.print(table)
        if said := unfaithful(manifest.extraction):
            results.print(f"[yellow]warning:[/] {said}", highlight=False, soft_wrap=True)
        for sample_id, reason in opened.reasons.items():
            results.print(f"[red]failed[/] {shown(f'{sample_id}: {reason}')}", highlight=False, soft_wrap=True)
    write_json(summary, to_json)


def _derivation_in_words(record: Any) -> str:
    """How a store was computed from others; "" where an encoder made it."""
    if record is None:
        return ""
    inputs = ", ".join(f"{each['encoder']} (digest {each['digest'][:12]})" for each in record.inputs)
    return " · ".join([str(record), f"of {inputs}", *record.said])


@app.command()
def verify(store: StorePath, to_json: Json = None) -> None:
    """Read every byte of a store and name whatever is damaged, missing or left over.

    [dim]featcache verify teacher.zarr[/dim]
    """
    from featcache.extraction.receipts import void
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
        what = "derivation" if opened.manifest.derivation else "extraction"
        problems.append(f"{what} has not finished; run the same `featcache {opened.made_by}` command again")
    write_json({"command": "verify", "store": str(store), "problems": problems}, to_json)
    for problem in problems:
        screen.print(f"[red]{shown(store)}[/]: {shown(problem)}", highlight=False)
    if problems:
        if opened.sealed:
            screen.print(
                f"the same `featcache {opened.made_by}` command repairs it; what was imported or written otherwise, remove and make again"
            )
        raise typer.Exit(1)
    screen.print(f"[green]whole[/] {shown(store)}: {rows_and_failed(opened)}")


@app.command()
def check(
    stores: Annotated[list[str], typer.Argument(metavar="STORE…", help="Feature stores (…​.zarr), or their URLs.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the rows that are sampled.")] = 0,
    to_json: Json = None,
) -> None:
    """What to know of stores before believing a number: precision, failed, identical and near-identical rows, collapse,
    labels. Stores of one encoder are held against each other.

    Exit code 1 where an evaluation would be wrong: extraction has not finished; 10 % of the rows failed, or all; a value is
    not finite; one encoder in two precisions; 1 % of a store's rows are images of earlier rows or of another store, or 10 %
    nearly, by an encoder that tells images apart; 1 % are all zeros; every dimension is constant; the median distance to the nearest other image is below 0.001;
    an effective rank below a twentieth of the dimensions.

    [dim]featcache check train.zarr test.zarr[/dim]
    [dim]featcache check student.zarr --json check.json[/dim]
    """
    from featcache.store.check import check as check_stores

    with bar("check", "rows") as update:
        report = check_stores(stores, seed=seed, progress=update)
    if to_json != "-":
        results.print(check_table(report))
    for remark in report.remarks:
        how = "[red]falsifies:[/]" if remark.falsifies else "[yellow]note:[/]"
        screen.print(f"{how} {shown(remark.text)}", highlight=False)
    if not report.remarks:
        screen.print("[green]nothing to remark[/]")
    write_json({"command": "check", **report.record()}, to_json)
    if report.falsified:
        raise typer.Exit(1)


app.command(cls=ListsPlugins)(export)
app.command()(push)
app.command("import", cls=ListsPlugins)(import_)


@app.command()
def ls(to_json: Json = None) -> None:
    """The stores there are: those under $FEATCACHE_HOME, and any other that was made here.

    [dim]featcache ls[/dim]
    [dim]featcache ls --json stores.json[/dim]
    """
    from featcache.store import FeatureStore
    from featcache.store.index import known_stores

    listed: list[dict[str, Any]] = []
    for path in known_stores():
        try:
            listed.append({"store": str(path), "sealed": (store := FeatureStore(path)).sealed, **store_summary(store)})
        except ConnectionError as error:
            listed.append({"store": str(path), "error": str(error), "state": "unreachable"})
        except (ValueError, OSError) as error:
            listed.append({"store": str(path), "error": str(error), "state": "damaged"})
    if to_json != "-":
        if not listed:
            screen.print("no stores yet; `featcache extract CORPUS --teacher SPEC` makes one")
        table = make_table("", "store", "encoder", "corpus", "rows", "state")
        for item in listed:
            state = item.get("state") or ("sealed" if item["sealed"] else "unfinished")
            named = (shown(item.get(key) or "") for key in ("store", "encoder", "corpus"))
            table.add_row(*named, f"{item.get('rows', 0):,}", state)
        if listed:
            results.print(table)
    write_json({"command": "ls", "stores": listed}, to_json)


@app.command()
def rm(store: StorePath, dry_run: DryRun = False, to_json: Json = None) -> None:
    """Delete a store, and nothing that is not one. Of a link, only the link goes.

    [dim]featcache rm teacher.zarr[/dim]
    """
    from featcache.disk.refusals import writing
    from featcache.disk.urls import is_url
    from featcache.extraction.receipts import void
    from featcache.store import FeatureStore
    from featcache.store.files import files_at
    from featcache.store.index import forget

    opened = FeatureStore(store)
    if dry_run:
        screen.print(f"would remove {shown(store)}: {rows_and_failed(opened)}, {opened.size_bytes / 1e6:,.1f} MB")
        would("rm", {"store": store, "rows": len(opened), "bytes": opened.size_bytes}, to_json)
        return
    if not is_url(store) and (link := Path(store)).is_symlink():  # what it leads to may be needed elsewhere
        link.unlink()
        screen.print(f"removed the link {shown(store)}; its store stays at {shown(opened.identity)}", highlight=False)
        write_json({"command": "rm", "store": store, "stays": opened.identity}, to_json)
        return
    with writing(store, "run the same command again", "path"), files_at(store).only_writer():
        opened.remove()
        forget(opened)
        void(store)
        # While the lock is held: a writer that opened the file meanwhile sees that it is gone, and refuses.
        if not is_url(store):
            Path(f"{Path(store)}.lock").unlink(missing_ok=True)
    screen.print(f"removed {shown(store)}")
    write_json({"command": "rm", "store": store}, to_json)


app.command()(demo)
app.command()(new)

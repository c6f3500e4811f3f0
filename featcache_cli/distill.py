"""`distill`: stage two."""

import inspect
import json
import math
import os
import re
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from featcache_cli.flags import plugin_option, takes
from featcache_cli.mapping import mapping
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
from featcache_cli.runs import ls, watch
from featcache_cli.screen import (
    Device,
    DeviceOption,
    DryRun,
    Json,
    ListsPlugins,
    TrustCode,
    Workers,
    bar,
    duration,
    make_table,
    program,
    rate,
    results,
    screen,
    shown,
    would,
    write_json,
)
from featcache_cli.speed import speed
from featcache_cli.sweep import sweep

METHOD = "centred"
"""The default, here too so that `--help` need not import PyTorch."""

app = program("distill", "Stage two: train small students against the kept features.")


_OPTIONS = "featcache.method_options"


class _WithMethod(ListsPlugins):
    """Where `--method NAME` is given, the options of that method are flags too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        taken = {each for param in self.params for each in param.opts}
        ctx.meta[_WithMethod] = [option for option in _method_flags(_method_in(args)) if option.opts[0] not in taken]
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        return [*super().get_params(ctx), *ctx.meta.get(_WithMethod, ())]


def _method_in(args: list[str]) -> str:
    """The method that a command line names; "" where it names none."""
    given = [after for flag, after in zip(args, [*args[1:], ""], strict=True) if flag == "--method"]
    return (given + [each.partition("=")[2] for each in args if each.startswith("--method=")] or [""])[-1]


def _method_flags(name: str) -> list[Any]:
    """A flag for every option of the method; what it is given goes where --set KEY=VALUE goes."""
    if not name:
        return []
    import distill

    def keep(context: typer.Context, param: typer.CallbackParam, value: str | None) -> None:
        if value is not None:
            context.meta.setdefault(_OPTIONS, {})[param.name] = f"{param.name}={value}"

    flags = [
        plugin_option(
            key, f"method {name}", each["what"], "" if each["default"] is None else json.dumps(each["default"]),
            expose_value=False, callback=keep,
        )
        for key, each in _described(distill.load_method(name)).items()
        if key not in ("teacher_dim", "student_dim")
    ]  # fmt: skip
    of_them = typer.Typer(add_completion=False)
    of_them.command()(takes(lambda: None, flags))
    return [param for param in typer.main.get_command(of_them).params if param.name != "help"]


class TrainingPrecision(StrEnum):
    auto, fp32, bf16 = "auto", "fp32", "bf16"


@app.command(cls=_WithMethod)
def fit(
    context: typer.Context,
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
        typer.Option(
            metavar="SPEC",
            help="tiny[:FILE], timm/NAME[:WEIGHTS], open_clip/NAME[:CHECKPOINT], run:FOLDER[@epoch=N], run:hf-hub:USER/NAME "
            "or MODULE:CALLABLE; of texts bag/DIM, gru/DIM, transformers/CONFIG.json. "
            "Libraries: {featcache.models}.",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="One of {distill.methods}; see `distill methods`.", show_default=METHOD)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.", show_default="100")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step.", show_default="256")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="0.003 × √(batch size / 256)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and mapping.", show_default="0")] = None,
    device: DeviceOption = Device.auto,
    precision: Annotated[
        TrainingPrecision | None, typer.Option(help="'auto' is bf16 on a GPU, else fp32.", show_default="auto")
    ] = None,
    any_precision: Annotated[
        bool, typer.Option("--any-precision", help="Train on stores in different precisions of one teacher.")
    ] = False,
    workers: Workers = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in RUN, as its config.toml says.")] = False,
    config: Annotated[
        Path | None, typer.Option(metavar="RUN.TOML", help="Start from a run's config.toml; flags win over it.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting or method option; see `distill settings`."),
    ] = None,
    trust_code: TrustCode = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Train a student so that it behaves like the teacher.

    [dim]distill fit --store teacher.zarr --corpus photos/ --student timm/resnet18 --out runs/a[/dim]
    [dim]distill fit --store a.zarr --corpus a/ --store b.zarr --corpus b/ --student tiny --out runs/b[/dim]
    [dim]distill fit --store a.zarr --student tiny --out runs/c --set mapping=orthogonal --set ema=0.999 --set views=plain[/dim]
    [dim]distill fit --out runs/a --resume[/dim]
    [dim]distill fit --config runs/a/config.toml --method proteus --out runs/d[/dim]
    [dim]torchrun --nproc-per-node 8 --no-python distill fit --config runs/a/config.toml --out runs/e[/dim]

    `distill settings` lists every KEY of --set, with its default; `distill fit --method NAME --help` has NAME's options.
    """
    import distill
    from distill.training.run import Run

    first_process = os.environ.get("RANK", "0") == "0"  # of those that torchrun started: it alone tells
    screen.quiet = not first_process
    if resume and config is None and out and (out / "config.toml").exists():
        config = out / "config.toml"
    flags = {
        "store": _one_or_all(store), "corpus": _one_or_all(corpus), "out": out, "student": student, "method": method,
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
        "precision": precision.value if precision else None, "any_precision": any_precision or None,
    }  # fmt: skip
    given = _given(config, flags, [*(settings or ()), *context.meta.get(_OPTIONS, {}).values()], trust_code)
    if resume and out and not given.get("store") and not (out / "config.toml").exists():
        raise ValueError(f"{out}: holds no run to resume (config.toml); begin one with --store and --student")
    missing = [f"--{name}" for name in ("store", "out", "student") if name not in given]
    if missing:
        raise typer.BadParameter(f"give {', '.join(missing)}")
    finished_before = Run(given["out"]).finished
    if dry_run:
        with screen.status("first images"):
            plan = distill.preview(
                given.pop("store"),
                given.pop("corpus", None),
                device=device.value,
                workers=workers,
                resume=resume,
                trust_code=trust_code,
                **given,
            )
        _announce_fit(plan)
        if finished_before:
            screen.print(f"nothing is left to train: {shown(given['out'])} is finished", highlight=False)
        would("fit", {"run": str(given["out"]), **asdict(plan), "bytes": plan.bytes_to_write}, to_json)
        return
    with bar("fit", "steps") as update:

        def show(at: Any) -> None:
            rest = f"{rate(at.images_per_second)} images/s · waits {at.wait:.0%}" if at.stage == "training" else ""
            if at.terms:
                terms = " + ".join(f"{name} {value:.4f}" for name, value in at.terms.items())
                rest = f"loss {at.loss:.4f} · {rest}" + (f" · {terms}" if len(at.terms) > 1 else "")
            update(at.done, at.total, rest, at.stage)

        run = distill.fit(
            given.pop("store"),
            given.pop("corpus", None),
            device=device.value,
            workers=workers,
            resume=resume,
            trust_code=trust_code,
            announce=_announce_fit,
            progress=show,
            **given,
        )
    if not first_process:
        return
    _say_fitted(run, finished_before)
    write_json({"command": "fit", "run": str(run.path), "config": run.config, "metrics": run.metrics[-1]}, to_json)


def _given(config: Path | None, flags: dict[str, Any], settings: list[str], trust_code: bool) -> dict[str, Any]:
    """The arguments of `distill.fit`, from a run's config.toml; flags win over it, and `settings`, KEY=VALUE, over these.
    Refuses code that the file alone names, unless it is trusted."""
    from featcache.specs import refuse_code, refuse_code_of_corpora

    given = _read_config(config) if config else {}
    method, options, student = given.get("method", METHOD), given.pop("method_options", {}), given.get("student")
    given |= {key: value for key, value in flags.items() if value is not None}
    for setting in settings:
        _set(given, setting)
    if flags["student"] is None and given.get("student") == student:
        refuse_code(config, student, trust_code)
    if flags["corpus"] is None:
        refuse_code_of_corpora(config, given.get("corpus"), trust_code)
    if given.get("method", METHOD) == method:  # another method has other options
        given["method_options"] = {**options, **given.get("method_options", {})}
    return given


def _say_fitted(run: Any, finished_before: bool) -> None:
    """How the run ended: its loss, what was held out, and what its mapping kept."""
    final = run.metrics[-1]
    speed = f"{rate(final['images_per_second'])} images/s"
    screen.print(
        f"[green]finished{' before' if finished_before else ''}[/] {shown(run.path)}: loss {final['loss']:.4f} after "
        f"{final['epoch']} epochs, {'nothing is left to train' if finished_before else speed}"
    )
    if "holdout/gram_pearson" in final:
        named = {name.partition("/")[2]: value for name, value in final.items() if name.startswith("holdout/")}
        screen.print("held-out samples: " + ", ".join(f"{name} {value:.4f}" for name, value in named.items()))
    if "mapping/deviation" in final:
        loss = ""
        if "mapping/sne_start" in final:
            loss = f"SNE loss {final['mapping/sne_start']:.4f} → {final['mapping/sne']:.4f}, "
        if "mapping/lifted_from" in final:
            loss = f"lifted from the teacher's {final['mapping/lifted_from']:,.0f} dimensions, all angles kept; "
        screen.print(
            f"mapping: {loss}singular values {final['mapping/singular_min']:.2f}–{final['mapping/singular_max']:.2f}, "
            f"deviation from orthogonal {final['mapping/deviation']:.3f}"
        )
    if (run.path / "head.safetensors").exists():
        screen.print(f"its classifier: {shown(run.path / 'head.safetensors')}, for `--head` of evalsuite's commands")
    screen.print(f"embed with it: featcache extract CORPUS --teacher run:{shown(run.path)}")


@app.command()
def methods(to_json: Json = None) -> None:
    """The methods there are, a line each.

    [dim]distill methods[/dim]
    """
    from distill import load_method
    from featcache.plugins import plugin_names

    described = {name: (load_method(name).__doc__ or "").splitlines()[0] for name in plugin_names("distill.methods")}
    if to_json != "-":
        table = make_table("", "method", "what it does")
        for name, line in described.items():
            table.add_row(name, shown(line))
        results.print(table)
    write_json({"command": "methods", "methods": described}, to_json)


@app.command(cls=ListsPlugins)
def settings(
    method: Annotated[str, typer.Option(help="Whose options to list: {distill.methods}.")] = METHOD,
    to_json: Json = None,
) -> None:
    """What `distill fit --set KEY=VALUE` takes, with defaults: its settings and the options of a method.

    [dim]distill settings --method tintem[/dim]
    """
    import distill

    made = distill.load_method(method)
    listed = {
        "settings": _described(distill.FitConfig) | _described(distill.fit, *_OF_PROCESS),
        "options": _described(made),
    }
    for name in ("teacher_dim", "student_dim"):
        listed["options"].pop(name, None)
    listed["settings"].pop("method_options")
    if to_json != "-":
        for title, of in (("settings", listed["settings"]), (f"options of method {method}", listed["options"])):
            table = make_table(title, "KEY = default", "what it is")
            for name, each in of.items():
                default = "" if each["default"] is None else f" = {json.dumps(each['default'])}"
                table.add_row(shown(name + default), shown(each["what"]))
            results.print(table)
    write_json({"command": "settings", "method": method, **listed}, to_json)


class RunFormat(StrEnum):
    safetensors, onnx = "safetensors", "onnx"


class ExportPrecision(StrEnum):
    fp32, fp16, int8 = "fp32", "fp16", "int8"


class CalibrationMethod(StrEnum):
    percentile, minmax, entropy = "percentile", "minmax", "entropy"


@app.command("export")
def export_run(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, FOLDER@epoch=N, or run:hf-hub:USER/NAME[@REVISION].")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")],
    format: Annotated[
        RunFormat, typer.Option(help="safetensors for plain timm or torch; ONNX for any batch size.")
    ] = RunFormat.safetensors,
    precision: Annotated[
        ExportPrecision,
        typer.Option(
            help="fp16: float16 weights; ONNX computes in it too, between float32 ends. int8: of ONNX, in whole numbers."
        ),
    ] = ExportPrecision.fp32,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="CORPUS", help="For int8: images like those it will see; others of them measure the loss."
        ),
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="At most so many calibrate, and as many measure.", show_default="256")
    ] = None,
    calibration_method: Annotated[
        CalibrationMethod | None,
        typer.Option(
            help="The range that counts: of 99.999 % of the numbers seen, all of them, or where least is lost.",
            show_default="percentile",
        ),
    ] = None,
    calibration_seed: Annotated[int | None, typer.Option(help="Chooses the images.", show_default="0")] = None,
    any_loss: Annotated[
        bool, typer.Option("--any-loss", help="Keep an int8 file however far from the student.")
    ] = False,
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing",
            help="ONNX takes uint8 RGB images (batch, height, width, 3) of any size: resize, crop and normalisation are in the graph.",
        ),
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="The student of the newest checkpoint, where a run is not finished.")
    ] = False,
    result: Annotated[
        list[Path] | None,
        typer.Option(metavar="RESULT.json", help="Of evalsuite, for the model card; repeat for more."),
    ] = None,
    trust_code: TrustCode = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Write a student as files that load without featcache, with a model card.

    [dim]distill export runs/a student/ --format onnx --result knn.json[/dim]
    [dim]distill export runs/a small/ --format onnx --precision int8 --calibration photos/[/dim]
    """
    import distill
    from distill.exporting.export import preview

    asked = {
        "images": calibration_images,
        "method": calibration_method.value if calibration_method else None,
        "seed": calibration_seed,
    }
    settings: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if settings and calibration is None:
        raise typer.BadParameter("give --calibration CORPUS, whose images these choose from")
    calibrating = distill.Calibration(corpus=calibration, **settings) if calibration is not None else None
    given: dict[str, Any] = {
        "format": format.value, "precision": precision.value, "with_preprocessing": with_preprocessing,
        "unfinished": unfinished, "trust_code": trust_code, "results": result or [], "calibration": calibrating,
        "any_loss": any_loss,
    }  # fmt: skip
    if dry_run:
        size = preview(run, out, **given)
        screen.print(f"would export {shown(out)}: {format.value}, {precision.value}, {size / 1e6:,.1f} MB of weights")
        would("export", {"run": str(run), "out": str(out), "format": format.value, "bytes": size}, to_json)
        return
    with screen.status(f"exporting to {format.value}"):
        made = distill.export(run, out, **given)
    found = (
        f"loaded again, it differs from the student by at most {made.max_difference:.1e} of an embedding's length"
        if made.loss is None
        else shown(made.loss)
    )
    screen.print(f"[green]exported[/] {shown(made.path)}: {', '.join(made.files)}; {found}", highlight=False)
    summary = {
        "run": str(run),
        "out": str(made.path),
        "format": format.value,
        "precision": precision.value,
        "files": list(made.files),
    }
    loss = {"loss": asdict(made.loss)} if made.loss else {}
    write_json({"command": "export", **summary, "max_difference": made.max_difference, **loss}, to_json)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or FOLDER@epoch=N.")],
    repository: RepositoryName,
    private: Private = False,
    revision: Revision = "",
    message: Message = "",
    licence: Licence = None,
    overwrite: Overwrite = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="The student of the newest checkpoint, where a run is not finished.")
    ] = False,
    result: Annotated[
        list[Path] | None,
        typer.Option(metavar="RESULT.json", help="Of evalsuite, for the model card; repeat for more."),
    ] = None,
    trust_code: TrustCode = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Push a student to the Hugging Face hub, with a model card; `run:hf-hub:USER/NAME` reads it wherever a run folder is read.

    The token is the hub's own: HF_TOKEN, or what `hf auth login` left.

    [dim]distill push runs/a USER/NAME --private[/dim]
    [dim]distill push runs/a USER/NAME --revision v2 --message "100 epochs more" --result knn.json[/dim]
    """
    import distill
    from distill.exporting.push import preview_push

    if dry_run:
        place, size = preview_push(run, repository, revision=revision, unfinished=unfinished, trust_code=trust_code)
        screen.print(f"would push {shown(run)} to {shown(place)}: {size / 1e6:,.1f} MB of weights", highlight=False)
        would("push", {"run": str(run), "repository": place.name, "bytes": size}, to_json)
        return
    screen.print(f"pushing {shown(run)} to {shown(repository)}", highlight=False)
    pushed = distill.push(
        run, repository, private=private, revision=revision, message=message, licence=licence, overwrite=overwrite,
        unfinished=unfinished, trust_code=trust_code, results=result or [],
    )  # fmt: skip
    say_pushed(pushed)
    code = pushed.hub_code.splitlines()
    how = (
        f"loads with timm: {code[-1].removeprefix('model = ')}"
        if code
        else "loads with the code in its README.md, not by timm"
    )
    screen.print(shown(how), highlight=False)
    screen.print(
        f"embed with it: featcache extract CORPUS --teacher run:hf-hub:{shown(pushed.repository)}", highlight=False
    )
    write_json(
        {"command": "push", "run": str(run), **push_summary(pushed), "hub_code": pushed.hub_code or None}, to_json
    )


app.command()(sweep)
app.command()(ls)
app.command()(watch)
app.command()(speed)
app.command(cls=ListsPlugins)(mapping)


_OF_PROCESS = ("checkpoint_minutes", "trackers")
"""What `distill.fit` takes besides the fields of FitConfig and what has a flag."""


def _read_config(path: Path) -> dict[str, Any]:
    """The config.toml of a run, as keyword arguments of `distill.fit`."""
    from distill import FitConfig
    from distill.sweep import ANY, PATHS, TABLE, TEXT, check_keys, read_toml
    from featcache.specs import naming

    given = {
        key: value for key, value in read_toml(path).items() if key not in ("teacher", "store_digest", "head_digest")
    }
    keys = {**dict.fromkeys((*FitConfig.__dataclass_fields__, *_OF_PROCESS), ANY), "method": TEXT}
    with naming(path):
        check_keys(given, {**keys, **PATHS, "method_options": TABLE})
        leading = {
            key: given[key] for key in ("epochs", "batch_size", "optimizer", "schedule", "milestones") if key in given
        }
        followed = FitConfig(student="", **leading)
    for key in ("lr", "warmup_epochs", "weight_decay"):  # follows again, from what the flags make of these
        if given.get(key) == getattr(followed, key):
            given.pop(key, None)
    return given


def _described(made: Any, *names: str) -> dict[str, dict[str, Any]]:
    """Of each argument, or of `names`: its "default" (None for none) and "what" the docstring says of it, its own or of a
    class that it extends."""
    said: dict[str, str] = {}
    for each in reversed(getattr(made, "__mro__", (made,))):
        for keys, text in re.findall(r"^ {4}([\w, ]+): (.+(?:\n {8}.+)*)", inspect.getdoc(each) or "", re.MULTILINE):
            said.update(dict.fromkeys(keys.split(", "), " ".join(text.split())))
    arguments = inspect.signature(made).parameters
    defaults = {name: None if each.default is each.empty else each.default for name, each in arguments.items()}
    return {name: {"default": defaults[name], "what": said.get(name, "")} for name in names or defaults}


def _one_or_all(given: list[str] | None) -> str | list[str] | None:
    return given[0] if given and len(given) == 1 else given or None


def _announce_fit(plan: Any) -> None:
    left_out = f", {plan.failed:,} failed rows left out" if plan.failed else ""
    held_out = f", {plan.held_out:,} held out for evaluation" if plan.held_out else ""
    held_out += f" (and {plan.copies:,} copies of these images left out)" if plan.copies else ""
    screen.print(f"{plan.samples:,} samples{left_out}{held_out}; views: {plan.views}")
    screen.print(f"pixels: {shown(plan.pixels)}", highlight=False)
    shared = f", shared by {plan.processes} processes" if plan.processes > 1 else ""
    done = f", {plan.done:,} of them done" if plan.done else ""
    screen.print(
        f"student of {plan.student_weights / 1e6:,.2f} M weights; {plan.steps:,} steps{done}{shared}; "
        f"checkpoints of {plan.checkpoint_bytes / 1e6:,.1f} MB"
    )
    if plan.classes:
        names = ", ".join(plan.classes[:3]) + (", …" if len(plan.classes) > 3 else "")
        none = f"; {plan.unlabelled:,} samples have no label" if plan.unlabelled else ""
        screen.print(f"classifier: {len(plan.classes):,} classes ({shown(names)}){none}", highlight=False)
    if plan.snapshots:
        each = f"{plan.snapshot_bytes / 1e6:,.1f} MB"
        screen.print(f"students kept on the way: {plan.snapshots:,} of {each}", highlight=False)
    if plan.input:
        speed = f"about {duration(plan.seconds)}, by a few images" if math.isfinite(plan.seconds) else "time unknown"
        screen.print(
            f"input: {shown(plan.input)} · {plan.precision} · at most {plan.bytes_to_write / 1e6:,.1f} MB on the disk · {speed}",
            highlight=False,
        )
    if plan.expected:
        screen.print(f"expected: {plan.expected}")


def _set(given: dict[str, Any], setting: str) -> None:
    """Put `key=value` (the value in TOML, True or False, or a bare word) where `distill.fit` looks for it."""
    from distill import FitConfig
    from distill.training.config import method_options
    from featcache.plugins import plugin_names, suggest
    from featcache.specs import value_in

    key, equals, text = (part.strip() for part in setting.partition("="))
    if not (key and equals and text):
        raise ValueError(f"--set {setting}: --set takes KEY=VALUE, such as --set ema=0.999")
    method = str(given.get("method", METHOD))
    options = method_options(method)
    if text.lower() == "none" and options.get(key) is not str:  # of which "none" may be one, as of `own` of landmarks
        raise ValueError(f"--set {setting}: None is no value; leave the setting out for its default")
    value = value_in(text)
    settings = {*FitConfig.__dataclass_fields__, *_OF_PROCESS} - {"method_options"}
    if key == "trackers":
        value = [value] if isinstance(value, str) else value
    if key in options:  # first: some have an option `head`, which is a setting of the others
        given["method_options"] = {**given.get("method_options", {}), key: value}
    elif key in settings:
        given[key] = value
    else:
        others = [name for name in plugin_names("distill.methods") if key in method_options(name)]
        remedy = f"it is an option of {', '.join(others)}" if others else suggest(key, {*settings, *options})
        raise ValueError(f"--set {setting}: method {method} has no such setting; {remedy}")

"""`distill`: stage two."""

import json
import math
import os
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from commands.screen import HELP, Device, DeviceOption, Json, Workers, bar, make_table, results, screen, write_json

app = typer.Typer(help="Stage two: train small students against the kept features.", **HELP)


class TrainingPrecision(StrEnum):
    auto, fp32, bf16 = "auto", "fp32", "bf16"


@app.command()
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
    write_json({"command": "fit", "run": str(run.path), "config": run.config, "metrics": final}, to_json)


@app.command()
def methods(to_json: Json = None) -> None:
    """The methods there are, a line each."""
    from distill import load_method
    from featcache.plugins import plugin_names

    described = {name: (load_method(name).__doc__ or "").splitlines()[0] for name in plugin_names("distill.methods")}
    if to_json != "-":
        table = make_table("", "method", "what it does")
        for name, line in described.items():
            table.add_row(name, line)
        results.print(table)
    write_json({"command": "methods", "methods": described}, to_json)


class RunFormat(StrEnum):
    safetensors, onnx = "safetensors", "onnx"


@app.command("export")
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
    write_json({"command": "export", **summary, "max_difference": made.max_difference}, to_json)


@app.command()
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
        shown = make_table(str(folder), *header)
        for line in body:
            shown.add_row(*line)
        results.print(shown)
    write_json({"command": "sweep", "out": str(folder), "failed": failed, **table}, to_json)
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

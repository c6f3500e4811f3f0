"""`evalsuite`: the evaluators."""

import json
import os
import pkgutil
import re
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from commands.screen import (
    HELP,
    Device,
    DeviceOption,
    Json,
    Workers,
    bar,
    make_table,
    results,
    screen,
    shown,
    writable,
    write_json,
)

app = typer.Typer(help="Evaluate teachers and students from their stores.", **HELP)


Resamples = Annotated[int, typer.Option(min=1, help="Bootstrap resamples behind each interval.")]


class _ListsDetectors(TyperCommand):
    """A command whose help ends with the names of the detectors: `detectors.names()`, without importing evaluators."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        own = pkgutil.iter_modules([str(Path(__file__).parents[1] / "evalsuite" / "detectors")])
        names = {each.name for each in own if each.name[0] != "_"}
        names |= {each.name for each in entry_points(group="evalsuite.detectors")}
        self.epilog = f"Detectors: {', '.join(sorted(names))}."
        super().format_help(ctx, formatter)


class Preset(StrEnum):
    dinov2, cospress = "dinov2", "cospress"


@app.command()
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
    """k-nearest-neighbour classification: micro (top1, top5) and macro accuracy.

    [dim]evalsuite knn --bank train.zarr --query test.zarr --k 10,20 --json knn.json[/dim]
    """
    import evalsuite

    with screen.status("searching"):
        result = evalsuite.knn(
            bank,
            query,
            None if k is None else _integers(k, "--k"),
            temperature,
            preset=preset.value,
            shots=shots,
            index=index,
            seed=seed,
        )
    _show(result, to_json)


@app.command(cls=_ListsDetectors)
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
            help="Repeat for more; NAME:k=1 sets an argument, mcm:text=names.npy the class names' embeddings. Names: below.",
            show_default="knn",
        ),
    ] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Neighbours, for detectors that use them.", show_default="50")
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="FILE", help="A classifier, for detectors that need one: `evalsuite probe`'s.")
    ] = None,
    resamples: Resamples = 1000,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    to_json: Json = None,
) -> None:
    """How well detectors tell ID images from others. AUROC 0.5 is chance, 1 is perfect.

    [dim]evalsuite ood --id-train train.zarr --id-test test.zarr --near tin=tin.zarr --detector knn --detector rmd[/dim]
    [dim]evalsuite ood --preset openood-cifar10 --stores stores/ --detector knn[/dim]
    """
    if preset is None and stores is None:
        if id_train is None or id_test is None:
            raise typer.BadParameter("give --id-train STORE and --id-test STORE, or --preset NAME and --stores FOLDER")
        if not (near or far):
            raise typer.BadParameter("no OOD set was given; give --near NAME=STORE or --far NAME=STORE")
    elif preset is None or stores is None or id_train or id_test or near or far:
        raise typer.BadParameter(
            "--preset NAME and --stores FOLDER go together, without --id-train, --id-test, --near and --far"
        )
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
            resamples=resamples,
            seed=seed,
        )
    _show(result, to_json)


@app.command()
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
    """How faithfully a student keeps the teacher's angles between images, its neighbours and its votes.

    [dim]evalsuite fidelity --teacher teacher.zarr --student student.zarr --mapping runs/a/mapping.safetensors[/dim]
    """
    import evalsuite

    with screen.status("comparing"):
        result = evalsuite.fidelity(
            teacher, student, k=k, mapping=mapping, teacher_bank=teacher_bank, student_bank=student_bank, seed=seed
        )
    _show(result, to_json)


@app.command()
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
        str | None,
        typer.Option(
            metavar="HEAD.safetensors", help="Keep the classifier, for detectors that need one.", callback=writable
        ),
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
        result = evalsuite.probe(
            train, test, save=save, device=device.value, seed=seed,
            progress=lambda done, of: update(done, of, "choosing C" if done < of - 1 else "with the chosen C"), **given,
        )  # fmt: skip
    screen.print(f"C = {result.parameters['c']:g}, {result.parameters['steps']} steps", highlight=False)
    _show(result, to_json)


@app.command()
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
    pgd_steps: Annotated[int | None, typer.Option(min=1, help="Of each attack.", show_default="20")] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="RESULT.json", help="Another encoder's result, that errors are relative to: mce."),
    ] = None,
    workers: Workers = None,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make all stores in --out anew.")] = False,
    seed: Annotated[int, typer.Option(help="Of the intervals, and where --pgd starts.")] = 0,
    to_json: Json = None,
) -> None:
    """Accuracy, and AUROC, on corrupted images. Run it again to resume: finished stores are not made again.

    [dim]evalsuite robustness --encoder run:runs/a --corpus photos-test/ --bank student.zarr --out runs/a/corrupted[/dim]
    """
    if pgd_steps and not pgd:
        raise ValueError(f"--pgd-steps {pgd_steps}: nothing is attacked; give --pgd EPS too")
    import evalsuite

    sets = {group: _named_stores(stores or [], f"--{group}") for group, stores in (("near", near), ("far", far))}
    with bar("robustness", "images") as update:
        result = evalsuite.robustness(
            encoder, corpus, bank, out, corruptions=corruptions if corruptions == "all" else corruptions.split(","),
            severities=_range(severity, "--severity"), size=size, k=k, near=sets["near"], far=sets["far"],
            detectors=detector or ["knn"], head=head, pgd=() if pgd is None else _numbers(pgd, "--pgd"), pgd_steps=pgd_steps or 20,
            reference=reference, workers=workers, device=device.value, overwrite=overwrite, seed=seed, progress=update,
        )  # fmt: skip
    _show(result, to_json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A.json", help="A result of knn, probe, ood or robustness: --json.")],
    b: Annotated[str, typer.Argument(metavar="B.json", help="Another of the same command, on the same samples.")],
    resamples: Resamples = 1000,
    seed: Annotated[int, typer.Option(help="Of the intervals.")] = 0,
    to_json: Json = None,
) -> None:
    """Is B better than A? The difference of every metric, with an interval over the samples that both have.

    [dim]evalsuite compare teacher-ood.json student-ood.json[/dim]
    """
    import evalsuite

    _require_no_input(to_json, [a, b])
    with screen.status("comparing"):
        result = evalsuite.compare(a, b, resamples=resamples, seed=seed)
    _show(result, to_json)


@app.command()
def report(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RESULT.json …",
            help="Results of any command; NAME is shown for their encoder ('teacher' marks the teacher).",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PAGE.html", help="The page to write.", callback=writable)] = Path(
        "report.html"
    ),
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
    _require_no_input(to_json, paths)
    page = evalsuite.report(paths, out, names=names, title=title)
    screen.print(f"[green]written[/] {shown(page)}: {len(paths)} results, {page.stat().st_size / 1e6:.1f} MB")
    write_json({"command": "report", "out": str(page), "results": paths, "bytes": page.stat().st_size}, to_json)


def _require_no_input(to_json: str | None, read: list[str]) -> None:
    if to_json and to_json != "-":
        from evalsuite.result import refuse_inputs

        refuse_inputs(to_json, read)


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
        raise typer.BadParameter(f"{flag} {text or repr(text)}: give whole numbers, separated by commas") from None


def _range(text: str, flag: str) -> list[int]:
    """`1-5`, or a comma list."""
    ends = re.fullmatch(r"(\d+)-(\d+)", text)
    return list(range(int(ends[1]), int(ends[2]) + 1)) if ends else _integers(text, flag)


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text or repr(text)}: give numbers, separated by commas") from None


def _show(result: Any, to_json: str | None) -> None:
    if to_json != "-":
        tables = {"ood": _ood_table, "robustness": _robustness_table, "compare": _comparison_table}
        results.print(tables.get(result.command, _metric_table)(result))
    if to_json not in (None, "-"):
        result.write(to_json)  # and, beside it, what was measured of each sample
    else:
        write_json(json.loads(result.to_json()), to_json)


def _metric_table(result: Any) -> Table:
    """A row a metric, with what chance would reach; below, the three classes of the lowest values (the rest: JSON)."""
    chance = result.parameters.get("chance", {})
    table = make_table(result.command, "metric", "value", "chance", "95 % interval")
    overall = {name: metric for name, metric in result.metrics.items() if not name.startswith("per_class/")}
    for name, metric in overall.items():
        interval = f"{metric.ci95[0]:.4f}–{metric.ci95[1]:.4f}" if metric.ci95 else ""
        table.add_row(shown(name), f"{metric.value:.4f}", f"{chance[name]:.4f}" if name in chance else "", interval)
    lowest = []
    for what in overall:
        classes = [
            (metric.value, name.removeprefix("per_class/").removesuffix(f"/{what}"))
            for name, metric in result.metrics.items()
            if name.startswith("per_class/") and name.endswith(f"/{what}")
        ]
        if classes:
            named = ", ".join(f"{name} {value:.4f}" for value, name in sorted(classes)[:3])
            lowest.append(shown(f"lowest {what}: {named}"))
    table.caption = "\n".join(lowest) or None
    table.caption_justify = "left"
    return table


def _filled(title: str, columns: list[str], rows: list[list[str]], longest: int = 10_000) -> Table:
    """The rows as a table, their names folded after slashes where they are longer than `longest`."""
    table = make_table(title, *columns)
    table.collapse_padding = True
    for name, *values in rows:
        lines = [""]
        for part in re.findall(r"[^/]*/|[^/]+", name):
            if lines[-1] and len(lines[-1] + part) > longest:
                lines.append("")
            lines[-1] += part
        table.add_row("\n".join(map(shown, lines)), *values)
    return table


def _folded(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """The rows as a table, their names folded as far as the terminal's width wants it."""
    excess = _excess(_filled(title, columns, rows))
    longest = max(len(name) for name, *_ in rows)
    return _filled(title, columns, rows, longest - excess) if excess > 0 else _filled(title, columns, rows)


def _excess(table: Table) -> int:
    """By how many characters the table is wider than the terminal."""
    return results.measure(table, options=results.options.update(max_width=10_000)).maximum - results.width


def _comparison_table(result: Any) -> Table:
    """A row a metric; below, what differs in the settings, what was not compared, and how many samples were paired."""
    given = result.parameters
    rows = []
    for name, metric in result.metrics.items():
        interval = f"{metric.ci95[0]:+.4f} to {metric.ci95[1]:+.4f}"
        verdict = given["verdicts"][name]
        rows.append([
            name, f"{given['a'][name]:.4f}", f"{given['b'][name]:.4f}", f"{metric.value:+.4f}", interval,
            f"[bold]{verdict}[/]" if verdict.endswith("better") else "–",
        ])  # fmt: skip
    table = _folded(
        f"A: {result.inputs['a']['path']}   B: {result.inputs['b']['path']}",
        [given["command"], "A", "B", "B − A", "95 % interval", "verdict"],
        rows,
    )
    said = ["–: no difference shown"]
    if given["differing"]:
        said.append(f"A and B differ in: {'; '.join(given['differing'])}")
    if left := given["not_compared"]:
        more = f", and {len(left) - 6} more: --json has them" if len(left) > 6 else ""
        said.append(f"not compared: {', '.join(left[:6])}{more}")
    for name, count in given["samples"].items():
        left_out = count["only_a"] + count["only_b"]
        said.append(
            f"{name}: {count['paired']:,} samples"
            + (f", left out {count['only_a']:,} only in A and {count['only_b']:,} only in B" if left_out else "")
        )
    table.caption, table.caption_justify = "\n".join(map(shown, said)), "left"
    return table


def _ood_table(result: Any) -> Table:
    """A row a detector and set, a column a metric, and the AUROC's interval where there is room."""
    rows: dict[str, dict[str, str]] = {}
    for name, metric in result.metrics.items():
        where, _, what = name.rpartition("/")
        rows.setdefault(where, {})[what] = f"{metric.value:.4f}"
        if what == "auroc":
            rows[where]["95 %_interval"] = f"{metric.ci95[0]:.4f}–{metric.ci95[1]:.4f}"
    settings = "; ".join(
        " ".join([spec, *(f"{name}={value}" for name, value in given.items())])
        + (" (failed)" if spec in result.parameters["failed_detectors"] else "")
        for spec, given in result.parameters["detectors"].items()
    )
    columns = ["ood", *(column.replace("_", "\n") for column in next(iter(rows.values())))]
    cells = [[where, *values.values()] for where, values in rows.items()]
    table = _filled(settings, columns, cells)
    if _excess(table) > 0:
        at = columns.index("95 %\ninterval")
        for each in (columns, *cells):
            del each[at]
        table = _folded(settings, columns, cells)
        table.caption, table.caption_justify = "95 % intervals are in the JSON: --json PATH", "left"
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
    return _folded(
        "robustness",
        ["", *levels],
        [[row, *(values.get(level, "") for level in levels)] for row, values in rows.items()],
    )

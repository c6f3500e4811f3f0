"""`evalsuite`: the evaluators."""

import os
import pkgutil
import re
from collections.abc import Sequence
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from featcache_cli.result_tables import show
from featcache_cli.screen import (
    Device,
    DeviceOption,
    Json,
    TrustCode,
    Workers,
    bar,
    program,
    screen,
    shown,
    writable,
    write_json,
)

app = program("evalsuite", "Evaluate teachers and students from their stores.")


DropIdentical = Annotated[
    bool,
    typer.Option(
        "--drop-identical",
        help="Leave out images that the other side has too (by their hashes; where a store has none, by the very same embedding).",
    ),
]
AnyPrecision = Annotated[
    bool,
    typer.Option(
        "--any-precision", help="Compare stores in whatever precision they were made and kept; the result says so."
    ),
]
Resamples = Annotated[int, typer.Option(min=1, hidden=True, help="No effect: intervals are no longer drawn at random.")]


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
    drop_identical: DropIdentical = False,
    any_precision: AnyPrecision = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the few-shot draw.")] = 0,
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
            drop_identical=drop_identical,
            any_precision=any_precision,
            seed=seed,
        )
    show(result, to_json)


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
    drop_identical: DropIdentical = False,
    any_precision: AnyPrecision = False,
    seed: Annotated[int, typer.Option(min=0, hidden=True, help="No effect, as --resamples.")] = 0,
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

    _keep_apart([to_json], [head])
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
            drop_identical=drop_identical,
            any_precision=any_precision,
            seed=seed,
        )
    show(result, to_json)


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
    drop_identical: DropIdentical = False,
    any_precision: AnyPrecision = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample of rows and of the chance levels.")] = 0,
    to_json: Json = None,
) -> None:
    """How faithfully a student keeps the teacher's angles between images, its neighbours and its votes.

    [dim]evalsuite fidelity --teacher teacher.zarr --student student.zarr --mapping runs/a/mapping.safetensors[/dim]
    """
    import evalsuite

    _keep_apart([to_json], [mapping])
    with screen.status("comparing"):
        result = evalsuite.fidelity(
            teacher,
            student,
            k=k,
            mapping=mapping,
            teacher_bank=teacher_bank,
            student_bank=student_bank,
            drop_identical=drop_identical,
            any_precision=any_precision,
            seed=seed,
        )
    show(result, to_json)


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
    drop_identical: DropIdentical = False,
    any_precision: AnyPrecision = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows that choose C.")] = 0,
    to_json: Json = None,
) -> None:
    """Logistic regression on the kept embeddings.

    [dim]evalsuite probe --train teacher.zarr --test teacher-test.zarr --save head.safetensors[/dim]
    """
    import evalsuite

    _keep_apart([save, to_json], [])
    given: dict[str, Any] = {} if c is None else {"c": _numbers(c, "--c")}
    with bar("probe", "fits") as update:
        result = evalsuite.probe(
            train, test, save=save, device=device.value, drop_identical=drop_identical, any_precision=any_precision, seed=seed,
            progress=lambda done, of: update(done, of, "choosing C" if done < of - 1 else "with the chosen C"), **given,
        )  # fmt: skip
    screen.print(f"C = {result.parameters['c']:g}, {result.parameters['steps']} steps", highlight=False)
    show(result, to_json)


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
        str | None, typer.Option(metavar="FILE", help="A classifier, for detectors and attacks: `evalsuite probe`'s.")
    ] = None,
    pgd: Annotated[
        str | None,
        typer.Option(metavar="EPS,…", help="Attack encoder and --head: at most so many 1/255ths a pixel, such as 4,8."),
    ] = None,
    pgd_steps: Annotated[int | None, typer.Option(min=1, help="Of each attack.", show_default="20")] = None,
    autoattack: Annotated[
        str | None,
        typer.Option(metavar="EPS,…", help="The same with AutoAttack: stronger, and far slower."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="RESULT.json", help="Another encoder's result, that errors are relative to: mce."),
    ] = None,
    workers: Workers = None,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make all stores in --out anew.")] = False,
    drop_identical: DropIdentical = False,
    any_precision: AnyPrecision = False,
    seed: Annotated[int, typer.Option(min=0, help="Of where --pgd starts.")] = 0,
    trust_code: TrustCode = False,
    to_json: Json = None,
) -> None:
    """Accuracy, and AUROC, on corrupted images. Run it again to resume: finished stores are not made again.

    [dim]evalsuite robustness --encoder run:runs/a --corpus photos-test/ --bank student.zarr --out runs/a/corrupted[/dim]
    """
    if pgd_steps and not pgd:
        raise ValueError(f"--pgd-steps {pgd_steps}: nothing is attacked; give --pgd EPS too")
    if detector and not (near or far):
        raise ValueError(
            f"--detector {detector[0]}: there is no OOD set to tell apart; give --near or --far NAME=STORE too"
        )
    import evalsuite

    _keep_apart([to_json], [head, reference])
    sets = {group: _named_stores(stores or [], f"--{group}") for group, stores in (("near", near), ("far", far))}
    with bar("robustness", "images") as update:
        result = evalsuite.robustness(
            encoder, corpus, bank, out, corruptions=corruptions if corruptions == "all" else corruptions.split(","),
            severities=_range(severity, "--severity"), size=size, k=k, near=sets["near"], far=sets["far"],
            detectors=detector or ["knn"], head=head, pgd=() if pgd is None else _numbers(pgd, "--pgd"), pgd_steps=pgd_steps or 20,
            autoattack=() if autoattack is None else _numbers(autoattack, "--autoattack"),
            reference=reference, workers=workers, device=device.value, overwrite=overwrite, drop_identical=drop_identical, any_precision=any_precision, seed=seed,
            trust_code=trust_code, progress=update,
        )  # fmt: skip
    show(result, to_json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A.json", help="A result of knn, probe, ood or robustness: --json.")],
    b: Annotated[str, typer.Argument(metavar="B.json", help="Another of the same command, on the same samples.")],
    resamples: Resamples = 1000,
    seed: Annotated[int, typer.Option(min=0, hidden=True, help="No effect, as --resamples.")] = 0,
    to_json: Json = None,
) -> None:
    """Is B better than A? The difference of every metric, with an interval over the samples that both have.

    [dim]evalsuite compare teacher-ood.json student-ood.json[/dim]
    """
    import evalsuite

    _keep_apart([to_json], [a, b])
    with screen.status("comparing"):
        result = evalsuite.compare(a, b, resamples=resamples, seed=seed)
    show(result, to_json)


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
            if names.setdefault(path, name) != name:
                raise typer.BadParameter(f"{item}: {path} is called {names[path]} already; give each result one name")
        else:
            path = item
        paths.append(path)
    _keep_apart([out, to_json], paths)
    page = evalsuite.report(paths, out, names=names, title=title)
    screen.print(f"[green]written[/] {shown(page)}: {len(paths)} results, {page.stat().st_size / 1e6:.1f} MB")
    write_json({"command": "report", "out": str(page), "results": paths, "bytes": page.stat().st_size}, to_json)


def _keep_apart(written: Sequence[str | Path | None], read: Sequence[str | None]) -> None:
    """Before any work: no file to be written is one of the files to read, or another one to be written."""
    from evalsuite.result import refuse_inputs

    outputs = [str(path) for path in written if path is not None and str(path) != "-"]
    for number, path in enumerate(outputs):
        refuse_inputs(path, [*(each for each in read if each is not None), *outputs[:number]])


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

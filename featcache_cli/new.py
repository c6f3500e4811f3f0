"""`featcache new`: a small project for a folder of images, its settings chosen from them, with their reasons."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featcache_cli.demo import run_shown
from featcache_cli.screen import (
    Device,
    DeviceOption,
    DryRun,
    Json,
    TrustCode,
    duration,
    make_table,
    numbered,
    printable,
    rate,
    results,
    screen,
    shown,
    would,
    write_json,
)

if TYPE_CHECKING:
    from distill.chosen import Choice

TEACHER = "timm/vit_small_patch14_dinov2.lvd142m"
DETECTED = 100
"""Images, of which a fifth is enough for a threshold that keeps 95 %; of fewer there is no detector, unless others are given."""
COMMANDS, SETTINGS = "commands.sh", "fit.toml"


def new(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="The images, as `featcache extract` takes them.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The project; made here.")],
    teacher: Annotated[str, typer.Option(metavar="SPEC", help="As `featcache extract` takes it.")] = TEACHER,
    student: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="As `distill fit` takes it.", show_default="by the images and the teacher"),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="CORPUS", help="Other images, to compare student and teacher on.", show_default="CORPUS"),
    ] = None,
    device: DeviceOption = Device.auto,
    run: Annotated[bool, typer.Option("--run", help="Run its commands, too; what is done already is kept.")] = False,
    trust_code: TrustCode = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Begin: views, student, input, batch, learning rate and epochs chosen from the images, each with its reason in a comment;
    how long it may take; and the commands, to be read, changed and run.

    [dim]featcache new photos/ --out project/[/dim]
    [dim]featcache new photos/ --test photos-test/ --teacher builtin/efficientnet_lite0 --out project/ --run[/dim]
    """
    import featcache
    from distill.chosen import choose, described, survey
    from distill.training.rehearsal import seconds_of_training
    from featcache.corpora import in_words, passed_over

    images, encoder = featcache.open_corpus(corpus), featcache.load_encoder(teacher, trust_code=trust_code)
    if test:
        featcache.open_corpus(test)
    seen = survey(images)
    side, parameters = encoder.image_input.size, encoder.parameters
    extracted, settings = choose(seen, teacher_parameters=parameters, teacher_side=side, student=student)
    commands = _commands(corpus, seen.images, test, teacher, out, extracted, device.value, trust_code)
    files = {
        SETTINGS: _toml(corpus, out, settings),
        COMMANDS: "\n".join([_HEADER.format(script=printable(shlex.quote(str(out / COMMANDS)))), *commands, ""]),
    }
    _refuse_other(out, files)

    passed = in_words(passed_over(images))
    unreadable = f", about {seen.images - seen.readable:,} cannot be read" if seen.unreadable else ""
    screen.print(
        f"{seen.images:,} images of {numbered(seen.classes, 'class', 'classes')}, {seen.side} px on the shorter side{unreadable}"
        + (f"; passed over: {shown(passed)}" if passed else ""),
        highlight=False,
    )
    if to_json != "-":
        table = make_table("", "setting", "value", "why")
        table.columns[-1].justify = "left"
        for name, value, reason in described({**extracted, **settings}):
            table.add_row(name, shown(value), shown(reason))
        results.print(table)
    with screen.status("a few images"):
        options = {name: each.value for name, each in extracted.items()}
        plan = featcache.preview(images, [encoder], [out / "teacher.zarr"], device=device.value, **options)
        values = {name: each.value for name, each in settings.items()}
        training = seconds_of_training(values, encoder.image_input, seen.images, device.value, trust_code)
    screen.print(
        f"extraction: about {duration(plan.seconds)} at {rate(plan.samples_per_second)} images/s, "
        f"{plan.bytes_to_write / 1e6:,.1f} MB, {shown(', '.join(plan.precisions) or 'done already')}",
        highlight=False,
    )
    screen.print(f"training: about {duration(training)}; both by a few images, on this machine", highlight=False)
    found = {
        "out": str(out), "images": seen.images, "classes": seen.classes, "commands": commands,
        "settings": {**options, **values}, "seconds": {"extract": plan.seconds, "fit": training},
    }  # fmt: skip
    if dry_run:
        would("new", found, to_json)
        return
    _write(out, files)
    screen.print(f"[green]written[/] {shown(out / SETTINGS)} and {shown(out / COMMANDS)}: change them as you like")
    if run:
        results.quiet = to_json == "-"  # tables are no JSON
        try:
            for command in commands:
                run_shown(command)
        finally:
            results.quiet = False
    else:
        screen.print(f"run it: sh {shown(shlex.quote(str(out / COMMANDS)))}", highlight=False)
    write_json({"command": "new", **found}, to_json)


_HEADER = """\
#!/bin/sh
# Run from the folder in which `featcache new` was run: sh {script}
# Each command can be run again: what is done is kept, what was interrupted goes on.
set -e
"""


def _commands(
    corpus: str,
    images: int,
    test: str | None,
    teacher: str,
    out: Path,
    extracted: Mapping[str, "Choice"],
    device: str,
    trust: bool,
) -> list[str]:
    """From images to a student, and how well it follows."""
    common = (" --trust-code" if trust else "") + (f" --device {device}" if device != "auto" else "")
    views = "".join(f" --{name} {each.value}" for name, each in extracted.items())

    def at(name: str) -> str:
        return shlex.quote(str(out / name))

    def extract(images: str, encoder: str, store: str, more: str = "") -> str:
        named = shlex.quote(encoder)
        return f"featcache extract {shlex.quote(images)} --teacher {named}{more}{common} --out {at(store)}"

    student, suffix = f"run:{out / 'run'}", "-test" if test else ""
    held_out = f" --id {at('student-test.zarr')}" if test else ""
    detector = f"evalsuite detector fit {at('student.zarr')}{held_out} --out {at('detector')} --overwrite"
    detector += " --trust-code" if trust else ""
    of_teacher, of_student = f"teacher{suffix}.zarr", f"student{suffix}.zarr"
    return [
        extract(corpus, teacher, "teacher.zarr", views),
        f"distill fit --config {at(SETTINGS)} --out {at('run')}{common} --resume",
        extract(corpus, student, "student.zarr"),
        *([extract(test, teacher, of_teacher), extract(test, student, of_student)] if test else []),
        f"evalsuite fidelity --teacher {at(of_teacher)} --student {at(of_student)} --json {at('fidelity.json')}",
        *([detector] if test or images >= DETECTED else []),
    ]


def _toml(corpus: str, out: Path, settings: Mapping[str, "Choice"]) -> str:
    import tomli_w

    lines = [
        "# Settings of `distill fit`, chosen from the images. `distill settings` lists all there are.",
        tomli_w.dumps({"store": str(out / "teacher.zarr"), "corpus": corpus}),
    ]
    lines += [f"# {printable(each.reason)}\n{tomli_w.dumps({name: each.value})}" for name, each in settings.items()]
    return "\n".join(lines)


def _refuse_other(out: Path, files: Mapping[str, str]) -> None:
    """Raises ValueError where something else is there than this very project."""
    from featcache.disk.durable import refuse_taken
    from featcache.disk.refusals import refuse_unmakeable, writing

    if not _is_there(out, files):
        if all((out / name).is_file() for name in files):
            script = shlex.quote(str(out / COMMANDS))
            raise ValueError(
                f"{out}: holds a project with other settings, or one that was changed; run that one with: sh {script}, or "
                "choose another --out"
            )
        with writing(out):
            refuse_unmakeable(refuse_taken(out, folder=True).parent)


def _is_there(out: Path, files: Mapping[str, str]) -> bool:
    return all((out / name).is_file() and (out / name).read_bytes() == text.encode() for name, text in files.items())


def _write(out: Path, files: Mapping[str, str]) -> None:
    from featcache.disk.durable import appearing
    from featcache.disk.refusals import writing

    if not _is_there(out, files):
        with writing(out), appearing(out, folder=True) as part:
            part.mkdir()
            for name, text in files.items():
                (part / name).write_bytes(text.encode())

"""`distill sweep`: many runs from one cache, each measured, one table."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache_cli.screen import (
    Device,
    DeviceOption,
    DryRun,
    Json,
    TrustCode,
    Workers,
    bar,
    duration,
    make_table,
    results,
    screen,
    shown,
    would,
    write_json,
    write_whole,
)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.TOML", help="What to train; see above.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For runs and results.", show_default="`out` in the file")
    ] = None,
    device: DeviceOption = Device.auto,
    workers: Workers = None,
    trust_code: TrustCode = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    r"""Train every combination of methods, students, seeds and dimensions from one cache, and tell mean ± sd.

    Run it again to resume: finished runs are kept, a failed one is tried again. So are the stores and results of their
    evaluation, unless the student, the images, the options or the code that measures have changed. Images are decoded once
    for all runs of one input size, and their pixels kept in memory, or else in a nameless file in FOLDER.

    [dim]distill sweep sweep.toml --out sweeps/first[/dim]

    The file:

    store = "teacher.zarr"              # or a list, with a corpus for each
    corpus = "photos/"
    methods = ["tintem", {name = "tintem-long", method = "tintem", epochs = 200}]
    students = ["tiny", {name = "vit", student = "timm/vit_tiny_patch16_224", patch_size = 8}]
    seeds = [0, 1, 2]
    dimensions = [64, 128]              # of the embedding; 0 is the student's own

    \[common]                            # `distill settings`, but trackers and checkpoint_minutes
    epochs = 100
    method_options = {mapping = "orthogonal"}

    \[evaluate]                          # optional; corpora, not stores
    bank = "photos/"
    query = "photos-test/"
    near = {tin = "tiny-imagenet/"}
    far = {textures = "dtd/"}
    k = 20                              # neighbours
    detectors = ["knn", "rmd"]
    """
    from distill.rendered import Renderings
    from distill.sweep import cells, check, expand, markdown, read_sweep, reason, tabulate
    from featcache.specs import naming

    asked = read_sweep(file)
    if out is None and asked.out is None:
        raise ValueError(f"{file}: names no out folder; add out = … or give --out FOLDER")
    folder = out or Path(str(asked.out))
    failed, rows = {}, []
    with naming(file):
        runs = expand(asked)
        check(asked, runs, trust_code)
        with naming("[evaluate]"):
            evaluate = _Evaluation(asked, folder, device.value, workers, trust_code) if asked.evaluate else None
            if evaluate and evaluate.teacher and not dry_run:
                rows.append(("teacher", evaluate.measure("teacher", evaluate.teacher)))
    if dry_run:
        _would_train(
            asked, runs, folder, {"device": device.value, "workers": workers, "trust_code": trust_code}, to_json
        )
        return
    folder.mkdir(parents=True, exist_ok=True)
    renderings = Renderings(folder)
    wanted = ("holdout/", "loss") if _same_loss(runs, bool(evaluate)) else ("holdout/",)
    for number, named in enumerate(runs, 1):
        try:
            run = _trained(
                f"{number}/{len(runs)} {named.name}", asked.store, asked.corpus, out=folder / "runs" / named.name,
                device=device.value, workers=workers, trust_code=trust_code, renderings=renderings, **named.settings,
            )  # fmt: skip
            final = {k: v for k, v in run.metrics[-1].items() if k.startswith(wanted) and not k.startswith("loss/")}
            rows.append((named.group, evaluate.measure(named.name, f"run:{run.path}") if evaluate else final))
            screen.print(f"[green]finished[/] {shown(named.name)} ({number} of {len(runs)})", highlight=False)
        except Exception as error:
            failed[named.name] = reason(error)
            screen.print(f"[red]failed[/] {shown(f'{named.name}: {failed[named.name]}')}", highlight=False)
    table = tabulate(rows, failed)
    write_whole(folder / "table.md", markdown(table))
    write_whole(folder / "table.json", json.dumps(table, indent=2) + "\n")
    if to_json != "-":
        header, *body = cells(table)
        printed = make_table(str(folder), *header)
        for line in body:
            printed.add_row(*map(shown, line))
        results.print(printed)
    write_json({"command": "sweep", "out": str(folder), **table}, to_json)
    if failed:
        screen.print(f"[red]{len(failed)} of {len(runs)} runs failed[/]: {shown(', '.join(failed))}", highlight=False)
        raise typer.Exit(1)


def _would_train(asked: Any, runs: Sequence[Any], folder: Path, options: dict[str, Any], to_json: str | None) -> None:
    """A line for each run, what is left of it, and how long all of them may take."""
    import distill

    with screen.status("first images"):
        plans = {
            named.name: distill.preview(
                asked.store, asked.corpus, out=folder / "runs" / named.name, resume=True, **options, **named.settings
            )
            for named in runs
        }
    if to_json != "-":
        table = make_table(str(folder), "run", "samples", "steps", "done", "student", "about")
        for name, plan in plans.items():
            counts = (f"{number:,}" for number in (plan.samples, plan.steps, plan.done))
            table.add_row(shown(name), *counts, f"{plan.student_weights / 1e6:,.2f} M", duration(plan.seconds))
        results.print(table)
    seconds = sum(plan.seconds for plan in plans.values())
    tested = " and as many evaluations" if asked.evaluate else ""
    screen.print(
        f"{len(plans)} runs{tested}; training takes about {duration(seconds)}, by a few images", highlight=False
    )
    found = {name: {"steps": p.steps, "done": p.done, "seconds": p.seconds} for name, p in plans.items()}
    would("sweep", {"out": str(folder), "runs": found, "seconds": seconds}, to_json)


def _trained(label: str, *stores: Any, **given: Any) -> Any:
    """One run, or what it lacks of it, with a bar."""
    import distill

    def announce(plan: Any) -> None:
        screen.print(f"{shown(label)}: pixels {shown(plan.pixels)}", highlight=False)

    with bar(label, "steps") as update:

        def show(at: Any) -> None:
            update(at.done, at.total, "" if math.isnan(at.loss) else f"loss {at.loss:.4f}")

        return distill.fit(*stores, resume=True, announce=announce, progress=show, **given)


def _same_loss(runs: Sequence[Any], evaluated: bool) -> bool:
    """Whether the runs' losses can be set side by side; says so where they cannot, and there is nothing else."""
    losses = {json.dumps([run.settings.get("method"), run.settings.get("method_options")]) for run in runs}
    held_out = any(run.settings.get("holdout") or run.settings.get("eval_every") for run in runs)
    if len(losses) > 1 and not (evaluated or held_out):
        screen.print(
            "the losses of different methods, or of one with other options, measure different things and are not set side "
            r"by side; for a comparison add \[evaluate], or holdout = 0.05 to \[common]"
        )
    return len(losses) == 1


class _Evaluation:
    """Embeds the test corpora of a sweep with each student, and measures.

    Attributes:
        teacher: spec of the encoder to compare with, "" for none.
    """

    def __init__(self, asked: Any, folder: Path, device: str, workers: int | None, trust_code: bool):
        import featcache
        from evalsuite import detectors
        from featcache.specs import naming, refuse_code, refuse_code_of_corpora

        given = asked.evaluate
        self._trust_code = trust_code
        self._folder, self._options = folder, {"device": device, "workers": workers}
        self._near, self._far = given.get("near", {}), given.get("far", {})
        self._corpora = {"bank": given["bank"], "query": given["query"], **self._near, **self._far}
        self._k, self._detectors = given.get("k", 20), given.get("detectors", ["knn"])
        first = asked.store if isinstance(asked.store, str) else asked.store[0]
        self.teacher = given["teacher"] if "teacher" in given else featcache.open_store(first).encoder_name
        refuse_code('its teacher (teacher = "" is none)', self.teacher, trust_code)
        self._of_teacher: dict[str, Any] = {}
        for part, corpus in self._corpora.items():  # refuses before anything is trained
            refuse_code_of_corpora(part, corpus, trust_code)
            with naming(part):
                featcache.open_corpus(corpus)
        for spec in self._detectors:
            with naming("detectors"):
                detectors.build(spec)

    def measure(self, name: str, encoder: str) -> dict[str, float]:
        """kNN accuracy, AUROC and, where there is a teacher, fidelity to it, of OOD scores too. Stores and result files are left
        in `stores/` and `results/`, and taken from there where they are of this very encoder, these images and options."""
        from evalsuite.evaluators import Evaluator
        from evalsuite.evaluators.fidelity import Fidelity
        from evalsuite.evaluators.knn import Knn
        from evalsuite.evaluators.ood import Ood
        from evalsuite.kept import measured

        stores = self._embedded(name, encoder)
        if encoder == self.teacher:
            self._of_teacher = stores
        asked: dict[str, Evaluator] = {"knn": Knn(stores["bank"], stores["query"], k=[self._k])}
        if self._near or self._far:
            asked["ood"] = Ood(
                id_train=stores["bank"],
                id_test=stores["query"],
                near={part: stores[part] for part in self._near},
                far={part: stores[part] for part in self._far},
                detectors=self._detectors,
            )
        if teacher := self._of_teacher:
            sets = [*self._near, *self._far]
            scored = {
                "detectors": self._detectors,
                "teacher_bank": teacher["bank"],
                "student_bank": stores["bank"],
                "teacher_ood": {part: teacher[part] for part in sets},
                "student_ood": {part: stores[part] for part in sets},
            }
            asked["fidelity"] = Fidelity(teacher["query"], stores["query"], **(scored if sets else {}))
        found = {
            command: measured(evaluator, self._folder / "results" / f"{name}-{command}.json")
            for command, evaluator in asked.items()
        }
        wanted = re.compile(r"top1@\d+|.*/mean/auroc|gram_pearson|cka_debiased|mutual_knn@\d+|scores/.*/all/spearman")
        metrics = {key: metric.value for result in found.values() for key, metric in result.metrics.items()}
        return {key: value for key, value in metrics.items() if wanted.fullmatch(key)}

    def _embedded(self, name: str, encoder: str) -> dict[str, Any]:
        """The stores of all corpora, by part."""
        import featcache

        loaded, stores = featcache.load_encoder(encoder, trust_code=self._trust_code), {}
        with bar(f"{name}: embed", "images") as update:
            options = {"progress": lambda at: update(at.done, at.rows), **self._options}
            for part, corpus in self._corpora.items():
                out = self._folder / "stores" / f"{name}-{part}.zarr"
                try:
                    stores[part] = featcache.extract(corpus, loaded, out, **options)
                except ValueError:  # it is of an earlier student or of other images; whatever else it is, is said again
                    stores[part] = featcache.extract(corpus, loaded, out, overwrite=True, **options)
        return stores

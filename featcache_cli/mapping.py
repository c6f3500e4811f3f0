"""`distill mapping`: what each mapping keeps of a teacher."""

from typing import Annotated

import typer
from rich.table import Table

from featcache_cli.screen import DryRun, Json, bar, make_table, results, screen, shown, would, write_json

_REPORTED = {
    "sne": "SNE\nloss ↓",
    "singular": "singular\nvalues",
    "deviation": "‖WWᵀ/c\n− I‖ ↓",
    "gram_pearson": "Gram\ncorr. ↑",
    "mutual_knn@10": "mutual\nkNN@10 ↑",
    "top1@20": "top-1 ↑\nk = 20",
    "auroc@1": "AUROC ↑\nk = 1",
    "auroc@50": "AUROC ↑\nk = 50",
}
"""Columns of `distill mapping`: name in the report, heading."""


def mapping(
    store: Annotated[str, typer.Option(metavar="STORE", help="The teacher's features: to fit to, and the neighbours.")],
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--mapping",
            metavar="NAME",
            help="{distill.mappings}; repeat for several.",
            show_default="all that suit the store",
        ),
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Of the student's space.")] = 128,
    id_test: Annotated[
        str | None, typer.Option(metavar="STORE", help="Held-out features, for kNN accuracy and as ID for AUROC.")
    ] = None,
    ood: Annotated[str | None, typer.Option(metavar="STORE", help="Features of another distribution.")] = None,
    any_precision: Annotated[
        bool, typer.Option("--any-precision", help="Compare stores in whatever precision they were made.")
    ] = False,
    dry_run: DryRun = False,
    to_json: Json = None,
) -> None:
    """Fit mappings from the teacher's space to a student's, and tell how much of the teacher each keeps.

    [dim]distill mapping --store teacher.zarr --dim 128 --id-test test.zarr --ood textures.zarr[/dim]
    [dim]distill mapping --store teacher.zarr --mapping sne --mapping orthogonal --json report.json[/dim]
    """
    import featcache
    from distill.mapping_report import report
    from distill.mappings import load_mapping
    from featcache.plugins import plugin_names
    from featcache.rows import Rows

    if ood and not id_test:
        raise ValueError("--ood: AUROC compares it with held-out features; give --id-test as well")
    bank = featcache.open_store(store)
    test, strangers = (featcache.open_store(path) if path else None for path in (id_test, ood))
    opened = [each for each in (bank, test, strangers) if each is not None]
    Rows.of(opened, any_precision=any_precision)  # refuses stores of different encoders or precisions
    names = name or plugin_names("distill.mappings")
    if dry_run:
        for each in names:
            load_mapping(each)
        screen.print(
            f"would fit {shown(', '.join(names))}: {len(bank):,} rows of {bank.embedding_dim} → {dim} dimensions"
        )
        would("mapping", {"store": store, "dim": dim, "mappings": names, "rows": len(bank)}, to_json)
        return
    found, refused = {}, {}
    for each in names:
        try:
            with bar(each, "steps") as update:
                fitted = load_mapping(each)(dim).fit(bank, update)  # type: ignore[call-arg]
        except ValueError as error:
            if name:
                raise
            refused[each] = str(error)
            continue
        found[each] = report(fitted, bank, id_test=test, ood=strangers)
    if not found:
        raise ValueError([*refused.values()][-1])
    if dim > bank.embedding_dim:
        screen.print(
            f"{dim} dimensions are more than the teacher's {bank.embedding_dim}: mappings lift it there, all angles kept"
        )
    for each, why in refused.items():
        screen.print(f"[yellow]left out[/] {shown(f'{each}: {why}')}", highlight=False)
    if to_json != "-":
        results.print(_table(f"{store} → {dim} dimensions", found))
        results.print(
            "↓ less is better, ↑ more is better. SNE loss: nats. ‖WWᵀ/c − I‖: over √dim, 0 is orthogonal. Correlation: −1…1. "
            "Shared neighbours, kNN accuracy and AUROC (0.5 is chance): 0…1. All of cosines."
        )
    write_json({"command": "mapping", "store": store, "dim": dim, "mappings": found, "left_out": refused}, to_json)


def _table(title: str, found: dict[str, dict[str, float]]) -> Table:
    """A row a mapping, a column each of `_REPORTED` that was measured; where the teacher itself was, it comes first."""
    kept = next(iter(found.values()))
    teacher = {key.removeprefix("teacher/"): value for key, value in kept.items() if key.startswith("teacher/")}
    columns = {key: title for key, title in _REPORTED.items() if key in kept or key == "singular"}
    table = make_table(title, "mapping", *columns.values())
    for each, numbers in {**({"(the teacher)": teacher} if teacher else {}), **found}.items():
        cells = {key: f"{value:.3f}" for key, value in numbers.items()}
        if "singular_min" in numbers:
            cells["singular"] = f"{numbers['singular_min']:.2f}–{numbers['singular_max']:.2f}"
        table.add_row(shown(each), *(cells.get(key, "") for key in columns))
    return table

"""What `featcache check` found, as a table."""

from typing import Any

from rich.table import Table

from featcache_cli.screen import make_table, shown


def check_table(report: Any) -> Table:
    """A row a property, a column a store; below, what stores of one encoder have in common."""
    table = make_table("", "", *(shown(_short(store.store, report)) for store in report.stores))
    for name, cell in (
        ("encoder", lambda of: shown(f"{of.encoder} ({of.dimensions:,}-d)")),
        ("precision", lambda of: shown(of.precision or "not known")),
        ("worst cosine to fp32", lambda of: _number(of.cosine, 6)),
        ("kept in", lambda of: of.dtypes["embedding"]),
        ("rows", lambda of: f"{of.rows:,}" + ("" if of.sealed else f" ({of.pending:,} to come)")),
        ("failed", lambda of: f"{of.failed:,}"),
        ("identical", lambda of: f"{of.identical:,}" + ("" if of.images_known else " (by embedding)")),
        ("near-identical", lambda of: _share(of.near_identical)),
        ("nearest other, 1 − cosine", lambda of: _number(of.nearest)),
        ("any other, 1 − cosine", lambda of: _number(of.apart)),
        ("effective rank", lambda of: _number(of.effective_rank, 4)),
        ("constant dimensions", lambda of: f"{of.constant_dimensions:,}"),
        ("zero rows", lambda of: f"{of.zero_rows:,}"),
        ("not finite", lambda of: f"{of.not_finite:,}"),
        ("labelled", lambda of: f"{of.usable - of.unlabelled:,}"),
        ("classes", lambda of: f"{len(of.classes):,}"),
        ("with one row", lambda of: f"{sum(count == 1 for count in of.classes.values()):,}"),
    ):
        table.add_row(name, *(cell(store) for store in report.stores))
    said = [
        f"{_short(pair.a, report)} and {_short(pair.b, report)}: {pair.identical_a:,} and {pair.identical_b:,} rows in common, "
        f"near-identical {_share(pair.near_a)} and {_share(pair.near_b)}, {len(pair.classes):,} classes in common"
        for pair in report.pairs
    ]
    if any(store.usable > store.sampled for store in report.stores):
        most = max(store.sampled for store in report.stores)
        said.append(f"near-identical, nearest and any other: of up to {most:,} sampled rows a store")
    table.caption, table.caption_justify = "\n".join(map(shown, said)) or None, "left"
    return table


def _short(path: str, report: Any) -> str:
    """The last part of the path, where no other store has that too."""
    lasts = [store.store.rstrip("/").rpartition("/")[2] for store in report.stores]
    last = path.rstrip("/").rpartition("/")[2]
    return last if lasts.count(last) == 1 else path


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"

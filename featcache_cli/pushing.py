"""What `distill push` and `featcache push` share: their options, and what they say in the end."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache_cli.screen import screen, shown

if TYPE_CHECKING:
    from featcache.repository import Pushed

RepositoryName = Annotated[
    str, typer.Argument(metavar="USER/NAME", help="The repository on the hub; made where there is none.")
]
Private = Annotated[bool, typer.Option("--private", help="Of a new repository: for your own eyes.")]
Revision = Annotated[str, typer.Option(metavar="BRANCH", help="Made where there is none.", show_default="main")]
Message = Annotated[str, typer.Option(metavar="TEXT", help="Of the commit.", show_default="says what it is")]
Licence = Annotated[
    str | None,
    typer.Option(
        "--license",
        metavar="NAME",
        help="For the card, as the hub names it (apache-2.0, other, …). What you may give, you have to find out.",
        show_default="none is given",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what differs there by a new commit; earlier ones stay in its history."),
]


def say_pushed(pushed: "Pushed") -> None:
    what = "[green]pushed[/]" if pushed.changed else "[green]there already[/]"
    size = f"{len(pushed.files)} files, {pushed.bytes / 1e6:,.1f} MB"
    where = f"{pushed.repository.url}/tree/{pushed.repository.revision or 'main'}"
    screen.print(f"{what} {shown(where)}: {size}, commit {pushed.commit[:12]}", highlight=False)


def push_summary(pushed: "Pushed") -> dict[str, Any]:
    of = pushed.repository
    return {
        "repository": of.name,
        "kind": of.kind,
        "revision": of.revision or "main",
        "commit": pushed.commit,
        "url": of.url,
        "files": list(pushed.files),
        "bytes": pushed.bytes,
        "changed": pushed.changed,
    }

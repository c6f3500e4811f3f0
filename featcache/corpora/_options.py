"""What may follow a corpus in its spec, `@image=png@label=species`: which part of a sample is which."""

import os
import re

from featcache.plugins import suggest

OPTIONS = re.compile(r"((?:@\w+=[^@/]*)*)$")


def split_options(source: str, rest: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """`rest` of a spec without its options, and those options.

    Raises:
        ValueError: an option that is not `known`, or is given twice.
    """
    if os.path.exists(rest):  # a name that looks like options
        return rest, {}
    written = OPTIONS.search(rest)
    assert written
    found: dict[str, str] = {}
    for name, value in re.findall(r"@(\w+)=([^@]*)", written[1]):
        where = f"{source}:{rest}: @{name}={value}"
        if name not in known:
            raise ValueError(f"{where}: no such option; {suggest(name, known)}")
        if name in found:
            raise ValueError(f"{where}: @{name} is given twice; keep one")
        found[name] = value
    return rest[: written.start()], found

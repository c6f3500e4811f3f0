"""What may follow a corpus in its spec, `@image=png@label=species`: which part of a sample is which."""

import os
import re

from featcache.specs import options_in

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
    return rest[: written.start()], options_in(written[1], f"{source}:{rest}", known)

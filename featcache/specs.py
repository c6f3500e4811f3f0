"""Specs of encoders and students, and settings, as text: nothing is loaded."""

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from featcache.plugins import plugin_names, suggest


def names_code(spec: str) -> bool:
    """Whether loading this encoder or student imports a module that the spec itself names: `MODULE:CALLABLE`."""
    known = plugin_names("featcache.models")
    return spec.startswith(("python:", "python/")) or (
        bool(re.fullmatch(r"[\w.]+:\w+", spec)) and spec.partition(":")[0] not in known
    )


def code_in(spec: str) -> str:
    """`MODULE:CALLABLE` of a spec that `names_code`, without the name of the plugin that runs it."""
    return re.sub(r"^python[:/]", "", spec)


def refuse_code(place: object, spec: object, trust_code: bool) -> None:
    """Raises ValueError where `place`, a file, names code that the user does not trust."""
    if isinstance(spec, str) and names_code(spec) and not trust_code:
        raise ValueError(
            f"{place}: names code, {spec}, which files do not get to run; if you know it, add --trust-code (trust_code=True)"
        )


def refuse_code_of_corpora(place: object, corpora: object, trust_code: bool) -> None:
    """The same of the spec of a corpus, or of several: an `adversarial:` one has a teacher, and may have a decoder."""
    for corpus in [corpora] if isinstance(corpora, str) else corpora if isinstance(corpora, list | tuple) else []:
        for code in re.findall(r"(?=adversarial:(.+?)::)|(?<=@decoder=)([\w.]+:\w+)", str(corpus)):
            refuse_code(place, code[0] or code[1], trust_code)


@contextmanager
def naming(place: object) -> Iterator[None]:
    """A ValueError raised within says first where: a file, a key in it, a plugin."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def value_in(text: str) -> Any:
    """The value that a setting is given as text: in TOML, or True or False, or else a bare word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return {"true": True, "false": False}.get(text.lower(), text)


def options_in(text: str, spec: str, known: Sequence[str]) -> dict[str, str]:
    """The options `@name=value…` of a spec, in its order.

    Raises:
        ValueError: one is not `known`, or is given twice.
    """
    found: dict[str, str] = {}
    for name, value in re.findall(r"@(\w+)=([^@]*)", text):
        if name not in known:
            raise ValueError(f"{spec}: @{name}={value}: no such option; {suggest(name, known)}")
        if name in found:
            raise ValueError(f"{spec}: @{name}={value}: @{name} is given twice; keep one")
        found[name] = value
    return found


def split_specs(text: str) -> list[str]:
    """The specs of a comma list. Commas of paths are left alone: a new spec begins only where one can, and never inside
    the path of a file or folder that is there."""
    sources = "|".join(re.escape(name).replace("_", "[_-]") for name in plugin_names("featcache.models"))
    begins = rf"(?:{sources})[/:]|[\w.]+:\w+(?:,|$)"
    cuts = [*(match.start() for match in re.finditer(rf",(?={begins})", text)), len(text)]
    specs, start = [], 0
    while start < len(text):
        later = [cut for cut in cuts if cut > start]
        end = max((cut for cut in later if _names_path(text[start:cut])), default=later[0])
        specs.append(text[start:end])
        start = end + 1
    return specs


def _names_path(spec: str) -> bool:
    source, place = re.sub(r"(@\w+=[^@,]*)+$", "", spec).split(":", 1) if ":" in spec else ("", "")
    after_tag = re.sub(r"^[\w-]+:", "", place)
    # A comma before the colon: the path is that of a later spec.
    return "," not in source and any(os.path.exists(each) for each in (place, after_tag) if each)

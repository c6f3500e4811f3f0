"""The page's one file: style, script and data in it, and a policy that lets in nothing else."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).with_name("page")
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.MULTILINE)


def render(title: str, data: Mapping[str, Any]) -> str:
    """The whole page about `data`, which may hold the records of `evalsuite.charts`."""
    style, script = _part("page.css"), bundled(_PAGE / "page.js")
    policy = (
        "default-src 'none'",
        *(["img-src data:"] if data.get("pictures") else []),
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "base-uri 'none'",
        "form-action 'none'",
    )
    fillings = {
        "policy": "; ".join(policy),
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": _json_in_html(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: fillings[place[1]], _part("page.html"))


def bundled(entry: Path) -> str:
    """The module and all that it imports as one script: each after what it imports, without `import` and `export`.

    Modules import from files beside them, by name, at their beginning: `import { a, b } from "./c.js";`. As one script
    they share one scope, so no two may define one name (a browser refuses the script). Raises `ValueError` where modules
    import each other in a circle.
    """
    done: dict[str, str] = {}

    def add(name: str, importers: tuple[str, ...]) -> None:
        if name in importers:
            raise ValueError(f"modules import each other: {' → '.join((*importers, name))}")
        if name in done:
            return
        text = (entry.parent / name).read_text(encoding="utf-8")
        for imported in _IMPORT.findall(text):
            add(imported, (*importers, name))
        done[name] = re.sub(r"^export (?=const|let|function)", "", _IMPORT.sub("", text), flags=re.MULTILINE).strip()

    add(entry.name, ())
    return '"use strict";\n' + "\n".join(done.values())


def _part(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json_in_html(data: Any) -> str:
    """ASCII JSON that no HTML parser takes for anything but text."""
    text = json.dumps(_plain(data), separators=(",", ":"), allow_nan=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _plain(value: Any) -> Any:
    """The same in what JSON has: of a record its class and the fields that are not their defaults; text for what is not a
    finite number, a list, a mapping or a truth value."""
    if dataclasses.is_dataclass(value):
        given = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        told = {key: _plain(of) for key, of in given.items() if not (of is None or of is False or of in ("", (), {}))}
        return {"kind": type(value).__name__} | told
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)

"""What differs between two recordings of `record.py`, a line each; exit code 1 where anything does.

python tests/golden/compare.py BEFORE.json AFTER.json
"""

import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """Of two JSON values, with where they differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if key not in after:
                yield f"{at}/{key}: gone (was {str(before[key])[:100]})"
            elif key not in before:
                yield f"{at}/{key}: new ({str(after[key])[:100]})"
            else:
                yield from differences(before[key], after[key], f"{at}/{key}")
        if before.keys() == after.keys() and list(before) != list(after):
            yield f"{at}: keys in another order: {list(before)} → {list(after)}"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{at}[{number}]")
    elif isinstance(before, list) and isinstance(after, list):
        lines = difflib.ndiff(*([json.dumps(each, ensure_ascii=False) for each in side] for side in (before, after)))
        yield from (f"{at}: {line[:200]}" for line in lines if line[0] in "-+")
    elif type(before) is not type(after) or before != after:
        yield f"{at}: {str(before)[:200]!r} → {str(after)[:200]!r}"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Artefacts in their recorded order; of text files what they say, of others that their digest differs."""
    said = []
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in before or name not in after:
            said.append(f"{name}: {'gone' if name in before else 'new'}")
            continue
        a, b = before[name], after[name]
        files, content = (tuple(each.get(part, {}) for each in (a, b)) for part in ("files", "content"))
        said += [f"{name}{line}" for line in differences(*content)]
        explained = {file for file in files[0] if content[0].get(file) != content[1].get(file)}
        of_bytes = [{file: sha[:12] for file, sha in each.items() if file not in explained} for each in files]
        # The order of files is that of their names: no line of its own.
        said += [f"{name}{line}" for line in differences(*(dict(sorted(each.items())) for each in of_bytes))]
        if a.get("missing") != b.get("missing"):
            said.append(f"{name}: not made: {a.get('missing')} → {b.get('missing')}")
    return said


def main() -> int:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    before, after = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    for recording in (before, after):
        recording.pop("")  # where each artefact lay
    said = compare(before, after)
    print("\n".join(said) if said else f"{len(before)} artefacts, all the same")  # noqa: T201
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())

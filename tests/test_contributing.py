"""The tour of CONTRIBUTING: its six files are there, and its tree has every file and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TREE = TEXT.split("Then the tree.")[1].split("```")[1]
PACKAGES = ("featcache", "distill", "evalsuite", "featcache_cli")


def listed() -> dict[str, str]:
    """File or folder → its words; of folders whose files stand in a row, the files have none."""
    found, package, folder, names_follow = {}, "", "", False
    for line in filter(None, TREE.splitlines()):
        indent, name, words = len(line) - len(line.lstrip()), *[*line.split(maxsplit=1), ""][:2]
        if name.endswith("/"):
            package, folder = (name, name) if indent == 0 else (package, package + name)
            found[folder], names_follow = words.rstrip(":"), words.endswith(":")
        elif names_follow and indent >= 6:
            found |= {f"{folder}{each}.py": "" for each in line.split()}
        else:
            found[f"{folder}{name}.py"] = words
    return found


def test_the_tree_has_every_file_and_no_other():
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    folders = {f"{Path(file).parent}/" for file in files}
    assert set(listed()) == files | folders


def test_five_words_a_file_or_so():
    words = {name: said for name, said in listed().items() if said}
    assert len(words) > 100
    assert not {name: said for name, said in words.items() if not 1 <= len(said.split()) <= 6}


def test_the_six_files_to_read_first_are_there():
    first = re.findall(r"^\d\. `([^`]+)`: ", TEXT, re.MULTILINE)
    assert len(first) == 6
    assert all((ROOT / file).is_file() for file in first)

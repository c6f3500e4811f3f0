"""Labels as a corpus gives them: indices into class names, -1 for none."""

from collections.abc import Sequence

MAX_CLASSES = 1_000_000


def from_names(names: Sequence[str | None]) -> tuple[list[int], list[str] | None]:
    """Labels and class names of samples whose class is known by name; the classes are sorted by name."""
    classes = sorted({name for name in names if name})
    index = {name: i for i, name in enumerate(classes)}
    return [index[name] if name else -1 for name in names], classes or None


def from_folders(paths: Sequence[str]) -> tuple[list[int], list[str] | None]:
    """Labels and class names of samples whose first folder, if any, is their class."""
    return from_names([path.split("/", 1)[0] if "/" in path else None for path in paths])


def from_numbers(numbers: Sequence[int | None], source: str) -> tuple[list[int], list[str] | None]:
    """Labels and class names ("0", "1", …) of samples whose class is a number.

    Raises:
        ValueError: a number below -1 or too large to be one of 0…classes-1.
    """
    labels = [-1 if number is None else int(number) for number in numbers]
    wrong = next((label for label in labels if not -1 <= label < MAX_CLASSES), None)
    if wrong is not None:
        raise ValueError(f"{source}: {wrong} is no class number; number the classes from 0, or name them in words")
    return labels, [str(i) for i in range(max(labels, default=-1) + 1)] or None

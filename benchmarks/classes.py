"""Tiny-ImageNet's photographs as the benchmarks split them: settings are chosen on training images alone.

Of the 101 classes of `tiny-imagenet-train-*.tar`, every fifth is "unseen": near OOD while settings are chosen. Of the
others, every tenth image is "held" out, the rest is "fit"; "train" is all three. The test sets are of the validation images: those of the
101 classes ("test"), those of other classes ("near"); and 1,000 test images of CIFAR-10 ("far").
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from photographs import unpacked

TRAIN = [f"tiny-imagenet-train-{shard}" for shard in range(4)]
PARTS = ("train", "fit", "held", "unseen", "test", "near", "far")


def parts(data: Path, work: Path) -> dict[str, Path]:
    """Folders of class folders, by part."""
    out = work / "images" / "classes"
    if not out.exists():
        partial = out.with_name("classes.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for part, file in _files(data, work):
            target = partial / part / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
        partial.rename(out)
    return {part: out / part for part in PARTS}


def _files(data: Path, work: Path) -> Iterator[tuple[str, Path]]:
    shards = [unpacked(name, data, work) for name in TRAIN]
    classes = sorted(each.name for each in shards[0].iterdir())
    for number, name in enumerate(classes):
        files = [file for shard in shards for file in sorted((shard / name).iterdir())]
        for index, file in enumerate(files):
            yield "train", file
            yield ("unseen" if number % 5 == 4 else "held" if index % 10 == 9 else "fit"), file
    for folder in sorted(unpacked("tiny-imagenet-val-half", data, work).iterdir()):
        for file in sorted(folder.iterdir()):
            yield ("test" if folder.name in classes else "near"), file
    for folder in sorted(unpacked("cifar10-test-half", data, work).iterdir()):
        for file in sorted(folder.iterdir())[:100]:
            yield "far", file

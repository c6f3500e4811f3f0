"""Does the student keep the teacher's robustness? ImageNet-C's 15 corruptions on CIFAR-10, of encoders that faithfulness.py left.

1,000 test images (100 a class), severities 1, 3 and 5 made at 32 px (harder than CIFAR-10-C's own). Bank: the 10,000
training images, clean. OOD: 5,000 Tiny-ImageNet photographs at 32 px, clean, against the corrupted images as ID. Prints a
Markdown table with 95 % intervals over the images; mCE is relative to the teacher. Interrupted, it goes on where it was.

    python benchmarks/faithfulness.py --seeds 0
    python benchmarks/robustness.py

Needs the robustness extra.
"""

import csv
from pathlib import Path

from faithfulness import TEACHER
from photographs import arguments, unpacked

import evalsuite

METRICS = {
    "clean kNN top-1": "clean/top1@20",
    "corrupted kNN top-1": "mean/top1@20",
    "mCE": "mce",
    "near AUROC, clean": "clean/knn/near/tin/auroc",
    "near AUROC, corrupted": "mean/knn/near/tin/auroc",
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100, help="of each class")
    parser.add_argument("--encoders", default="proteus-flip-8-64-0,cosine-flip-8-64-0,tintem-flip-8-64-0")
    options = parser.parse_args()
    corpus = some_of(unpacked("cifar10-test-half", options.data, options.work), options.images)
    teacher = None
    print("| encoder | " + " | ".join(METRICS) + " |\n|" + "---|" * (len(METRICS) + 1))
    for name in ["teacher", *options.encoders.split(",")]:
        stores = options.work / "stores"
        found = evalsuite.robustness(
            TEACHER if name == "teacher" else f"run:{options.work / 'runs' / name}",
            str(corpus),
            stores / f"{name}-train.zarr",
            stores / f"{name}-corrupted",
            severities=(1, 3, 5),
            near={"tin": stores / f"{name}-tin.zarr"},
            reference=teacher,
        )
        teacher = teacher or found
        cells = [found.metrics.get(metric) for metric in METRICS.values()]
        print(f"| {name} | " + " | ".join(shown(cell) for cell in cells) + " |", flush=True)


def some_of(folder: Path, count: int) -> Path:
    """A manifest of the first `count` images of each class."""
    manifest = folder.with_name(f"{folder.name}-{count}.csv")
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for label in sorted(path for path in folder.iterdir() if path.is_dir()):
            rows.writerows((path, label.name) for path in sorted(label.iterdir())[:count])
    return manifest


def shown(metric: evalsuite.Metric | None) -> str:
    if metric is None:
        return "1"
    return f"{metric.value:.3f}" + (f" ({metric.ci95[0]:.3f}–{metric.ci95[1]:.3f})" if metric.ci95 else "")


if __name__ == "__main__":
    main()

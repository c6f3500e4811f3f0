"""What a sample's own column is worth to `landmarks`: one of the columns, or none.

Teacher EfficientNet-Lite0; student `tiny`, on the first 2,000 images of one CIFAR-10 shard; measured on 1,000 of another
of its training shards, which nothing else looks at. Prints a Markdown table, mean ± sd over seeds.

    python benchmarks/landmarks.py --seeds 0,1,2
"""

import shutil
import statistics
from pathlib import Path

from photographs import arguments, unpacked

import distill
import evalsuite
import featcache
from distill.methods.landmarks import OWN

TEACHER = "builtin/efficientnet_lite0"
METRICS = ("top1@20", "mutual_knn@10", "gram_pearson")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default=",".join(OWN))
    options = parser.parse_args()
    train = first(unpacked("cifar10-train-0", options.data, options.work), options.images)
    test = first(unpacked("cifar10-train-1", options.data, options.work), 1000)
    stores = options.work / "stores"
    exact = {"precision": "fp32", "device": "cpu"}
    teacher = [featcache.extract(str(each), TEACHER, stores / f"{each.name}.zarr", **exact) for each in (train, test)]
    print("\n| own landmark | " + " | ".join(METRICS) + " |\n|" + "---|" * (len(METRICS) + 1))
    for way in options.ways.split(","):
        found = []
        for seed in options.seeds.split(","):
            name = f"landmarks-{way.replace(' ', '-')}-{options.images}-{options.epochs}-{seed}"
            run = distill.fit(
                teacher[0], str(train), out=options.work / "runs" / name, student="tiny", epochs=options.epochs,
                batch_size=64, seed=int(seed), device="cpu", precision="fp32", method_options={"own": way}, resume=True,
            )  # fmt: skip
            student = [
                featcache.extract(str(each), f"run:{run.path}", stores / f"{name}-{each.name}.zarr", **exact)
                for each in (train, test)
            ]
            metrics = {**evalsuite.knn(*student, k=[20]).metrics, **evalsuite.fidelity(teacher[1], student[1]).metrics}
            found.append([metrics[key].value for key in METRICS])
        cells = [
            f"{statistics.mean(of):.3f} ± {statistics.stdev(of) if len(of) > 1 else 0:.3f}"
            for of in zip(*found, strict=True)
        ]
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)


def first(folder: Path, count: int) -> Path:
    """A folder of the same classes with the first images of `folder`, as many of each class."""
    out = folder.with_name(f"{folder.name}-first-{count}")
    if not out.exists():
        classes = sorted(each for each in folder.iterdir() if each.is_dir())
        for each in classes:
            (out / each.name).mkdir(parents=True)
            for file in sorted(each.iterdir())[: count // len(classes)]:
                shutil.copy(file, out / each.name / file.name)
    return out


if __name__ == "__main__":
    main()

"""Does the student keep the teacher's angles? The methods against each other, on CIFAR-10, equal in all else.

Teacher EfficientNet-Lite0; student `tiny`; trained on the 10,000 images of one CIFAR-10 shard and their mirror images
(replayed, with the teacher's features of those very pixels); tested on 5,000 held-out ones. OOD: 5,000 Tiny-ImageNet
photographs at 32 px (near), 250 full-size ImageNet photographs and 450 scans of digits (far). Prints a Markdown table,
mean ± sd over seeds. Interrupted, it goes on where it was. A recipe is a method, with options after colons. With
--mixed, students also train on pictures made of the training images; with --unlabelled, on the images of other folders;
with --tiles, on pieces of the photographs: then the far set is not held out. An epoch passes over each image once, in
one of its views. All features are extracted in fp32.

    python benchmarks/faithfulness.py --seeds 0,1,2
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from photographs import arguments, resized, tiles, unpacked

import distill
import evalsuite
import featcache

TEACHER = "builtin/efficientnet_lite0"
METRICS = {
    "kNN top-1 (k = 20)": "top1@20",
    "near AUROC (k = 1)": "knn:k=1/near/tin/auroc",
    "near AUROC (k = 50)": "knn:k=50/near/tin/auroc",
    "far AUROC (k = 50)": "knn:k=50/far/photographs/auroc",
    "digits AUROC (k = 50)": "knn:k=50/far/digits/auroc",
    "Gram correlation": "gram_pearson",
    "Gram, training images": "train/gram_pearson",
    "Gram, near set": "tin/gram_pearson",
    "mutual kNN@10": "mutual_knn@10",
    "CKA (debiased, unit rows)": "cka_debiased_unit",
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of the students' training")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipes", default="proteus,mse,cosine,rkd,lightly_v1,tintem,tintem:relation=0.3,landmarks")
    parser.add_argument("--augment", default="flip", choices=["none", "flip", "rrc"], help="of the stored views")
    parser.add_argument("--views", type=int, default=2, help="stored of each image, unless --augment none")
    parser.add_argument("--crop-area", type=float, default=0.35, help="least area of a stored crop, of the image's")
    parser.add_argument(
        "--student-augment", choices=["photometric", "crops"], help="train on view 0 against the student's own views"
    )
    parser.add_argument("--mixed", type=int, default=0, help="also train on so many mixtures of the training images")
    parser.add_argument(
        "--unlabelled", type=Path, nargs="*", default=[], help="folders or .tar files of images to train on too"
    )
    parser.add_argument(
        "--tiles", type=int, default=0, help="also train on so many squares of each of the 250 photographs"
    )
    options = parser.parse_args()
    images = unpack(options)
    teacher = stores(options.work, images, "teacher", TEACHER)
    views = {"augment": options.augment, "views": 1 if options.augment == "none" else options.views}
    views_name = options.augment + (f"-{views['views']}" if views["views"] > 2 else "")
    if options.augment == "rrc":
        views["crop_area"] = options.crop_area
        views_name += f"-{options.crop_area}"
    extra: dict[str, Path | str] = {}
    for given in options.unlabelled:
        folder = unpacked(given.stem, given.parent, options.work) if given.suffix == ".tar" else given
        extra[folder.name] = folder
    if options.mixed:
        extra[f"mixed-{options.mixed}"] = f"mixed:{options.mixed}:{images['train']}"
    if options.tiles:
        pieces = tiles(images["far"], options.tiles, 32)
        extra[pieces.name] = pieces
    corpora = {f"targets-{views_name}": images["train"]}
    corpora |= {f"targets-{views_name}-{name}": corpus for name, corpus in extra.items()}
    targets = [
        featcache.extract(str(corpus), TEACHER, options.work / "stores" / f"{name}.zarr", precision="fp32", **views)
        for name, corpus in corpora.items()
    ]
    student_views = {"views": "student", "student_augment": options.student_augment} if options.student_augment else {}
    table = {"teacher": [measure(teacher, teacher)]}
    for seed in options.seeds.split(","):
        for recipe in re.split(r",(?![^\[]*\])", options.recipes):  # not at the commas of a list
            name = f"{recipe.replace(':', '-')}-{views_name}-{options.epochs}-{options.batch_size}-{seed}"
            precision = [options.precision] if options.precision != "fp32" else []
            name = "-".join([name, *filter(None, [options.student_augment]), *extra, *precision])
            out = options.work / "runs" / name
            method, method_options = parsed(recipe)
            distill.fit(
                targets, list(map(str, corpora.values())), out=out, student="tiny", method=method, method_options=method_options,
                epochs=options.epochs, batch_size=options.batch_size, lr=3e-3, seed=int(seed), precision=options.precision, resume=True,
                **student_views,
            )  # fmt: skip
            found = measure(stores(options.work, images, name, f"run:{out}"), teacher)
            table.setdefault(recipe, []).append(found)
            print(f"{name}: " + "  ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True)

    print("\n| encoder | " + " | ".join(METRICS) + " |\n|" + "---|" * (len(METRICS) + 1))
    for name, runs in table.items():
        cells = [[run[metric] for run in runs] for metric in METRICS]
        print(f"| {name} | " + " | ".join(mean_sd(values) for values in cells) + " |")


def unpack(options: argparse.Namespace) -> dict[str, Path | str]:
    """Corpora, by the part they play."""
    data, work = options.data, options.work
    return {
        "train": unpacked("cifar10-train-0", data, work),
        "test": unpacked("cifar10-test-half", data, work),
        "tin": resized(unpacked("tiny-imagenet-val-half", data, work), 32),
        "far": unpacked("imagenet-samples-250", data, work),
        "digits": "digits:test",
    }


def stores(work: Path, images: dict[str, Path | str], name: str, encoder: str) -> dict[str, featcache.FeatureStore]:
    return {
        part: featcache.extract(str(corpus), encoder, work / "stores" / f"{name}-{part}.zarr", precision="fp32")
        for part, corpus in images.items()
    }


def parsed(recipe: str) -> tuple[str, dict[str, float | bool | str]]:
    """`METHOD:KEY=VALUE:…` → the method and its options."""
    method, *given = recipe.split(":")
    return method, {key: value_of(value) for key, _, value in (item.partition("=") for item in given)}


def value_of(text: str) -> float | bool | str:
    """A number, true or false, or a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def measure(encoder: dict[str, featcache.FeatureStore], teacher: dict[str, featcache.FeatureStore]) -> dict[str, float]:
    found = [
        evalsuite.knn(encoder["train"], encoder["test"], k=[20]),
        evalsuite.ood(
            id_train=encoder["train"],
            id_test=encoder["test"],
            near={"tin": encoder["tin"]},
            far={"photographs": encoder["far"], "digits": encoder["digits"]},
            detectors=["knn:k=1", "knn:k=50"],
        ),
        evalsuite.fidelity(teacher["test"], encoder["test"]),
    ]
    metrics = {key: metric.value for result in found for key, metric in result.metrics.items()}
    for part in ("train", "tin"):
        fidelity = evalsuite.fidelity(teacher[part], encoder[part])
        metrics[f"{part}/gram_pearson"] = fidelity.metrics["gram_pearson"].value
    return {title: metrics[key] for title, key in METRICS.items()}


def mean_sd(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()

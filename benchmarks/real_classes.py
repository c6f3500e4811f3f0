"""How faithful is a student of photographs of a hundred classes? Methods against each other, equal in all else.

Teacher EfficientNet-Lite0 at its own input; 64 px photographs of Tiny-ImageNet (`classes.py`), in their plain view and three
replayed crops; no labels. `--split tune` trains on some classes and measures on held-out images and unseen classes of the
training set: settings are chosen there. `--split test` trains on all training images and measures on the test sets. OOD
near: other classes; far: CIFAR-10. Student features are extracted in fp32. Prints a Markdown table, mean ± sd over seeds. Interrupted,
it goes on where it was; two processes may work on different seeds or recipes at once.

    python benchmarks/real_classes.py --seeds 0,1,2
"""

import os
from pathlib import Path

import torch
from classes import parts
from faithfulness import mean_sd, parsed
from landmarks import first
from photographs import arguments
from torch.utils.flop_counter import FlopCounterMode

import distill
import evalsuite
import featcache
from featcache.student import Student, load_student, open_student

TEACHER = "builtin/efficientnet_lite0"
SPLITS = {
    "tune": {"train": "fit", "test": "held", "near": "unseen"},
    "test": {"train": "train", "test": "test", "near": "near", "far": "far"},
}
DETECTORS = ("knn:k=1", "knn:k=10", "knn:k=50", "mahalanobis++", "rmd")
METRICS = {
    "kNN top-1": "top1@20",
    **{f"near, {name}": f"{name}/near/near/auroc" for name in DETECTORS},
    **{f"far, {name}": f"{name}/far/far/auroc" for name in ("knn:k=50", "mahalanobis++")},
    **{f"Spearman, {name}": f"scores/{name}/all/spearman" for name in ("knn:k=50", "mahalanobis++")},
    "Gram": "gram_pearson",
    "mutual kNN@10": "mutual_knn@10",
    "CKA (unit)": "cka_debiased_unit",
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--split", default="test", choices=list(SPLITS))
    parser.add_argument(
        "--images", type=int, default=0, help="train on the first so many, as many of each class; all when 0"
    )
    parser.add_argument("--student", default="tiny")
    parser.add_argument("--image-size", type=int, default=0, help="px; the student's own when 0")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"], help="of the students' training")
    parser.add_argument("--quick", action="store_true", help="measure neighbours and angles alone")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipes", default="centred,landmarks,tintem,cosine,proteus")
    options = parser.parse_args()
    print(f"{TEACHER}: {multiply_adds(open_student(TEACHER))}")
    images = {part: str(folder) for part, folder in parts(options.data, options.work).items()}
    roles = dict(SPLITS[options.split])
    if options.images:
        roles["train"] += f"-first-{options.images}"
        images[roles["train"]] = str(first(Path(images[SPLITS[options.split]["train"]]), options.images))
    stores = options.work / "stores"
    exact = {"precision": "fp32", "device": "cpu"}
    views = {"augment": "rrc", "views": 4, "crop_area": 0.6}
    teacher = {
        role: featcache.extract(
            images[part],
            TEACHER,
            stores / f"classes-teacher-{part}.zarr",
            **exact,
            **({} if part in ("test", "near", "far") else views),
        )
        for role, part in roles.items()
    }
    table = {"teacher": [measured(teacher, teacher, options.quick)]}
    for seed in options.seeds.split(","):
        for recipe in options.recipes.split(","):
            method, method_options = parsed(recipe)
            student = options.student.replace("/", "-") + (f"-{options.image_size}" if options.image_size else "")
            name = f"classes-{options.split}{options.images or ''}-{student}-{recipe.replace(':', '-')}-{options.epochs}-{options.lr}-{options.precision}-{seed}"
            run = distill.fit(
                teacher["train"], images[roles["train"]], out=options.work / "runs" / name, student=options.student,
                image_size=options.image_size, method=method, method_options=method_options, epochs=options.epochs,
                batch_size=options.batch_size, lr=options.lr, seed=int(seed), precision=options.precision, device="cpu",
                resume=True, workers=int(os.environ.get("OMP_NUM_THREADS", 2)),
            )  # fmt: skip
            print(f"{name}: {multiply_adds(load_student(run.path)[0])}")
            found = {
                role: featcache.extract(images[part], f"run:{run.path}", stores / f"{name}-{part}.zarr", **exact)
                for role, part in roles.items()
            }
            table.setdefault(recipe, []).append(measured(found, teacher, options.quick))
            print(f"{name}: " + "  ".join(f"{k} {v:.3f}" for k, v in table[recipe][-1].items()), flush=True)
    titles = list(table["teacher"][0])
    print("\n| encoder | " + " | ".join(titles) + " |\n|" + "---|" * (len(titles) + 1))
    for name, runs in table.items():
        print(f"| {name} | " + " | ".join(mean_sd([run[title] for run in runs]) for title in titles) + " |")


def multiply_adds(student: Student) -> str:
    """Of one image, by torch's own count."""
    with FlopCounterMode(display=False) as counted:
        student.eval()(torch.zeros(1, 3, student.image_size, student.image_size))
    return f"{counted.get_total_flops() / 2e6:.0f} M multiply-adds an image"


def measured(
    encoder: dict[str, featcache.FeatureStore], teacher: dict[str, featcache.FeatureStore], quick: bool = False
) -> dict[str, float]:
    """`METRICS` by title, those of the sets that there are."""
    found = [evalsuite.knn(encoder["train"], encoder["test"], k=[20])]
    if quick:
        found.append(evalsuite.fidelity(teacher["test"], encoder["test"]))
        return titled(found)
    found += [
        evalsuite.ood(
            id_train=encoder["train"],
            id_test=encoder["test"],
            near={"near": encoder["near"]},
            far={"far": encoder["far"]} if "far" in encoder else None,
            detectors=DETECTORS,
        ),
        evalsuite.fidelity(
            teacher["test"],
            encoder["test"],
            teacher_bank=teacher["train"],
            student_bank=encoder["train"],
            detectors=DETECTORS,
            teacher_ood={name: teacher[name] for name in ("near", "far") if name in teacher},
            student_ood={name: encoder[name] for name in ("near", "far") if name in encoder},
        ),
    ]
    return titled(found)


def titled(found: list[evalsuite.Result]) -> dict[str, float]:
    metrics = {key: metric.value for result in found for key, metric in result.metrics.items()}
    return {title: metrics[key] for title, key in METRICS.items() if key in metrics}


if __name__ == "__main__":
    main()

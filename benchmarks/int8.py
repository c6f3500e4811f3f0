"""What int8 costs: students exported by ONNX Runtime's static quantisation, beside what they were.

Teacher EfficientNet-Lite0 at 128 px, CIFAR-10's JPEGs (1,000 to train, calibrate and bank; 500 test images). Students: `tiny`,
distilled for 20 epochs; `lite0` from its own ImageNet weights, of which five steps at a learning rate of 1e-7 move the batch norms' statistics
alone, and `lite0-trained`, distilled from there for one epoch of 31 steps at 1e-4; a ViT-Ti/16 at 64 px of random weights, for the code path. Near OOD are 200 images of Tiny-ImageNet, far 80 aerial photographs of roads. Prints two
Markdown tables: each student beside its int8, and how fast they are. Interrupted, it goes on where it was.

    python benchmarks/int8.py
"""

import json
from pathlib import Path
from typing import Any

from photographs import arguments, unpacked

import distill
import evalsuite
import featcache
from distill.exporting.speed import speed

TEACHER = "builtin/efficientnet_lite0@size=128"
ONE_EPOCH = {"epochs": 1, "views": "plain", "method": "cosine"}
LITE0 = {"student": "builtin/efficientnet_lite0", "image_size": 128}
FITS: dict[str, dict[str, Any]] = {
    "tiny": {"student": "tiny", "epochs": 20, "batch_size": 128},
    "lite0": {**LITE0, **ONE_EPOCH, "lr": 1e-7, "batch_size": 16},
    "lite0-trained": {**LITE0, **ONE_EPOCH, "lr": 1e-4, "batch_size": 32},
    "vit": {"student": "timm/vit_tiny_patch16_224", "image_size": 64, **ONE_EPOCH, "lr": 1e-7, "batch_size": 16},
}
SETS = {
    "train": ("cifar10-train-0", "*", 100),
    "test": ("cifar10-test-half", "*", 50),
    "tin": ("tiny-imagenet-val-half", "*", 1),
    "roads": ("roads-epfl-200px", "train/images", 80),
}
"""Of each set its archive, its folders in it, and how many images of each."""
EXACT: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--method", default="percentile", help="of calibration")
    options = parser.parse_args()
    work = options.work / "int8"
    sets = {name: few(unpacked(archive, options.data, options.work), folders, count, work / name)
            for name, (archive, folders, count) in SETS.items()}  # fmt: skip

    def stores(encoder: str, name: str) -> dict[str, Path]:
        for of in sets:
            featcache.extract(str(sets[of]), encoder, work / f"{name}-{of}.zarr", **EXACT)
        return {of: work / f"{name}-{of}.zarr" for of in sets}

    teacher, rows, runs = stores(TEACHER, "teacher"), [], []
    for name, given in FITS.items():
        run = work / "runs" / name
        on = "roads" if given.get("lr") == 1e-7 else "train"
        distill.fit(teacher[on], str(sets[on]), out=run, device="cpu", resume=run.exists(), **given)
        small, said = work / f"{name}-{options.method}", work / f"{name}-{options.method}.json"
        if not small.exists():
            calibration = distill.Calibration(corpus=str(sets["train"]), method=options.method)
            lost = distill.export(
                run, small, format="onnx", precision="int8", calibration=calibration, any_loss=True
            ).loss
            assert lost
            said.write_text(json.dumps([lost.cosine, lost.least]))
        cosine = json.loads(said.read_text())
        whole, rounded = stores(f"run:{run}", name), stores(f"onnx/{small}", small.name)
        rows += [
            [name, "fp32", 1.0, 1.0, *measured(teacher, whole, whole)],
            [name, "int8", *cosine, *measured(teacher, whole, rounded)],
        ]
        runs.append(run)
    table("student", "", "cosine", "least", "Gram", "10-NN", "Gram to teacher", "kNN near", "kNN far", rows=rows)
    found = speed(runs, threads=(1, 2), batches=(1, 8))
    table("student", "format", "threads", "batch", "time", "MB", "M parameters", "M multiply-adds", rows=[
        [Path(each.run).name, each.format, each.threads, each.batch, each.ratio, each.file_bytes / 1e6,
         each.parameters / 1e6, each.multiply_adds / 1e6]
        for each in found
    ])  # fmt: skip


def few(source: Path, folders: str, count: int, target: Path) -> Path:
    """Links to the first so many images of each of the folders."""
    for folder in sorted(path for path in source.glob(folders) if path.is_dir()):
        for file in sorted(folder.iterdir())[:count]:
            link = target / folder.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(file.resolve())
    return target


def measured(teacher: dict[str, Path], whole: dict[str, Path], found: dict[str, Path]) -> list[float]:
    """How like the student in fp32 and the teacher test images are, and AUROCs of kNN."""
    like = evalsuite.fidelity(whole["test"], found["test"]).metrics
    taught = evalsuite.fidelity(teacher["test"], found["test"]).metrics
    ood = evalsuite.ood(
        id_train=found["train"], id_test=found["test"], near={"tin": found["tin"]}, far={"roads": found["roads"]},
        detectors=["knn"],
    ).metrics  # fmt: skip
    return [
        like["gram_pearson_centred"].value, like["mutual_knn@10"].value, taught["gram_pearson_centred"].value,
        ood["knn/near/mean/auroc"].value, ood["knn/far/mean/auroc"].value,
    ]  # fmt: skip


def table(*columns: str, rows: list[list[Any]]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = (f"{cell:.2f}" if isinstance(cell, float) and cell >= 10 else f"{cell:.4f}" if isinstance(cell, float) else f"{cell}" for cell in row)  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

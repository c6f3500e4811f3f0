"""The null test: the same images as ID and as OOD set. AUROC must be 0.5; what else it is, precision alone has made.

Bank and query are CIFAR-10 images. The query is extracted twice, the second time with another number of threads and
with nothing known to other stores; as ID and OOD set it must score alike, whichever precision both are in. In the last
column one side is fp32 and the other bf16, which the commands refuse unless asked (`--any-precision`). Encoders:
EfficientNet-Lite0, and a `tiny` student of it, trained for this (or --student run:PATH).

    python benchmarks/null_test.py
"""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from photographs import arguments, unpacked

import distill
import evalsuite
import featcache
from evalsuite.metrics import auroc
from evalsuite.scores import build_all, fit_all, score_all
from featcache.head import Head
from featcache.rows import Rows

TEACHER = "builtin/efficientnet_lite0"
DETECTORS = [
    *(
        "knn:k=1",
        "knn",
        "mahalanobis",
        "mahalanobis++",
        "rmd",
        "ssd",
        "gmm",
        "cosine_mean",
        "residual",
        "lof",
    ),
    *(
        "msp",
        "maxlogit",
        "energy",
        "gen",
        "klm",
        "react",
        "ash",
        "scale",
        "dice",
        "she",
        "vim",
        "nnguide",
        "fdbd",
        "nci",
    ),
    "gradnorm",
]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--bank", type=int, default=2000, help="images that detectors are fitted to")
    parser.add_argument("--query", type=int, default=500, help="images that are ID and OOD set")
    parser.add_argument("--encoders", default=f"{TEACHER},student", help="comma list")
    parser.add_argument("--method", default="proteus", help="of the student that is trained")
    parser.add_argument("--student", help="run:PATH of another student")
    parser.add_argument("--half", default="bf16+channels_last", help="the other precision")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of identical images, saturated scores, unfaithful stores
    work = options.work / "null_test"
    os.environ["FEATCACHE_HOME"] = str(work / "home")  # nothing known
    images = {
        "bank": some_of(unpacked("cifar10-train-0", options.data, options.work), options.bank, work),
        "query": some_of(unpacked("cifar10-test-half", options.data, options.work), options.query, work),
    }
    for name in options.encoders.split(","):
        spec = options.student or trained(images["bank"], options.method, work) if name == "student" else name
        title = f"{options.method} student" if name == "student" and not options.student else spec
        print(f"\n| {title}: detector | fp32 | {options.half} | fp32 against {options.half} |\n|---|---|---|---|")
        found = aurocs(images, spec, options.half, work)
        for detector in found[0]:
            print(f"| `{detector}` | " + " | ".join(f"{each.get(detector, np.nan):.4f}" for each in found) + " |")


def aurocs(images: dict[str, Path], spec: str, half: str, work: Path) -> list[dict[str, float]]:
    """Detector → AUROC, all in fp32, all in half precision, and with the OOD set alone in half precision."""
    encoder, threads = featcache.load_encoder(spec), torch.get_num_threads()
    stores: dict[str, featcache.FeatureStore] = {}
    name = "".join(c if c.isalnum() else "-" for c in spec)[-40:]
    for precision in ("fp32", half):
        for part, others in (("bank", 0), ("query", 0), ("query", 1)):
            os.environ["FEATCACHE_HOME"] = str(work / f"home-{others}")
            torch.set_num_threads(3 - threads if others and threads < 3 else threads)
            stores[f"{precision} {part}{others}"] = featcache.extract(
                str(images[part]),
                encoder,
                work / "stores" / f"{name}-{precision}-{part}{others}.zarr",
                precision=precision,
            )
    torch.set_num_threads(threads)
    made = []
    for bank, ood in (("fp32", "fp32"), (half, half), ("fp32", half)):
        heads = work / f"{name}-{bank}.safetensors"
        evalsuite.probe(stores[f"{bank} bank0"], stores[f"{bank} query0"], c=1.0, save=heads)
        head, failures = Head.read(heads), {}
        rows = [Rows.of(stores[which], head) for which in (f"{bank} bank0", f"{bank} query0", f"{ood} query1")]
        for each in rows[1:]:
            rows[0].require_same_encoder(each, any_precision=bank != ood)
        fitted = fit_all(build_all(DETECTORS), rows[0], rows[1:], failures)
        one, other = (score_all(fitted, each, failures) for each in rows[1:])
        made.append({detector: auroc(one[detector], other[detector]) for detector in one if detector not in failures})
    return made


def some_of(folder: Path, count: int, work: Path) -> Path:
    """A folder of links to `count` of the images, evenly of every class."""
    made = work / "images" / f"{folder.name}-{count}"
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not made.exists():
        for each in classes:
            (made / each.name).mkdir(parents=True)
            for path in sorted(each.iterdir())[: count // len(classes)]:
                (made / each.name / path.name).symlink_to(path.resolve())
    return made


def trained(images: Path, method: str, work: Path) -> str:
    """A `tiny` student of the teacher, after eight epochs on these images."""
    out = work / "runs" / f"{method}-{images.name}"
    targets = featcache.extract(str(images), TEACHER, work / "stores" / f"targets-{images.name}.zarr", precision="fp32")
    distill.fit(
        targets,
        str(images),
        out=out,
        student="tiny",
        method=method,
        epochs=8,
        batch_size=64,
        precision="fp32",
        resume=True,
    )
    return f"run:{out}"


if __name__ == "__main__":
    main()

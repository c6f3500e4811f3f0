"""Are the settings that `featcache new` chooses worth it beside `distill fit`'s own defaults?

The first images of scikit-learn's digits, EfficientNet-Lite0, student `tiny`, as many epochs, so equally many images seen: (A) one
view and the defaults, (B) views, batch and learning rate as `distill.chosen` has them. How alike student and teacher are on other
scans, that neither was chosen by.

    python benchmarks/chosen.py --images 256 --seeds 0,1,2
"""

import argparse
import statistics
from pathlib import Path

import distill
import evalsuite
import featcache
from distill.chosen import choose, survey
from featcache.corpora.digits import Digits

METRICS = ("gram_pearson", "cka_debiased", "mutual_knn@10", "agreement/top1")


def write(folder: Path, split: str, count: int) -> str:
    corpus = Digits(split)
    for i in range(count):
        path = folder / split / str(corpus.label(i)) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(corpus.read(i))
    return str(folder / split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--test-images", type=int, default=250)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/chosen"))
    asked = parser.parse_args()
    train, test = write(asked.work, "train", asked.images), write(asked.work, "test", asked.test_images)
    teacher = featcache.load_encoder("builtin/efficientnet_lite0")
    seen = survey(featcache.open_corpus(train))
    views, settings = choose(seen, teacher_parameters=teacher.parameters, teacher_side=teacher.preprocess.size)
    given = {name: each.value for name, each in settings.items()}
    fits = {
        "default": ({}, {name: given[name] for name in ("student", "epochs", "holdout") if name in given}),
        "chosen": ({name: each.value for name, each in views.items()}, given),
    }
    of_teacher = featcache.extract(test, teacher, asked.work / "teacher-test.zarr", precision="fp32")
    found: dict[tuple[str, str], list[float]] = {}
    for name, (extracting, fitting) in fits.items():
        store = featcache.extract(train, teacher, asked.work / f"{name}.zarr", precision="fp32", **extracting)
        for seed in map(int, asked.seeds.split(",")):
            out = asked.work / "runs" / f"{name}-{seed}"
            options = {"mapping_steps": 200}
            run = distill.fit(store, train, out=out, seed=seed, method_options=options, resume=True, **fitting)
            place = asked.work / f"{name}-{seed}-test.zarr"
            of_student = featcache.extract(test, f"run:{run.path}", place, precision="fp32")
            for metric, value in evalsuite.fidelity(of_teacher, of_student).metrics.items():
                if metric in METRICS:
                    found.setdefault((name, metric), []).append(value.value)
    for name in fits:
        told = []
        for metric in METRICS:
            values = found[name, metric]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            told.append(f"{metric} {statistics.fmean(values):.3f}{spread}")
        print(f"{name}: {' · '.join(told)}")


if __name__ == "__main__":
    main()

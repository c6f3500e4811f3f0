"""`evalsuite ood` with ten detectors, against pytorch-ood with the same ten on the same arrays.

50,000 training rows, 10,000 ID and 2 × 10,000 OOD rows of 768 dimensions in 100 classes, both sides in turn in one run.
Ours read stores, fit, score, and compute seven metrics with intervals.
pytorch-ood has the arrays in memory, fits, scores, and computes its metrics. Prints seconds, of the clock and of the
processor, also of each detector, the ratios of the latter, and the process's peak memory up to there (Linux). The peer's
arrays take some 20 GiB at full size, 5 GiB at `--rows 25000 --classes 50`.

    python benchmarks/ood_speed.py

Needs the dev extra, for pytorch-ood.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_ood import detector as peer
from pytorch_ood.metrics import OODMetrics
from safetensors.numpy import save_file

import evalsuite
from evalsuite.detectors import load
from evalsuite.detectors._ranges import principal
from featcache import write_store
from featcache.rows import Rows

FEATURES = {
    "knn": lambda w, b: peer.KNN(None),
    "mahalanobis": lambda w, b: peer.Mahalanobis(None),
    "rmd": lambda w, b: peer.RMD(None),
    "gmm": lambda w, b: peer.GMM(None),
    "vim": lambda w, b: peer.ViM(None, principal("vim:components", None, Rows.from_arrays(w.numpy())), w, b),
}
LOGITS = {
    "msp": lambda: peer.MaxSoftmax(None),
    "maxlogit": lambda: peer.MaxLogit(None),
    "energy": lambda: peer.EnergyBased(None),
    "gen": lambda: peer.GEN(None),
    "klm": lambda: peer.KLMatching(None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--double", action="store_true", help="let pytorch-ood compute in float64, to compare AUROCs")
    parser.add_argument("--detectors", default=",".join([*FEATURES, *LOGITS]), help="of these")
    options = parser.parse_args()
    if options.double:
        torch.Tensor.float = torch.Tensor.double
    data, labels = rows(options.rows, options.width, options.classes)
    means = np.stack([data["train"][labels == c].mean(axis=0) for c in range(options.classes)])
    weight, bias = means / options.width, -(means**2).sum(axis=1) / 2 / options.width  # nearest mean, not too sure
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for name, x in data.items():
            write_store(here / f"{name}.zarr", x, labels=labels if name == "train" else None)
        save_file({"weight": weight, "bias": bias}, here / "head.safetensors")

        def ours(detectors: list[str]) -> dict[str, float]:
            result = evalsuite.ood(
                id_train=here / "train.zarr", id_test=here / "test.zarr", near={"near": here / "near.zarr"},
                far={"far": here / "far.zarr"}, head=here / "head.safetensors", detectors=detectors,
            )  # fmt: skip
            return {name: metric.value for name, metric in result.metrics.items() if name.endswith("r/auroc")}

        ten = options.detectors.split(",")
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "ten detectors": lambda: ours(ten),
            "pytorch-ood, the same ten": lambda: theirs(ten, data, labels, weight, bias),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        found = {}
        of_detector = watch(ten)
        for _ in range(options.rounds):
            for name, side in sides.items():
                began = time.perf_counter(), time.process_time()
                found[name] = side()
                taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                print(f"{name}: {taken[name][-1][1]:.1f} s of the processor; peak so far {peak:.1f} GiB", flush=True)
        for name, seconds in of_detector.items():
            print(f"  ours {name}: {seconds / options.rounds:.2f} s of the processor")
        ours_s = np.median(taken["ten detectors"], axis=0)
        for name, seconds in taken.items():
            wall, busy = np.median(seconds, axis=0)
            print(f"{name:26} {wall:8.1f} s, processor {busy:8.1f} s, {busy / ours_s[1]:6.2f} × ours with ten")
        for name, value in found["pytorch-ood, the same ten"].items():
            print(f"{name:28} {value:.6f}, ours {found['ten detectors'][name] - value:+.1e}")


def watch(names: list[str]) -> dict[str, float]:
    """What each of our detectors will have taken from now on, in seconds of the processor."""
    taken = dict.fromkeys(names, 0.0)

    def timed(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = time.process_time()
            found = method(*given)
            taken[name] += time.process_time() - began
            return found

        return run

    for name in names:
        kind = load(name)
        kind.fit, kind.score = timed(kind.fit, name), timed(kind.score, name)
    return taken


def rows(count: int, width: int, classes: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Overlapping clusters, as float16 holds them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, width))

    def around(centres: np.ndarray, label: np.ndarray) -> np.ndarray:
        found = centres[label] + 3 * rng.normal(size=(len(label), width))
        return found.astype(np.float16).astype(np.float32)

    labels = np.arange(count) % classes
    few = np.arange(count // 5) % classes
    return {
        "train": around(centres, labels),
        "test": around(centres, few),
        "near": around(centres + 0.5 * rng.normal(size=centres.shape), few),
        "far": around(rng.normal(size=centres.shape), few),
    }, labels


def theirs(
    detectors: list[str], data: dict[str, np.ndarray], labels: np.ndarray, weight: np.ndarray, bias: np.ndarray
) -> dict[str, float]:
    target = torch.from_numpy(labels)
    features = {name: torch.from_numpy(x).float() for name, x in data.items()}
    w, b = torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
    logits = {name: x @ w.T + b for name, x in features.items()}
    found = {}
    for name in detectors:
        make = {**FEATURES, **LOGITS}[name]
        began = time.process_time()
        if name in FEATURES:
            detector, given, fit, predict = make(w, b), features, "fit_features", "predict_features"
        else:
            detector, given, fit, predict = make(), logits, "fit_logits", "predict_logits"
        if detector.requires_fit:
            getattr(detector, fit)(given["train"], target)
        scores = {part: getattr(detector, predict)(given[part]) for part in ("test", "near", "far")}
        for part in ("near", "far"):
            metrics = OODMetrics()
            metrics.update(scores["test"], torch.zeros(len(scores["test"]), dtype=torch.long))
            metrics.update(scores[part], torch.full((len(scores[part]),), -1))
            found[f"{name}/{part}/{part}/auroc"] = float(metrics.compute()["AUROC"])
        print(f"  pytorch-ood {name}: {time.process_time() - began:.1f} s of the processor", flush=True)
    return found


if __name__ == "__main__":
    main()

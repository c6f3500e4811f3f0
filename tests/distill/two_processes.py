"""Run by test_processes.py, in one process or as one of two: trains with every method given and writes what it saw.

python two_processes.py STORE CORPUS OUT METHOD …
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

import distill

METHODS = {
    "proteus": {},
    "relation": {"method": "tintem", "method_options": {"mapping_steps": 2, "mapping_batch_size": 8, "relation": 0.5}},
    "landmarks": {"method_options": {"mapping_steps": 2, "mapping_batch_size": 8, "landmarks": 9}},
    "joint": {"method": "tintem", "method_options": {"joint": True}},
    "rkd": {"optimizer": "sgd", "layer_decay": 0.9, "keep_checkpoints": 2 / 3},
    "lightly_v1": {"method_options": {"queue": 24}},
}


def small() -> nn.Module:
    """Without batch statistics: those are of one process's part of the batch on a CPU."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.Conv2d(8, 16, 3, 2), nn.Flatten(), nn.LazyLinear(8))


def make() -> nn.Module:
    module = small()
    module(torch.zeros(1, 3, 16, 16))
    return module


def main(store: str, corpus: str, out: str, *names: str) -> None:
    torch.set_num_threads(1)
    importlib.import_module("distill.training.loop").LOG_EVERY = 1
    for name in names:
        told: list[dict[str, float]] = []
        settings = {"method": name, **METHODS[name]}
        distill.fit(
            store, corpus, out=Path(out) / name, device="cpu", workers=1, student="two_processes:make", image_size=16,
            epochs=2, batch_size=16, lr=1e-3, eval_every=1, holdout=0.25,
            progress=lambda at, told=told: told.append(at.terms), **settings,
        )  # fmt: skip
        if told:
            (Path(out) / f"{name}.json").write_text(json.dumps([terms for terms in told if terms]))


if __name__ == "__main__":
    main(*sys.argv[1:])

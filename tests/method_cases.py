"""Every distillation method, and every way of using it, of few steps."""

from collections.abc import Mapping
from typing import Any

from featcache.plugins import plugin_names

FEW: Mapping[str, Any] = {"mapping_steps": 3}

WAYS: dict[str, list[dict[str, Any]]] = {
    "tintem": [
        {**FEW},
        {"mapping": "spectral"},
        {**FEW, "relation": 0.3},
        {"joint": True},
        {**FEW, "tokens": True},
        {"tokens": True, "joint": True, "relation": 0.3},
    ],
    "centred": [{"mapping": "spectral", "landmarks": 7}, {"mapping": "spectral", "tokens": True, "landmarks": 50}],
    "landmarks": [{"mapping": "spectral", "landmarks": 7}, {"mapping": "spectral", "tokens": True, "landmarks": 50}],
    "proteus": [{}, {"tokens": True}],
    "cosine": [{}, {"head": "layernorm_linear"}],
    "mse": [{}, {"head": "mlp"}],
    "rkd": [{}, {"match": 1.0, "normalise": False, "angle_batch": 7}],
    "lightly_v1": [{}, {"queue": 50}],
    "ce": [{}, {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0}],
    "autoencoder": [{}, {"sigmoid": True}],
    "ega": [{}, {"edge": 0.0, "dim": 7}],
    "akd": [{}, {"lam": 1.0, "norms": "train"}, {"lam": 0.0, "smoothing": 0.1, "random_start": False, "steps": 1}],
    "reffakd": [{}, {"table_temperature": 0.1, "control": "shuffled"}, {"control": "even"}],
    "dad": [{}, {"temperature": 1.0}],
    "sslkd": [{}, {"match": "cosine", "align": "mse", "tokens": False, "least": 0.4}],
    "sskd": [{"head_epochs": 1}, {"relation": 0.0}],
    "embed_distill": [{"scores": 0.0, "labels": 0.0}],
    "learn_to_augment": [{"keep": 5}],
    "kd": [{}, {"alpha": 1.0, "temperature": 2.0}],
    "okd": [
        {"start": 0.1},
        {"start": 0.1, "mu": 0.0, "direction": "reverse", "temperature": 2.0},
        {"online": False, "lam": 1.0, "source": "token_logits"},
    ],
}
CASES = [(name, options) for name in plugin_names("distill.methods") for options in WAYS.get(name, [{}])]
"""(name, options): those above, and every other registered method as it is by default."""


def label(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items() if key not in FEW)])

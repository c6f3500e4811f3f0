"""Every distillation method, and every way of using it, with a store and a batch for any of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill import load_method
from distill.methods import Batch, Fitted
from featcache.inputs.images import PARAMETERS
from featcache.plugins import plugin_names
from featcache.rows import Rows
from featcache.store import FeatureStore, create_store
from featcache.store.layout import OK
from featcache.store.manifest import CorpusRecord, EncoderRecord, Manifest, ViewsRecord

TEACHER, STUDENT, ROWS, VIEWS = 12, 6, 20, 2
FIELDS = {"embedding": (TEACHER,), "tokens": (16, TEACHER), "prefix_tokens": (2, TEACHER)}

WAYS: dict[str, list[dict[str, Any]]] = {
    "tintem": [
        {},
        {"mapping": "spectral"},
        {"relation": 0.3},
        {"joint": True},
        {"tokens": True},
        {"tokens": True, "joint": True, "relation": 0.3},
    ],
    "landmarks": [{"mapping": "spectral", "landmarks": 7}, {"mapping": "spectral", "tokens": True, "landmarks": 50}],
    "proteus": [{}, {"tokens": True}],
    "cosine": [{}, {"head": "layernorm_linear"}],
    "mse": [{}, {"head": "mlp"}],
    "rkd": [{}, {"match": 1.0, "normalise": False, "angle_batch": 7}],
    "lightly_v1": [{}, {"queue": 50}],
}
CASES = [(name, options) for name in plugin_names("distill.methods") for options in WAYS.get(name, [{}])]
"""(name, options): those above, and every other registered method as it is by default."""


def label(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def write_token_store(path: Path, fields: dict[str, tuple[int, ...]] = FIELDS, seed: int = 0) -> FeatureStore:
    """Random features of any shape, two views."""
    rng = np.random.default_rng(seed)
    manifest = Manifest(
        encoder=EncoderRecord(name="arrays", fingerprint="arrays", preprocess={}),
        corpus=CorpusRecord(spec=None, rows=ROWS, class_names=None),
        views=ViewsRecord(count=VIEWS),
        fields={name: list(shape) for name, shape in fields.items()},
        chunk_rows=ROWS,
    )
    store = create_store(path, manifest)
    features = {name: rng.normal(size=(ROWS, VIEWS, *shape)).astype(np.float16) for name, shape in fields.items()}
    rows = {
        "label": np.full(ROWS, -1),
        "sample_id": np.array([str(i) for i in range(ROWS)], dtype=object),
        "content": np.zeros((ROWS, 16), np.uint8),
        "view": np.zeros((ROWS, VIEWS, len(PARAMETERS)), np.float32),
        "reason": np.array([""] * ROWS, dtype=object),
        "state": np.full(ROWS, OK, np.uint8),
    }
    store.write_chunk(0, {**features, **rows})
    store.seal()
    return store


def build(case: tuple[str, dict[str, Any]], source: Rows, fitted: Fitted | None = None) -> tuple[Any, dict[str, float]]:
    """A prepared method, its heads drawn from seed 0, and what it reports."""
    name, options = case
    few = {"mapping_steps": 3} if name == "tintem" and not options.keys() & {"joint", "mapping"} else {}
    torch.manual_seed(0)
    method = load_method(name)(TEACHER, STUDENT, **few, **options)
    return method, method.prepare(source, seed=0, progress=None, fitted=fitted)


def batch_of(features: dict[str, Tensor], row: Tensor | None = None) -> Batch:
    """Samples with these features of the teacher, of no row unless it is given, without labels."""
    none = torch.full((len(next(iter(features.values()))),), -1)
    inputs = torch.zeros(len(none), 3, 1, 1)
    return Batch(features, inputs, none if row is None else row, torch.zeros_like(none), none)


def teacher_batch(source: Rows, fields: tuple[str, ...], view: int = 0) -> Batch:
    rows = range(len(source))
    return batch_of({name: torch.from_numpy(source.gather(rows, name, view)).float() for name in fields})


def student_batch(fields: tuple[str, ...], seed: int = 1) -> dict[str, Tensor]:
    """What a student with a 3 × 3 grid might give, as leaves."""
    drawn = torch.Generator().manual_seed(seed)
    shapes = {"embedding": (ROWS, STUDENT), "tokens": (ROWS, 9, STUDENT)}
    return {name: torch.randn(shapes[name], generator=drawn).requires_grad_() for name in fields}


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()
